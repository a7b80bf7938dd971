//! The one rule that makes words of texts and of queries.
//!
//! A text is put in Unicode form NFKC and its case is folded (upper case, then lower case of each character, so that `ß` is `ss` and `ς`
//! is `σ`); a word is a run of letters, digits and the marks upon them, and whatever lies between words, apostrophes and hyphens too,
//! parts them. Scripts that write without spaces (Han, kana, Thai, Lao, Khmer, Burmese) give a word for each character, so that a query
//! is found inside an unbroken line.

use std::iter;
use std::sync::LazyLock;

use unicode_normalization::char::{canonical_combining_class, is_combining_mark};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfkc_quick};

use super::vectorized;

/// Most bytes of a word that is its own key where words are looked up.
pub(super) const SHORT: usize = 16;
/// Bytes that are looked at in one step.
const STEP: usize = 64;
const EIGHT: usize = 8;
const BLANKS: &str = match std::str::from_utf8(&[b' '; STEP + SHORT]) {
    Ok(blanks) => blanks,
    Err(_) => "",
};

/// The words of `text`, folded, with one space before, between and after them, into `out` (emptied first). No words: one space.
pub(crate) fn words_of(text: &str, out: &mut String) {
    let mut folded = String::with_capacity(text.len() + 8);
    fold(text, &mut folded);
    folded.make_ascii_lowercase();
    out.clear();
    out.push(' ');
    for word in folded.split(|c: char| c.is_ascii() && !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        out.push_str(word);
        out.push(' ');
    }
}

/// Texts, folded, one after the other, and where their words are.
#[derive(Default, Debug)]
pub(super) struct Folded {
    /// Between words stands ASCII that is neither letter nor digit. After the last word at least [`SHORT`] blanks, up to a multiple of
    /// [`STEP`].
    text: String,
    /// Where each text ends, in bytes.
    text_ends: Vec<usize>,
    /// Where each word begins, and where it ends.
    turns: Vec<u32>,
    /// For each step which of its bytes begin a word, and how many words begin before it.
    begins: Vec<(u64, usize)>,
    /// After how many words each text ends.
    ends: Vec<usize>,
}

impl Folded {
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.text_ends.clear();
    }

    pub(super) const fn len(&self) -> usize {
        self.text.len()
    }

    pub(super) fn add(&mut self, text: &str) {
        if text.is_ascii() {
            // `find_words` does the rest.
            self.text.push_str(text);
        } else {
            fold(text, &mut self.text);
        }
        self.text_ends.push(self.text.len());
        self.text.push(' ');
    }

    /// Finds the words of all texts. [`SHORT`] bytes follow on the beginning of each.
    pub(super) fn find_words(&mut self) {
        self.text.push_str(&BLANKS[..SHORT + (STEP - (self.text.len() + SHORT) % STEP) % STEP]);
        self.text.make_ascii_lowercase();
        vectorized(
            #[inline(always)]
            || self.find_turns(),
        );
        let Self { text_ends, begins, ends, .. } = self;
        ends.clear();
        ends.extend(text_ends.iter().map(|end| {
            let (bits, before) = begins[end / STEP];
            before + (bits & ((1 << (end % STEP)) - 1)).count_ones() as usize
        }));
    }

    #[inline(always)]
    fn find_turns(&mut self) {
        let Self { text, turns, begins, .. } = self;
        begins.clear();
        turns.resize(text.len() + EIGHT, 0);
        let (mut inside, mut n) = (0, 0_usize);
        for (bytes, start) in text.as_bytes().chunks_exact(STEP).zip((0..).step_by(STEP)) {
            let mut in_word = 0_u64;
            for (i, eight) in bytes.as_chunks::<EIGHT>().0.iter().enumerate() {
                in_word |= word_bytes(u64::from_le_bytes(*eight)) << (i * EIGHT);
            }
            // A bit for each byte that is in a word where the one before it is not, or the other way round.
            let mut here = in_word ^ (in_word << 1 | inside);
            begins.push((here & in_word, n.div_ceil(2)));
            inside = in_word >> 63;
            // Eight at a time, without a branch for each; those after the last one are overwritten.
            let end = n + here.count_ones() as usize;
            while n < end {
                for turn in &mut turns[n..n + EIGHT] {
                    *turn = start + here.trailing_zeros();
                    here &= here.wrapping_sub(1);
                }
                n += EIGHT;
            }
            n = end;
        }
        turns.truncate(n);
    }

    pub(super) const fn bytes(&self) -> &[u8] {
        self.text.as_bytes()
    }

    /// Where the words begin and end.
    pub(super) fn words(&self) -> &[[u32; 2]] {
        self.turns.as_chunks().0
    }

    /// After how many words each text ends.
    pub(super) fn ends(&self) -> &[usize] {
        &self.ends
    }
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x80 * ONES;

