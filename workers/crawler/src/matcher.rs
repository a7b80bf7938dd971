//! Which queries stand in a text, as whole words.
//!
//! One rule makes words of every text and every query: the text is put in Unicode form NFKC and its case is folded (upper case, then
//! lower case of each character, so that `ß` is `ss` and `ς` is `σ`); a word is a run of letters, digits and the marks upon them, and
//! whatever lies between words, apostrophes and hyphens too, is one space. Scripts that write without spaces (Han, kana, Thai, Lao,
//! Khmer, Burmese) give a word for each character, so that a query is found inside an unbroken line. A text is then `" a red car "`,
//! a query `" red "`, and a byte automaton (daachorse) finds all overlapping ones in one pass.

use daachorse::DoubleArrayAhoCorasick;
use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;

use crate::{CrawlError, QueryList};

/// Finds the queries of a list in texts. It is read-only: all threads share one.
pub struct Matcher {
    automaton: Option<DoubleArrayAhoCorasick<u32>>,
    digest: capfilt_schemas::Digest,
}

impl Matcher {
    /// Compiles a list; about 5 µs and 90 bytes a query.
    ///
    /// # Errors
    /// [`CrawlError::Compile`] if the list is too large for the automaton (2^24 queries).
    pub fn new(queries: &QueryList) -> Result<Self, CrawlError> {
        let patterns = queries.iter().enumerate().map(|(i, q)| {
            let mut words = String::new();
            words_of(q.text, &mut words);
            (words, u32::try_from(i).unwrap_or(u32::MAX))
        });
        let automaton = if queries.is_empty() {
            None
        } else {
            Some(DoubleArrayAhoCorasick::with_values(patterns).map_err(|e| CrawlError::Compile(e.to_string()))?)
        };
        Ok(Self { automaton, digest: queries.digest() })
    }

    /// The digest of the list that was compiled.
    #[must_use]
    pub const fn digest(&self) -> capfilt_schemas::Digest {
        self.digest
    }

    /// The positions of all queries that `text` holds, ascending, into `found` (emptied first); `scratch` is reused between calls.
    pub fn find(&self, text: &str, scratch: &mut String, found: &mut Vec<u32>) {
        found.clear();
        let Some(automaton) = &self.automaton else { return };
        words_of(text, scratch);
        found.extend(automaton.find_overlapping_iter(scratch.as_bytes()).map(|m| m.value()));
        found.sort_unstable();
        found.dedup();
    }
}

/// The words of `text`, folded, with one space before, between and after them, into `out` (emptied first). No words: one space.
pub(crate) fn words_of(text: &str, out: &mut String) {
    out.clear();
    out.push(' ');
    if text.is_ascii() {
        for b in text.bytes() {
            if b.is_ascii_alphanumeric() {
                out.push(char::from(b.to_ascii_lowercase()));
            } else {
                end_word(out);
            }
        }
    } else {
        for c in text.nfkc() {
            push_char(c, out);
        }
    }
    end_word(out);
}

fn push_char(c: char, out: &mut String) {
    if is_combining_mark(c) {
        // A mark belongs to the word it stands on; alone it is nothing.
        if !out.ends_with(' ') {
            out.push(c);
        }
    } else if is_unspaced(c) {
        end_word(out);
        out.push(c);
    } else if c.is_alphanumeric() {
        if out.chars().next_back().is_some_and(is_unspaced) {
            end_word(out);
        }
        // Down, up and down again: `ẞ` and `ß` both become `ss`.
        out.extend(c.to_lowercase().flat_map(char::to_uppercase).flat_map(char::to_lowercase));
    } else {
        end_word(out);
    }
}

fn end_word(out: &mut String) {
    if !out.ends_with(' ') {
        out.push(' ');
    }
}

/// Letters of scripts that put no spaces between words.
const fn is_unspaced(c: char) -> bool {
    matches!(c,
        '\u{0e01}'..='\u{0e30}' | '\u{0e32}'..='\u{0e33}' | '\u{0e40}'..='\u{0e46}' // Thai, without marks and digits
        | '\u{0e81}'..='\u{0eb0}' | '\u{0eb2}'..='\u{0eb3}' | '\u{0ebd}'..='\u{0ec6}' // Lao
        | '\u{1000}'..='\u{102a}' // Burmese
        | '\u{1780}'..='\u{17b3}' // Khmer
        | '\u{3041}'..='\u{3096}' | '\u{309d}'..='\u{309f}' | '\u{30a1}'..='\u{30fa}' | '\u{30fc}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' // kana
        | '\u{3005}'..='\u{3007}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}'
        | '\u{20000}'..='\u{3ffff}') // Han
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
        matcher.find(text, &mut String::new(), &mut out);
        out
    }

    #[test]
    fn one_rule_makes_words() {
        assert_eq!(words("A red-hot  car!"), " a red hot car ");
        assert_eq!(words("don't"), " don t ");
        assert_eq!(words(""), " ");
        assert_eq!(words("?!"), " ");
        assert_eq!(words("Straße STRASSE STRAẞE"), " strasse strasse strasse ");
        assert_eq!(words("ΟΔΟΣ οδος οδός"), " οδοσ οδοσ οδόσ ");
        assert_eq!(words("ﬁsh ２０２４ Ⅳ"), " fish 2024 iv ");
        assert_eq!(words("cafe\u{301} café"), " café café ");
        assert_eq!(words("白い猫 cat猫cat"), " 白 い 猫 cat 猫 cat ");
        assert_eq!(words("हिन्दी पाठ"), " हिन्दी पाठ ");
        assert_eq!(words("แมว"), " แ ม ว ");
    }

    #[test]
    fn finds_whole_words_only_and_all_that_overlap() {
        let queries = ["new york", "york", "new york city", "or", "cat", "New-York"];
        assert_eq!(found(&queries, "New York City, NY"), [0, 1, 2]);
        assert_eq!(found(&queries, "the cathedral of Yorkshire"), [] as [u32; 0]);
        assert_eq!(found(&queries, "cat cat CAT's"), [4]);
        assert_eq!(found(&["猫"], "白い猫です"), [0]);
        assert_eq!(found(&[], "anything"), [] as [u32; 0]);
    }

    /// What the automaton should find, done the slow way over lists of words.
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

    proptest! {
        #[test]
        fn same_as_the_naive_search(
            queries in proptest::collection::vec("[ab猫É'é]{1,3}( [abß]{1,2}){0,2}", 0..20),
            text in "([abß猫É-]{1,3}[ .,]{0,2}){0,12}",
        ) {
            let list = QueryList::from_texts(queries.iter().map(String::as_str));
            let matcher = Matcher::new(&list).unwrap();
            let mut out = Vec::new();
            matcher.find(&text, &mut String::new(), &mut out);
            prop_assert_eq!(out, naive(&list, &text));
        }

        #[test]
        fn words_are_stable_and_well_spaced(text in "\\PC{0,40}") {
            let once = words(&text);
            prop_assert!(once.starts_with(' ') && once.ends_with(' ') && !once.contains("  "));
            prop_assert_eq!(words(&once), once);
        }

        #[test]
        fn ascii_takes_the_same_way_as_unicode(text in "[ -~]{0,40}") {
            let mut slow = String::from(" ");
            text.nfkc().for_each(|c| push_char(c, &mut slow));
            end_word(&mut slow);
            prop_assert_eq!(words(&text), slow);
        }
    }
}
