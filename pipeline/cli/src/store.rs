//! `capfilt store …`

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use capfilt_coordinator::plan::Downloads;
use capfilt_coordinator::takedown::redact;
use capfilt_schemas::Table;
use capfilt_store::Store;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

use crate::args::{StoreArgs, StoreVerb};
use crate::config::RunConfig;
use crate::output::{Failure, bytes, complain, count, say, say_json};
use crate::work_dir;

/// Shards that are looked for at once.
const LOCATED_AT_ONCE: usize = 32;

/// The places of the shards of samples in the store, as the newest pass of the downloads over each left them.
pub(crate) async fn samples(store: &Store, downloads: &Downloads) -> Result<Vec<String>, Failure> {
    let places = stream::iter(&downloads.samples).map(|shard| store.locate(Table::Samples, shard));
    let places = places.buffered(LOCATED_AT_ONCE).map_ok(|(place, _)| place.to_string());
    Ok(places.try_collect().await?)
}

/// Opens the store that `--store` means: an address, or a config that names one.
pub(crate) async fn open(args: &StoreArgs) -> Result<Store, Failure> {
    let path = Path::new(&args.store);
    if path.is_file() {
        let config = RunConfig::load(path, &[])?;
        return existing(&config.run.store).await;
    }
    let store = Store::open_existing(&args.store).await?;
    store.ok_or_else(|| {
        Failure::Usage(format!(
            "`{}` is neither a store nor a config; a store is made by a run, or by `model import`",
            args.store
        ))
    })
}

/// As [`open`]; a store that is not there yet is made, but not among the files of an existing folder.
pub(crate) async fn open_or_make(args: &StoreArgs) -> Result<Store, Failure> {
    let path = Path::new(&args.store);
    if path.is_file() {
        Store::open(&RunConfig::load(path, &[])?.run.store).await?;
    } else if std::fs::read_dir(path).map_or(!path.exists(), |mut entries| entries.next().is_none()) {
        Store::open(&args.store).await?;
    }
    open(args).await
}

/// The store at an address, which a run has made: a mistyped one must not become an empty store.
pub(crate) async fn existing(address: &str) -> Result<Store, Failure> {
    let store = Store::open_existing(address).await?;
    store.ok_or_else(|| Failure::Usage(format!("there is no store at `{address}`; `capfilt run` makes it")))
}

pub(crate) async fn run(verb: StoreVerb) -> Result<ExitCode, Failure> {
    match verb {
        StoreVerb::Check(args) => {
            let report = open(&args).await?.check().await?;
            if args.json {
                say_json(&report)?;
            } else {
                say(&format!(
                    "{} records and {} objects ({}) read; {} unreferenced objects; {}",
                    count(report.records),
                    count(report.objects),
                    bytes(report.bytes),
                    count(report.unreferenced),
                    if report.is_sound() { "everything fits" } else { "NOT SOUND" }
                ));
                for finding in &report.findings {
                    complain(&format!("{}: {}", finding.path, finding.problem));
                }
            }
            Ok(if report.is_sound() { ExitCode::SUCCESS } else { ExitCode::from(3) })
        }
        StoreVerb::Sweep(args) => {
            if !(args.grace_hours.is_finite() && args.grace_hours >= 0.0) {
                return Err(Failure::Usage("--grace-hours must be a number of hours, 0 or more".to_owned()));
            }
            let grace = Duration::from_secs_f64((args.grace_hours * 3600.0).min(1e12));
            let store = open(&args.store).await?;
            let redacted = redact(&store, args.dry_run).await?;
            let copies = work_dir::clear(&store, &args).await?;
            let report = store.sweep(grace, args.dry_run).await?;
            if args.store.json {
                say_json(&json!({
                    "objects": report.objects, "bytes": report.bytes, "young": report.young,
                    "redacted": redacted, "work_dir_exports": copies,
                }))?;
            } else {
                for (table, reached) in &redacted.tables {
                    let verb = if args.dry_run { "would empty" } else { "emptied" };
                    let (rows, shards) = (count(reached.rows), count(reached.shards));
                    say(&format!("{verb} {rows} rows of {table} that were taken down, in {shards} shards"));
                }
                if copies > 0 {
                    let verb = if args.dry_run { "would remove" } else { "removed" };
                    say(&format!("{verb} {copies} exports with them from the work folder"));
                }
                let verb = if args.dry_run { "would remove" } else { "removed" };
                say(&format!(
                    "{verb} {} objects ({}); left {} that are younger than {} h",
                    count(report.objects),
                    bytes(report.bytes),
                    count(report.young),
                    args.grace_hours
                ));
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}