/// A bit for each of eight bytes, the first one the lowest: whether it belongs to a word. No capital letters stand in a folded text,
/// and nothing outside of ASCII parts words.
#[inline(always)]
const fn word_bytes(eight: u64) -> u64 {
    let low = eight & !HIGH;
    // The high bit of each byte of `low + (0x80 - c)` says whether the byte is `c` or more.
    let letter = (low + (0x80 - b'a' as u64) * ONES) & !(low + (0x7f - b'z' as u64) * ONES);
    let digit = (low + (0x80 - b'0' as u64) * ONES) & !(low + (0x7f - b'9' as u64) * ONES);
    let word = (eight | letter | digit) & HIGH;
    // The eight high bits, side by side.
    (word >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

/// Appends `text`, folded, but for capital ASCII letters.
fn fold(text: &str, out: &mut String) {
    let known = Known::table();
    let mut rest = text;
    loop {
        let ascii = ascii_len(rest.as_bytes());
        if ascii == rest.len() {
            break;
        }
        let (mut end, mut is_stable) = (ascii, true);
        for c in rest[ascii..].chars().take_while(|c| !c.is_ascii()) {
            end += c.len_utf8();
            is_stable &= known.of(c).is_stable;
        }
        if is_stable {
            fold_ascii(&rest[..ascii], out);
            rest[ascii..end].chars().for_each(|c| known.fold(c, out));
        } else {
            // NFKC joins nothing across the front of an ASCII character. The last one before others goes with them: a mark may stand on it.
            let start = ascii.saturating_sub(1);
            fold_ascii(&rest[..start], out);
            rest[start..end].nfkc().for_each(|c| known.fold(c, out));
        }
        rest = &rest[end..];
    }
    fold_ascii(rest, out);
}

/// How many bytes of ASCII come first.
fn ascii_len(text: &[u8]) -> usize {
    let (eights, last) = text.as_chunks::<EIGHT>();
    for (eight, at) in eights.iter().zip((0..).step_by(EIGHT)) {
        let others = u64::from_le_bytes(*eight) & HIGH;
        if others != 0 {
            return at + others.trailing_zeros() as usize / 8;
        }
    }
    text.len() - last.len() + last.iter().position(|b| !b.is_ascii()).unwrap_or(last.len())
}

fn fold_ascii(text: &str, out: &mut String) {
    if text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        end_unspaced(out);
    }
    out.push_str(text);
}

/// What is known of the characters up to the ideographs, by their numbers.
struct Known(Vec<Character>);

impl Known {
    fn table() -> &'static Self {
        static TABLE: LazyLock<Known> = LazyLock::new(|| {
            let all =
                (0..0x3000).map(|c| char::from_u32(c).map_or(Character { kind: Kind::Other, is_stable: false }, Character::new));
            Known(all.collect())
        });
        &TABLE
    }

    fn of(&self, c: char) -> Character {
        self.0.get(c as usize).copied().unwrap_or_else(|| Character::new(c))
    }

    fn fold(&self, c: char, out: &mut String) {
        match self.of(c).kind {
            // A mark belongs to the word it stands on; alone it is nothing.
            Kind::Mark if in_word(out) => out.push(c),
            Kind::Mark => {}
            Kind::Unspaced => {
                end_word(out);
                out.push(c);
            }
            Kind::Letter(folded) => {
                end_unspaced(out);
                match folded {
                    Some(folded) => out.push(folded),
                    None => out.extend(folds(c)),
                }
            }
            Kind::Other => end_word(out),
        }
    }
}

#[derive(Clone, Copy)]
struct Character {
    kind: Kind,
    /// Whether NFKC leaves it as it is, whatever stands before it.
    is_stable: bool,
}

#[derive(Clone, Copy)]
enum Kind {
    Mark,
    Unspaced,
    /// A letter or digit, and what it folds to, if that is one character.
    Letter(Option<char>),
    Other,
}

impl Character {
    fn new(c: char) -> Self {
        let is_stable = is_nfkc_quick(iter::once(c)) == IsNormalized::Yes && canonical_combining_class(c) == 0;
        let kind = if is_combining_mark(c) {
            Kind::Mark
        } else if is_unspaced(c) {
            Kind::Unspaced
        } else if c.is_alphanumeric() {
            let mut folded = folds(c);
            let first = folded.next();
            Kind::Letter(if folded.next().is_none() { first } else { None })
        } else {
            Kind::Other
        };
        Self { kind, is_stable }
    }
}

/// Down, up and down again: `ẞ` and `ß` both become `ss`.
fn folds(c: char) -> impl Iterator<Item = char> {
    c.to_lowercase().flat_map(char::to_uppercase).flat_map(char::to_lowercase)
}

