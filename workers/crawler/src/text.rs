//! Texts as rows hold them.

/// The text with single spaces, without control characters, cut after `max` characters.
pub(crate) fn clean(text: &str, max: usize) -> String {
    let bytes = text.as_bytes();
    // Blanks and control characters beyond ASCII begin with one of four bytes.
    let is_plain = bytes.iter().fold(true, |all, b| all & !matches!(b, ..b' ' | 0x7f | 0xc2 | 0xe1..=0xe3));
    let has_two_blanks = bytes.array_windows().fold(false, |any, two: &[u8; 2]| any | (two == b"  "));
    if is_plain && bytes.len() <= max && bytes.trim_ascii().len() == bytes.len() && !has_two_blanks {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len().min(max));
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()) {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
        if out.len() > max * 4 {
            break;
        }
    }
    if let Some((end, _)) = out.char_indices().nth(max) {
        out.truncate(end);
        out.truncate(out.trim_end().len());
    }
    out
}
