//! What the downloads of a run led to, for people and for Prometheus: success by class, bytes, hosts, cost.

use std::net::SocketAddr;
use std::time::Duration;

use capfilt_crawler::{Downloads, Traffic};
use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_util::MetricKindMask;
use serde_json::{Value, json};

use crate::output::{Failure, bytes, count, table};
use crate::progress::Pace;

/// Failure classes that fit beside a progress bar.
const CLASSES: usize = 4;
/// Hosts in a table, and hosts that have metrics of their own.
const HOSTS: usize = 20;

/// How long a gauge that is told no more is shown.
const IDLE: Duration = Duration::from_secs(600);

/// Serves the process's metrics at `address`, under `/metrics`.
///
/// # Errors
/// [`Failure::Usage`] if the address cannot be listened on.
pub(crate) fn serve_metrics(address: SocketAddr) -> Result<(), Failure> {
    // What is told no more, as of a host that is among those with most downloads no longer, goes.
    let builder = PrometheusBuilder::new().with_http_listener(address).idle_timeout(MetricKindMask::GAUGE, Some(IDLE));
    builder.install().map_err(|e| Failure::Usage(format!("cannot serve metrics at {address}: {e}")))
}

/// One line: `91.4% ok, 12.3 MiB/s; timeout 3.1%, dns 2.2%; 0.19 a million`. Empty before the first download.
pub(crate) fn line(traffic: &Traffic, hourly_price: Option<f64>) -> String {
    let totals = traffic.totals();
    if totals.all() == 0 {
        return String::new();
    }
    let mut text = format!("{:.1}% ok, {}/s", totals.success() * 100.0, bytes(per_second(&totals, traffic)));
    for (i, (status, share)) in totals.failures().into_iter().take(CLASSES).enumerate() {
        let apart = if i == 0 { ';' } else { ',' };
        text.push_str(&format!("{apart} {status} {:.1}%", share * 100.0));
    }
    if let Some(cost) = cost(traffic, hourly_price) {
        text.push_str(&format!("; {cost:.2} a million"));
    }
    text
}

fn cost(traffic: &Traffic, hourly_price: Option<f64>) -> Option<f64> {
    hourly_price.and_then(|price| traffic.cost_per_million(price))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "three digits are shown"
)]
fn per_second(totals: &Downloads, traffic: &Traffic) -> u64 {
    (totals.bytes as f64 / traffic.span().as_secs_f64().max(1e-3)) as u64
}

/// What [`line()`] says and the table of hosts, as gauges. Only the hosts with most downloads have some, since each has lines of its own
/// wherever metrics are kept.
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

/// What this process downloaded, as the end of a run says it; nothing if that is nothing.
pub(crate) fn summary(traffic: &Traffic, hourly_price: Option<f64>) -> Option<String> {
    let totals = traffic.totals();
    if totals.all() == 0 {
        return None;
    }
    let seconds = traffic.span().as_secs_f64();
    let mut text = format!(
        "\ndownloads: {} of {} gave an image ({:.1}%), {} in {seconds:.0} s",
        count(totals.ok()),
        count(totals.all()),
        totals.success() * 100.0,
        bytes(totals.bytes),
    );
    if let Some(cost) = cost(traffic, hourly_price) {
        text.push_str(&format!(", {cost:.2} a million images at {} an hour", hourly_price.unwrap_or_default()));
    }
    for (status, share) in totals.failures() {
        text.push_str(&format!("\n  {:<18} {:>5.1}%  {}", status.as_str(), share * 100.0, count(totals.by_status[&status])));
    }
    let mut rows =
        vec![["host", "downloads", "ok", "bytes", "seconds with waits", "most frequent failure"].map(str::to_owned).to_vec()];
    for (host, d) in traffic.hosts(HOSTS) {
        let failure = d.failures().first().map_or_else(String::new, |(s, share)| format!("{s} {:.0}%", share * 100.0));
        #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
        let each = d.busy.as_secs_f64() / d.all().max(1) as f64;
        rows.push(vec![
            host,
            count(d.all()),
            format!("{:.1}%", d.success() * 100.0),
            bytes(d.bytes),
            format!("{each:.2}"),
            failure,
        ]);
    }
    Some(format!("{text}\n\n{}", table(&rows)))
}

/// The same for programs.
pub(crate) fn to_json(traffic: &Traffic, hourly_price: Option<f64>) -> Value {
    let hosts: Vec<Value> =
        traffic.hosts(HOSTS).into_iter().map(|(host, d)| json!({"host": host, "downloads": of(&d)})).collect();
    json!({
        "downloads": of(&traffic.totals()),
        "seconds": traffic.span().as_secs_f64(),
        "cost_per_million": cost(traffic, hourly_price),
        "hosts": hosts,
    })
}

fn of(d: &Downloads) -> Value {
    json!({"all": d.all(), "ok": d.ok(), "bytes": d.bytes, "by_status": d.by_status, "busy_seconds": d.busy.as_secs_f64()})
}
