//! A config worked off: coordinator, queue and workers in one process.

use std::fs::File;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use capfilt_coordinator::plan::{Plan, PlanConfig, plan};
use capfilt_coordinator::reconcile::{Observer, RunOutcome, TaskSink, reconcile};
use capfilt_crawler::{Discover, Fetch, Matcher, Traffic, Web};
use capfilt_runtime::{MemoryQueue, Stage, Telemetry, WorkQueue, Worker};
use capfilt_schemas::Task;
use capfilt_store::Store;
use tokio_util::sync::CancellationToken;

use crate::config::{Inputs, RunConfig};
use crate::interrupt::interrupted;
use crate::outcome::{Retry, conclude};
use crate::output::{self, Failure};
use crate::progress::RunProgress;
use crate::{metrics, models, work_dir};

/// The embedded queue as the coordinator sees it.
struct Sink(Arc<MemoryQueue>);

#[async_trait]
impl TaskSink for Sink {
    async fn submit(&self, tasks: &[Task]) -> Result<(), String> {
        self.0.enqueue(tasks).await.map_err(|e| e.to_string())
    }
}

/// A config with all that it names, ready to be worked off.
pub(crate) struct Job {
    pub(crate) config: RunConfig,
    pub(crate) store: Store,
    pub(crate) planned: PlanConfig,
    inputs: Inputs,
    began: Instant,
    _alone: Option<File>,
}

impl Job {
    /// Takes the work folder, opens the store and puts the models into it.
    pub(crate) async fn prepare(config: RunConfig) -> Result<Self, Failure> {
        // Before anything is written.
        if config.run.rounds > 0 {
            config.check_machine()?;
        }
        let inputs = config.inputs()?;
        let alone = work_dir::lock(&config)?;
        let store = Store::open(&config.run.store).await?;
        Self::open(config, store, inputs, Some(alone)).await
    }

    /// As [`prepare`](Self::prepare), to look only: nothing is written, not even a store.
    pub(crate) async fn look(config: RunConfig) -> Result<Self, Failure> {
        let inputs = config.inputs()?;
        let store = match Store::open_existing(&config.run.store).await? {
            Some(store) => store,
            None => Store::open("memory:").await?,
        };
        Self::open(config, store, inputs, None).await
    }

    async fn open(config: RunConfig, store: Store, inputs: Inputs, alone: Option<File>) -> Result<Self, Failure> {
        let models = models::of_run(&config, &store, alone.is_some()).await?;
        models::same_as_begun(&config, &store, &models).await?;
        let planned = config.plan(&inputs, &models)?;
        Ok(Self { config, store, planned, inputs, began: Instant::now(), _alone: alone })
    }

    /// What is left to do.
    pub(crate) async fn plan(&self) -> Result<Plan, Failure> {
        Ok(plan(&self.planned, Observer::new(self.store.clone()).observe(&self.planned).await?))
    }

    /// Works it off, and tells what came of it.
    pub(crate) async fn work(self, as_json: bool, retry: Option<Retry>) -> Result<ExitCode, Failure> {
        let Self { config, store, planned, inputs, began, _alone } = self;
        let (outcome, traffic) = match work_off(&config, &store, &planned, inputs).await? {
            Some(ended) => ended,
            None => return Ok(ExitCode::from(output::INTERRUPTED)),
        };
        conclude(&config, &store, &outcome, &traffic, retry.as_ref(), began, as_json).await
    }
}

/// Coordinator, queue and worker, until nothing is left to do. `None` if a person interrupted.
async fn work_off(
    config: &RunConfig,
    store: &Store,
    planned: &PlanConfig,
    inputs: Inputs,
) -> Result<Option<(RunOutcome, Traffic)>, Failure> {
    if let Some(address) = config.worker.metrics {
        metrics::serve(address)?;
    }
    let (stages, traffic) = stages(config, inputs)?;
    let (queue, telemetry, stop) = (Arc::new(MemoryQueue::new()), Telemetry::default(), CancellationToken::new());
    let worker = Worker::new(
        store.clone(),
        config.run.name.clone(),
        Arc::clone(&queue) as Arc<dyn WorkQueue>,
        stages,
        config.worker.runtime.clone(),
        telemetry.clone(),
    );
    let working = tokio::spawn(worker.run(stop.clone()));
    let progress = Arc::new(RunProgress::new(telemetry, traffic.clone(), config.worker.hourly_price));
    let latest: Arc<Mutex<Option<Plan>>> = Arc::default();
    let watch = {
        let latest = Arc::clone(&latest);
        move |plan: &Plan| *latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan.clone())
    };
    // Shown by a task of its own, so that bars move while the coordinator is busy with SQL.
    let shown = Arc::clone(&progress);
    let showing = tokio::spawn(async move {
        loop {
            let plan = latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(plan) = plan {
                shown.show(&plan);
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    });
    let sink = Sink(queue);
    let outcome = tokio::select! {
        outcome = reconcile(store, planned, &sink, &watch) => outcome?,
        () = interrupted() => {
            stop.cancel();
            output::complain("interrupted; what is committed stays, run the same command to go on");
            return Ok(None);
        }
        ended = working => {
            let why = ended.map_or_else(|e| e.to_string(), |r| r.map_or_else(|e| e.to_string(), |()| "it stopped".to_owned()));
            return Err(Failure::Other(anyhow::anyhow!("the worker ended before the run: {why}")));
        }
    };
    stop.cancel();
    showing.abort();
    progress.show(&outcome.plan);
    progress.finish();
    Ok(Some((outcome, traffic)))
}

/// The stages of this process's worker, and what its downloads will lead to.
fn stages(config: &RunConfig, inputs: Inputs) -> Result<(Vec<Arc<dyn Stage>>, Traffic), Failure> {
    let vision = &config.worker.vision;
    let web = Web::new(&config.worker.crawler).map_err(|e| Failure::Usage(e.to_string()))?;
    let matcher = Arc::new(Matcher::new(&inputs.queries).map_err(|e| Failure::Usage(e.to_string()))?);
    let fetch = Fetch::new(web.clone());
    let traffic = fetch.traffic();
    let stages: Vec<Arc<dyn Stage>> = vec![
        Arc::new(Discover::new(web, matcher, Arc::new(inputs.queries))),
        Arc::new(inputs.annotate),
        Arc::new(fetch),
        Arc::new(capfilt_vision::CaptionStage::new(vision.clone())),
        Arc::new(capfilt_vision::ScoreStage::new(vision.clone())),
        Arc::new(capfilt_trainer::TrainStage(config.worker.trainer.clone())),
        Arc::new(capfilt_trainer::EvaluateStage(config.worker.trainer.clone())),
    ];
    Ok((stages, traffic))
}
