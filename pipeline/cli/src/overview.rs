//! `capfilt plan` and `capfilt status`: a run as the store shows it.

use std::process::ExitCode;

use capfilt_coordinator::plan::{Action, Plan, plan as make_plan};
use capfilt_coordinator::reconcile::Observer;
use capfilt_schemas::StageKind;
use serde_json::json;

use crate::args::ViewArgs;
use crate::config::RunConfig;
use crate::job::Job;
use crate::outcome::decisions;
use crate::output::{Failure, count, moment, say, say_json, table};
use crate::{models, store};

pub(crate) async fn plan(args: ViewArgs) -> Result<ExitCode, Failure> {
    let config = args.config.load()?;
    show_plan(config, args.json).await
}

/// Shows what is left to do, and changes nothing.
pub(crate) async fn show_plan(config: RunConfig, as_json: bool) -> Result<ExitCode, Failure> {
    let job = Job::look(config).await?;
    let now = job.plan().await?;
    if as_json {
        let tasks: Vec<_> = now.tasks.iter().map(|t| json!({"id": t.id(), "task": t})).collect();
        say_json(&json!({
            "run": job.config.run.name, "round": now.round, "complete": now.complete, "stuck": now.stuck,
            "progress": now.progress, "tasks": tasks, "given_up": now.dead,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    say(&stages(&now));
    say("");
    for action in &now.actions {
        say(&match action {
            Action::Own(task) => format!("next: {} over {} shards", task.stage, task.inputs.len()),
            Action::StartRound(record) => format!("next: start round {}", record.round),
            Action::FinishRound(finish) => format!("next: finish round {}", finish.record.round),
        });
    }
    let ready = now.tasks.len() as u64;
    say(&match (now.complete, ready) {
        (true, _) => "nothing is left to do".to_owned(),
        (false, 0) => "further tasks follow from what comes next".to_owned(),
        (false, n) => format!("{} tasks can start now; further ones follow from what they write", count(n)),
    });
    Ok(ExitCode::SUCCESS)
}

fn stages(now: &Plan) -> String {
    let mut rows = vec![["stage", "tasks", "done", "given up", "rows done"].map(str::to_owned).to_vec()];
    for stage in StageKind::ALL {
        let p = now.progress.get(stage).copied().unwrap_or_default();
        rows.push(vec![stage.name().to_owned(), count(p.tasks), count(p.done), count(p.dead), count(p.rows_done)]);
    }
    table(&rows)
}

pub(crate) async fn status(args: ViewArgs) -> Result<ExitCode, Failure> {
    let config = args.config.load()?;
    let store = store::existing(&config.run.store).await?;
    let run = &config.run.name;
    let (rounds, results, events) = (store.rounds(run).await?, store.round_results(run).await?, store.events(run).await?);
    let failures: Vec<_> = store.all_failures().await?.into_iter().filter(|f| f.run == *run).collect();
    let planned = config.plan(&config.inputs()?, &models::of_run(&config, &store, false).await?)?;
    let now = make_plan(&planned, Observer::new(store.clone()).observe(&planned).await?);
    if args.json {
        say_json(&json!({
            "run": run, "round": now.round, "complete": now.complete, "progress": now.progress,
            "samples": store::samples(&store, &now.downloads).await?,
            "rounds": rounds, "results": results, "failures": failures, "events": events, "given_up": now.dead,
            "downloads": now.downloads.statuses,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let state = match (&now.stuck, now.complete, now.round) {
        (Some(why), ..) => format!("cannot go on: {why}"),
        (None, true, _) => "complete".to_owned(),
        (None, false, 0) => "gathering".to_owned(),
        (None, false, round) => format!("in round {round} of {}", config.run.rounds),
    };
    let given_up = if now.dead.is_empty() { String::new() } else { format!(", {} tasks given up", count(now.dead.len() as u64)) };
    say(&format!("run {run}: {state}{given_up}"));
    say("");
    say(&stages(&now));
    if !now.downloads.statuses.is_empty() {
        let counts: Vec<String> = now.downloads.statuses.iter().map(|(status, n)| format!("{} {status}", count(*n))).collect();
        say("");
        say(&format!("downloads: {}", counts.join(", ")));
    }
    for result in &results {
        say("");
        let dataset = &result.dataset;
        say(&format!("round {}: dataset version {} ({})", result.round, dataset.version, dataset.digest.short()));
        for (name, value) in &result.metrics {
            let challenger = result.challenger_metrics.get(name).map_or_else(String::new, |c| format!("   challenger {c:.4}"));
            say(&format!("  {name:<24} {value:.4}{challenger}"));
        }
        decisions(result).iter().for_each(|decision| say(&format!("  {decision}")));
    }
    if !failures.is_empty() {
        say("");
        say(&format!("{} failed attempts; the last ones:", failures.len()));
        for f in failures.iter().rev().take(5) {
            say(&format!("  {} {} attempt {}: {}", f.stage, f.task_id.0.short(), f.attempt, f.error));
        }
    }
    if !events.is_empty() {
        say("");
        for e in events.iter().rev().take(10).rev() {
            say(&format!("{}  {}", moment(e.at_ms), e.message));
        }
    }
    Ok(ExitCode::SUCCESS)
}
