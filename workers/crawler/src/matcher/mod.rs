//! Which queries stand in a text, as whole words.
//!
//! One rule makes words of every text and every query (`words.rs`). Nearly every word of a text is a word of some query, so matching
//! goes from word to word, not from byte to byte: each word is looked up once, which gives its number and the query that it is alone;
//! then a trie over these numbers is walked from each word on (`index.rs`). That finds all queries, overlapping ones too.

mod index;
mod places;
mod sort;
mod words;

use pulp::Arch;

use crate::{CrawlError, QueryList};
pub(crate) use words::words_of;

/// Bytes of folded text that are looked up together: a few hundred words, whose keys stay in the nearest cache.
const BLOCK: usize = 2048;

/// Finds the queries of a list in texts. It is read-only: all threads share one.
pub struct Matcher {
    index: index::Index,
    digest: capfilt_schemas::Digest,
}

/// Memory that [`Matcher::find`] uses again from text to text; each thread has its own.
#[derive(Default, Debug)]
pub struct Scratch {
    folded: words::Folded,
    steps: index::Steps,
}

impl Matcher {
    /// Compiles a list.
    ///
    /// # Errors
    /// [`CrawlError::Compile`] if the list has too many words (2^29).
    pub fn new(queries: &QueryList) -> Result<Self, CrawlError> {
        let mut words = String::new();
        let mut index = index::Builder::default();
        for (number, query) in (0..).zip(queries.iter()) {
            words_of(query.text, &mut words);
            index
                .add(words.split_ascii_whitespace(), number)
                .ok_or_else(|| CrawlError::Compile("it has too many words".to_owned()))?;
        }
        Ok(Self { index: index.finish(), digest: queries.digest() })
    }

    /// The digest of the list that was compiled.
    #[must_use]
    pub const fn digest(&self) -> capfilt_schemas::Digest {
        self.digest
    }

    /// Bytes of memory that it holds.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.index.bytes()
    }

    /// The positions of all queries that `text` holds, ascending, into `found` (emptied first).
    pub fn find(&self, text: &str, scratch: &mut Scratch, found: &mut Vec<u32>) {
        found.clear();
        self.find_all([text], scratch, |_, queries| found.extend_from_slice(queries));
    }

    /// Calls `each` for every text, in order, with its place among the texts and the positions of all queries that it holds, ascending.
    /// Faster than one text at a time.
    pub fn find_all<'a>(
        &self,
        texts: impl IntoIterator<Item = &'a str>,
        scratch: &mut Scratch,
        mut each: impl FnMut(usize, &[u32]),
    ) {
        let mut texts = texts.into_iter().peekable();
        let mut done = 0;
        while texts.peek().is_some() {
            let Scratch { folded, steps } = scratch;
            folded.clear();
            while folded.len() < BLOCK
                && let Some(text) = texts.next()
            {
                folded.add(text);
            }
            folded.find_words();
            self.index.find(folded, steps, |queries| {
                each(done, queries);
                done += 1;
            });
        }
    }
}

/// Runs `step` compiled for the widest instructions that this CPU has; what it calls has to be inlined.
fn vectorized(step: impl FnOnce()) {
    Arch::new().dispatch(step);
}

