//! Which of the texts that were found become queries: source after source, the most frequent first, until the budget is spent.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use serde::{Deserialize, Serialize};

/// The parts of the recipe, in the order in which they get their share of the budget (MetaCLIP's `build_metadata.py`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuerySource {
    /// The first word or phrase of a WordNet synset.
    Wordnet,
    /// A frequent word.
    Unigram,
    /// Two words that belong together.
    Bigram,
    /// The title of an article that is much read, or of a list.
    Title,
}

impl QuerySource {
    /// As tables and lists write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wordnet => "wordnet",
            Self::Unigram => "unigram",
            Self::Bigram => "bigram",
            Self::Title => "title",
        }
    }
}

/// A query of a table.
#[derive(Clone, PartialEq, Debug)]
pub struct QueryRow {
    /// Its words as the matcher folds them, with one space between.
    pub text: Box<str>,
    /// The first source that it was found in.
    pub source: QuerySource,
    /// Synsets (`wordnet`), uses (`unigram`, `bigram`) or page views (`title`); 0 for a title of a list, which says nothing about views.
    pub count: u64,
    /// Pointwise mutual information in bits, of bigrams.
    pub pmi: Option<f64>,
}

/// What became of the texts of a source that reach its thresholds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceCounts {
    /// Which.
    pub source: QuerySource,
    /// Texts that reach the thresholds.
    pub found: u64,
    /// Of those, the ones that an earlier source gave already.
    pub repeated: u64,
    /// Of those, the ones for which the budget had no room.
    pub cut: u64,
    /// Of those, the queries.
    pub kept: u64,
}

/// Picks queries, source by source.
pub(super) struct Picker {
    budget: usize,
    taken: HashSet<Box<str>>,
    rows: Vec<QueryRow>,
    counts: Vec<SourceCounts>,
}

impl Picker {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, taken: HashSet::new(), rows: Vec::new(), counts: Vec::new() }
    }

    /// The next source: `offer` is called with each of its texts once, in any order. What there is room for is kept, the most frequent
    /// first, of equally frequent ones by their bytes.
    pub(super) fn source<E>(
        &mut self,
        source: QuerySource,
        offer: impl FnOnce(&mut dyn FnMut(&str, u64, Option<f64>)) -> Result<(), E>,
    ) -> Result<(), E> {
        let room = self.budget - self.rows.len();
        let (mut found, mut repeated) = (0, 0);
        // The worst on top.
        let mut best: BinaryHeap<(Reverse<u64>, Box<str>, Option<Bits>)> = BinaryHeap::new();
        offer(&mut |text, count, pmi| {
            found += 1;
            if self.taken.contains(text) {
                repeated += 1;
                return;
            }
            let better = best.peek().is_none_or(|(worst, last, _)| (Reverse(count), text) < (*worst, last));
            if best.len() < room || (room > 0 && better) {
                best.push((Reverse(count), text.into(), pmi.map(Bits)));
                if best.len() > room {
                    best.pop();
                }
            }
        })?;
        let kept = best.len() as u64;
        for (Reverse(count), text, pmi) in best.into_sorted_vec() {
            self.taken.insert(text.clone());
            self.rows.push(QueryRow { text, source, count, pmi: pmi.map(|p| p.0) });
        }
        match self.counts.iter_mut().find(|c| c.source == source) {
            Some(counts) => {
                counts.found += found;
                counts.repeated += repeated;
                counts.cut += found - repeated - kept;
                counts.kept += kept;
            }
            None => self.counts.push(SourceCounts { source, found, repeated, cut: found - repeated - kept, kept }),
        }
        Ok(())
    }

    /// The queries in order, and how many each source gave.
    pub(super) fn finish(self) -> (Vec<QueryRow>, Vec<SourceCounts>) {
        (self.rows, self.counts)
    }
}

/// A PMI that never decides an order: no two texts of a source are the same.
#[derive(Clone, Copy)]
struct Bits(f64);

impl PartialEq for Bits {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Bits {}
impl PartialOrd for Bits {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Bits {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn pick(budget: usize, sources: &[(QuerySource, &[(&str, u64)])]) -> (Vec<(String, u64)>, Vec<SourceCounts>) {
        let mut picker = Picker::new(budget);
        for (source, texts) in sources {
            let offer = |each: &mut dyn FnMut(&str, u64, Option<f64>)| {
                texts.iter().for_each(|(t, n)| each(t, *n, None));
                Ok::<_, ()>(())
            };
            picker.source(*source, offer).unwrap();
        }
        let (rows, counts) = picker.finish();
        (rows.into_iter().map(|r| (r.text.into(), r.count)).collect(), counts)
    }

    #[test]
    fn later_sources_get_what_is_left() {
        let words: &[_] = &[("b", 5), ("a", 5), ("c", 9), ("d", 1)];
        let titles: &[_] = &[("c", 100), ("e", 70), ("f", 80)];
        let (rows, counts) = pick(5, &[(QuerySource::Unigram, words), (QuerySource::Title, titles)]);
        assert_eq!(rows, [("c", 9), ("a", 5), ("b", 5), ("d", 1), ("f", 80)].map(|(t, n)| (t.to_owned(), n)));
        assert_eq!(counts[0], SourceCounts { source: QuerySource::Unigram, found: 4, repeated: 0, cut: 0, kept: 4 });
        assert_eq!(counts[1], SourceCounts { source: QuerySource::Title, found: 3, repeated: 1, cut: 1, kept: 1 });
        let (rows, counts) = pick(2, &[(QuerySource::Unigram, words), (QuerySource::Title, titles)]);
        assert_eq!(rows, [("c", 9), ("a", 5)].map(|(t, n)| (t.to_owned(), n)));
        assert_eq!((counts[0].cut, counts[1].cut, counts[1].repeated), (2, 2, 1));
        assert_eq!(pick(0, &[(QuerySource::Unigram, words)]).0, []);
    }

    proptest! {
        #[test]
        fn order_of_offers_does_not_matter(mut texts in proptest::collection::btree_map("[a-f]{1,2}", 0_u64..5, 0..20).prop_map(|m| m.into_iter().collect::<Vec<_>>()).prop_shuffle(), budget in 0_usize..12) {
            let view: Vec<_> = texts.iter().map(|(t, n)| (t.as_str(), *n)).collect();
            let (got, _) = pick(budget, &[(QuerySource::Unigram, &view)]);
            texts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
            texts.truncate(budget);
            prop_assert_eq!(got, texts);
        }
    }
}
