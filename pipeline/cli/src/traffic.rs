//! What the downloads of a run led to, for people and for programs: success by class, bytes, hosts, cost.

use capfilt_crawler::{Downloads, Traffic};
use serde_json::{Value, json};

use crate::output::{bytes, count, table};

/// Failure classes that fit beside a progress bar.
const CLASSES: usize = 4;
/// Hosts in a table, and hosts that have metrics of their own.
pub(crate) const HOSTS: usize = 20;

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

pub(crate) fn cost(traffic: &Traffic, hourly_price: Option<f64>) -> Option<f64> {
    hourly_price.and_then(|price| traffic.cost_per_million(price))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "three digits are shown"
)]
pub(crate) fn per_second(totals: &Downloads, traffic: &Traffic) -> u64 {
    (totals.bytes as f64 / traffic.span().as_secs_f64().max(1e-3)) as u64
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