/// Whether the last character belongs to a word.
fn in_word(out: &str) -> bool {
    out.as_bytes().last().is_some_and(|b| !b.is_ascii() || b.is_ascii_alphanumeric())
}

fn end_word(out: &mut String) {
    if in_word(out) {
        out.push(' ');
    }
}

fn end_unspaced(out: &mut String) {
    if out.as_bytes().last().is_some_and(|b| !b.is_ascii()) && out.ends_with(is_unspaced) {
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

    fn joined(text: &str) -> String {
        let mut out = String::new();
        words_of(text, &mut out);
        out
    }

    /// The rule, done character by character over the whole text.
    fn slowly(text: &str) -> String {
        let mut out = String::from(" ");
        let end = |out: &mut String| {
            if !out.ends_with(' ') {
                out.push(' ');
            }
        };
        for c in text.nfkc() {
            if is_combining_mark(c) {
                if !out.ends_with(' ') {
                    out.push(c);
                }
            } else if is_unspaced(c) {
                end(&mut out);
                out.push(c);
            } else if c.is_alphanumeric() {
                if out.chars().next_back().is_some_and(is_unspaced) {
                    end(&mut out);
                }
                out.extend(c.to_lowercase().flat_map(char::to_uppercase).flat_map(char::to_lowercase));
            } else {
                end(&mut out);
            }
        }
        end(&mut out);
        out
    }

    #[test]
    fn one_rule_makes_words() {
        assert_eq!(joined("A red-hot  car!"), " a red hot car ");
        assert_eq!(joined("don't"), " don t ");
        assert_eq!(joined(""), " ");
        assert_eq!(joined("?!"), " ");
        assert_eq!(joined("Straße STRASSE STRAẞE"), " strasse strasse strasse ");
        assert_eq!(joined("ΟΔΟΣ οδος οδός"), " οδοσ οδοσ οδόσ ");
        assert_eq!(joined("ﬁsh ２０２４ Ⅳ"), " fish 2024 iv ");
        assert_eq!(joined("cafe\u{301} café"), " café café ");
        assert_eq!(joined("白い猫 cat猫cat"), " 白 い 猫 cat 猫 cat ");
        assert_eq!(joined("हिन्दी पाठ"), " हिन्दी पाठ ");
        assert_eq!(joined("แมว"), " แ ม ว ");
        assert_eq!(joined("-\u{301}x .\u{301}"), " x ");
    }

    #[test]
    fn every_byte_is_in_a_word_or_not() {
        for b in 0..=u8::MAX {
            let in_word = !b.is_ascii() || b.is_ascii_lowercase() || b.is_ascii_digit();
            for place in 0..8 {
                let blanks = u64::from_le_bytes([b' '; 8]) & !(0xff << (place * 8));
                assert_eq!(word_bytes(blanks | u64::from(b) << (place * 8)), u64::from(in_word) << place, "{b:#x}");
                let letters = u64::from_le_bytes([b'z'; 8]) & !(0xff << (place * 8));
                let around = 0xff & !(1 << place);
                assert_eq!(word_bytes(letters | u64::from(b) << (place * 8)), around | u64::from(in_word) << place, "{b:#x}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_quick_way_is_the_slow_way(text in "([ -~]{0,9}|\\PC{0,3}|[a-z猫แิ\u{301}\u{323}ﬁ½…’éß가각ᄀᆨ]{0,4}){0,12}") {
            prop_assert_eq!(joined(&text), slowly(&text));
        }

        #[test]
        fn words_are_stable_and_well_spaced(text in "\\PC{0,40}") {
            let once = joined(&text);
            prop_assert!(once.starts_with(' ') && once.ends_with(' ') && !once.contains("  "));
            prop_assert_eq!(joined(&once), once);
        }

        #[test]
        fn steps_find_the_same_words(texts in proptest::collection::vec("([ -~]{0,80}|[a-z]{0,80}|\\PC{0,3}){0,6}", 0..5)) {
            let mut folded = Folded::default();
            texts.iter().for_each(|text| folded.add(text));
            folded.find_words();
            prop_assert!(folded.len() % STEP == 0 && folded.text.ends_with(&BLANKS[..SHORT]));
            let found: Vec<&str> = folded.words().iter().map(|[start, end]| &folded.text[*start as usize..*end as usize]).collect();
            let mut from = 0;
            for (text, end) in texts.iter().zip(folded.ends()) {
                let wanted = slowly(text);
                prop_assert_eq!(&found[from..*end], wanted.split_whitespace().collect::<Vec<_>>());
                from = *end;
            }
            prop_assert_eq!(from, found.len());
        }
    }
}
