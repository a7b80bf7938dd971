//! The HTTP answer in a `response` record: status, headers and body, as the crawler would have got it.

use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use httparse::{EMPTY_HEADER, ParserConfig, Response, Status};

/// Most headers of an answer.
const MAX_HEADERS: usize = 256;

/// An answer.
pub(super) struct Answer<'a> {
    pub(super) status: u16,
    headers: Vec<(&'a str, &'a [u8])>,
    rest: &'a [u8],
}

impl<'a> Answer<'a> {
    /// Reads the head of an answer; `None` if it is none.
    pub(super) fn parse(block: &'a [u8]) -> Option<Self> {
        let mut room = [EMPTY_HEADER; MAX_HEADERS];
        let mut response = Response::new(&mut room);
        let mut lenient = ParserConfig::default();
        lenient
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .allow_multiple_spaces_in_response_status_delimiters(true)
            .ignore_invalid_headers_in_responses(true);
        let Ok(Status::Complete(length)) = lenient.parse_response(&mut response, block) else { return None };
        let headers = response.headers.iter().map(|h| (h.name, h.value)).collect();
        Some(Self { status: response.code?, headers, rest: &block[length..] })
    }

    pub(super) fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.headers.iter().copied()
    }

    /// The value of a header, if it is text.
    pub(super) fn header(&self, name: &str) -> Option<&'a str> {
        let (_, value) = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok()
    }

    /// The body without transfer and content encodings, `max` bytes of it at most.
    ///
    /// Many archives, Common Crawl's too, hold the body decoded below headers that still say otherwise, so an encoding is undone
    /// only where the body is in it.
    pub(super) fn body(&self, max: usize) -> Vec<u8> {
        let chunked = self.header("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().contains("chunked"));
        let whole = if chunked { unchunk(self.rest) } else { None };
        let body = whole.as_deref().unwrap_or(self.rest);
        let encoding = self.header("content-encoding").unwrap_or_default().trim().to_ascii_lowercase();
        let decoded = match encoding.as_str() {
            "gzip" | "x-gzip" if body.starts_with(&[0x1f, 0x8b]) => read(MultiGzDecoder::new(body), max, true),
            // These two begin with no sign of what they are.
            "deflate" => read(ZlibDecoder::new(body), max, false).or_else(|| read(DeflateDecoder::new(body), max, false)),
            "br" => read(brotli::Decompressor::new(body, 4096), max, false),
            _ => None,
        };
        decoded.unwrap_or_else(|| body[..body.len().min(max)].to_vec())
    }
}

/// As much as can be read up to `max`; `None` if that is nothing, or if it breaks off and is not wanted then.
fn read(from: impl Read, max: usize, cut: bool) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let whole = from.take(max as u64).read_to_end(&mut out).is_ok();
    ((whole || cut) && !out.is_empty()).then_some(out)
}

/// The content of chunks (RFC 9112, 7.1), up to where they break off; `None` if there are none.
fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut any = false;
    while let Ok(Status::Complete((start, length))) = httparse::parse_chunk_size(rest) {
        any = true;
        let Some(chunk) = rest.get(start..) else { break };
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(chunk.len());
        if length == 0 {
            break;
        }
        out.extend_from_slice(&chunk[..length]);
        let after = &chunk[length..];
        rest = after.strip_prefix(b"\r\n").or_else(|| after.strip_prefix(b"\n")).unwrap_or(after);
    }
    any.then_some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    fn body(block: &[u8]) -> Vec<u8> {
        Answer::parse(block).unwrap().body(1000)
    }

    #[test]
    fn heads_are_read_as_they_come() {
        let answer =
            Answer::parse(b"HTTP/1.1  200 Fine\r\nX-One : 1\r\nbad header\r\nContent-Type: text/html\r\n\r\nbody").unwrap();
        assert_eq!((answer.status, answer.header("content-type"), answer.header("x-one")), (200, Some("text/html"), Some("1")));
        assert_eq!(answer.body(3), b"bod");
        assert!(Answer::parse(b"HTTP/1.1 200 OK\r\nnever ends").is_none());
        assert!(Answer::parse(b"<html>").is_none());
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        assert!(Answer::parse(many.as_bytes()).is_none());
    }

    #[test]
    fn chunks_are_joined_if_there_are_any() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let of = |rest: &str| String::from_utf8(body(format!("{head}{rest}").as_bytes())).unwrap();
        assert_eq!(of("3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n"), "abcdefg");
        assert_eq!(of("3\r\nabc\r\nff\r\ncut off"), "abccut off");
        assert_eq!(of("<html>already joined"), "<html>already joined");
        assert_eq!(of(""), "");
    }

    #[test]
    fn content_is_decoded_if_it_is_encoded() {
        let with =
            |name: &str, body: &[u8]| [format!("HTTP/1.1 200 OK\r\nContent-Encoding: {name}\r\n\r\n").as_bytes(), body].concat();
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(b"<html>").unwrap();
        let gz = gz.finish().unwrap();
        assert_eq!(body(&with("GZIP", &gz)), b"<html>");
        assert_eq!(body(&with("gzip", &gz[..gz.len() - 9])), b"<html>", "as far as it goes");
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(b"<html>").unwrap();
        assert_eq!(body(&with("deflate", &zlib.finish().unwrap())), b"<html>");
        let mut raw = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        raw.write_all(b"<html>").unwrap();
        assert_eq!(body(&with("deflate", &raw.finish().unwrap())), b"<html>");
        let mut br = Vec::new();
        brotli::CompressorWriter::new(&mut br, 4096, 5, 20).write_all(b"<html>").unwrap();
        assert_eq!(body(&with("br", &br)), b"<html>");
        for name in ["gzip", "deflate", "br", "zstd", "identity"] {
            assert_eq!(body(&with(name, b"<p>plain")), b"<p>plain", "{name}");
        }
        let bomb = {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(&vec![b' '; 10 << 20]).unwrap();
            gz.finish().unwrap()
        };
        assert_eq!(body(&with("gzip", &bomb)).len(), 1000);
    }
}
