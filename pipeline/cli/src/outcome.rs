//! What a run led to: its report, its export, and the last words.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use capfilt_coordinator::export::{ExportConfig, export};
use capfilt_coordinator::plan::Plan;
use capfilt_coordinator::reconcile::RunOutcome;
use capfilt_coordinator::report::{self, ReportInput};
use capfilt_coordinator::retrain;
use capfilt_crawler::Traffic;
use capfilt_schemas::{DatasetVersion, FetchStatus, RetryRecord, RoundResult, StageKind, StatusCounts};
use capfilt_store::Store;
use serde_json::{Value, json};

use crate::config::RunConfig;
use crate::output::{self, Failure, count, duration, say, say_json, table};
use crate::progress::Bar;
use crate::{dataset, store, traffic};

/// A retry under way.
pub(crate) struct Retry {
    /// Its record; there is none where nothing was left to fetch again.
    pub(crate) record: Option<RetryRecord>,
    pub(crate) statuses: BTreeSet<FetchStatus>,
    /// Rows by status, when it was asked for.
    pub(crate) before: StatusCounts,
}

impl Retry {
    /// What it came to, for programs.
    pub(crate) fn to_json(&self, now: &StatusCounts) -> Value {
        json!({
            "number": self.record.as_ref().map(|r| r.number),
            "statuses": self.statuses,
            "rows": self.statuses.iter().filter_map(|s| self.before.get(s.as_str())).sum::<u64>(),
            "before": self.before,
            "now": now,
        })
    }

    /// What it came to, for people.
    pub(crate) fn summary(&self, now: &StatusCounts) -> Option<String> {
        let record = self.record.as_ref()?;
        let mut page = vec![["status", "before", "now"].map(str::to_owned).to_vec()];
        let all: BTreeSet<&String> = self.before.keys().chain(now.keys()).collect();
        let cell = |counts: &StatusCounts, status: &String| count(counts.get(status).copied().unwrap_or(0));
        page.extend(all.into_iter().map(|status| vec![status.clone(), cell(&self.before, status), cell(now, status)]));
        Some(format!("\nretry {}\n{}", record.number, table(&page)))
    }
}

/// Report, export, and the last words.
pub(crate) async fn conclude(
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
            "samples": store::samples(store, &outcome.plan.downloads).await?,
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
            let names: BTreeSet<&String> = result.metrics.keys().chain(result.challenger_metrics.keys()).collect();
            for name in names {
                let cell = |of: &BTreeMap<String, f64>| of.get(name).map_or_else(String::new, |value| format!("{value:.4}"));
                rows.push(vec![name.clone(), cell(&result.metrics), cell(&result.challenger_metrics)]);
            }
            say(&table(&rows));
            decisions(result).iter().for_each(|decision| say(decision));
        }
        if let Some(exported) = &exported {
            say(&format!("\nexport  {}", dataset::exported(exported)));
        }
        if config.run.rounds == 0 {
            let shards = outcome.plan.downloads.samples.len() as u64;
            let how = "`capfilt status --json` names them, in order, under `samples`";
            say(&format!("samples  {} shards in {}; {how}", count(shards), config.run.store));
        }
        say(&format!("report  {}", report_path.display()));
        say(&format!("{} tasks done in {}", count(outcome.tasks_done), duration(began.elapsed().as_secs())));
    }
    for (fact, n) in lost(store, &outcome.plan).await? {
        output::complain(&format!("{} {fact}", count(n)));
    }
    if let Some(forbidden) = traffic.totals().by_status.get(&FetchStatus::ForbiddenAddress) {
        output::complain(&format!(
            "{} addresses are of private networks, which are not asked; `allow_networks` of [worker.crawler] opens some, and \
             `capfilt retry --status forbidden_address` asks again",
            count(*forbidden)
        ));
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

/// What a round decided, a line for each role.
pub(crate) fn decisions(result: &RoundResult) -> Vec<String> {
    // Records of earlier versions tell no reasons.
    let untold =
        result.promoted.iter().filter(|role| !result.reasons.contains_key(*role)).map(|role| format!("promoted a new {role}"));
    let told = result.reasons.iter().map(|(role, why)| match result.promoted.contains(role) {
        true => format!("promoted a new {role}: {why}"),
        false if role == retrain::CLIP => format!("trained a {role}: {why}"),
        false => format!("keeps its {role}: {why}"),
    });
    untold.chain(told).collect()
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
