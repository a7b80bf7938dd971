//! `capfilt run`: coordinator, queue and workers in one process.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use async_trait::async_trait;
use capfilt_coordinator::export::{ExportConfig, export};
use capfilt_coordinator::plan::{Plan, PlanConfig, plan};
use capfilt_coordinator::reconcile::{Observer, RunOutcome, TaskSink, reconcile};
use capfilt_coordinator::report::{self, ReportInput};
use capfilt_crawler::{Discover, Fetch, Matcher, Traffic, Web};
use capfilt_runtime::{MemoryQueue, Stage, Telemetry, WorkQueue, Worker};
use capfilt_schemas::{DatasetVersion, StageKind, Task};
use capfilt_store::Store;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::args::RunArgs;
use crate::config::{Inputs, RunConfig};
use crate::output::{self, Failure, count, duration, say, say_json, table};
use crate::overview::show_plan;
use crate::progress::{Bar, RunProgress};
use crate::retry::Retry;
use crate::{dataset, models, traffic};

/// The embedded queue as the coordinator sees it.
struct Sink(Arc<MemoryQueue>);

#[async_trait]
impl TaskSink for Sink {
    async fn submit(&self, tasks: &[Task]) -> Result<(), String> {
        self.0.enqueue(tasks).await.map_err(|e| e.to_string())
    }
}

pub(crate) async fn run(args: RunArgs) -> Result<ExitCode, Failure> {
    let config = RunConfig::load(&args.config.config, &args.config.set)?;
    if args.dry_run {
        return show_plan(config, args.json).await;
    }
    let job = Job::prepare(config).await?;
    if args.retry_failed {
        for failure in job.store.all_failures().await? {
            job.store.forget_failures(&failure.task_id).await?;
        }
    }
    job.work(args.json, None).await
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
        let inputs = config.inputs()?;
        let alone = lock_work_dir(&config)?;
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
        models::same_as_begun(&config, &store, models.as_ref()).await?;
        let planned = config.plan(&inputs, models.as_ref())?;
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
        traffic::serve_metrics(address)?;
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
        _ = tokio::signal::ctrl_c() => {
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

/// Takes the work folder for this process: two runs in one would overwrite each other's unfinished work. The lock dies with the process.
pub(crate) fn lock_work_dir(config: &RunConfig) -> Result<File, Failure> {
    let folder = &config.worker.runtime.work_dir;
    let path = folder.join("lock");
    let open = || std::fs::create_dir_all(folder).and_then(|()| File::create(&path));
    let file = open().with_context(|| format!("cannot write `{}`", path.display()))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Failure::Usage(format!(
            "another run is at work in `{}`; wait for it, or give this one another `worker.runtime.work_dir`",
            folder.display()
        ))),
        // A file system without locks is used without them.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
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
        Arc::new(capfilt_trainer::TrainStage),
        Arc::new(capfilt_trainer::EvaluateStage),
    ];
    Ok((stages, traffic))
}

