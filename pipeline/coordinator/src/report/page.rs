//! The page: frame, headline, and the sections on the way of the pairs.

use std::fmt::Display;

use capfilt_schemas::{FetchStatus, Origin};

use super::chart::{Bar, Series, bars, histogram};
use super::data::{Report, Round};
use super::html::{Html, count, date, duration, nothing, number, open, percent, ratio};
use super::{gallery, rounds};

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut h = Html::default();
    h.raw("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    h.raw("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"color-scheme\" content=\"light dark\">");
    h.raw(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
    );
    h.put("<title>{} – capfilt run report</title><style>", &[&report.input.run]);
    h.raw(include_str!("style.css")).raw("</style></head>\n<body>");
    header(&mut h, report);
    h.raw("<main>");
    tiles(&mut h, report);
    h.raw("<div class=\"two\">");
    funnel(&mut h, report);
    fetch(&mut h, report);
    h.raw("</div><div class=\"two wide-left\">");
    scores(&mut h, report);
    noise(&mut h, report);
    h.raw("</div>");
    gallery::section(&mut h, report);
    rounds::metrics(&mut h, report);
    rounds::learning(&mut h, report);
    rounds::stages(&mut h, report);
    rounds::failures(&mut h, report);
    rounds::lineage(&mut h, report);
    rounds::events(&mut h, report);
    h.raw(
        "</main><footer>Written by <b>capfilt</b> from the store's records. This page stands alone: it loads nothing.</footer>",
    );
    h.raw("</body></html>\n");
    h.finish()
}

fn header(h: &mut Html, report: &Report) {
    let finished = report.rounds.iter().filter(|r| r.result.is_some()).count();
    let begun = report.rounds.len();
    h.put("<header><p class=\"eyebrow\">capfilt run report</p><h1>{}", &[&report.input.run]);
    match (begun, finished) {
        (0, _) => h.raw(" <span class=\"badge plain\">no round yet</span>"),
        (1, 1) => h.raw(" <span class=\"badge good\">1 round finished</span>"),
        (b, f) if b == f => h.put(" <span class=\"badge good\">{} rounds finished</span>", &[&f]),
        (b, _) => h.put(" <span class=\"badge plain\">round {} unfinished</span>", &[&b]),
    };
    h.raw("</h1><dl class=\"facts\">");
    let mut fact = |name: &'static str, value: &dyn Display| {
        h.put("<div><dt>{}</dt><dd>{}</dd></div>", &[&name, value]);
    };
    match report.newest().and_then(|r| r.version.as_ref()) {
        Some(v) => {
            fact("Dataset", &format_args!("{}, version {}", v.name, v.version));
            fact("Digest", &v.digest.short());
        }
        None => fact("Dataset", &format_args!("{}, no version yet", report.input.dataset)),
    }
    if let Some((from, to)) = report.span {
        fact("Began", &date(from));
        fact(if begun == finished { "Ended" } else { "Latest" }, &date(to));
        fact("At work", &duration(report.busy_ms));
    }
    h.raw("</dl></header>");
}

