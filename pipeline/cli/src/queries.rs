//! `capfilt queries`: make query lists, and look at them.

mod plot;
mod stats;

use std::process::ExitCode;

use capfilt_crawler::{CrawlError, QueryBuild, QueryInputs, QueryList, QueryTable, SourceCounts, TableHead};
use serde::Serialize;
use serde_json::json;

use crate::args::{QueriesBuildArgs, QueriesShowArgs, QueriesVerb};
use crate::output::{Failure, bytes, complain, count, duration, say, say_json, table};
use crate::progress::Bar;

pub(crate) async fn run(verb: QueriesVerb) -> Result<ExitCode, Failure> {
    match verb {
        QueriesVerb::Build(args) => build(*args).await,
        QueriesVerb::Show(args) => show(&args),
        QueriesVerb::Stats(args) => stats::run(args).await,
    }
}

async fn build(args: QueriesBuildArgs) -> Result<ExitCode, Failure> {
    let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
    if args.out.extension().is_none_or(|e| e != "parquet") {
        return usage(&format!("`{}` does not end in .parquet: query tables are Parquet", args.out.display()));
    }
    if !args.dry_run && !args.overwrite && args.out.exists() {
        return usage(&format!("`{}` exists; give another --out, or --overwrite", args.out.display()));
    }
    if args.budget == 0 || args.bigram_pmi.is_nan() {
        return usage("--budget must be at least 1, and --bigram-pmi a number");
    }
    if [&args.dump, &args.word_counts, &args.page_views, &args.titles, &args.wordnet].into_iter().all(Vec::is_empty) {
        return usage(
            "nothing to make queries of: give at least one of --wordnet, --dump, --word-counts, --page-views, --titles",
        );
    }
    let beside = args.out.parent().filter(|p| !p.as_os_str().is_empty()).map_or_else(|| ".".into(), std::path::Path::to_owned);
    let work_dir = args.work_dir.unwrap_or(beside);
    std::fs::create_dir_all(&work_dir)
        .map_err(|e| Failure::Other(anyhow::Error::new(e).context(format!("cannot make `{}`", work_dir.display()))))?;
    let defaults = QueryBuild::default();
    let settings = QueryBuild {
        inputs: QueryInputs {
            wordnet: args.wordnet,
            dumps: args.dump,
            word_counts: args.word_counts,
            page_views: args.page_views,
            titles: args.titles,
        },
        budget: args.budget,
        unigram_count: args.unigram_count,
        bigram_pmi: args.bigram_pmi,
        bigram_count: args.bigram_count,
        title_views: args.title_views,
        wiki: args.wiki,
        memory: args.memory.saturating_mul(1 << 20),
        threads: args.threads.unwrap_or(defaults.threads),
        work_dir,
    };
    let started = std::time::Instant::now();
    let (out, overwrite, dry_run) = (args.out.clone(), args.overwrite, args.dry_run);
    let work = move || {
        let bar = std::sync::Arc::new(Bar::new("queries", "MB"));
        let shown = std::sync::Arc::clone(&bar);
        let built = settings.run(Box::new(move |read, of| shown.set(read / 1_000_000, of / 1_000_000)));
        bar.finish();
        let built = built?;
        if !dry_run && !built.rows.is_empty() {
            built.write(&out, overwrite)?;
        }
        Ok::<_, CrawlError>(built)
    };
    let built = tokio::task::spawn_blocking(work).await.map_err(anyhow::Error::from)??;
    built.notes.iter().for_each(|note| complain(note));
    if built.rows.is_empty() {
        let what = "no text of the sources reaches its threshold, so nothing was written; look at the files that were named, and at --help";
        return Err(Failure::Usage(what.to_owned()));
    }
    if args.json {
        say_json(&Built::new(&built, &args.out, args.dry_run, started.elapsed().as_secs_f64()))?;
        return Ok(ExitCode::SUCCESS);
    }
    say(&table(&source_rows(&built.head.sources)));
    let (rows, budget) = (count(built.rows.len() as u64), count(built.head.budget));
    let done = if args.dry_run { "not written (dry run)".to_owned() } else { args.out.display().to_string() };
    say(&format!("{rows} queries of at most {budget} in {}: {done}", duration(started.elapsed().as_secs())));
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Built<'a> {
    /// Where the table is; null after a dry run.
    path: Option<String>,
    queries: usize,
    seconds: f64,
    notes: &'a [String],
    #[serde(flatten)]
    head: &'a TableHead,
}

impl<'a> Built<'a> {
    fn new(built: &'a QueryTable, path: &std::path::Path, dry_run: bool, seconds: f64) -> Self {
        let path = (!dry_run).then(|| path.display().to_string());
        Self { path, queries: built.rows.len(), seconds, notes: &built.notes, head: &built.head }
    }
}

fn source_rows(sources: &[SourceCounts]) -> Vec<Vec<String>> {
    let head = ["source", "found", "repeated", "cut", "kept"].map(str::to_owned).to_vec();
    let row = |c: &SourceCounts| {
        let mut cells = vec![c.source.name().to_owned()];
        cells.extend([c.found, c.repeated, c.cut, c.kept].map(count));
        cells
    };
    std::iter::once(head).chain(sources.iter().map(row)).collect()
}

fn show(args: &QueriesShowArgs) -> Result<ExitCode, Failure> {
    let list = QueryList::load(&args.list)?;
    let is_table = args.list.extension().is_some_and(|e| e == "parquet");
    let head = if is_table { TableHead::load(&args.list)? } else { None };
    let mut sources: Vec<(&str, u64, Vec<&str>)> = Vec::new();
    for query in list.iter() {
        let at = sources.iter().position(|s| s.0 == query.source).unwrap_or_else(|| {
            sources.push((query.source, 0, Vec::new()));
            sources.len() - 1
        });
        sources[at].1 += 1;
        if sources[at].2.len() < args.examples {
            sources[at].2.push(query.text);
        }
    }
    if args.json {
        let sources: Vec<_> =
            sources.iter().map(|(name, n, some)| json!({ "source": name, "queries": n, "examples": some })).collect();
        say_json(&json!({ "queries": list.len(), "digest": list.digest(), "sources": sources, "made": head }))?;
        return Ok(ExitCode::SUCCESS);
    }
    say(&format!("{} queries, digest {}", count(list.len() as u64), list.digest()));
    let mut rows = vec![["source", "queries", "first"].map(str::to_owned).to_vec()];
    rows.extend(sources.iter().map(|(name, n, some)| vec![(*name).to_owned(), count(*n), some.join(", ")]));
    say(&table(&rows));
    if let Some(head) = head {
        say(&format!(
            "\nmade with a budget of {}, words used {} times, pairs of {} bits used {} times, titles viewed {} times ({}), of:",
            count(head.budget),
            count(head.unigram_count),
            head.bigram_pmi,
            count(head.bigram_count),
            count(head.title_views),
            head.wiki
        ));
        for file in &head.inputs {
            say(&format!("  {:<11} {} ({}, sha256 {})", file.kind, file.name, bytes(file.bytes), file.sha256));
        }
    }
    Ok(ExitCode::SUCCESS)
}
