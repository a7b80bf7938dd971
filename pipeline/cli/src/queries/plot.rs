//! Charts of how texts are spread over queries: in the terminal, and as SVG, bare or in an HTML page.

use std::fmt::Write as _;
use std::path::Path;

use capfilt_coordinator::marginals::{Marginals, Side};

use crate::output::count;

/// Columns and lines of the chart in the terminal.
const COLUMNS: usize = 64;
const LINES: usize = 14;

/// Points of a curve in the SVG.
const POINTS: usize = 300;

/// Texts of a query by its rank, both axes logarithmic: `o` as found, `x` as drawn by balancing.
pub(crate) fn terminal(m: &Marginals) -> String {
    let curves = [(Some(m.before.ranked()), 'o'), (m.after.as_ref().map(Side::ranked), 'x')];
    let longest = curves.iter().filter_map(|(c, _)| c.as_ref().map(Vec::len)).max().unwrap_or(0).max(2);
    let highest = curves.iter().filter_map(|(c, _)| c.as_ref()?.first().copied()).max().unwrap_or(0).max(2);
    let mut grid = vec![[' '; COLUMNS]; LINES];
    for (counts, mark) in &curves {
        let Some(counts) = counts else { continue };
        #[expect(clippy::needless_range_loop, reason = "lines are indexed, columns counted")]
        for column in 0..COLUMNS {
            let rank = (longest as f64).powf(column as f64 / (COLUMNS - 1) as f64).round() as usize;
            let Some(n) = counts.get(rank - 1) else { continue };
            let height = (*n as f64).ln() / (highest as f64).ln();
            let line = ((1.0 - height) * (LINES - 1) as f64).round() as usize;
            grid[line.min(LINES - 1)][column] = *mark;
        }
    }
    let width = count(highest).len();
    let mut text = String::from("texts of a query by its rank, o found, x drawn, both axes logarithmic\n");
    for (i, line) in grid.iter().enumerate() {
        let label = match i {
            0 => count(highest),
            i if i == LINES - 1 => "1".to_owned(),
            _ => String::new(),
        };
        let _ = writeln!(text, "{label:>width$} |{}", line.iter().collect::<String>().trim_end());
    }
    let last = count(longest as u64);
    let _ = write!(text, "{:>width$} +{}\n{:>width$}  1{last:>space$}", "", "-".repeat(COLUMNS), "", space = COLUMNS - 1);
    text
}

/// The charts as a file of the kind that its name asks for.
///
/// # Errors
/// If it asks for neither SVG nor HTML.
pub(crate) fn file(path: &Path, m: &Marginals, listed: Option<usize>) -> Result<String, String> {
    let charts = svg(m, listed);
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => Ok(charts),
        Some("html") => Ok(format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Queries and texts</title>\
             <meta name=\"color-scheme\" content=\"light\"></head><body>{charts}</body></html>\n"
        )),
        _ => Err(format!("`{}`: a plot is a file ending in .svg or .html", path.display())),
    }
}

const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 66.0;
const TOP: f64 = 44.0;
const FOUND: &str = "#2f6fed";
const TAKEN: &str = "#e08a00";

/// One chart with its axes, from (0, 0) below left to (1, 1).
struct Panel {
    x: f64,
    svg: String,
}

