//! Sitemaps (sitemaps.org): XML with `<loc>`, perhaps with images of each page (`sitemap-image/1.1`), or plain text with an address a
//! line; each perhaps gzipped.

use std::io::Read;

use capfilt_schemas::TextSource;
use flate2::read::MultiGzDecoder;
use quick_xml::Reader;
use quick_xml::events::Event;
use url::Url;

use crate::address;
use crate::html::{FoundImage, decode};
use crate::text::clean;

/// The longest sitemap that sitemaps.org allows, with some room. Packed and unpacked; what is longer is cut.
pub(crate) const MAX_BYTES: usize = 52 << 20;
/// How much is read of one that a crawl comes upon: it reads many at once.
pub(crate) const MAX_BYTES_ON_THE_WAY: usize = 16 << 20;
/// Most images of a page, as the extension has it.
const MAX_IMAGES: usize = 1000;
/// Longest text that is looked at, in bytes.
const MAX_TEXT: usize = 64 << 10;

/// What a sitemap names, in its order.
#[derive(Default, Debug, PartialEq)]
pub(crate) struct Sitemap {
    pub(crate) pages: Vec<SitePage>,
    pub(crate) sitemaps: Vec<Url>,
}

/// A page and its images, those without a text left out.
#[derive(Debug, PartialEq)]
pub(crate) struct SitePage {
    pub(crate) url: Url,
    pub(crate) images: Vec<FoundImage>,
}

/// Reads a sitemap: at most `max` addresses of it, unpacked `max_bytes`. Texts are cut after `max_text` characters.
pub(crate) fn parse(body: &[u8], max: usize, max_bytes: usize, max_text: usize) -> Sitemap {
    let mut unpacked = Vec::new();
    let body = if body.starts_with(b"\x1f\x8b") {
        // A packed file that breaks off is read as far as it goes.
        let _ = MultiGzDecoder::new(body).take(max_bytes as u64).read_to_end(&mut unpacked);
        unpacked.as_slice()
    } else {
        body
    };
    let content = decode(body, None);
    if content.contains("<loc") { parse_xml(&content, max, max_text) } else { parse_text(&content, max) }
}

fn parse_text(content: &str, max: usize) -> Sitemap {
    let pages = content.lines().map(str::trim).filter_map(address::parse).map(|url| SitePage { url, images: Vec::new() });
    Sitemap { pages: pages.take(max).collect(), ..Sitemap::default() }
}

/// The open elements that matter, and what they hold so far.
#[derive(Default)]
struct State {
    in_sitemap: bool,
    in_url: bool,
    in_image: bool,
    /// The text of the innermost element, with entities.
    text: String,
    loc: Option<Url>,
    images: Vec<FoundImage>,
    image_loc: Option<Url>,
    caption: String,
    title: String,
}

/// What was read before the XML goes wrong stays read.
fn parse_xml(content: &str, max: usize, max_text: usize) -> Sitemap {
    let mut reader = Reader::from_str(content);
    let config = reader.config_mut();
    (config.check_end_names, config.allow_unmatched_ends, config.allow_dangling_amp) = (false, true, true);
    let (mut sitemap, mut state) = (Sitemap::default(), State::default());
    while sitemap.pages.len() + sitemap.sitemaps.len() < max {
        match reader.read_event() {
            Ok(Event::Start(tag)) => state.open(tag.local_name().as_ref()),
            Ok(Event::End(tag)) => state.close(tag.local_name().as_ref(), &mut sitemap, max_text),
            Ok(Event::Text(text)) => state.add(&text, "", ""),
            Ok(Event::GeneralRef(name)) => state.add(&name, "&", ";"),
            Ok(Event::CData(text)) => state.add(String::from_utf8_lossy(&text).replace('&', "&amp;").as_bytes(), "", ""),
            Ok(Event::Eof) | Err(_) => break,
            Ok(_) => {}
        }
    }
    sitemap
}

impl State {
    fn open(&mut self, name: &[u8]) {
        self.text.clear();
        match name {
            b"sitemap" => self.in_sitemap = true,
            b"url" => *self = Self { in_url: true, ..Self::default() },
            b"image" if self.in_url => {
                self.in_image = true;
                self.image_loc = None;
                self.caption.clear();
                self.title.clear();
            }
            _ => {}
        }
    }

    fn add(&mut self, text: &[u8], before: &str, after: &str) {
        if self.text.len() + text.len() <= MAX_TEXT {
            [before, &String::from_utf8_lossy(text), after].iter().for_each(|part| self.text.push_str(part));
        }
    }

    fn close(&mut self, name: &[u8], sitemap: &mut Sitemap, max_text: usize) {
        let text = std::mem::take(&mut self.text);
        let text = || htmlize::unescape(text.as_str()).into_owned();
        match name {
            b"loc" if self.in_image => self.image_loc = address::parse(text().trim()),
            b"caption" if self.in_image => self.caption = text(),
            b"title" if self.in_image => self.title = text(),
            b"loc" if self.in_url => self.loc = self.loc.take().or_else(|| address::parse(text().trim())),
            b"loc" if self.in_sitemap => sitemap.sitemaps.extend(address::parse(text().trim())),
            b"image" => self.end_image(max_text),
            b"sitemap" => self.in_sitemap = false,
            b"url" => {
                let done = std::mem::take(self);
                sitemap.pages.extend(done.loc.map(|url| SitePage { url, images: done.images }));
            }
            _ => {}
        }
    }

