//! Titles of articles: with their page views, from Wikimedia's files, or as they stand in a list.
//!
//! Hourly files (`pageviews-…gz`) have lines `en.m Title 12 0`, daily and monthly "complete" ones `en.wikipedia Title id mobile-web 12 A3…`, the
//! older `pagecounts-ez` `en.z Title 12 …`. Views of all devices count together.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::input::{Input, InputFile, Meter};
use super::tally::{Merge, Tally};
use crate::CrawlError;
use crate::matcher::words_of;

/// MediaWiki's longest title, in bytes.
const LONGEST_TITLE: usize = 255;
/// The wikis whose pages have the names of [`NAMESPACES`].
const ENGLISH: [&str; 2] = ["en", "simple"];
/// What stands before the colon of pages of the English Wikipedia that are no articles, with other names for it; ` talk` may follow.
const NAMESPACES: [&str; 25] = [
    "media",
    "special",
    "talk",
    "user",
    "wikipedia",
    "project",
    "wp",
    "wt",
    "file",
    "image",
    "mediawiki",
    "template",
    "tm",
    "help",
    "category",
    "portal",
    "draft",
    "mos",
    "timedtext",
    "module",
    "book",
    "education program",
    "gadget",
    "gadget definition",
    "event",
];

/// Sums the views of titles over files, several files at a time.
pub(super) fn views(
    paths: &[PathBuf],
    wiki: &str,
    memory: usize,
    threads: usize,
    folder: &Path,
    meter: &Arc<Meter>,
) -> Result<(Merge, Vec<InputFile>), CrawlError> {
    let threads = threads.clamp(1, paths.len().max(1));
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut tally, mut files, mut words) = (Tally::new(memory / threads / 2, folder), Vec::new(), String::new());
        let mut one = |path: &Path| {
            let mut input = Input::open("page_views", path, 1, meter)?;
            let read = each_line(&mut input, |line| {
                title_and_views(line, wiki).map_or(Ok(()), |(title, n)| add(&mut tally, title, wiki, n, &mut words))
            });
            read.map_err(|e| fail(&input, folder, e))?;
            input.finish()
        };
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(path) = paths.get(i) else { return Ok((tally, files)) };
            match one(path) {
                Ok(file) => files.push((i, file)),
                Err(e) => {
                    next.store(paths.len(), Ordering::Relaxed);
                    return Err((i, e));
                }
            }
        }
    };
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let panicked = |_| Err((0, CrawlError::write(folder, io::Error::other("a counting thread panicked"))));
        workers.into_iter().map(|w| w.join().unwrap_or_else(panicked)).collect::<Vec<_>>()
    });
    let (mut tallies, mut files) = (Vec::new(), Vec::new());
    let mut failure: Option<(usize, CrawlError)> = None;
    for result in results {
        match result {
            Ok((tally, of)) => {
                tallies.push(tally);
                files.extend(of);
            }
            Err(e) if failure.as_ref().is_none_or(|f| e.0 < f.0) => failure = Some(e),
            Err(_) => {}
        }
    }
    if let Some((_, e)) = failure {
        return Err(e);
    }
    files.sort_by_key(|f| f.0);
    let merge = Tally::merge(tallies).map_err(|e| CrawlError::write(folder, e))?;
    Ok((merge, files.into_iter().map(|f| f.1).collect()))
}

/// Adds the titles of a list: one a line, as a title or as the address of a page writes it (`all-titles-in-ns0`).
pub(super) fn list(
    path: &Path,
    wiki: &str,
    meter: &Arc<Meter>,
    tally: &mut Tally,
    folder: &Path,
) -> Result<InputFile, CrawlError> {
    let mut input = Input::open("titles", path, 1, meter)?;
    let (mut first, mut words) = (true, String::new());
    let read = each_line(&mut input, |line| {
        let head = std::mem::take(&mut first) && matches!(line, b"page_title" | b"title");
        if head { Ok(()) } else { add(tally, line.split(|b| *b == b'\t').next().unwrap_or(line), wiki, 0, &mut words) }
    });
    read.map_err(|e| fail(&input, folder, e))?;
    input.finish()
}

