//! From a page's bytes to text.

use encoding_rs::{Encoding, UTF_8, WINDOWS_1252};

/// How far from its start a page may name its charset (the HTML standard says 1024; real pages are later).
const META_WINDOW: usize = 4096;

/// The text of a page or an XML file. Its charset is, in this order: its byte order mark, `charset` of the `Content-Type`, the `encoding`
/// of its XML declaration, its `<meta>`, UTF-8 if it is valid UTF-8, windows-1252.
pub(crate) fn decode(body: &[u8], content_type: Option<&str>) -> String {
    let named = content_type.and_then(|c| charset_in(c.as_bytes())).or_else(|| xml_encoding(body)).or_else(|| meta_charset(body));
    let encoding = named.unwrap_or_else(|| if std::str::from_utf8(body).is_ok() { UTF_8 } else { WINDOWS_1252 });
    encoding.decode(body).0.into_owned()
}

fn meta_charset(body: &[u8]) -> Option<&'static Encoding> {
    let head = &body[..body.len().min(META_WINDOW)];
    let mut rest = head;
    while let Some(start) = find(rest, b"<meta") {
        let tag = &rest[start + 5..];
        let end = tag.iter().position(|b| *b == b'>').unwrap_or(tag.len());
        if let Some(found) = charset_in(&tag[..end]) {
            return Some(in_ascii(found));
        }
        rest = &tag[end..];
    }
    None
}

/// `<?xml version="1.0" encoding="…"?>`
fn xml_encoding(body: &[u8]) -> Option<&'static Encoding> {
    let declaration = body.trim_ascii_start().strip_prefix(b"<?xml")?;
    let declaration = &declaration[..declaration.len().min(META_WINDOW)];
    value_of(&declaration[..find(declaration, b"?>")?], b"encoding").map(in_ascii)
}

/// A page that could say in ASCII what it is in is not in UTF-16 (HTML standard, 13.2.3.2).
fn in_ascii(named: &'static Encoding) -> &'static Encoding {
    named.output_encoding()
}

fn charset_in(text: &[u8]) -> Option<&'static Encoding> {
    value_of(text, b"charset")
}

/// What follows a name and `=`, as an encoding.
fn value_of(text: &[u8], name: &[u8]) -> Option<&'static Encoding> {
    let after = text[find(text, name)? + name.len()..].trim_ascii_start();
    let value = after.strip_prefix(b"=")?.trim_ascii_start();
    let value = value.strip_prefix(b"\"").or_else(|| value.strip_prefix(b"'")).unwrap_or(value);
    let end = value.iter().position(|b| b"\"'; \t\r\n/>".contains(b)).unwrap_or(value.len());
    Encoding::for_label(&value[..end])
}

fn find(text: &[u8], lower: &[u8]) -> Option<usize> {
    text.windows(lower.len()).position(|w| w.eq_ignore_ascii_case(lower))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_comes_first_then_the_page_then_a_guess() {
        assert_eq!(decode(b"\xe9t\xe9", Some("text/html; Charset=\"ISO-8859-1\"")), "été");
        assert_eq!(decode(b"<meta charset=iso-8859-1>\xe9", None), "<meta charset=iso-8859-1>é");
        let http_equiv = b"<META http-equiv='Content-Type' content='text/html; charset=koi8-r'>\xc1";
        assert!(decode(http_equiv, Some("text/html")).ends_with('а'));
        assert_eq!(decode("é".as_bytes(), None), "é");
        assert_eq!(decode(b"\xe9", None), "é");
        assert_eq!(decode("\u{feff}é".as_bytes(), Some("text/html; charset=latin1")), "é");
        assert_eq!(decode(b"\xff\xfeh\0i\0", None), "hi");
        let xml = b"<?xml version='1.0' encoding='koi8-r'?><html><meta charset=utf-8>\xc1";
        assert!(decode(xml, Some("application/xhtml+xml")).ends_with('а'));
        assert!(decode(b"<?xml version='1.0'?><p>encoding='koi8-r'?>\xe9", None).ends_with('é'));
    }

    #[test]
    fn nonsense_does_not_stop_it() {
        assert_eq!(decode(b"\xc3(", Some("text/html; charset=utf-8")), "\u{fffd}(");
        assert_eq!(decode(b"x", Some("text/html; charset=klingon")), "x");
        assert_eq!(decode(b"<meta charset", Some("charset")), "<meta charset");
        assert_eq!(decode(b"<meta charset=utf-16>\xc3\xa9", None), "<meta charset=utf-16>é");
    }
}
