//! `capfilt doctor`: is everything there that a run needs?

use std::path::Path;
use std::process::ExitCode;

use capfilt_store::Store;
use serde::Serialize;

use crate::args::ViewArgs;
use crate::config::{Inputs, RunConfig};
use crate::models;
use crate::output::{Failure, say, say_json};

#[derive(Serialize)]
struct Finding {
    what: String,
    ok: bool,
    says: String,
}

pub(crate) async fn run(args: ViewArgs) -> Result<ExitCode, Failure> {
    let mut findings = Vec::new();
    let mut note = |what: &str, result: Result<String, String>| {
        let (ok, says) = result.map_or_else(|e| (false, e), |s| (true, s));
        findings.push(Finding { what: what.to_owned(), ok, says });
    };
    match RunConfig::load(&args.config.config, &args.config.set) {
        Err(e) => note("config", Err(e.text())),
        Ok(config) => {
            note("config", Ok(format!("run `{}`, {} rounds", config.run.name, config.run.rounds)));
            note("threads", Ok(std::thread::available_parallelism().map_or(1, usize::from).to_string()));
            note("work folder", writable(&config.worker.runtime.work_dir));
            let says = |inputs: Inputs| {
                let (sources, clean, heldout) = (inputs.discover.len(), inputs.annotated.len(), inputs.heldout.len());
                format!("{} queries, {sources} sources, {clean} annotated and {heldout} held-out sets", inputs.queries.len())
            };
            note("inputs", config.inputs().map(says).map_err(|e| e.text()));
            match Store::open(&config.run.store).await {
                Err(e) => note("store", Err(Failure::from(e).text())),
                Ok(store) => {
                    note("store", Ok(store.url().to_string()));
                    let models = models::of_run(&config, &store, false).await;
                    let says = models.map(|m| format!("captioner {}, filter {}", m.captioner.short(), m.filter.short()));
                    note("models", says.map_err(|e| e.text()));
                }
            }
        }
    }
    let sound = findings.iter().all(|f| f.ok);
    if args.json {
        say_json(&findings)?;
    } else {
        for f in &findings {
            say(&format!("{}  {:<12} {}", if f.ok { "ok  " } else { "BAD " }, f.what, f.says));
        }
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn writable(folder: &Path) -> Result<String, String> {
    let trial = || {
        std::fs::create_dir_all(folder)?;
        tempfile::tempfile_in(folder)
    };
    trial().map(|_| folder.display().to_string()).map_err(|e| format!("`{}` cannot be written: {e}", folder.display()))
}
