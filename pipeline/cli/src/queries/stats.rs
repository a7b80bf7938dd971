//! `capfilt queries stats`: how a run's texts are spread over the queries.

use std::path::Path;
use std::process::ExitCode;

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::balance::BalanceConfig;
use capfilt_coordinator::marginals::{Marginals, Side, marginals};
use capfilt_crawler::QueryList;
use capfilt_schemas::{Commit, StageKind};
use capfilt_store::Store;
use serde_json::{Value, json};

use super::plot;
use crate::args::{QueriesStatsArgs, StoreArgs};
use crate::config::RunConfig;
use crate::output::{Failure, count, say, say_json, table};
use crate::store;

/// What the figures are of.
struct Meant {
    store: Store,
    sql: SqlConfig,
    settings: BalanceConfig,
    queries: Option<QueryList>,
    found: Vec<Commit>,
    balanced: Option<Commit>,
}

pub(crate) async fn run(args: QueriesStatsArgs) -> Result<ExitCode, Failure> {
    let path = Path::new(&args.from);
    let meant = if path.is_file() { of_config(&args).await? } else { of_store(&args).await? };
    let found: Vec<&Commit> = meant.found.iter().collect();
    let m = marginals(&meant.store, &meant.sql, &found, meant.balanced.as_ref(), &meant.settings, args.top).await?;
    let listed = meant.queries.as_ref().map(QueryList::len);
    let name = |query: u32| meant.queries.as_ref().and_then(|list| list.get(query)).map(|q| q.text.to_owned());
    if let Some(file) = &args.plot {
        let page = plot::file(file, &m, listed).map_err(Failure::Usage)?;
        let write = std::fs::write(file, page);
        write.map_err(|e| Failure::Other(anyhow::anyhow!("cannot write `{}`: {e}", file.display())))?;
    }
    if args.json {
        let mut value = serde_json::to_value(&m).map_err(anyhow::Error::from)?;
        value["queries_in_list"] = json!(listed);
        value["never_matched"] = json!(listed.map(|all| (all as u64).saturating_sub(m.before.queries)));
        for (shown, top) in value["top"].as_array_mut().into_iter().flatten().zip(&m.top) {
            shown["text"] = json!(name(top.query));
        }
        say_json(&value)?;
    } else {
        say(&text(&m, listed, name));
        if let Some(file) = &args.plot {
            say(&format!("\nplot written to {}", file.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The tasks that a config asks for, as far as they are done.
async fn of_config(args: &QueriesStatsArgs) -> Result<Meant, Failure> {
    if args.run.is_some() {
        return Err(Failure::Usage("--run is for a store; a config says which run is meant".to_owned()));
    }
    let config = RunConfig::load(Path::new(&args.from), &args.set)?;
    let queries = list(args.queries.as_deref().unwrap_or(&config.queries.path))?;
    let sources = config.discover.params(&queries, &config.run.snapshot);
    let sources = sources.map_err(|e| Failure::Usage(capfilt_store::chain(&e)))?;
    let sources = sources.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::from)?;
    let store = store::existing(&config.run.store).await?;
    let mut found = store.commits(StageKind::Discover).await?;
    found.retain(|c| c.task.stage_version == capfilt_crawler::DISCOVER_VERSION && sources.contains(&c.task.params));
    let mut inputs: Vec<_> = found.iter().flat_map(Commit::as_inputs).collect();
    inputs.sort_unstable();
    inputs.dedup();
    let settings = serde_json::to_value(&config.balance).map_err(anyhow::Error::from)?;
    let balanced = store.commits(StageKind::Balance).await?.into_iter().find(|c| {
        let version = c.task.stage_version == capfilt_coordinator::balance::STAGE_VERSION;
        version && c.task.params == settings && c.task.inputs == inputs
    });
    Ok(Meant { store, sql: config.worker.sql, settings: config.balance, queries: Some(queries), found, balanced })
}

/// The newest balance task of a store, or of one of its runs, and the tasks that it rests on.
async fn of_store(args: &QueriesStatsArgs) -> Result<Meant, Failure> {
    if !args.set.is_empty() {
        return Err(Failure::Usage("--set changes a config, but this is a store".to_owned()));
    }
    let store = store::open(&StoreArgs { store: args.from.clone(), json: args.json }).await?;
    let of_run = |c: &Commit| args.run.as_deref().is_none_or(|run| c.run.as_str() == run);
    let balanced = store.commits(StageKind::Balance).await?.into_iter().filter(of_run).max_by_key(|c| c.committed_at_ms);
    let Some(balanced) = balanced else {
        let which = args.run.as_ref().map_or_else(String::new, |run| format!(" by the run `{run}`"));
        let what = format!("nothing in `{}` has been balanced{which}; name a config to look at what was found so far", args.from);
        return Err(Failure::Usage(what));
    };
    let mut found = store.commits(StageKind::Discover).await?;
    // A source in which no text matched wrote no shard; the run that balanced has read it all the same.
    found.retain(|c| match c.outputs.is_empty() {
        true => c.run == balanced.run,
        false => c.as_inputs().any(|i| balanced.task.inputs.contains(&i)),
    });
    let settings = match balanced.task.params.clone() {
        params @ Value::Object(_) => serde_json::from_value(params).unwrap_or_default(),
        _ => BalanceConfig::default(),
    };
    let queries = args.queries.as_deref().map(list).transpose()?;
    Ok(Meant { store, sql: SqlConfig::default(), settings, queries, found, balanced: Some(balanced) })
}

fn list(path: &Path) -> Result<QueryList, Failure> {
    QueryList::load(path).map_err(|e| Failure::Usage(capfilt_store::chain(&e)))
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn text(m: &Marginals, listed: Option<usize>, name: impl Fn(u32) -> Option<String>) -> String {
    let mut lines = Vec::new();
    match (m.texts_seen, m.share_matched) {
        (Some(seen), Some(share)) => lines.push(format!("{} texts seen, {} of them hold a query", count(seen), percent(share))),
        _ => lines.push("the sources did not say how many texts they saw".to_owned()),
    }
    if let Some(all) = listed {
        let never = (all as u64).saturating_sub(m.before.queries);
        let share = if all == 0 { 0.0 } else { never as f64 / all as f64 };
        lines.push(format!("{} queries, {} of them ({}) in no text", count(all as u64), count(never), percent(share)));
    }
    lines.push(String::new());
    let after = |of: &dyn Fn(&Side) -> String| m.after.as_ref().map_or_else(|| "-".to_owned(), of);
    let mut rows = vec![vec![String::new(), "found".to_owned(), "drawn".to_owned()]];
    let mut row = |what: String, of: &dyn Fn(&Side) -> String| rows.push(vec![what, of(&m.before), after(of)]);
    row("texts".to_owned(), &|s| count(s.texts));
    row("entries (a query with a text)".to_owned(), &|s| count(s.entries));
    row("entries per text".to_owned(), &|s| format!("{:.2}", s.entries_per_text));
    row("queries with a text".to_owned(), &|s| count(s.queries));
    row(format!("head: queries above {}", count(m.threshold)), &|s| count(s.head_queries));
    row("head's share of entries".to_owned(), &|s| percent(s.head_share));
    row("tail's share of entries".to_owned(), &|s| percent(s.tail_share));
    lines.push(table(&rows));
    if m.after.is_some() {
        lines.push("drawn: the texts that each query took; a text that another query took may hold it as well".to_owned());
    }
    if m.after.is_none() {
        lines.push("not balanced yet: only what was found so far is shown".to_owned());
    }
    if !m.top.is_empty() {
        lines.push(String::new());
        let mut rows = vec![["query", "texts found", "share", "drawn"].map(str::to_owned).to_vec()];
        for t in &m.top {
            let text = name(t.query).unwrap_or_else(|| format!("#{}", t.query));
            let share = t.before as f64 / m.before.entries.max(1) as f64;
            rows.push(vec![text, count(t.before), percent(share), t.after.map_or_else(|| "-".to_owned(), count)]);
        }
        lines.push(table(&rows));
        lines.push(String::new());
        lines.push(plot::terminal(m));
    }
    lines.join("\n")
}
