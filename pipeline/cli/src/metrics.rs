//! The process's metrics, as Prometheus reads them.

use std::net::SocketAddr;
use std::time::Duration;

use capfilt_crawler::Traffic;
use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_util::MetricKindMask;

use crate::output::Failure;
use crate::pace::Pace;
use crate::traffic::{HOSTS, cost, per_second};

/// How long a gauge that is told no more is shown.
const IDLE: Duration = Duration::from_secs(600);

/// Serves the process's metrics at `address`, under `/metrics`.
///
/// # Errors
/// [`Failure::Usage`] if the address cannot be listened on.
pub(crate) fn serve(address: SocketAddr) -> Result<(), Failure> {
    // What is told no more, as of a host that is among those with most downloads no longer, goes.
    let builder = PrometheusBuilder::new().with_http_listener(address).idle_timeout(MetricKindMask::GAUGE, Some(IDLE));
    builder.install().map_err(|e| Failure::Usage(format!("cannot serve metrics at {address}: {e}")))
}

/// What [`traffic::line`](crate::traffic::line) says and the table of hosts, as gauges. Only the hosts with most downloads have some,
/// since each has lines of its own wherever metrics are kept.
#[expect(clippy::cast_precision_loss, reason = "gauges")]
pub(crate) fn publish(traffic: &Traffic, hourly_price: Option<f64>) {
    let totals = traffic.totals();
    for (status, n) in &totals.by_status {
        metrics::gauge!("capfilt_downloads", "status" => status.as_str()).set(*n as f64);
    }
    if totals.all() > 0 {
        metrics::gauge!("capfilt_download_success_ratio").set(totals.success());
        metrics::gauge!("capfilt_downloaded_bytes_per_second").set(per_second(&totals, traffic) as f64);
    }
    if let Some(cost) = cost(traffic, hourly_price) {
        metrics::gauge!("capfilt_cost_per_million_images").set(cost);
    }
    for (host, downloads) in traffic.hosts(HOSTS) {
        for (status, n) in &downloads.by_status {
            metrics::gauge!("capfilt_host_downloads", "host" => host.clone(), "status" => status.as_str()).set(*n as f64);
        }
        metrics::gauge!("capfilt_host_bytes", "host" => host).set(downloads.bytes as f64);
    }
}

/// How far a stage is, and the time that it has left, if that can be told.
#[expect(clippy::cast_precision_loss, reason = "gauges")]
pub(crate) fn publish_stage(stage: &'static str, done: u64, of: u64, pace: Option<&Pace>) {
    metrics::gauge!("capfilt_stage_done", "stage" => stage).set(done as f64);
    metrics::gauge!("capfilt_stage_expected", "stage" => stage).set(of as f64);
    if let Some(pace) = pace {
        metrics::gauge!("capfilt_stage_seconds_left", "stage" => stage).set(pace.left as f64);
    }
}