enum Fault {
    Read(io::Error),
    Spill(io::Error),
}

fn fail(input: &Input, folder: &Path, fault: Fault) -> CrawlError {
    match fault {
        Fault::Read(e) => input.fail(e),
        Fault::Spill(e) => CrawlError::write(folder, e),
    }
}

fn each_line(input: &mut Input, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(), Fault> {
    let mut lines = input.lines();
    while let Some((_, line)) = lines.next().map_err(Fault::Read)? {
        each(line).map_err(Fault::Spill)?;
    }
    Ok(())
}

fn add(tally: &mut Tally, title: &[u8], wiki: &str, n: u64, words: &mut String) -> io::Result<()> {
    let Some(title) = readable(title).filter(|title| !is_other_namespace(title, wiki)) else { return Ok(()) };
    words_of(name_of(&title), words);
    if words.trim() == "" {
        return Ok(());
    }
    tally.add(words.trim(), n).map(|_| ())
}

/// A line's title and views, if it is of this wiki.
fn title_and_views<'a>(line: &'a [u8], wiki: &str) -> Option<(&'a [u8], u64)> {
    let mut fields = line.split(|b| *b == b' ');
    let project = fields.next()?.strip_prefix(wiki.as_bytes())?;
    let (title, a, b) = (fields.next()?, fields.next()?, fields.next());
    let views = match project {
        b"" | b".m" | b".zero" | b".z" => a,
        // Some lines have no page id.
        b".wikipedia" if b.is_some_and(|b| b.first().is_some_and(u8::is_ascii_digit)) => b?,
        b".wikipedia" => fields.next()?,
        _ => return None,
    };
    let views = std::str::from_utf8(views).ok()?.parse().ok()?;
    (title.len() <= 3 * LONGEST_TITLE).then_some((title, views))
}

/// Whether a title is of a page that is no article. MediaWiki writes no space behind the colon of a namespace, and few articles have a colon
/// without a space, so that in other languages, whose namespaces are not known here, such a prefix is one: `Spezial:Suche`. It never
/// begins with a digit: `3:10 to Yuma`.
fn is_other_namespace(title: &str, wiki: &str) -> bool {
    let Some((prefix, rest)) = title.split_once(':') else { return false };
    if rest.starts_with(' ') {
        return false;
    }
    // `:x`, `http://…`: no title is like that.
    if prefix.is_empty() || rest.starts_with("//") {
        return true;
    }
    if !ENGLISH.contains(&wiki) {
        return !prefix.starts_with(char::is_numeric);
    }
    let prefix = prefix.trim().to_ascii_lowercase();
    let of = prefix.strip_suffix(" talk").unwrap_or(&prefix);
    NAMESPACES.contains(&of)
}

/// A title with its `%C3%A9` and `_` as people read them; `None` if it is not UTF-8, or longer than titles are.
fn readable(title: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(title.len());
    let mut rest = title;
    while let Some((&first, tail)) = rest.split_first() {
        let digit = |i: usize| tail.get(i).and_then(|b| char::from(*b).to_digit(16)).map(|d| d as u8);
        let (byte, behind) = match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => (high << 4 | low, &tail[2..]),
            (b'_', ..) => (b' ', tail),
            _ => (first, tail),
        };
        bytes.push(byte);
        rest = behind;
    }
    let title = String::from_utf8(bytes).ok()?;
    (title.len() <= LONGEST_TITLE).then_some(title)
}

/// What a title names, without what tells it from others of that name: `Mercury (planet)` is `Mercury`.
fn name_of(title: &str) -> &str {
    let title = title.trim();
    match title.strip_suffix(')').and_then(|t| t.rsplit_once(" (")) {
        Some((name, _)) if !name.trim().is_empty() => name,
        _ => title,
    }
}

