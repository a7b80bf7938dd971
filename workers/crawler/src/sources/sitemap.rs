//! Sitemaps (sitemaps.org): XML with `<loc>`, or plain text with an address a line, each perhaps gzipped.

use std::cell::RefCell;
use std::io::Read;
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use lol_html::{HtmlRewriter, MemorySettings, Settings, element, text};
use url::Url;

use crate::html::{MAX_URL, decode};

/// How much of a sitemap is read, packed and unpacked (sitemaps.org allows 50 MB).
pub(super) const MAX_BYTES: usize = 16 << 20;

/// What a sitemap names.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Sitemap {
    pub(crate) pages: Vec<Url>,
    pub(crate) sitemaps: Vec<Url>,
}

/// Reads a sitemap; at most `max` addresses of it.
pub(crate) fn parse(body: &[u8], max: usize) -> Sitemap {
    let mut unpacked = Vec::new();
    let body = if body.starts_with(b"\x1f\x8b") {
        // A packed file that breaks off is read as far as it goes.
        let _ = MultiGzDecoder::new(body).take(MAX_BYTES as u64).read_to_end(&mut unpacked);
        unpacked.as_slice()
    } else {
        body
    };
    let content = decode(body, None);
    if content.contains("<loc") { parse_xml(&content, max) } else { parse_text(&content, max) }
}

fn parse_text(content: &str, max: usize) -> Sitemap {
    Sitemap { pages: content.lines().filter_map(address).take(max).collect(), ..Sitemap::default() }
}

#[derive(Default)]
struct State {
    loc: String,
    found: Vec<(bool, String)>,
}

fn parse_xml(content: &str, max: usize) -> Sitemap {
    let state = Rc::new(RefCell::new(State::default()));
    let (opening, inside) = (Rc::clone(&state), Rc::clone(&state));
    let handler = |is_index: bool| {
        let opening = Rc::clone(&opening);
        move |el: &mut lol_html::html_content::Element<'_, '_>| {
            opening.borrow_mut().loc.clear();
            if let Some(handlers) = el.end_tag_handlers() {
                let closing = Rc::clone(&opening);
                handlers.push(Box::new(move |_| {
                    let mut state = closing.borrow_mut();
                    let loc = std::mem::take(&mut state.loc);
                    if state.found.len() < max {
                        state.found.push((is_index, loc));
                    }
                    Ok(())
                }));
            }
            Ok(())
        }
    };
    let settings = Settings::new()
        .with_strict(false)
        .with_memory_settings(MemorySettings::new().with_max_allowed_memory_usage(1 << 20))
        .append_element_content_handler(element!("url > loc", handler(false)))
        .append_element_content_handler(element!("sitemap > loc", handler(true)))
        .append_element_content_handler(text!("loc", move |chunk| {
            let mut state = inside.borrow_mut();
            if state.loc.len() <= MAX_URL {
                state.loc.push_str(chunk.as_str());
            }
            Ok(())
        }));
    let mut reader = HtmlRewriter::new(settings, |_: &[u8]| {});
    if reader.write(content.as_bytes()).is_ok() {
        let _ = reader.end();
    }
    let mut sitemap = Sitemap::default();
    for (is_index, loc) in &state.borrow().found {
        if let Some(url) = address(&htmlize::unescape(loc.as_str())) {
            if *is_index { &mut sitemap.sitemaps } else { &mut sitemap.pages }.push(url);
        }
    }
    sitemap
}

fn address(text: &str) -> Option<Url> {
    let text = text.trim();
    let text = text.strip_prefix("<![CDATA[").and_then(|t| t.strip_suffix("]]>")).unwrap_or(text).trim();
    Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && text.len() <= MAX_URL)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    fn urls(of: &[Url]) -> Vec<&str> {
        of.iter().map(Url::as_str).collect()
    }

    const XML: &[u8] = b"<?xml version=\"1.0\"?><urlset xmlns=\"http://www.sitemaps.org/schemas/sitemap/0.9\">\
        <url><loc> http://a.test/x?a=1&amp;b=2 </loc><lastmod>2024</lastmod></url><url><loc>http://a.test/y</loc></url>\
        <url><loc>not an address</loc></url><image:loc>http://a.test/i.jpg</image:loc></urlset>";

    #[test]
    fn reads_pages_and_further_sitemaps() {
        assert_eq!(urls(&parse(XML, 10).pages), ["http://a.test/x?a=1&b=2", "http://a.test/y"]);
        assert_eq!(parse(XML, 1).pages.len(), 1);
        let index = b"<sitemapindex><sitemap><loc>http://a.test/s1.xml.gz</loc></sitemap></sitemapindex>";
        let found = parse(index, 10);
        assert_eq!((urls(&found.sitemaps), found.pages.len()), (vec!["http://a.test/s1.xml.gz"], 0));
        assert_eq!(
            urls(&parse(b"http://a.test/1\r\n\nftp://a.test/2\nhttp://a.test/3", 10).pages),
            ["http://a.test/1", "http://a.test/3"]
        );
    }

    #[test]
    fn reads_packed_ones_whole_or_cut() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gz.write_all(XML).unwrap();
        let packed = gz.finish().unwrap();
        assert_eq!(parse(&packed, 10), parse(XML, 10));
        parse(&packed[..packed.len() / 2], 10);
        for nonsense in [b"".as_slice(), b"\x1f\x8b", b"<loc", b"<html><body>404</body></html>", b"<url><loc><url><loc>"] {
            assert_eq!(parse(nonsense, 10), Sitemap::default());
        }
    }
}
