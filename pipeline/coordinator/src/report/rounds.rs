//! The sections on rounds, learning curves, stages, failures, lineage and history.

use std::collections::{BTreeMap, BTreeSet};

use capfilt_schemas::{Digest, StageKind};
use serde_json::Value;

use super::chart::{Curve, curve, sparkline};
use super::data::{Report, Round};
use super::html::{Html, count, date, duration, nothing, number, open, percent, shortened, title};

/// Failed tasks that are listed one by one.
const MAX_FAILED: usize = 50;
/// Characters of an error that are shown.
const ERROR_LENGTH: usize = 600;

/// Metrics of champions and challengers over the rounds.
pub(super) fn metrics(h: &mut Html, report: &Report) {
    let lead = "Held-out metrics of the models that a round worked with (champions) and of those trained on what it built (challengers).";
    open(h, "rounds", "Round over round", &lead);
    let judged: Vec<&Round> = report.rounds.iter().filter(|r| r.result.is_some()).collect();
    let values = |r: &Round, name: &str| {
        let result = r.result.as_ref();
        let of =
            |pick: fn(&capfilt_schemas::RoundResult) -> &BTreeMap<String, f64>| result.and_then(|r| pick(r).get(name).copied());
        (of(|r| &r.metrics), of(|r| &r.challenger_metrics))
    };
    let results = judged.iter().filter_map(|r| r.result.as_ref());
    let names: BTreeSet<&str> =
        results.flat_map(|r| r.metrics.keys().chain(r.challenger_metrics.keys())).map(String::as_str).collect();
    if names.is_empty() {
        nothing(h, "Not recorded: no models were evaluated on held-out pairs.");
        h.raw("</section>");
        return;
    }
    h.raw("<p class=\"legend\"><span><i class=\"champion\"></i>champion</span><span><i class=\"challenger\"></i>challenger</span></p>");
    let mut roles: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut names: Vec<&str> = names.into_iter().collect();
    names.sort_by_key(|name| split_number(name));
    for name in &names {
        roles.entry(name.split_once('/').map_or("", |(role, _)| role)).or_default().push(name);
    }
    for (role, names) in &roles {
        if !role.is_empty() {
            h.put("<h3>{}</h3>", &[role]);
        }
        h.raw("<div class=\"curves\">");
        for name in names {
            let points: Vec<_> = judged.iter().map(|r| (r.number, values(r, name).0, values(r, name).1)).collect();
            h.put("<figure><figcaption><b>{}</b>", &[&label(name)]);
            if let Some((_, champion, challenger)) = points.last() {
                h.put("<span>{}", &[&champion.map_or("–".to_owned(), number)]);
                change(h, *champion, *challenger);
                h.raw("</span>");
            }
            h.raw("</figcaption>");
            curve(h, &Curve { points });
            h.raw("</figure>");
        }
        h.raw("</div>");
    }
    table(h, &judged, &roles, &values);
    h.raw("</section>");
}

/// How the losses fell while models were trained.
pub(super) fn learning(h: &mut Html, report: &Report) {
    if report.trainings.is_empty() {
        return;
    }
    open(
        h,
        "learning",
        "Learning curves",
        &"Losses at every logged step; the height of a chart runs from the smallest to the largest. ITC grows while the queue fills.",
    );
    for training in &report.trainings {
        h.put("<h3>Round {}: {}</h3><div class=\"curves\">", &[&training.round, &training.role]);
        for (loss, points) in &training.losses {
            let (Some((_, first)), Some((steps, last))) = (points.first(), points.last()) else { continue };
            h.put("<figure><figcaption><b>{}</b>", &[&loss.to_uppercase()]);
            h.put("<span>{} → {} in {} steps</span></figcaption>", &[&number(*first), &number(*last), &count(*steps as u64)]);
            sparkline(h, points);
            h.raw("</figure>");
        }
        h.raw("</div>");
    }
    h.raw("</section>");
}

type Values<'a> = dyn Fn(&Round, &str) -> (Option<f64>, Option<f64>) + 'a;

fn table(h: &mut Html, judged: &[&Round], roles: &BTreeMap<&str, Vec<&str>>, values: &Values<'_>) {
    h.raw("<div class=\"scroll\"><table><thead><tr><th rowspan=\"2\">Metric</th>");
    for round in judged {
        h.put("<th colspan=\"3\" class=\"group\">Round {}</th>", &[&round.number]);
    }
    h.raw("</tr><tr>");
    for _ in judged {
        h.raw("<th class=\"num group\">Champion</th><th class=\"num\">Challenger</th><th class=\"num\">Change</th>");
    }
    h.raw("</tr></thead><tbody>");
    for (role, names) in roles {
        h.put("<tr class=\"role\"><th>{}</th>", &[&if role.is_empty() { "all models" } else { role }]);
        for result in judged.iter().filter_map(|r| r.result.as_ref()) {
            let trained = names.iter().any(|n| result.challenger_metrics.contains_key(*n));
            h.raw("<td colspan=\"3\" class=\"group\">");
            match (result.promoted.iter().any(|p| p == role), trained) {
                (true, _) => h.raw("<span class=\"badge good\">promoted</span>"),
                (false, true) if *role == crate::retrain::CLIP => {
                    h.raw("<span class=\"badge plain\">measures the version</span>")
                }
                (false, true) => h.raw("<span class=\"badge plain\">champion stays</span>"),
                (false, false) => h.raw("<span class=\"badge plain\">not trained</span>"),
            };
            h.raw("</td>");
        }
        h.raw("</tr>");
        for name in names {
            h.put("<tr><td>{}</td>", &[&label(name)]);
            for round in judged {
                let (champion, challenger) = values(round, name);
                let shown = |v: Option<f64>| v.map_or("–".to_owned(), number);
                h.put(
                    "<td class=\"num group\">{}</td><td class=\"num\">{}</td><td class=\"num\">",
                    &[&shown(champion), &shown(challenger)],
                );
                change(h, champion, challenger);
                h.raw("</td>");
            }
            h.raw("</tr>");
        }
    }
    h.raw("</tbody></table></div>");
}

