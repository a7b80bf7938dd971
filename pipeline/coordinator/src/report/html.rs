//! Writing HTML so that no text can become markup, and numbers as people read them.

use std::fmt::{Display, Write as _};

use capfilt_schemas::StageKind;

/// A page being written. Markup can only come from literals; whatever is data goes through an escape.
#[derive(Debug, Default)]
pub(super) struct Html(String);

impl Html {
    /// Appends `markup`, each `{}` in it replaced by the next of `texts`, escaped. What is escaped is safe between tags and within a
    /// quoted attribute.
    pub(super) fn put(&mut self, markup: &'static str, texts: &[&dyn Display]) -> &mut Self {
        debug_assert_eq!(markup.matches("{}").count(), texts.len(), "{markup}");
        let mut pieces = markup.split("{}");
        self.0.push_str(pieces.next().unwrap_or_default());
        for (piece, text) in pieces.zip(texts) {
            self.text(text).0.push_str(piece);
        }
        self
    }

    /// Appends markup.
    pub(super) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.0.push_str(markup);
        self
    }

    /// Appends a text, escaped.
    pub(super) fn text(&mut self, text: &dyn Display) -> &mut Self {
        // Writing to a string cannot fail.
        let _ = write!(Escape(&mut self.0), "{text}");
        self
    }

    /// Appends base64 of `bytes`.
    pub(super) fn base64(&mut self, bytes: &[u8]) -> &mut Self {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode_string(bytes, &mut self.0);
        self
    }

    /// The page.
    pub(super) fn finish(self) -> String {
        self.0
    }
}

struct Escape<'a>(&'a mut String);

impl std::fmt::Write for Escape<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                '\n' | '\t' => self.0.push(' '),
                // A text from the web may hold anything; control characters have no place in HTML.
                c if c.is_control() => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

/// `12,345`.
pub(super) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(c);
    }
    text
}

/// `part` of `whole` as a ratio; `None` if there is no whole.
pub(super) fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// `12.3%`; `–` if there is no ratio.
pub(super) fn percent(ratio: Option<f64>) -> String {
    match ratio.filter(|r| r.is_finite()) {
        Some(r) if (0.9995..1.0).contains(&r) => "99.9%".to_owned(),
        Some(r) if r > 0.0 && r < 0.0005 => "<0.1%".to_owned(),
        Some(r) => format!("{:.1}%", r * 100.0),
        None => "–".to_owned(),
    }
}

/// A measured value with three significant digits or so.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        "–".to_owned()
    } else if size >= 1000.0 {
        format!("{}{}", if value < 0.0 { "−" } else { "" }, count(size.round() as u64))
    } else {
        let decimals = if size >= 100.0 {
            0
        } else if size >= 10.0 {
            1
        } else {
            3
        };
        format!("{value:.decimals$}").replace('-', "−")
    }
}

/// `1 h 03 min`, `4 min 12 s`, `7.5 s`, `850 ms`.
pub(super) fn duration(ms: u64) -> String {
    let s = ms / 1000;
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", s, ms % 1000 / 100),
        60_000..3_600_000 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// `2026-02-28 13:05 UTC`.
pub(super) fn date(ms: u64) -> String {
    let (days, minutes) = (ms / 86_400_000, ms / 60_000 % 1440);
    let (mut year, mut left) = (1970, days);
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    loop {
        let length = if leap(year) { 366 } else { 365 };
        if left < length {
            break;
        }
        left -= length;
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02} UTC", left + 1, minutes / 60, minutes % 60)
}

/// At most `limit` characters of a text, with a mark where more followed.
pub(super) fn shortened(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((end, _)) => format!("{}…", text[..end].trim_end()),
        None => text.to_owned(),
    }
}

/// Opens a section.
pub(super) fn open(h: &mut Html, id: &'static str, title: &'static str, lead: &dyn Display) {
    h.put("\n<section id=\"{}\"><h2>{}</h2>", &[&id, &title]);
    let lead = lead.to_string();
    if !lead.is_empty() {
        h.put("<p class=\"lead\">{}</p>", &[&lead]);
    }
}

/// What stands where there is nothing to show.
pub(super) fn nothing(h: &mut Html, why: &'static str) {
    h.put("<p class=\"nothing\">{}</p>", &[&why]);
}

/// A stage's name as a title.
pub(super) fn title(stage: StageKind) -> String {
    let name = stage.name();
    name[..1].to_uppercase() + &name[1..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_stays_a_text() {
        let mut h = Html::default();
        h.put("<p title=\"{}\">{}</p>", &[&"\" onload='x'", &"<script>a && b</script>\u{0}{}"]);
        assert_eq!(
            h.finish(),
            "<p title=\"&quot; onload=&#39;x&#39;\">&lt;script&gt;a &amp;&amp; b&lt;/script&gt;\u{fffd}{}</p>"
        );
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [percent(Some(0.0)), percent(Some(0.12345)), percent(Some(0.9999)), percent(None)],
            ["0.0%", "12.3%", "99.9%", "–"]
        );
        assert_eq!([number(0.41234), number(-12.34), number(123.44), number(f64::NAN)], ["0.412", "−12.3", "123", "–"]);
        assert_eq!(
            [duration(850), duration(7_540), duration(252_000), duration(3_780_000)],
            ["850 ms", "7.5 s", "4 min 12 s", "1 h 03 min"]
        );
        assert_eq!([date(0), date(951_827_700_000)], ["1970-01-01 00:00 UTC", "2000-02-29 12:35 UTC"]);
        assert_eq!([shortened("añb", 2), shortened("añ", 2)], ["añ…", "añ"]);
    }
}
