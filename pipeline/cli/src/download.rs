//! `capfilt download`: img2dataset's flags, by its names, on capfilt's crawler.

mod flags;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capfilt_crawler::{CrawlError, DownloadProgress, DownloadSummary, download};
use capfilt_schemas::FetchStatus;
use tokio_util::sync::CancellationToken;

use crate::interrupt::interrupted;
use crate::output::{self, Failure, count, duration, say, say_json};
use crate::pace::Pace;
use crate::progress::Bar;
use crate::{metrics, traffic};
pub(crate) use flags::DownloadArgs;

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

pub(crate) async fn run(args: DownloadArgs) -> Result<ExitCode, Failure> {
    let (as_json, hourly_price) = (args.json, args.hourly_price);
    if args.enable_wandb {
        output::complain("--enable_wandb: nothing is sent to wandb; the stats stand in the _stats.json files");
    }
    if let Some(address) = args.metrics {
        metrics::serve(address)?;
    }
    let config = args.config()?;
    let (progress, stop) = (Arc::new(DownloadProgress::default()), CancellationToken::new());
    let interrupts = tokio::spawn(stop_when_interrupted(stop.clone()));
    let shown = tokio::spawn(show(Arc::clone(&progress), hourly_price));
    let folder = config.output_folder.clone();
    let result = download(config, Arc::clone(&progress), stop).await;
    shown.abort();
    interrupts.abort();
    let summary = result.map_err(|e| match e {
        e @ (CrawlError::Config { .. } | CrawlError::Format { .. } | CrawlError::Read { .. }) => {
            Failure::Usage(capfilt_store::chain(&e))
        }
        e => Failure::Other(e.into()),
    })?;
    if as_json {
        let mut json = serde_json::to_value(&summary).map_err(anyhow::Error::from)?;
        json["fetch"] = traffic::to_json(progress.traffic(), hourly_price);
        say_json(&json)?;
    } else {
        if let Some(led_to) = traffic::summary(progress.traffic(), hourly_price) {
            say(&format!("{}\n", led_to.trim_start()));
        }
        say(&words(&folder.display().to_string(), &summary));
    }
    let forbidden = progress.traffic().totals().by_status.get(&FetchStatus::ForbiddenAddress).copied().unwrap_or(0);
    if forbidden > 0 {
        output::complain(&format!(
            "{} addresses are of private networks, which are not asked; `--set 'crawler.allow_networks=[\"10.0.0.0/8\"]'` opens one, and \
             `--retry_status forbidden_address` asks again",
            count(forbidden)
        ));
    }
    if summary.stopped {
        output::complain("interrupted; finished shards stay, run the same command to go on");
        return Ok(ExitCode::from(output::INTERRUPTED));
    }
    for (shard, why) in &summary.failed_shards {
        output::complain(&format!("shard {shard} could not be written: {why}"));
    }
    Ok(if summary.failed_shards.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(output::INCOMPLETE) })
}

/// The first interrupt ends the download in order, the second one the program.
async fn stop_when_interrupted(stop: CancellationToken) {
    interrupted().await;
    stop.cancel();
    interrupted().await;
    std::process::exit(i32::from(output::INTERRUPTED));
}

async fn show(progress: Arc<DownloadProgress>, hourly_price: Option<f64>) {
    let (bar, mut began) = (Bar::new("download", "rows"), Instant::now());
    loop {
        tokio::time::sleep(TICK).await;
        let (done, rows) = (progress.traffic().totals().all(), progress.rows());
        if rows == 0 {
            // The time that the list takes tells nothing about the downloads.
            began = Instant::now();
        }
        let pace = Pace::of(began.elapsed(), done, rows);
        let words = if rows == 0 { "reading the list".to_owned() } else { pace.as_ref().map_or_else(String::new, Pace::words) };
        bar.show(done, rows, &format!("{words}  {}", traffic::line(progress.traffic(), hourly_price)));
        metrics::publish(progress.traffic(), hourly_price);
        metrics::publish_stage("download", done, rows, pace.as_ref());
    }
}

fn words(folder: &str, summary: &DownloadSummary) -> String {
    let mut lines = Vec::new();
    if summary.unreadable > 0 {
        lines.push(format!("{} rows of the list could not be read and are in no shard", count(summary.unreadable)));
    }
    if summary.shards == 0 && summary.failed_shards.is_empty() && !summary.stopped {
        lines.push(format!("{folder}: nothing to do, {} shards are there", count(summary.shards_there)));
        return lines.join("\n");
    }
    let there =
        if summary.shards_there > 0 { format!("; {} were there before", count(summary.shards_there)) } else { String::new() };
    lines.push(format!(
        "{folder}: {} shards with {} images of {} rows in {}{there}",
        count(summary.shards),
        count(summary.successes),
        count(summary.count),
        duration(Duration::from_secs_f64(summary.seconds).as_secs()),
    ));
    lines.join("\n")
}