/// Makes room for `n` values, whatever they are.
fn at_least<T: Clone + Default>(values: &mut Vec<T>, n: usize) {
    if values.len() < n {
        values.resize(n, T::default());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn words(text: &str) -> String {
        let mut out = String::new();
        words_of(text, &mut out);
        out
    }

    fn found(queries: &[&str], text: &str) -> Vec<u32> {
        let matcher = Matcher::new(&QueryList::from_texts(queries.iter().copied())).unwrap();
        let mut out = Vec::new();
        matcher.find(text, &mut Scratch::default(), &mut out);
        out
    }

    #[test]
    fn finds_whole_words_only_and_all_that_overlap() {
        let queries = ["new york", "york", "new york city", "or", "cat", "New-York"];
        assert_eq!(found(&queries, "New York City, NY"), [0, 1, 2]);
        assert_eq!(found(&queries, "the cathedral of Yorkshire"), [] as [u32; 0]);
        assert_eq!(found(&queries, "cat cat CAT's"), [4]);
        assert_eq!(found(&["猫"], "白い猫です"), [0]);
        assert_eq!(found(&[], "anything"), [] as [u32; 0]);
        assert_eq!(found(&["a b c d", "b c", "c d e"], "a b c d e"), [0, 1, 2]);
    }

    #[test]
    fn words_of_any_length_are_told_apart() {
        let all: Vec<String> = (1..40).flat_map(|n| [format!("{}x", "a".repeat(n)), format!("{}y", "a".repeat(n))]).collect();
        let queries: Vec<&str> = all.iter().map(String::as_str).collect();
        let matcher = Matcher::new(&QueryList::from_texts(queries.iter().copied())).unwrap();
        let mut out = Vec::new();
        for (i, query) in (0..).zip(&all) {
            matcher.find(query, &mut Scratch::default(), &mut out);
            assert_eq!(out, [i]);
            matcher.find(&format!("{query}z"), &mut Scratch::default(), &mut out);
            assert_eq!(out, [] as [u32; 0]);
        }
        let long = format!("{} {}", "q".repeat(100_000), "a ".repeat(100_000));
        matcher.find(&long, &mut Scratch::default(), &mut out);
        assert_eq!(out, [] as [u32; 0]);
    }

    /// What should be found, done the slow way over lists of words.
    fn naive(queries: &QueryList, text: &str) -> Vec<u32> {
        let text_words = words(text);
        let text_words: Vec<_> = text_words.split_whitespace().collect();
        let holds = |query: &str| {
            let query = words(query);
            let query: Vec<_> = query.split_whitespace().collect();
            text_words.windows(query.len()).any(|w| w == query)
        };
        (0_u32..).zip(queries.iter()).filter(|(_, q)| holds(q.text)).map(|(i, _)| i).collect()
    }

    #[test]
    fn many_texts_are_as_each_alone() {
        let list = QueryList::from_texts(["a", "b a", "long words here", "here a"]);
        let matcher = Matcher::new(&list).unwrap();
        let texts: Vec<String> =
            (0..500).map(|n| ["a b", "", "a", "b a long", "words here a", "long words here"][n % 6].repeat(n % 40)).collect();
        let (mut scratch, mut alone, mut next) = (Scratch::default(), Vec::new(), 0);
        matcher.find_all(texts.iter().map(String::as_str), &mut scratch, |i, found| {
            assert_eq!(i, next);
            matcher.find(&texts[i], &mut Scratch::default(), &mut alone);
            assert_eq!(found, alone, "{}", texts[i]);
            next += 1;
        });
        assert_eq!(next, texts.len());
    }

    proptest! {
        #[test]
        fn same_as_the_naive_search(
            queries in proptest::collection::vec("[ab猫É'é]{1,3}( [abß]{1,2}){0,2}", 0..20),
            text in "([abß猫É-]{1,3}[ .,]{0,2}){0,12}",
        ) {
            let list = QueryList::from_texts(queries.iter().map(String::as_str));
            let matcher = Matcher::new(&list).unwrap();
            let mut out = Vec::new();
            matcher.find(&text, &mut Scratch::default(), &mut out);
            prop_assert_eq!(out, naive(&list, &text));
        }

        #[test]
        fn long_words_and_long_queries_too(
            queries in proptest::collection::vec("(abcdefgh|abcdefghi|abcdefghijklmnop|abcdefghijklmnopq|b)( (abcdefghijklmnop|abcdefghijklmnopq|b|c)){0,4}", 0..40),
            text in "((abcdefgh|abcdefghi|abcdefghijklmnop|abcdefghijklmnopq|abcdefghijklmnopz|b|c)[ .]){0,30}",
        ) {
            let list = QueryList::from_texts(queries.iter().map(String::as_str));
            let matcher = Matcher::new(&list).unwrap();
            let mut out = Vec::new();
            matcher.find(&text, &mut Scratch::default(), &mut out);
            prop_assert_eq!(out, naive(&list, &text));
        }
    }
}
