//! The page's charts: bars in HTML, curves and histograms in SVG. Colours come from the style sheet by class.

use super::html::{Html, count, percent, ratio};

/// A line of a bar chart.
pub(super) struct Bar<'a> {
    pub(super) label: String,
    /// What the label means, in small print.
    pub(super) hint: &'a str,
    /// Length as a share of the longest possible bar.
    pub(super) share: f64,
    pub(super) value: String,
    /// Further facts beside the value, in small print.
    pub(super) note: String,
    /// Class for the colour: one of the style sheet's `web`, `synthetic`, `human`, `good`, `bad`, `plain`.
    pub(super) tone: &'static str,
}

/// Horizontal bars, one below the other.
pub(super) fn bars(h: &mut Html, bars: &[Bar<'_>]) {
    h.raw("<ul class=\"bars\">");
    for bar in bars {
        let width = format!("{:.2}", bar.share.clamp(0.0, 1.0) * 100.0);
        h.put("<li><span class=\"label\">{}", &[&bar.label]);
        if !bar.hint.is_empty() {
            h.put(" <small>{}</small>", &[&bar.hint]);
        }
        h.put("</span><span class=\"value\">{}", &[&bar.value]);
        if !bar.note.is_empty() {
            h.put(" <small>{}</small>", &[&bar.note]);
        }
        h.put("</span><span class=\"track\"><i class=\"{}\" style=\"width:{}%\"></i></span></li>", &[&bar.tone, &width]);
    }
    h.raw("</ul>");
}

/// One series of a histogram over [0, 1].
pub(super) struct Series {
    pub(super) name: &'static str,
    /// Class for the colour.
    pub(super) tone: &'static str,
    /// Texts in each of equal parts of [0, 1].
    pub(super) bins: Vec<u64>,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 748.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 252.0;

/// Histograms side by side in every part of [0, 1], each as shares of its own texts, with the line from which on texts are kept
/// if there is such a line.
pub(super) fn histogram(h: &mut Html, series: &[Series], threshold: Option<f64>) {
    let total = |s: &Series| s.bins.iter().sum::<u64>();
    let shares = series.iter().flat_map(|s| s.bins.iter().filter_map(move |n| ratio(*n, total(s))));
    let (top, step) = scale(shares.fold(0.0, f64::max));
    let x = |v: f64| LEFT + v * (RIGHT - LEFT);
    let y = |v: f64| BOTTOM - v / top * (BOTTOM - TOP);
    let at = |v: f64| format!("{v:.1}");
    let threshold = threshold.map(|t| t.clamp(0.0, 1.0));
    h.put(
        "<svg class=\"histogram\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"Histogram of ITM scores\">",
        &[&WIDTH, &HEIGHT],
    );
    if let Some(line) = threshold.map(x) {
        let removed = [at(LEFT), at(TOP), at(line - LEFT), at(BOTTOM - TOP)];
        h.put("<rect class=\"removed\" x=\"{}\" y=\"{}\" ", &[&removed[0], &removed[1]]);
        h.put("width=\"{}\" height=\"{}\"/>", &[&removed[2], &removed[3]]);
    }
    let mut tick = 0.0;
    while tick <= top + step / 2.0 {
        let (left, right, height, label) = (at(LEFT), at(RIGHT), at(y(tick)), format!("{:.0}%", tick * 100.0));
        h.put("<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>", &[&left, &right, &height, &height]);
        h.put("<text class=\"end\" x=\"{}\" y=\"{}\">{}</text>", &[&at(LEFT - 8.0), &at(y(tick) + 4.0), &label]);
        tick += step;
    }
    for (nth, s) in series.iter().enumerate() {
        let bin = 1.0 / s.bins.len() as f64;
        let wide = x(bin) - x(0.0);
        let each = wide * 0.84 / series.len() as f64;
        for (i, n) in s.bins.iter().enumerate() {
            let share = ratio(*n, total(s));
            let from = i as f64 * bin;
            let left = x(from) + wide * 0.08 + each * nth as f64;
            // A bin that holds something is seen, however small its share.
            let height = share.map_or(0.0, |v| BOTTOM - y(v)).max(if *n > 0 { 1.5 } else { 0.0 });
            let side = if threshold.is_some_and(|t| from + bin <= t + 1e-9) { " low" } else { "" };
            h.put("<rect class=\"{}{}\" ", &[&s.tone, &side]);
            h.put("x=\"{}\" y=\"{}\" ", &[&at(left), &at(BOTTOM - height)]);
            h.put("width=\"{}\" height=\"{}\" rx=\"1.5\">", &[&at(each - 1.0), &at(height)]);
            let (range, share) = (format!("{from:.2} to {:.2}", from + bin), percent(share));
            h.put("<title>{}, ITM {}: {} texts, {}</title></rect>", &[&s.name, &range, &count(*n), &share]);
        }
    }
    h.put("<line class=\"axis\" x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>", &[&LEFT, &RIGHT, &BOTTOM, &BOTTOM]);
    for quarter in 0..=4 {
        let v = f64::from(quarter) / 4.0;
        h.put("<text class=\"middle\" x=\"{}\" y=\"{}\">{}</text>", &[&at(x(v)), &at(BOTTOM + 20.0), &v]);
    }
    h.put("<text class=\"middle\" x=\"{}\" y=\"{}\">ITM probability</text>", &[&at(x(0.5)), &at(BOTTOM + 42.0)]);
    if let Some(t) = threshold {
        let line = x(t);
        h.put(
            "<line class=\"threshold\" x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>",
            &[&at(line), &at(line), &(TOP - 8.0), &BOTTOM],
        );
        let (anchor, aside) = if t > 0.75 { ("end", -7.0) } else { ("start", 7.0) };
        let label = format!("kept from {t:.2} on");
        h.put("<text class=\"{} strong\" x=\"{}\" y=\"{}\">{}</text>", &[&anchor, &at(line + aside), &(TOP - 12.0), &label]);
    }
    h.raw("</svg>");
}

/// The top of a scale that holds `max`, and the distance of its ticks: 3 to 5 steps of 1, 2, 2.5 or 5 times a power of ten.
fn scale(max: f64) -> (f64, f64) {
    let max = if max > 0.0 { max.min(1.0) } else { 1.0 };
    let rough = max / 4.0;
    let power = 10_f64.powf(rough.log10().floor());
    let steps: &[f64] = if power < 0.1 { &[1.0, 2.0, 5.0] } else { &[1.0, 2.0, 2.5, 5.0] };
    // Ticks are written as whole percents.
    let step = steps.iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(10.0 * power).max(0.01);
    ((max / step).ceil() * step, step)
}

/// One metric over the rounds: what the round's model has, and what the model trained in it has.
pub(super) struct Curve {
    /// (round, champion, challenger), first round first.
    pub(super) points: Vec<(u32, Option<f64>, Option<f64>)>,
}

/// A small chart: champions as a line with dots, challengers as rings.
pub(super) fn curve(h: &mut Html, curve: &Curve) {
    const W: f64 = 240.0;
    const H: f64 = 84.0;
    const MARGIN: f64 = 14.0;
    let values = curve.points.iter().flat_map(|(_, a, b)| [*a, *b]).flatten().filter(|v| v.is_finite());
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return;
    }
    // A line that hardly moves shall look flat.
    let room = ((high - low) * 0.15).max(high.abs().max(1e-6) * 0.01);
    let (low, high) = (low - room, high + room);
    let last = curve.points.len().saturating_sub(1).max(1) as f64;
    let x = |i: usize| if curve.points.len() == 1 { W / 2.0 } else { MARGIN + i as f64 / last * (W - 2.0 * MARGIN) };
    let y = |v: f64| H - 26.0 - (v - low) / (high - low) * (H - 40.0);
    let at = |v: f64| format!("{v:.1}");
    h.put("<svg class=\"curve\" viewBox=\"0 0 {} {}\" aria-hidden=\"true\">", &[&W, &H]);
    h.put("<line class=\"grid\" x1=\"0\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>", &[&W, &(H - 20.0), &(H - 20.0)]);
    let champions: Vec<(f64, f64)> =
        curve.points.iter().enumerate().filter_map(|(i, p)| Some((x(i), y(p.1.filter(|v| v.is_finite())?)))).collect();
    let line: Vec<String> = champions.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    h.put("<polyline points=\"{}\"/>", &[&line.join(" ")]);
    for (i, (round, champion, challenger)) in curve.points.iter().enumerate() {
        let finite = |v: &Option<f64>| v.filter(|v| v.is_finite());
        if let Some((now, new)) = finite(champion).zip(finite(challenger)) {
            h.put(
                "<line class=\"lift\" x1=\"{}\" x2=\"{}\" y1=\"{}\" y2=\"{}\"/>",
                &[&at(x(i)), &at(x(i)), &at(y(now)), &at(y(new))],
            );
        }
        if let Some(new) = finite(challenger) {
            h.put("<circle class=\"challenger\" cx=\"{}\" cy=\"{}\" r=\"4\"/>", &[&at(x(i)), &at(y(new))]);
        }
        if let Some(now) = finite(champion) {
            h.put("<circle class=\"champion\" cx=\"{}\" cy=\"{}\" r=\"4\"/>", &[&at(x(i)), &at(y(now))]);
        }
        h.put("<text class=\"middle\" x=\"{}\" y=\"{}\">{}</text>", &[&at(x(i)), &(H - 5.0), round]);
    }
    h.raw("</svg>");
}

/// A small chart of points from left to right.
pub(super) fn sparkline(h: &mut Html, points: &[(f64, f64)]) {
    const W: f64 = 240.0;
    const H: f64 = 64.0;
    const MARGIN: f64 = 4.0;
    let points: Vec<(f64, f64)> = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        (low, (high - low).max(f64::MIN_POSITIVE))
    };
    let (left, width) = range(&mut points.iter().map(|p| p.0));
    let (bottom, height) = range(&mut points.iter().map(|p| p.1));
    let place = |(x, y): &(f64, f64)| {
        let (x, y) = ((x - left) / width, (y - bottom) / height);
        format!("{:.1},{:.1}", MARGIN + x * (W - 2.0 * MARGIN), H - MARGIN - y * (H - 2.0 * MARGIN))
    };
    let places: Vec<String> = points.iter().map(place).collect();
    h.put("<svg class=\"curve\" viewBox=\"0 0 {} {}\" aria-hidden=\"true\">", &[&W, &H]);
    h.put("<polyline points=\"{}\"/></svg>", &[&places.join(" ")]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_round_and_hold_everything() {
        for (max, expected) in [(0.0, 1.0), (1.0, 1.0), (0.62, 0.8), (0.13, 0.15), (0.041, 0.06)] {
            let (top, step) = scale(max);
            assert!((top - expected).abs() < 1e-9, "{max}: {top}");
            assert!(top >= max && (2.0..=5.1).contains(&(top / step)), "{max}: {top} by {step}");
        }
    }

    #[test]
    fn charts_of_nothing_are_no_error() {
        let mut h = Html::default();
        curve(&mut h, &Curve { points: vec![(1, None, Some(f64::NAN))] });
        sparkline(&mut h, &[(1.0, f64::NAN), (2.0, 3.0)]);
        sparkline(&mut h, &[]);
        histogram(&mut h, &[Series { name: "web", tone: "web", bins: vec![0; 20] }], Some(0.5));
        let page = h.finish();
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