fn tiles(h: &mut Html, report: &Report) {
    let funnel = report.funnel();
    let step = |name: &str| funnel.steps.iter().find(|(step, _)| step == name).map(|(_, n)| *n);
    let tile = |h: &mut Html, name: &'static str, value: String, note: String| {
        h.put("<div class=\"tile\"><dt>{}</dt><dd>{}</dd><p>{}</p></div>", &[&name, &value, &note]);
    };
    h.raw("\n<dl class=\"tiles\">");
    let or_none = |n: Option<u64>| n.map_or("–".to_owned(), count);
    let selected = step("selected").map(|n| format!("{} selected", count(n))).unwrap_or_default();
    tile(h, "Candidates", or_none(step("candidates")), selected);
    let (tried, ok) = (report.fetch.values().sum::<u64>(), report.fetch.get("ok").copied().unwrap_or(0));
    let fetched = (tried > 0).then_some(ok);
    tile(
        h,
        "Fetched",
        or_none(fetched),
        ratio(ok, tried).map(|r| format!("{} of the tries", percent(Some(r)))).unwrap_or_default(),
    );
    let newest = report.newest();
    let version = newest.and_then(|r| r.version.as_ref());
    let kept = version.map(|v| v.shards.iter().map(|s| s.rows).sum());
    let of = |origin: &Origin| {
        let n = version?.counts.get(origin.as_str()).copied().filter(|n| *n > 0)?;
        Some(format!("{} {origin}", count(n)))
    };
    let origins: Vec<String> = Origin::ALL.iter().filter_map(of).collect();
    tile(h, "Kept pairs", or_none(kept), origins.join(", "));
    let ratios = newest.map(Round::noise);
    let parts = ratios.and_then(|n| Some(format!("web {}, synthetic {}", percent(Some(n.web?)), percent(n.synthetic))));
    tile(h, "Noise ratio", percent(ratios.and_then(|n| n.all)), parts.unwrap_or_default());
    let results: Vec<_> = report.rounds.iter().filter_map(|r| r.result.as_ref()).collect();
    let promoted: usize = results.iter().map(|r| r.promoted.len()).sum();
    let trained = results.iter().filter(|r| !r.challenger_metrics.is_empty()).count();
    let note = match trained {
        0 => "no model was trained".to_owned(),
        1 => "trained in 1 round".to_owned(),
        n => format!("trained in {n} rounds"),
    };
    tile(h, "Promoted models", promoted.to_string(), note);
    h.raw("</dl>");
}

fn funnel(h: &mut Html, report: &Report) {
    open(
        h,
        "funnel",
        "From candidates to kept pairs",
        &"How many are left after each step, as a share of the first and of the step before.",
    );
    let steps = report.funnel().steps;
    if steps.is_empty() {
        nothing(h, "Nothing was gathered yet.");
    }
    // Up to the images that are judged every step leaves fewer; the texts of those images are counted anew.
    let texts = steps.iter().position(|(name, _)| name.contains("text")).unwrap_or(steps.len());
    let (images, texts) = steps.split_at(texts);
    let first = images.first().map_or(0, |s| s.1);
    let lines = images.iter().enumerate().map(|(i, (name, n))| {
        let before = i.checked_sub(1).map(|b| images[b].1);
        let note = before.map(|b| format!("{} · {} of previous", percent(ratio(*n, first)), percent(ratio(*n, b))));
        step(name, *n, first, note.unwrap_or_default(), "plain")
    });
    bars(h, &lines.collect::<Vec<_>>());
    if let Some((_, judged)) = texts.first() {
        let most = texts.iter().map(|t| t.1).max().unwrap_or(0);
        h.raw("<h3>Their texts</h3>");
        let lines = texts.iter().enumerate().map(|(i, (name, n))| {
            let tone = Origin::ALL.iter().map(|o| o.as_str()).find(|o| name.ends_with(o)).unwrap_or("plain");
            let part = i > 0 && name.starts_with("kept");
            let note = if part { format!("{} of judged", percent(ratio(*n, *judged))) } else { String::new() };
            step(name, *n, most, note, tone)
        });
        bars(h, &lines.collect::<Vec<_>>());
    }
    if !report.discover.is_empty() {
        h.raw("<details><summary>What the search for candidates saw</summary><dl class=\"pairs\">");
        for (name, n) in &report.discover {
            let value = if n.fract() == 0.0 && *n >= 0.0 { count(*n as u64) } else { number(*n) };
            h.put("<dt>{}</dt><dd>{}</dd>", &[&name.replace('_', " "), &value]);
        }
        h.raw("</dl></details>");
    }
    h.raw("</section>");
}

fn fetch(h: &mut Html, report: &Report) {
    let (tried, ok) = (report.fetch.values().sum::<u64>(), report.fetch.get("ok").copied().unwrap_or(0));
    let lead = match tried {
        0 => String::new(),
        _ => format!("{} of {} images arrived ({}). Why the others did not:", count(ok), count(tried), percent(ratio(ok, tried))),
    };
    open(h, "fetch", "Failures of the fetch", &lead);
    let mut failed: Vec<(&str, u64)> = report.fetch.iter().filter(|(s, _)| *s != "ok").map(|(s, n)| (s.as_str(), *n)).collect();
    failed.sort_by_key(|(status, n)| (std::cmp::Reverse(*n), *status));
    let most = failed.first().map_or(0, |f| f.1);
    if tried == 0 {
        nothing(h, "Nothing was fetched yet.");
    } else if failed.is_empty() {
        nothing(h, "No failures.");
    }
    let lines = failed.into_iter().map(|(status, n)| Bar {
        label: status.to_owned(),
        hint: FetchStatus::parse(status).map_or("", meaning),
        share: ratio(n, most).unwrap_or(0.0),
        value: count(n),
        note: percent(ratio(n, tried)),
        tone: "bad",
    });
    bars(h, &lines.collect::<Vec<_>>());
    h.raw("</section>");
}