/// Report, export, and the last words.
async fn conclude(
    config: &RunConfig,
    store: &Store,
    outcome: &RunOutcome,
    traffic: &Traffic,
    retry: Option<&Retry>,
    began: Instant,
    as_json: bool,
) -> Result<ExitCode, Failure> {
    let report_path = PathBuf::from(config.report.path.display().to_string().replace("{run}", config.run.name.as_str()));
    let input = ReportInput {
        run: config.run.name.clone(),
        dataset: config.dataset(),
        version: outcome.dataset.as_ref().map(|d| d.version),
        samples: config.report.samples,
    };
    report::write(store, &input, &report_path).await?;
    let mut exported = None;
    if let (Some(section), Some(version)) = (&config.export, &outcome.dataset) {
        let folder = section.folder.replace("{version}", &version.version.to_string());
        let settings = ExportConfig {
            folder: folder.into(),
            formats: section.formats.iter().map(|f| f.into_export()).collect(),
            ..ExportConfig::default()
        };
        let bar = Bar::new("export", "pairs");
        let of = version.shards.iter().map(|s| s.rows).sum();
        exported = Some(export(store, &config.worker.sql, version, &settings, |done| bar.set(done, of)).await?);
        bar.finish();
    }
    let results = store.round_results(&config.run.name).await?;
    let given_up = outcome.plan.dead.len();
    if as_json {
        say_json(&json!({
            "run": config.run.name,
            "complete": outcome.plan.complete,
            "tasks_done": outcome.tasks_done,
            "tasks_given_up": given_up,
            "progress": outcome.plan.progress,
            "fetch": traffic::to_json(traffic, config.worker.hourly_price),
            "retry": retry.map(|r| r.to_json(&outcome.plan.downloads.statuses)),
            "dataset": outcome.dataset,
            "results": results,
            "report": report_path,
            "export": exported,
            "seconds": began.elapsed().as_secs_f64(),
        }))?;
    } else {
        if outcome.tasks_done == 0 && given_up == 0 && outcome.plan.stuck.is_none() {
            say("nothing to do: everything that this config asks for is done already");
        }
        if let Some(summary) = retry.and_then(|r| r.summary(&outcome.plan.downloads.statuses)) {
            say(&summary);
        }
        if let Some(summary) = traffic::summary(traffic, config.worker.hourly_price) {
            say(&summary);
        }
        if let Some(version) = &outcome.dataset {
            say(&summary(version));
        }
        for result in results.iter().filter(|r| outcome.dataset.as_ref().is_some_and(|d| r.dataset.version <= d.version)) {
            say(&format!("\nround {} on held-out pairs (dataset version {})", result.round, result.dataset.version));
            let mut rows = vec![["metric", "in service", "challenger"].map(str::to_owned).to_vec()];
            for (name, value) in &result.metrics {
                let challenger = result.challenger_metrics.get(name).map_or_else(String::new, |v| format!("{v:.4}"));
                rows.push(vec![name.clone(), format!("{value:.4}"), challenger]);
            }
            say(&table(&rows));
            if !result.promoted.is_empty() {
                say(&format!("promoted: {}", result.promoted.join(", ")));
            }
        }
        if let Some(exported) = &exported {
            say(&format!("\nexport  {}", dataset::exported(exported)));
        }
        say(&format!("report  {}", report_path.display()));
        say(&format!("{} tasks done in {}", count(outcome.tasks_done), duration(began.elapsed().as_secs())));
    }
    for (fact, n) in lost(store, &outcome.plan).await? {
        output::complain(&format!("{} {fact}", count(n)));
    }
    if let Some(stuck) = &outcome.plan.stuck {
        let why = last_failure(store, outcome).await?;
        return Err(Failure::Other(anyhow::anyhow!("the run cannot go on: {stuck}{why}")));
    }
    if given_up > 0 {
        output::complain(&format!(
            "{given_up} tasks were given up; `capfilt status` says why, `--retry-failed` tries them again"
        ));
        return Ok(ExitCode::from(output::INCOMPLETE));
    }
    Ok(ExitCode::SUCCESS)
}

/// What the sources of a plan held that could not be read, in words.
async fn lost(store: &Store, plan: &Plan) -> Result<Vec<(&'static str, u64)>, Failure> {
    let mut facts: BTreeMap<String, u64> = BTreeMap::new();
    for commit in store.commits(StageKind::Discover).await?.iter().filter(|c| plan.found.contains(&c.task_id)) {
        for (fact, n) in commit.facts.as_object().into_iter().flatten() {
            *facts.entry(fact.clone()).or_default() += n.as_u64().unwrap_or(0);
        }
    }
    let n = |fact: &str| facts.get(fact).copied().unwrap_or(0);
    let (answers, results) = (n("search_pages"), n("search_results"));
    let lost = [
        ("records of archives were cut or damaged; nothing was found in them", n("records_bad")),
        ("records of archives were too long to be read", n("records_too_long")),
        ("rows of lists could not be read", n("rows_unreadable")),
        ("answers of search APIs, and no result in any: look at `items` of the adapter", if results == 0 { answers } else { 0 }),
        (
            "results of search APIs, and none with an image and a text: look at `image` and `texts` of the adapter",
            if n("search_results_unusable") == results { results } else { 0 },
        ),
    ];
    Ok(lost.into_iter().filter(|(_, n)| *n > 0).collect())
}

async fn last_failure(store: &Store, outcome: &RunOutcome) -> Result<String, Failure> {
    let Some(task) = outcome.plan.dead.last() else { return Ok(String::new()) };
    Ok(store.failures(task).await?.pop().map_or_else(String::new, |f| format!(": {}", f.error)))
}

fn summary(version: &DatasetVersion) -> String {
    let mut lines = vec![format!("\ndataset {}@{}  {}", version.name, version.version, version.digest)];
    let mut rows = vec![vec!["step".to_owned(), "pairs".to_owned()]];
    rows.extend(version.funnel.steps.iter().map(|(step, n)| vec![step.clone(), count(*n)]));
    lines.push(table(&rows));
    if let Some(noise) = version.noise_ratio {
        lines.push(format!("noise ratio: the filter removed {:.1}% of the texts it judged", noise * 100.0));
    }
    lines.join("\n")
}