impl Panel {
    fn new(x: f64, title: &str, below: &str) -> Self {
        let mut svg = String::new();
        let (right, bottom, middle) = (x + LEFT + WIDTH, TOP + HEIGHT, x + LEFT + WIDTH / 2.0);
        let _ = write!(svg, "<text x=\"{}\" y=\"{}\" font-weight=\"600\">{title}</text>", x + LEFT, TOP - 18.0);
        let _ = write!(svg, "<path d=\"M{} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#46536a\"/>", x + LEFT);
        let _ = write!(svg, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{below}</text>", bottom + 40.0);
        Self { x, svg }
    }

    fn at(&self, (x, y): (f64, f64)) -> (f64, f64) {
        (self.x + LEFT + x * WIDTH, TOP + (1.0 - y) * HEIGHT)
    }

    fn tick_x(&mut self, x: f64, label: &str) {
        let (x, y) = self.at((x, 0.0));
        let _ =
            write!(self.svg, "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#5c6573\">{label}</text>", y + 18.0);
    }

    fn tick_y(&mut self, y: f64, label: &str) {
        let ((x, y), (right, _)) = (self.at((0.0, y)), self.at((1.0, y)));
        let _ = write!(self.svg, "<path d=\"M{x:.1} {y:.1}H{right:.1}\" stroke=\"#e3e6eb\"/>");
        let _ = write!(
            self.svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#5c6573\">{label}</text>",
            x - 8.0,
            y + 4.0
        );
    }

    fn line(&mut self, points: impl Iterator<Item = (f64, f64)>, colour: &str) {
        let points: Vec<_> = points.map(|p| self.at(p)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ =
            write!(self.svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>", points.join(" "));
    }
}

/// Two charts side by side: texts by rank, and how the entries add up from the rarest query to the most frequent.
fn svg(m: &Marginals, listed: Option<usize>) -> String {
    let sides: Vec<(Vec<u64>, &str)> = [(Some(&m.before), FOUND), (m.after.as_ref(), TAKEN)]
        .into_iter()
        .filter_map(|(side, colour)| Some((side?.ranked(), colour)))
        .collect();
    let queries = sides.iter().map(|(c, _)| c.len()).chain(listed).max().unwrap_or(0).max(2);
    let highest = sides.iter().filter_map(|(c, _)| c.first().copied()).max().unwrap_or(0).max(2);
    let log = |n: f64, most: f64| n.max(1.0).ln() / most.ln();
    let mut ranks = Panel::new(0.0, "Texts of a query by its rank", "rank of the query (logarithmic)");
    for power in 0..=18 {
        let n = 10_u64.pow(power);
        if n <= highest {
            ranks.tick_y(log(n as f64, highest as f64), &count(n));
        }
        if n <= queries as u64 {
            ranks.tick_x(log(n as f64, queries as f64), &count(n));
        }
    }
    if m.threshold <= highest {
        let y = log(m.threshold as f64, highest as f64);
        let ((x, y), (right, _)) = (ranks.at((0.0, y)), ranks.at((1.0, y)));
        let _ = write!(ranks.svg, "<path d=\"M{x:.1} {y:.1}H{right:.1}\" stroke=\"#c0362c\" stroke-dasharray=\"5 4\"/>");
    }
    let mut sums =
        Panel::new(LEFT + WIDTH + 40.0, "Share of entries held by the rarer queries", "share of all queries, rarest first");
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        sums.tick_x(share, &format!("{:.0}%", share * 100.0));
        sums.tick_y(share, &format!("{:.0}%", share * 100.0));
    }
    for (counts, colour) in &sides {
        let last = counts.len().max(1) as f64;
        let steps = (0..=POINTS).map(|i| (last.powf(i as f64 / POINTS as f64).round() as usize).max(1));
        let points =
            steps.filter_map(|rank| Some((log(rank as f64, queries as f64), log(*counts.get(rank - 1)? as f64, highest as f64))));
        ranks.line(points, colour);
        sums.line(added_up(counts, queries).into_iter(), colour);
    }
    let (width, height) = (2.0 * (LEFT + WIDTH) + 60.0, TOP + HEIGHT + 84.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" role=\"img\" aria-label=\"Texts by query\">\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{}{}",
        ranks.svg, sums.svg
    );
    let legend = [("found", FOUND), ("drawn", TAKEN)];
    for (i, (name, colour)) in legend.iter().take(sides.len()).enumerate() {
        let x = LEFT + i as f64 * 90.0;
        let y = height - 14.0;
        let _ = write!(svg, "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>", y - 5.0);
        let _ = write!(svg, "<text x=\"{}\" y=\"{y}\">{name}</text>", x + 20.0);
    }
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{}\" fill=\"#c0362c\">- - {} for a query</text></svg>",
        LEFT + 200.0,
        height - 14.0,
        count(m.threshold)
    );
    svg
}

/// The share of entries that the rarest queries hold, at even shares of all queries; those without a text come first.
fn added_up(ranked: &[u64], queries: usize) -> Vec<(f64, f64)> {
    let total: u64 = ranked.iter().sum();
    let mut points = vec![(0.0, 0.0)];
    let (mut sum, mut next) = (0, 1);
    for (i, n) in std::iter::repeat_n(0, queries - ranked.len()).chain(ranked.iter().rev().copied()).enumerate() {
        sum += n;
        let share = (i + 1) as f64 / queries as f64;
        if share * POINTS as f64 >= f64::from(next) || i + 1 == queries {
            points.push((share, sum as f64 / total.max(1) as f64));
            next = (share * POINTS as f64) as u32 + 1;
        }
    }
    points
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn some(counts: &[u64], after: Option<&[u64]>) -> Marginals {
        let side = |counts: &[u64]| Side { counts: counts.to_vec(), ..Side::default() };
        Marginals {
            texts_seen: None,
            share_matched: None,
            threshold: 8,
            before: side(counts),
            after: after.map(side),
            top: Vec::new(),
        }
    }

    #[test]
    fn entries_add_up_from_the_rarest_query() {
        assert_eq!(added_up(&[6, 3, 1], 4), [(0.0, 0.0), (0.25, 0.0), (0.5, 0.1), (0.75, 0.4), (1.0, 1.0)]);
        assert_eq!(added_up(&[], 1).last(), Some(&(1.0, 0.0)));
        assert!(added_up(&vec![5; 500_000], 500_000).len() <= POINTS + 2);
    }

    #[test]
    fn charts_of_any_counts_can_be_drawn() {
        for (before, after) in
            [(vec![], None), (vec![0, 0], None), (vec![1], Some(vec![1])), (vec![900, 3, 0, 1], Some(vec![8, 3, 0, 1]))]
        {
            let m = some(&before, after.as_deref());
            let chart = file(Path::new("a.svg"), &m, Some(5)).unwrap();
            assert!(!chart.contains("NaN") && !chart.contains("inf\""), "{chart}");
            assert_eq!(chart.matches("<polyline").count(), if after.is_some() { 4 } else { 2 });
            let lines = terminal(&m);
            assert_eq!(lines.lines().count(), LINES + 3, "{lines}");
        }
        assert!(file(Path::new("a.png"), &some(&[], None), None).is_err());
    }

    #[test]
    fn the_terminal_shows_head_and_cap() {
        let m = some(&[1000, 100, 10, 1], Some(&[8, 8, 8, 1]));
        let lines: Vec<String> = terminal(&m).lines().map(str::to_owned).collect();
        assert!(lines[1].starts_with("1,000 |o"), "{}", lines[1]);
        assert!(lines[LINES].ends_with('x'), "{}", lines[LINES]);
    }
}
