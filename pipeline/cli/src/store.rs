//! `capfilt store …`

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use capfilt_store::Store;

use crate::args::{StoreArgs, StoreVerb};
use crate::config::RunConfig;
use crate::output::{Failure, bytes, complain, count, say, say_json};

/// Opens the store that `--store` means: an address, or a config that names one.
pub(crate) async fn open(args: &StoreArgs) -> Result<Store, Failure> {
    let path = Path::new(&args.store);
    if path.is_file() {
        let config = RunConfig::load(path, &[])?;
        return Ok(Store::open(&config.run.store).await?);
    }
    // A mistyped folder must not become an empty store.
    let is_folder = !args.store.contains(':');
    if is_folder && !path.join("store.json").is_file() {
        return Err(Failure::Usage(format!("`{}` is neither a store nor a config", args.store)));
    }
    Ok(Store::open(&args.store).await?)
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
            let report = open(&args.store).await?.sweep(grace, args.dry_run).await?;
            if args.store.json {
                say_json(&report)?;
            } else {
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
