//! `capfilt`: the one program. It joins the crates of the house, reads the config, and shows people what happens.

mod args;
mod by_hand;
mod config;
mod dataset;
mod doctor;
mod download;
mod hub;
mod interrupt;
mod job;
mod machine;
mod metrics;
mod models;
mod outcome;
mod output;
mod overview;
mod pace;
mod progress;
mod queries;
mod retry;
mod run;
mod store;
mod takedown;
mod traffic;
mod work_dir;

use std::process::ExitCode;

use args::{Cli, Verb};
use output::Failure;
use tracing_subscriber::EnvFilter;

/// Models free and take the same large buffers over and over, and sorting puts away memory in one thread and frees it in another: with
/// glibc's allocator the one is slow and the other leaves twice of what is in use.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Its settings: large buffers are kept for the next like small ones, for a minute, and lie in large pages. Training is then up to a third faster.
#[cfg(not(target_env = "msvc"))]
#[allow(unsafe_code, reason = "the name under which the allocator looks for its settings")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_SETTINGS: &[u8; 53] = b"oversize_threshold:0,dirty_decay_ms:60000,thp:always\0";

fn main() -> ExitCode {
    capfilt_vision::share_threads();
    let cli = Cli::read();
    logging(&cli);
    machine::raise_file_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            output::complain(&format!("no threads to run on: {e}"));
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // Downloads and models under way are not waited for: what counts is committed.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(failure) => {
            output::complain(&failure.text());
            failure.code()
        }
    }
}

async fn dispatch(cli: Cli) -> Result<ExitCode, Failure> {
    match cli.verb {
        Verb::Run(run) => run::run(run).await,
        Verb::Retry(retry) => retry::run(retry).await,
        Verb::Plan(plan) => overview::plan(plan).await,
        Verb::Status(status) => overview::status(status).await,
        Verb::Queries(verb) => queries::run(verb).await,
        Verb::Dataset(verb) => dataset::run(verb).await,
        Verb::Model(verb) => models::run(verb).await,
        Verb::Store(verb) => store::run(verb).await,
        Verb::Caption(args) => by_hand::caption(*args).await,
        Verb::Score(args) => by_hand::score(args).await,
        Verb::Download(args) => download::run(*args).await,
        Verb::Doctor(doctor) => doctor::run(doctor).await,
    }
}

/// Messages go to standard error: warnings by default, more with `-v`, as JSON with `--log-json`. `CAPFILT_LOG` overrides the filter.
fn logging(cli: &Cli) {
    let level = match cli.verbose {
        0 => "warn",
        1 => "warn,capfilt=info,capfilt_coordinator=info,capfilt_runtime=info,capfilt_crawler=info,capfilt_trainer=info",
        _ => "info,capfilt=debug,capfilt_coordinator=debug,capfilt_runtime=debug,capfilt_crawler=debug,capfilt_trainer=debug",
    };
    let filter = EnvFilter::try_from_env("CAPFILT_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(progress::LogWriter::default)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    if cli.log_json {
        builder.json().init();
    } else {
        builder.with_target(false).init();
    }
}
