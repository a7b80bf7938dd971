//! `capfilt dataset …`

use std::process::ExitCode;

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::diff::{DatasetDiff, Moved, diff};
use capfilt_coordinator::export::{ExportConfig, ExportSummary, export};
use capfilt_coordinator::takedown::left_out;
use capfilt_schemas::DatasetVersion;
use capfilt_store::Store;

use crate::args::{DatasetVerb, DiffArgs, ExportArgs};
use crate::output::{Failure, count, moment, say, say_json, table};
use crate::progress::Bar;
use crate::store::open;
use crate::takedown;

pub(crate) async fn run(verb: DatasetVerb) -> Result<ExitCode, Failure> {
    match verb {
        DatasetVerb::List(args) => {
            let store = open(&args).await?;
            let mut versions = Vec::new();
            for name in store.dataset_names().await? {
                versions.extend(store.dataset_versions(&name).await?);
            }
            if args.json {
                say_json(&versions)?;
            } else if versions.is_empty() {
                say("no dataset yet");
            } else {
                say(&list(&versions));
            }
        }
        DatasetVerb::Show(args) => {
            let store = open(&args.store).await?;
            let version = find(&store, &args.dataset).await?;
            let left_out = left_out(&store, &version, &store.taken_down().await?).await?;
            if args.store.json {
                let mut shown = serde_json::to_value(&version).map_err(anyhow::Error::from)?;
                shown["left_out"] = left_out.into();
                say_json(&shown)?;
            } else {
                say(&show(&version, left_out));
            }
        }
        DatasetVerb::Diff(args) => compare(&args).await?,
        DatasetVerb::Export(args) => copy_out(args).await?,
        DatasetVerb::Takedown(args) => takedown::run(args).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The version that `name` or `name@n` means.
async fn find(store: &Store, dataset: &str) -> Result<DatasetVersion, Failure> {
    let (name, version) = match dataset.split_once('@') {
        None => (dataset, None),
        Some((name, n)) => {
            let n = n.parse().map_err(|_| Failure::Usage(format!("`{dataset}` is not of the form name or name@number")))?;
            (name, Some(n))
        }
    };
    Ok(store.dataset_version(name, version).await?)
}

fn list(versions: &[DatasetVersion]) -> String {
    let head = ["dataset", "digest", "pairs", "web", "synthetic", "human", "noise", "round", "built"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for v in versions {
        let of = |origin: &str| count(v.counts.get(origin).copied().unwrap_or(0));
        rows.push(vec![
            format!("{}@{}", v.name, v.version),
            v.digest.short(),
            count(v.shards.iter().map(|s| s.rows).sum()),
            of("web"),
            of("synthetic"),
            of("human"),
            v.noise_ratio.map_or_else(String::new, |n| format!("{:.1}%", n * 100.0)),
            v.round.to_string(),
            moment(v.created_at_ms),
        ]);
    }
    table(&rows)
}

fn show(v: &DatasetVersion, left_out: u64) -> String {
    let mut lines = vec![
        format!("{}@{}  {}", v.name, v.version, v.digest),
        format!("built by round {} of run {}, {} (UTC)", v.round, v.run, moment(v.created_at_ms)),
        String::new(),
    ];
    let mut funnel = vec![vec!["step".to_owned(), "pairs".to_owned()]];
    funnel.extend(v.funnel.steps.iter().map(|(step, n)| vec![step.clone(), count(*n)]));
    lines.push(table(&funnel));
    lines.push(String::new());
    lines.push(v.noise_ratio.map_or_else(
        || "no texts were judged".to_owned(),
        |n| format!("noise ratio {:.1}% of the judged texts were removed", n * 100.0),
    ));
    lines.extend(v.lineage.captioner.map(|model| format!("captioner  {model}")));
    lines.extend(v.lineage.filter.map(|model| format!("filter     {model}")));
    lines.push(format!("built from {} shards by task {}", v.lineage.inputs.len(), v.lineage.build));
    lines.push(format!("settings   {}", v.settings));
    if v.takedowns > 0 || left_out > 0 {
        let since = count(left_out);
        lines.push(format!("takedowns  {} in force when it was built; {since} of its pairs taken down since", v.takedowns));
    }
    lines.join("\n")
}

async fn compare(args: &DiffArgs) -> Result<(), Failure> {
    let store = open(&args.store).await?;
    let (from, to) = (find(&store, &args.from).await?, find(&store, &args.to).await?);
    let found = diff(&store, &from, &to, args.examples).await?;
    if args.store.json {
        return say_json(&found);
    }
    say(&moves(&found));
    Ok(())
}

fn moves(found: &DatasetDiff) -> String {
    let mut lines = vec![format!("{} → {}: {} texts stayed", found.from, found.to, count(found.kept))];
    if found.taken_down > 0 {
        lines.push(format!("{} texts were taken down and are not compared", count(found.taken_down)));
    }
    for change in &found.settings {
        let value = |v: &Option<serde_json::Value>| v.as_ref().map_or_else(|| "unset".to_owned(), ToString::to_string);
        lines.push(format!("setting {}: {} → {}", change.name, value(&change.before), value(&change.after)));
    }
    for (sign, side) in [("+", &found.added), ("-", &found.removed)] {
        for (origin, Moved { texts, examples }) in side {
            lines.push(format!("{sign} {} {origin} texts", count(*texts)));
            for e in examples {
                let itm = e.itm.map_or_else(String::new, |i| format!("  itm {i:.3}"));
                lines.push(format!("    {}{itm}  {}", e.text, e.url));
            }
        }
    }
    lines.join("\n")
}

async fn copy_out(args: ExportArgs) -> Result<(), Failure> {
    let store = open(&args.store).await?;
    let version = find(&store, &args.dataset).await?;
    let config = ExportConfig {
        folder: args.out,
        formats: args.format.iter().map(|f| f.into_export()).collect(),
        overwrite: args.overwrite,
        ..ExportConfig::default()
    };
    let bar = Bar::new("export", "pairs");
    let of = version.shards.iter().map(|s| s.rows).sum();
    let summary = export(&store, &SqlConfig::default(), &version, &config, |done| bar.set(done, of)).await?;
    bar.finish();
    if args.store.json {
        return say_json(&summary);
    }
    say(&exported(&summary));
    Ok(())
}

/// What an export did, in one line.
pub(crate) fn exported(summary: &ExportSummary) -> String {
    let manifest = &summary.manifest;
    let there = if summary.already_there { " (was there already)" } else { "" };
    let gone = match manifest.left_out {
        0 => String::new(),
        n => format!("; {} pairs were taken down and left out", count(n)),
    };
    format!("{}: {} pairs of {} images{there}{gone}", summary.folder.display(), count(manifest.pairs), count(manifest.images))
}