/// How much better or worse the challenger is, with an arrow in the direction of the number.
fn change(h: &mut Html, champion: Option<f64>, challenger: Option<f64>) {
    let Some(by) = challenger.zip(champion).map(|(new, now)| new - now).filter(|d| d.is_finite()) else { return };
    if by.abs() < 5e-5 {
        h.raw("<em class=\"change\">±0</em>");
        return;
    }
    let (tone, arrow, sign) = if by > 0.0 { ("up", "▲", "+") } else { ("down", "▼", "−") };
    h.put("<em class=\"change {}\">{} {}{}</em>", &[&tone, &arrow, &sign, &number(by.abs())]);
}

/// A metric's name as the field writes it.
fn label(name: &str) -> String {
    let short = name.split_once('/').map_or(name, |(_, metric)| metric);
    let known = [("cider_d", "CIDEr-D"), ("rouge_l", "ROUGE-L"), ("auroc", "AUROC"), ("auroc_itc", "AUROC by ITC")];
    if let Some((_, label)) = known.iter().find(|(k, _)| *k == short) {
        return (*label).to_owned();
    }
    let (word, number) = split_number(short);
    let word = word.trim_end_matches('_');
    match number {
        Some(n) if word == "bleu" => format!("BLEU-{n}"),
        Some(n) if word == "tr_at" => format!("TR@{n}"),
        Some(n) if word == "ir_at" => format!("IR@{n}"),
        Some(n) if word == "zero_shot_at" => format!("zero-shot top-{n}"),
        _ => short.replace('_', " "),
    }
}

/// A name and the number at its end: `tr_at_10` comes after `tr_at_5`.
fn split_number(name: &str) -> (&str, Option<u64>) {
    let word = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (word, name[word.len()..].parse().ok())
}

/// What each stage did and how fast.
pub(super) fn stages(h: &mut Html, report: &Report) {
    open(
        h,
        "stages",
        "Stages",
        &"Time is that in which at least one task of the stage was at work; pauses between calls of the run do not count.",
    );
    if report.stages.is_empty() {
        nothing(h, "No task is done yet.");
        h.raw("</section>");
        return;
    }
    h.raw("<div class=\"scroll\"><table><thead><tr><th>Stage</th><th class=\"num\">Tasks</th><th class=\"num\">Reused</th>");
    h.raw("<th class=\"num\">Rows</th><th class=\"num\">Rows failed</th><th class=\"num\">Attempts failed</th>");
    h.raw("<th class=\"num\">Time</th><th class=\"num\">Rows/s</th></tr></thead><tbody>");
    for line in &report.stages {
        let none = || "–".to_owned();
        // What these write is not what takes their time.
        let rated = !matches!(line.stage, StageKind::Train | StageKind::Evaluate) && line.busy_ms > 0;
        let rate = rated.then(|| number(line.rows as f64 * 1000.0 / line.busy_ms as f64));
        let cells = [
            count(line.tasks),
            if line.reused > 0 { count(line.reused) } else { none() },
            count(line.rows),
            line.rows_failed.map_or_else(none, count),
            if line.failures > 0 { count(line.failures) } else { none() },
            duration(line.busy_ms),
            rate.unwrap_or_else(none),
        ];
        h.put("<tr><td>{}</td>", &[&title(line.stage)]);
        for cell in &cells {
            h.put("<td class=\"num\">{}</td>", &[cell]);
        }
        h.raw("</tr>");
    }
    h.raw("</tbody></table></div></section>");
}

