//! Words and pairs of words of a wiki: how often each is used, and how much more often two follow each other than chance would have it.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use super::dump::{self, Chunk, PageKind};
use super::input::{Input, InputFile, Meter};
use super::table::Pages;
use super::tally::{Merge, Run, RunWriter, Tally};
use super::wikitext::plain;
use crate::CrawlError;
use crate::matcher::words_of;

/// The longest word that is counted, in bytes; what is longer is no word of a language.
const LONGEST_WORD: usize = 100;
/// No collection of texts has more words than this; see `most_used`.
const MOST_WORDS: f64 = (1_u64 << 40) as f64;
/// What an entry of a map of words takes beside the word, and the smallest such map.
const WORD_BYTES: usize = 112;
const LEAST_PART: usize = 1 << 16;

/// Settings that counting needs.
pub(super) struct Counting<'a> {
    pub(super) min_pmi: f64,
    pub(super) min_count: u64,
    pub(super) memory: usize,
    pub(super) threads: usize,
    pub(super) folder: &'a Path,
}

/// Everything counted in the dumps.
pub(super) struct Ngrams {
    /// Every word with its count, sorted.
    words: Run,
    /// All words.
    total: u64,
    pairs: Merge,
    pub(super) pages: Pages,
    pub(super) files: Vec<InputFile>,
}

/// A pair of words that belong together.
pub(super) struct Pair<'a> {
    /// Both, with a space between.
    pub(super) text: &'a str,
    pub(super) count: u64,
    /// Pointwise mutual information in bits: `log2(count · words / (count of the first · count of the second))`, as NLTK's
    /// `BigramAssocMeasures.pmi`, which MetaCLIP's threshold is for (`metaclip/build_metadata.py`).
    pub(super) pmi: f64,
}

/// The count above which a word stands in no pair with this PMI: a pair is at most as frequent as its words, so
/// `pmi <= log2(words / count of the more frequent one)`. It holds for every part of a text too, so pairs of words that are more frequent
/// than this, in a collection as large as they come, need not be counted at all. At 30 bits hardly any are left.
fn most_used(total: f64, min_pmi: f64) -> f64 {
    total / min_pmi.exp2()
}

/// Counts words and pairs in dumps.
pub(super) fn count(dumps: &[PathBuf], settings: &Counting, meter: &Arc<Meter>) -> Result<Ngrams, CrawlError> {
    let threads = settings.threads.max(1);
    let limit = most_used(MOST_WORDS, settings.min_pmi);
    let spilling = |e| CrawlError::write(settings.folder, e);
    let (send, chunks) = sync_channel::<Chunk>(threads);
    let chunks = Arc::new(Mutex::new(chunks));
    let failed = AtomicBool::new(false);
    let (counters, files, too_long) = std::thread::scope(|scope| {
        // Half of the memory is for the tables, half for merging and picking.
        let table = settings.memory / threads / 4;
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (chunks, failed) = (Arc::clone(&chunks), &failed);
                scope.spawn(move || {
                    let counter = Counter::new(table, settings.folder, limit).run(&chunks);
                    failed.fetch_or(counter.is_err(), Ordering::Relaxed);
                    counter
                })
            })
            .collect();
        // Sending must fail, not wait, when no worker is left.
        drop(chunks);
        let read = || {
            let (mut files, mut too_long) = (Vec::new(), 0);
            for path in dumps {
                let mut input = Input::open("dump", path, threads, meter)?;
                // A worker that fails leaves its chunk; the others go on taking until this stops.
                let end = dump::chunks(&mut input, |chunk| !failed.load(Ordering::Relaxed) && send.send(chunk).is_ok());
                let end = end.map_err(|e| input.fail(e))?;
                if failed.load(Ordering::Relaxed) {
                    break;
                }
                if !end.pages {
                    return Err(CrawlError::format(
                        path,
                        "it holds no `<page>`; is it a MediaWiki XML dump (pages-articles), in UTF-8?",
                    ));
                }
                if end.cut {
                    return Err(CrawlError::format(path, "it ends within a page; get the file again"));
                }
                too_long += end.too_long;
                files.push(input.finish()?);
            }
            Ok((files, too_long))
        };
        let read = read();
        drop(send);
        let mut counters = Vec::new();
        for worker in workers {
            let counter = worker.join().map_err(|_| spilling(io::Error::other("a counting thread panicked")))?;
            counters.push(counter.map_err(spilling)?);
        }
        let (files, too_long) = read?;
        Ok::<_, CrawlError>((counters, files, too_long))
    })?;

    let mut pages = Pages { too_long, ..Pages::default() };
    let (mut words, mut pairs) = (Vec::new(), Vec::new());
    for counter in counters {
        pages.add(&counter.pages);
        words.push(counter.words);
        pairs.push(counter.pairs);
    }
    let merged = || {
        let mut merge = Tally::merge(words)?;
        let (mut all, mut total) = (RunWriter::new(settings.folder)?, 0);
        while let Some((word, n)) = merge.next()? {
            all.push(&word, n)?;
            total += n;
        }
        Ok((all.finish()?, total, Tally::merge(pairs)?))
    };
    let (words, total, pairs) = merged().map_err(spilling)?;
    pages.words = total;
    Ok(Ngrams { words, total, pairs, pages, files })
}