fn step(name: &str, n: u64, longest: u64, note: String, tone: &'static str) -> Bar<'static> {
    Bar { label: name.replace('_', " "), hint: "", share: ratio(n, longest).unwrap_or(0.0), value: count(n), note, tone }
}

const fn meaning(status: FetchStatus) -> &'static str {
    match status {
        FetchStatus::Ok => "",
        FetchStatus::BadUrl => "not an absolute http(s) address",
        FetchStatus::Robots => "forbidden by robots.txt",
        FetchStatus::OptOut => "opted out of training",
        FetchStatus::Dns => "host not found",
        FetchStatus::ForbiddenAddress => "not on the public internet",
        FetchStatus::Connect => "no connection",
        FetchStatus::Tls => "TLS failed",
        FetchStatus::Timeout => "deadline passed",
        FetchStatus::Redirect => "too many redirects",
        FetchStatus::HttpClient => "refused or not there",
        FetchStatus::RateLimited => "too many requests",
        FetchStatus::HttpServer => "server error",
        FetchStatus::TooLarge => "body over the cap",
        FetchStatus::Truncated => "body ended early",
        FetchStatus::Empty => "empty body",
        FetchStatus::HashMismatch => "not the expected file",
        FetchStatus::NotImage => "not a known image format",
        FetchStatus::TooManyPixels => "over the pixel guard",
        FetchStatus::Decode => "image is broken",
        FetchStatus::TooSmall => "under the least side",
        FetchStatus::Aspect => "too elongated",
        FetchStatus::TakenDown => "taken down",
    }
}

fn scores(h: &mut Html, report: &Report) {
    open(
        h,
        "scores",
        "Scores of the filter",
        &"Probability that text and image match, for the newest version; each series as shares of its own texts.",
    );
    let newest = report.newest();
    let series = [("Web texts", "web", Origin::Web), ("Synthetic texts", "synthetic", Origin::Synthetic)];
    let series = series.map(|(name, tone, origin)| Some(Series { name, tone, bins: newest?.histogram(origin)? }));
    let series: Vec<Series> = series.into_iter().flatten().collect();
    if series.is_empty() {
        nothing(h, "Not recorded.");
    } else {
        h.raw("<p class=\"legend\">");
        for s in &series {
            h.put("<span><i class=\"{}\"></i>{} <small>{}</small></span>", &[&s.tone, &s.name, &count(s.bins.iter().sum())]);
        }
        h.raw("</p>");
        histogram(h, &series, report.threshold().map(f64::from));
    }
    h.raw("</section>");
}

fn noise(h: &mut Html, report: &Report) {
    open(h, "noise", "Noise ratio", &"Share of the judged texts that the policy threw out, by round.");
    let mut any = false;
    for round in report.rounds.iter().filter(|r| r.version.is_some()) {
        let noise = round.noise();
        let lines = [(Origin::Web, noise.web), (Origin::Synthetic, noise.synthetic)];
        let bar = |(origin, share): (Origin, Option<f64>)| {
            let tone = if origin == Origin::Web { "web" } else { "synthetic" };
            Some(Bar { label: origin.to_string(), hint: "", share: share?, value: percent(share), note: String::new(), tone })
        };
        let lines: Vec<Bar<'_>> = lines.into_iter().filter_map(bar).collect();
        if lines.is_empty() && noise.all.is_none() {
            continue;
        }
        any = true;
        h.put("<h3>Round {} <small>{} of all texts</small></h3>", &[&round.number, &percent(noise.all)]);
        bars(h, &lines);
    }
    if !any {
        nothing(h, "Not recorded.");
    }
    h.raw("</section>");
}
