//! The parsers of foreign bytes, each behind one function: any bytes in, a panic if a promise is broken. For `scripts/fuzz.sh`, and for the
//! tests, which run its first inputs (`fuzz/seeds/`) and every one that once broke it (`fuzz/regressions/`).

use std::time::Duration;

use url::Url;

use crate::address::{MAX_URL, is_web};
use crate::config::ImageConfig;
use crate::download::exif;
use crate::html;
use crate::sources::{self, sitemap};
use crate::web::Rules;
use crate::{Matcher, QueryList, image, queries};

/// Reads any bytes.
pub type Parser = fn(&[u8]);

/// The parsers with the names of their fuzz targets, which are those of their folders of inputs.
pub const TARGETS: &[(&str, Parser)] = &[
    ("html", page),
    ("robots", robots),
    ("sitemap", site_map),
    ("archive", archive),
    ("wat", wat),
    ("dump", dump),
    ("image", picture),
    ("text", text),
];

/// Runs the parser of that name.
///
/// # Panics
/// If there is none, or if the parser breaks a promise.
#[allow(clippy::panic)]
pub fn run(target: &str, data: &[u8]) {
    match TARGETS.iter().find(|(name, _)| *name == target) {
        Some((_, parser)) => parser(data),
        None => panic!("no parser is named {target}"),
    }
}

fn page(data: &[u8]) {
    let content = html::decode(data, None);
    let Ok(url) = Url::parse("http://a.test/b/c.html") else { return };
    let page = html::extract(&content, &url, "capfilt", 100);
    for image in &page.images {
        assert!(image.url.len() <= MAX_URL && Url::parse(&image.url).is_ok_and(|u| is_web(&u)));
        assert!(image.texts.iter().all(|(_, text)| !text.is_empty() && text.chars().count() <= 100));
    }
}

fn robots(data: &[u8]) {
    let rules = Rules::parse(data, "capfilt");
    assert!(rules.delay <= Duration::from_secs(10) && rules.sitemaps.len() <= 50);
    for address in ["http://a.test/", "http://a.test/%61b/c.jpg?d=*$", "http://a.test/robots.txt"] {
        if let Ok(url) = Url::parse(address) {
            assert!(rules.allow(&url) || !address.ends_with("robots.txt"));
        }
    }
}

fn site_map(data: &[u8]) {
    let found = sitemap::parse(data, 100, 1 << 20, 100);
    assert!(found.pages.len() + found.sitemaps.len() <= 100);
}

fn archive(data: &[u8]) {
    // As it is, and as the content of a record that is sound.
    let head = format!(
        "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.test/\r\nContent-Type: application/http\r\nContent-Length: {}\r\n\r\n",
        data.len()
    );
    for file in [data, &[head.as_bytes(), data, b"\r\n\r\n"].concat()] {
        let read = sources::archive_pairs(file, |url, text| assert!(url.len() <= MAX_URL && !text.is_empty()));
        assert!(read.is_ok());
    }
}

fn wat(data: &[u8]) {
    let head =
        format!("WARC/1.0\r\nWARC-Type: metadata\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", data.len());
    archive(&[head.as_bytes(), data, b"\r\n\r\n"].concat());
}

fn picture(data: &[u8]) {
    // Small, so that a run sees many inputs; the guards are the same.
    let config = ImageConfig { max_pixels: 1 << 20, ..ImageConfig::default() };
    if let Ok(stored) = image::store(data, &config) {
        assert!(stored.width > 0 && stored.height > 0 && !stored.bytes.is_empty());
    }
    assert!(exif::read(data).starts_with('{'));
}

fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (queries, text) = text.split_at(text.char_indices().nth(text.chars().count() / 3).map_or(0, |(at, _)| at));
    let list = QueryList::from_texts(queries.split('\n'));
    let Ok(matcher) = Matcher::new(&list) else { return };
    let mut found = Vec::new();
    matcher.find(text, &mut crate::Scratch::default(), &mut found);
    assert!(found.is_sorted() && found.iter().all(|q| (*q as usize) < list.len()));
}

fn dump(data: &[u8]) {
    queries::read_any(data);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::path::Path;

    #[test]
    fn first_inputs_and_what_once_broke_a_parser_are_read() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
        for (name, parser) in TARGETS {
            parser(b"");
            let seeds = std::fs::read_dir(fuzz.join("seeds").join(name)).unwrap();
            let regressions = std::fs::read_dir(fuzz.join("regressions").join(name)).into_iter().flatten();
            for file in seeds.chain(regressions) {
                parser(&std::fs::read(file.unwrap().path()).unwrap());
            }
        }
    }
}