/// One thread's counts.
struct Counter {
    words: Tally,
    pairs: Tally,
    /// A word that is more frequent is in no pair.
    limit: f64,
    pages: Pages,
}

impl Counter {
    fn new(memory: usize, folder: &Path, limit: f64) -> Self {
        Self { words: Tally::new(memory, folder), pairs: Tally::new(memory, folder), limit, pages: Pages::default() }
    }

    fn run(mut self, chunks: &Mutex<Receiver<Chunk>>) -> io::Result<Self> {
        let (mut wikitext, mut prose, mut scratch) = (String::new(), String::new(), Scratch::default());
        let mut outcome = Ok(());
        loop {
            let chunk = chunks.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(chunk) = chunk else { break };
            // After a fault chunks are still taken, so that whoever sends them is not left waiting.
            if outcome.is_err() {
                continue;
            }
            outcome = chunk.pages(&mut wikitext, |kind, text| {
                self.pages.count(kind);
                if kind == PageKind::Article {
                    plain(text, &chunk.hidden, &mut prose);
                    self.prose(&prose, &mut scratch)?;
                }
                Ok(())
            });
        }
        outcome.map(|()| self)
    }

    /// Counts the words of a text, and those that follow each other with nothing but spaces between them.
    fn prose(&mut self, text: &str, scratch: &mut Scratch) -> io::Result<()> {
        for part in text.split(ends_pair) {
            words_of(part, &mut scratch.words);
            let mut last: Option<&str> = None;
            for word in scratch.words.split(' ').filter(|w| !w.is_empty()) {
                if word.len() > LONGEST_WORD {
                    last = None;
                    continue;
                }
                let used = self.words.add(word, 1)?;
                let rare = used as f64 <= self.limit;
                if let Some(first) = last.filter(|_| rare) {
                    scratch.pair.clear();
                    scratch.pair.extend([first, " ", word]);
                    self.pairs.add(&scratch.pair, 1)?;
                }
                last = rare.then_some(word);
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Scratch {
    words: String,
    pair: String,
}

/// What words on both sides do not belong together over: any sign but spaces, and the end of a line. Signs that hold letters in another
/// form (`™`, `№`) are parts of words.
fn ends_pair(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_alphanumeric() && c != ' ' && c != '\t';
    }
    !c.is_alphanumeric() && !is_combining_mark(c) && !c.is_whitespace() && !std::iter::once(c).nfkc().any(char::is_alphanumeric)
}

impl Ngrams {
    /// The highest PMI that a pair can have: of two words that are used once.
    pub(super) fn highest_pmi(&self) -> f64 {
        (self.total as f64).log2()
    }

    /// Calls `each` with every word and its count.
    pub(super) fn words(&mut self, folder: &Path, mut each: impl FnMut(&str, u64)) -> Result<(), CrawlError> {
        let mut read = || {
            let mut words = self.words.read()?;
            while let Some((word, n)) = words.next()? {
                each(word, n);
            }
            Ok(())
        };
        read().map_err(|e| CrawlError::write(folder, e))
    }

    /// Calls `each` with every pair that is frequent enough and of enough PMI.
    pub(super) fn pairs(mut self, settings: &Counting, each: impl FnMut(Pair)) -> Result<(), CrawlError> {
        self.find_pairs(settings, each).map_err(|e| CrawlError::write(settings.folder, e))
    }

    fn find_pairs(&mut self, settings: &Counting, mut each: impl FnMut(Pair)) -> io::Result<()> {
        let total = self.total as f64;
        let most = most_used(total, settings.min_pmi);
        // Pairs and words are in the same order, so the first word's count comes along; pairs that it rules out end here.
        let mut kept = BufWriter::new(tempfile::tempfile_in(settings.folder)?);
        {
            let mut words = self.words.read()?;
            let (mut first, mut first_count) = (String::new(), 0);
            while let Some((text, count)) = self.pairs.next()? {
                let (a, b) = text.split_once(' ').unwrap_or((&text, ""));
                while first.as_str() < a {
                    let Some((word, n)) = words.next()? else { break };
                    first.clear();
                    first.push_str(word);
                    first_count = n;
                }
                if count >= settings.min_count && first_count as f64 <= most {
                    kept.write_all(&[a.len() as u8, b.len() as u8])?;
                    kept.write_all(text.as_bytes())?;
                    kept.write_all(&count.to_le_bytes())?;
                    kept.write_all(&first_count.to_le_bytes())?;
                }
            }
        }
        let mut kept = kept.into_inner().map_err(io::IntoInnerError::into_error)?;
        // The second word's count is looked up, in as many parts of the list of words as memory asks for.
        let mut words = self.words.read()?;
        let mut part = HashMap::<Box<str>, u64>::new();
        loop {
            let mut bytes = 0;
            part.clear();
            while bytes < (settings.memory / 4).max(LEAST_PART)
                && let Some((word, n)) = words.next()?
            {
                if n >= settings.min_count && n as f64 <= most {
                    bytes += word.len() + WORD_BYTES;
                    part.insert(word.into(), n);
                }
            }
            if part.is_empty() {
                return Ok(());
            }
            kept.rewind()?;
            let mut reader = BufReader::with_capacity(1 << 16, &mut kept);
            let (mut head, mut text, mut number) = ([0; 2], String::new(), [0; 8]);
            while !reader.fill_buf()?.is_empty() {
                reader.read_exact(&mut head)?;
                text.clear();
                (&mut reader).take(u64::from(head[0]) + 1 + u64::from(head[1])).read_to_string(&mut text)?;
                reader.read_exact(&mut number)?;
                let count = u64::from_le_bytes(number);
                reader.read_exact(&mut number)?;
                let Some(second) = part.get(&text[usize::from(head[0]) + 1..]) else { continue };
                let ratio = count as f64 * total / (u64::from_le_bytes(number) as f64 * *second as f64);
                if ratio >= settings.min_pmi.exp2() {
                    each(Pair { text: &text, count, pmi: ratio.log2() });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Words and pairs by the book, in memory.
    fn by_the_book(texts: &[String]) -> (BTreeMap<String, u64>, BTreeMap<String, u64>, u64) {
        let (mut words, mut pairs, mut total) = (BTreeMap::new(), BTreeMap::new(), 0);
        for text in texts {
            for part in text.split(|c: char| !c.is_alphanumeric() && c != ' ') {
                let list: Vec<_> = part.split(' ').filter(|w| !w.is_empty()).map(str::to_lowercase).collect();
                total += list.len() as u64;
                list.iter().for_each(|w| *words.entry(w.clone()).or_insert(0) += 1);
                list.windows(2).for_each(|p| *pairs.entry(p.join(" ")).or_insert(0) += 1);
            }
        }
        (words, pairs, total)
    }

    fn counted(
        texts: &[String],
        min_pmi: f64,
        min_count: u64,
        threads: usize,
        memory: usize,
    ) -> (BTreeMap<String, u64>, BTreeMap<String, (u64, f64)>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.xml");
        let page = |t: &String| format!("<page><ns>0</ns><text>{t}</text></page>");
        std::fs::write(&path, texts.iter().map(page).collect::<String>()).unwrap();
        let settings = Counting { min_pmi, min_count, memory, threads, folder: folder.path() };
        let meter = Meter::new(&[&path], Box::new(|_, _| ())).unwrap();
        let mut ngrams = count(&[path], &settings, &meter).unwrap();
        let (mut words, mut pairs) = (BTreeMap::new(), BTreeMap::new());
        ngrams.words(folder.path(), |w, n| assert!(words.insert(w.to_owned(), n).is_none())).unwrap();
        ngrams.pairs(&settings, |p| assert!(pairs.insert(p.text.to_owned(), (p.count, p.pmi)).is_none())).unwrap();
        (words, pairs)
    }

    fn check(texts: &[String], min_pmi: f64, min_count: u64, threads: usize, memory: usize) {
        let (words, pairs, total) = by_the_book(texts);
        let (got_words, got_pairs) = counted(texts, min_pmi, min_count, threads, memory);
        assert_eq!(got_words, words);
        let wanted: BTreeMap<_, _> = pairs
            .into_iter()
            .filter_map(|(pair, n)| {
                let (a, b) = pair.split_once(' ').unwrap();
                let pmi = (n as f64 * total as f64 / (words[a] as f64 * words[b] as f64)).log2();
                (n >= min_count && pmi >= min_pmi).then_some((pair, (n, pmi)))
            })
            .collect();
        assert_eq!(got_pairs.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (pair, (n, pmi)) in wanted {
            assert_eq!(got_pairs[&pair].0, n);
            assert!((got_pairs[&pair].1 - pmi).abs() < 1e-9);
        }
    }

    #[test]
    fn little_memory_and_many_threads_change_nothing() {
        let texts: Vec<String> =
            (0..400_u64).map(|i| (0..60).map(|j| format!("w{} ", (i * 31 + j * j * 17) % 5_003)).collect()).collect();
        for min_pmi in [2.0, 11.0, 13.0] {
            check(&texts, min_pmi, 1, 3, 0);
        }
        check(&texts, 5.0, 2, 1, 1 << 30);
    }

    #[test]
    fn frequent_words_are_left_out_of_pairs_only_where_no_pair_can_pass() {
        // Above 2^40 / 2^39 = 2 uses a word is out of the count already.
        let mut texts = vec!["the cat the dog the bird".to_owned(), "rare pair".to_owned(), "rare pair".to_owned()];
        texts.extend((0..100).map(|_| "the the the filler of the text".to_owned()));
        let (words, pairs) = counted(&texts, 39.0, 1, 1, 1 << 20);
        assert_eq!((words["the"], pairs.len()), (403, 0));
        check(&texts, 8.0, 1, 2, 1 << 20);
    }

    #[test]
    fn signs_end_pairs_and_letters_in_disguise_do_not() {
        let pairs = |text: &str| counted(&[text.to_owned()], -40.0, 1, 1, 1 << 20).1.into_keys().collect::<Vec<_>>().join(",");
        assert_eq!(pairs("red car, big dog\nnew line. end"), "big dog,new line,red car");
        assert_eq!(pairs("red-hot don't a/b"), "hot don,t a");
        assert_eq!(pairs("caf\u{e9}  noir\u{a0}fort \u{2122}"), "café noir,fort tm,noir fort");
        assert_eq!(pairs("\u{7ea2}\u{8f66}"), "\u{7ea2} \u{8f66}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn same_as_by_the_book(texts in proptest::collection::vec("([ab]{1,2}[ ,]{1,2}){0,20}", 1..6), min_pmi in -3.0_f64..6.0, min_count in 1_u64..3) {
            check(&texts, min_pmi, min_count, 2, 0);
        }

        #[test]
        fn parts_have_the_words_of_the_whole(text in "\\PC{0,40}") {
            let (mut whole, mut part, mut joined) = (String::new(), String::new(), String::from(" "));
            words_of(&text, &mut whole);
            for p in text.split(ends_pair) {
                words_of(p, &mut part);
                joined.push_str(&part[1..]);
            }
            prop_assert_eq!(joined, whole);
        }
    }
}