/// Tasks that failed, the given-up ones first.
pub(super) fn failures(h: &mut Html, report: &Report) {
    if report.failed.is_empty() {
        return;
    }
    let lost = report.failed.iter().filter(|f| !f.recovered).count();
    let lead = format!("{} failed at least once; not done: {lost}.", counted(report.failed.len(), "task"));
    open(h, "failures", "Failed tasks", &lead);
    h.raw("<div class=\"scroll\"><table><thead><tr><th>Task</th><th>State</th><th class=\"num\">Attempts</th><th>Last error</th></tr></thead><tbody>");
    for task in report.failed.iter().take(MAX_FAILED) {
        h.put("<tr><td>{} <code>{}</code></td>", &[&title(task.last.stage), &task.last.task_id.0.short()]);
        match task.recovered {
            true => h.raw("<td><span class=\"badge good\">done later</span></td>"),
            false if task.last.retryable => h.raw("<td><span class=\"badge bad\">not done</span></td>"),
            false => h.raw("<td><span class=\"badge bad\">given up</span></td>"),
        };
        let error = shortened(&task.last.error, ERROR_LENGTH);
        h.put("<td class=\"num\">{}</td><td class=\"error\">{}</td></tr>", &[&task.attempts, &error]);
    }
    h.raw("</tbody></table></div>");
    if report.failed.len() > MAX_FAILED {
        h.put("<p class=\"nothing\">{} more are in the store.</p>", &[&(report.failed.len() - MAX_FAILED)]);
    }
    h.raw("</section>");
}

fn counted(n: usize, noun: &str) -> String {
    format!("{} {noun}{}", count(n as u64), if n == 1 { "" } else { "s" })
}

/// Which models made what, and with which settings.
pub(super) fn lineage(h: &mut Html, report: &Report) {
    open(h, "lineage", "Lineage", &"Everything is named by its digest; the first 12 characters are shown.");
    if report.rounds.is_empty() {
        nothing(h, "No round has begun.");
        h.raw("</section>");
        return;
    }
    h.raw(
        "<div class=\"scroll\"><table><thead><tr><th>Round</th><th>Captioner</th><th>Filter</th><th>Dataset</th><th>Digest</th>",
    );
    h.raw("<th>Build task</th><th class=\"num\">Shards read</th><th class=\"num\">Pairs</th><th class=\"num\">Noise</th></tr></thead><tbody>");
    for round in &report.rounds {
        let version = round.version.as_ref();
        let models = round.record.as_ref().map(|r| (Some(r.captioner), Some(r.filter)));
        let models = models.or_else(|| version.map(|v| (v.lineage.captioner, v.lineage.filter)));
        let none = || "–".to_owned();
        h.put("<tr><td>{}</td>", &[&round.number]);
        let digest = |h: &mut Html, d: Option<Digest>| {
            h.put("<td><code>{}</code></td>", &[&d.map_or_else(none, |d| d.short())]);
        };
        digest(h, models.and_then(|m| m.0));
        digest(h, models.and_then(|m| m.1));
        h.put("<td>{}</td>", &[&version.map_or_else(|| "not built".to_owned(), |v| format!("{} v{}", v.name, v.version))]);
        digest(h, version.map(|v| v.digest));
        digest(h, version.map(|v| v.lineage.build.0));
        let shards = version.map_or_else(none, |v| count(v.lineage.inputs.len() as u64));
        let pairs = version.map_or_else(none, |v| count(v.shards.iter().map(|s| s.rows).sum()));
        let noise = percent(round.noise().all);
        h.put("<td class=\"num\">{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td></tr>", &[&shards, &pairs, &noise]);
    }
    h.raw("</tbody></table></div>");
    if !report.models.is_empty() {
        h.raw("<h3>Models in service</h3><div class=\"scroll\"><table><thead><tr><th>Role</th><th>Model</th><th>Event</th>");
        h.raw("<th>Why</th><th>When</th></tr></thead><tbody>");
        for event in &report.models {
            h.put("<tr><td>{}</td><td><code>{}</code></td>", &[&event.role, &event.model.short()]);
            h.put("<td>{}</td><td class=\"error\">{}</td>", &[&event.action, &shortened(&event.reason, ERROR_LENGTH)]);
            h.put("<td class=\"when\">{}</td></tr>", &[&date(event.created_at_ms)]);
        }
        h.raw("</tbody></table></div>");
    }
    if let Some(version) = report.newest().and_then(|r| r.version.as_ref()) {
        let mut settings = Vec::new();
        flatten("build", &version.settings, &mut settings);
        h.raw("<h3>Settings of the newest version</h3><dl class=\"pairs\">");
        for (name, value) in &settings {
            h.put("<dt><code>{}</code></dt><dd>{}</dd>", &[name, &shortened(value, 300)]);
        }
        h.put("<dt>digest</dt><dd><code>{}</code></dd></dl>", &[&version.digest]);
    }
    h.raw("</section>");
}

/// Settings as `section.key` and value.
fn flatten(name: &str, value: &Value, into: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(k, v)| flatten(&format!("{name}.{k}"), v, into)),
        Value::Null => {}
        Value::String(text) => into.push((name.to_owned(), text.clone())),
        other => into.push((name.to_owned(), other.to_string())),
    }
}

/// What happened, for people.
pub(super) fn events(h: &mut Html, report: &Report) {
    if report.events.is_empty() {
        return;
    }
    h.put("\n<section id=\"events\"><details><summary><h2>History</h2> {}</summary>", &[&counted(report.events.len(), "event")]);
    h.raw("<ol class=\"events\">");
    for event in &report.events {
        h.put("<li><time>{}</time><span>{}</span></li>", &[&date(event.at_ms), &event.message]);
    }
    h.raw("</ol></details></section>");
}
