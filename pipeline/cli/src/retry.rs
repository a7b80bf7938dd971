//! `capfilt retry`: failed downloads again, and everything that follows from them.

use std::collections::BTreeSet;
use std::process::ExitCode;

use capfilt_coordinator::plan::Downloads;
use capfilt_schemas::{FetchStatus, RetryRecord, StatusCounts};
use serde_json::json;

use crate::args::RetryArgs;
use crate::job::Job;
use crate::outcome::Retry;
use crate::output::{Failure, count, say, say_json, table};

pub(crate) async fn run(args: RetryArgs) -> Result<ExitCode, Failure> {
    let statuses = if args.status.is_empty() { transient() } else { statuses(&args.status, "--status")? };
    let config = args.config.load()?;
    let job = if args.dry_run { Job::look(config).await? } else { Job::prepare(config).await? };
    let downloads = job.plan().await?.downloads;
    if !downloads.fetched {
        let (run, path) = (&job.config.run.name, args.config.config.display());
        return Err(Failure::Other(anyhow::anyhow!(
            "run {run} has not fetched everything once; `capfilt run {path}` does, and what fails then can be fetched again"
        )));
    }
    if args.dry_run {
        show(&statuses, &downloads, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let record = ask(&job, &statuses, &downloads).await?;
    if !args.json {
        let rows = rows(&statuses, &downloads.statuses);
        say(&match &record {
            Some(record) if rows > 0 => format!("retry {}: {} rows are fetched again", record.number, count(rows)),
            Some(record) => format!("retry {} goes on", record.number),
            None => nothing(&statuses, &downloads.statuses),
        });
    }
    job.work(args.json, Some(Retry { record, statuses, before: downloads.statuses })).await
}

/// What is fetched again if nothing else is said.
fn transient() -> BTreeSet<FetchStatus> {
    FetchStatus::ALL.iter().copied().filter(|s| s.is_transient()).collect()
}

/// The statuses of failed downloads that `flag` names, or `all` of them.
pub(crate) fn statuses(names: &[String], flag: &str) -> Result<BTreeSet<FetchStatus>, Failure> {
    let retried = || FetchStatus::ALL.iter().copied().filter(|s| s.can_be_retried());
    if names == ["all"] {
        return Ok(retried().collect());
    }
    let parse = |name: &String| {
        let known = FetchStatus::parse(name.trim()).filter(|s| s.can_be_retried());
        known.ok_or_else(|| {
            let known: Vec<_> = retried().map(FetchStatus::as_str).collect();
            Failure::Usage(format!("{flag}: `{name}` is no status of a failed download; there are: {} or all", known.join(", ")))
        })
    };
    names.iter().map(parse).collect()
}

/// The record of the retry: that of one that was interrupted, if the same is asked for again. None if there is nothing to fetch.
async fn ask(job: &Job, statuses: &BTreeSet<FetchStatus>, downloads: &Downloads) -> Result<Option<RetryRecord>, Failure> {
    let (run, settings) = (&job.config.run.name, job.planned.fetch_settings());
    let last = job.store.retries(run).await?.into_iter().rfind(|r| r.settings == settings);
    if let Some(open) = last.filter(|r| downloads.retrying && r.statuses.iter().eq(statuses)) {
        return Ok(Some(open));
    }
    let rows = rows(statuses, &downloads.statuses);
    if rows == 0 {
        return Ok(None);
    }
    let record = job.store.ask_retry(run, statuses, settings).await?;
    let message = format!("retry {} was asked for: {} rows with {}", record.number, count(rows), names(statuses));
    job.store.log_event(run, &message).await?;
    Ok(Some(record))
}

fn rows(statuses: &BTreeSet<FetchStatus>, counts: &StatusCounts) -> u64 {
    statuses.iter().filter_map(|s| counts.get(s.as_str())).sum()
}

fn names(statuses: &BTreeSet<FetchStatus>) -> String {
    statuses.iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", ")
}

fn nothing(statuses: &BTreeSet<FetchStatus>, counts: &StatusCounts) -> String {
    format!("nothing to fetch again: none of {} rows has the status {}", count(counts.values().sum()), names(statuses))
}

fn show(statuses: &BTreeSet<FetchStatus>, downloads: &Downloads, as_json: bool) -> Result<(), Failure> {
    let counts = &downloads.statuses;
    let again = rows(statuses, counts);
    if as_json {
        return say_json(&json!({ "statuses": statuses, "rows": again, "downloads": counts, "retrying": downloads.retrying }));
    }
    if again == 0 {
        say(&nothing(statuses, counts));
        return Ok(());
    }
    let mut page = vec![["status", "rows", "again"].map(str::to_owned).to_vec()];
    for (status, n) in counts {
        let chosen = FetchStatus::parse(status).is_some_and(|s| statuses.contains(&s));
        page.push(vec![status.clone(), count(*n), if chosen { count(*n) } else { String::new() }]);
    }
    say(&table(&page));
    say(&format!("{} rows would be fetched again", count(again)));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn statuses_are_those_of_failed_downloads() {
        let of = |names: &[&str]| statuses(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), "--status");
        assert_eq!(names(&transient()), "dns, connect, tls, timeout, http_429, http_5xx, truncated");
        assert_eq!(names(&of(&["http_4xx", " dns"]).unwrap()), "dns, http_4xx");
        assert!(of(&["all"]).unwrap().len() > transient().len() && !of(&["all"]).unwrap().contains(&FetchStatus::Ok));
        for bad in ["ok", "taken_down", "", "Timeout"] {
            let said = of(&["dns", bad]).unwrap_err().text();
            assert!(said.contains(&format!("`{bad}`")) && said.contains("not_image") && !said.contains("taken_down,"), "{said}");
        }
    }
}