    fn end_image(&mut self, max_text: usize) {
        self.in_image = false;
        let Some(url) = self.image_loc.take() else { return };
        let texts = [(TextSource::Figcaption, &self.caption), (TextSource::Title, &self.title)];
        let texts: Vec<_> =
            texts.into_iter().map(|(s, text)| (s, clean(text, max_text))).filter(|(_, text)| !text.is_empty()).collect();
        if !texts.is_empty() && self.images.len() < MAX_IMAGES {
            self.images.push(FoundImage { url: url.into(), texts });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn parsed(body: &[u8], max: usize) -> Sitemap {
        parse(body, max, 1 << 20, 20)
    }

    fn pages(of: &Sitemap) -> Vec<&str> {
        of.pages.iter().map(|page| page.url.as_str()).collect()
    }

    const XML: &[u8] = b"<?xml version=\"1.0\"?><urlset xmlns=\"http://www.sitemaps.org/schemas/sitemap/0.9\">\
        <url><loc> http://a.test/x?a=1&amp;b=2 </loc><lastmod>2024</lastmod></url><url><loc>http://a.test/y</loc></url>\
        <url><loc>not an address</loc></url><image:loc>http://a.test/i.jpg</image:loc></urlset>";

    #[test]
    fn reads_pages_and_further_sitemaps() {
        assert_eq!(pages(&parsed(XML, 10)), ["http://a.test/x?a=1&b=2", "http://a.test/y"]);
        assert_eq!(parsed(XML, 1).pages.len(), 1);
        let index = b"<sitemapindex><sitemap><loc>http://a.test/s1.xml.gz</loc></sitemap></sitemapindex>";
        let found = parsed(index, 10);
        assert_eq!((found.sitemaps[0].as_str(), found.pages.len()), ("http://a.test/s1.xml.gz", 0));
        let text = b"http://a.test/1\r\n\nftp://a.test/2\nhttp://a.test/3";
        assert_eq!(pages(&parsed(text, 10)), ["http://a.test/1", "http://a.test/3"]);
    }

    #[test]
    fn reads_images_with_their_texts() {
        let xml = "<urlset xmlns:image='http://www.google.com/schemas/sitemap-image/1.1'><url><loc><![CDATA[http://a.test/p?a&b]]></loc>\
            <video:video><video:title>a film</video:title></video:video>\
            <image:image><image:loc>http://cdn.test/1.jpg?x=1&amp;y=2#z</image:loc><image:caption>A &quot;red&#x22; caf\u{e9} &eacute;\n cat</image:caption>\
            <image:title><![CDATA[R&D]]></image:title></image:image>\
            <image:image><image:caption>no address</image:caption></image:image><image:image><image:loc>http://cdn.test/2.jpg</image:loc></image:image>\
            <i:image xmlns:i='x'><i:title>first & last</i:title><i:loc>http://cdn.test/3.jpg</i:loc></i:image></url>\
            <url><loc>http://a.test/q</loc></url>";
        let found = parsed(xml.as_bytes(), 10);
        assert_eq!(pages(&found), ["http://a.test/p?a&b", "http://a.test/q"]);
        let lines: Vec<String> = found.pages[0].images.iter().map(|i| format!("{} {:?}", i.url, i.texts)).collect();
        assert_eq!(
            lines,
            [
                "http://cdn.test/1.jpg?x=1&y=2 [(Figcaption, \"A \\\"red\\\" café é cat\"), (Title, \"R&D\")]",
                "http://cdn.test/3.jpg [(Title, \"first & last\")]"
            ]
        );
        assert_eq!(found.pages[1].images, []);
    }

    #[test]
    fn reads_packed_ones_whole_or_cut() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gz.write_all(XML).unwrap();
        let packed = gz.finish().unwrap();
        assert_eq!(parsed(&packed, 10), parsed(XML, 10));
        parsed(&packed[..packed.len() / 2], 10);
        for nonsense in [b"".as_slice(), b"\x1f\x8b", b"<loc", b"<html><body>404</body></html>", b"<url><loc><url><loc>"] {
            assert_eq!(parsed(nonsense, 10), Sitemap::default());
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_to_its_end(xml in "(</?(url|loc|sitemap|image:image|image:loc|image:title|x)( a=[\"']?b)?/?>|http://a.test/[a-z]{0,3}|[&;<>!\\[\\]a-z# -]{0,6}){0,30}") {
            for page in parsed(format!("<loc>{xml}").as_bytes(), 5).pages {
                prop_assert!(page.images.iter().all(|i| !i.texts.is_empty()));
            }
        }
    }
}
