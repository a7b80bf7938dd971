//! What people and programs read: text, JSON, exit codes.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use capfilt_coordinator::CoordinatorError;
use capfilt_crawler::CrawlError;
use capfilt_store::StoreError;
use serde::Serialize;

/// The run is done, but some tasks were given up.
pub(crate) const INCOMPLETE: u8 = 4;
/// The user interrupted.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why the program ends without success.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Wrong arguments or config.
    Usage(String),
    /// The store.
    Store(anyhow::Error),
    /// Anything else.
    Other(anyhow::Error),
}

impl Failure {
    pub(crate) fn code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Other(_) => 1,
            Self::Usage(_) => 2,
            Self::Store(_) => 3,
        })
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Self::Usage(text) => text.clone(),
            Self::Store(e) | Self::Other(e) => capfilt_store::chain(e.as_ref()),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Unknown(text) => Self::Usage(text),
            e => Self::Store(e.into()),
        }
    }
}

impl From<CoordinatorError> for Failure {
    fn from(e: CoordinatorError) -> Self {
        match e {
            CoordinatorError::Store(e) => e.into(),
            e @ CoordinatorError::Setting { .. } => Self::Usage(e.to_string()),
            e => Self::Other(e.into()),
        }
    }
}

impl From<CrawlError> for Failure {
    fn from(e: CrawlError) -> Self {
        match e {
            CrawlError::Config { .. } | CrawlError::Format { .. } => Self::Usage(e.to_string()),
            e => Self::Other(e.into()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        Self::Other(e)
    }
}

/// One line on standard error.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "capfilt: {text}");
}

/// Text on standard output. A reader that has gone away is no error.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// JSON on standard output.
pub(crate) fn say_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    say(&serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?);
    Ok(())
}

/// 1234567 as `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// Bytes as a person says them.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Seconds as `1 h 02 min`, `3 min 05 s` or `12 s`.
pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A moment as `2026-11-23 14:05:09` (UTC).
pub(crate) fn moment(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970-01-01 (proleptic Gregorian calendar, eras of 400 years).
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Rows of cells in columns; the first row is the head. Numbers (cells of digits, `,`, `.`, `%`, `-`) stand to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    let longest = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..width).map(longest).collect();
    let numeric = |s: &str| s.chars().any(|c| c.is_ascii_digit()) && s.chars().all(|c| c.is_ascii_digit() || ",.%-+".contains(c));
    let right: Vec<bool> = (0..width)
        .map(|c| rows.len() > 1 && rows.iter().skip(1).filter_map(|r| r.get(c)).all(|s| s.is_empty() || numeric(s)))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (c, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[c].saturating_sub(cell.chars().count()));
            let _ = if right[c] { write!(line, "{pad}{cell}  ") } else { write!(line, "{cell}{pad}  ") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!(count(0), "0");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        assert_eq!(duration(59), "59 s");
        assert_eq!(duration(185), "3 min 05 s");
        assert_eq!(duration(3_720), "1 h 02 min");
        assert_eq!(moment(0), "1970-01-01 00:00:00");
        assert_eq!(moment(951_782_400_000), "2000-02-29 00:00:00");
        assert_eq!(moment(1_795_442_709_000), "2026-11-23 14:05:09");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["stage", "rows"], ["fetch", "1,200"], ["score", "9"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "stage   rows\nfetch  1,200\nscore      9");
    }
}