/// Reads any line as one of a page view file and as a title.
#[cfg(any(test, feature = "fuzz"))]
pub(super) fn read_any(line: &[u8]) {
    let title = title_and_views(line, "en").map_or(line, |found| found.0);
    if let Some(title) = readable(title) {
        assert!(name_of(&title).len() <= LONGEST_TITLE);
        for wiki in ["en", "de"] {
            is_other_namespace(&title, wiki);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn summed(files: &[&str], threads: usize) -> Result<Vec<(String, u64)>, CrawlError> {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..files.len()).map(|i| folder.path().join(format!("views-{i}"))).collect();
        paths.iter().zip(files).for_each(|(path, text)| std::fs::write(path, text).unwrap());
        let meter = Meter::new(&paths.iter().map(PathBuf::as_path).collect::<Vec<_>>(), Box::new(|_, _| ())).unwrap();
        let (mut merge, about) = views(&paths, "en", 0, threads, folder.path(), &meter)?;
        assert_eq!(
            about.iter().map(|f| f.name.clone()).collect::<Vec<_>>(),
            (0..files.len()).map(|i| format!("views-{i}")).collect::<Vec<_>>()
        );
        let mut out = Vec::new();
        while let Some((title, n)) = merge.next().unwrap() {
            out.push((title.into(), n));
        }
        Ok(out)
    }

    #[test]
    fn sums_hours_days_and_devices() {
        let hour = "de Katze 99 0\nen Red_Car 30 0\nen.m Red_Car 20 0\nen Special:Search 1000 0\nen.b Cookbook 5 0\nen Main 7\nen - 5 0\n\"\" x 1 0\n";
        let day = "en.wikipedia red_car 123 desktop 5 A2B3\nen.wikipedia Red_car null mobile-web 6 A6\nen.wikipedia Caf%C3%A9 desktop 8 A8\nen.wikibooks X 1 desktop 5 A5\n";
        let ez = "en.z Mercury_(planet) 40 A40\nen.z Mercury_(element) 2 A2\nen.z 2001:_A_Space_Odyssey 3 A3\nen.z 3:10_to_Yuma 9 A9\nen.z User_talk%3AMe 9 A9\nen.z %FF%FE 3 A\nen bad x 0\n";
        let expected =
            [("2001 a space odyssey", 3), ("3 10 to yuma", 9), ("café", 8), ("main", 7), ("mercury", 42), ("red car", 61)]
                .map(|(t, n)| (t.to_owned(), n));
        for threads in [1, 3] {
            assert_eq!(summed(&[hour, day, ez], threads).unwrap(), expected);
        }
    }

    #[test]
    fn namespaces_are_told_from_titles_with_a_colon() {
        let articles = ["3:10 to Yuma (1957 film)", "2:22", "2001: A Space Odyssey", "24:7", "Batman", "Alien: Covenant"];
        let english = ["Re:Zero", "Halo:Reach", "File: the movie", "Category theory", "Helpless:x", "Bad talk:x", "Re:"];
        let pages = ["File:A.jpg", "user talk:Me", "Wikipedia:About", "SPECIAL:Search", "Talk:2:22", "TimedText talk:x", "WP:V"];
        let none = [":x", "Http://a.test"];
        for title in articles.iter().chain(&english) {
            assert!(!is_other_namespace(title, "en"), "{title}");
        }
        for title in pages.iter().chain(&none) {
            assert!(is_other_namespace(title, "en") && is_other_namespace(title, "de"), "{title}");
        }
        for title in articles {
            assert!(!is_other_namespace(title, "de"), "{title}");
        }
        assert!(is_other_namespace("Spezial:Suche", "de") && is_other_namespace("Benutzer Diskussion:Ich", "de"));
    }

    proptest! {
        #[test]
        fn foreign_lines_never_panic(mut line in proptest::collection::vec(any::<u8>(), 0..60), wiki in "[a-z]{0,2}") {
            title_and_views(&line, &wiki);
            read_any(&line);
            line.splice(0..0, *b"en ");
            read_any(&line);
        }
    }
}
