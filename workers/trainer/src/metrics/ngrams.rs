//! Counting n-grams in a fixed order.

use std::collections::BTreeMap;

/// Occurrences of each n-gram of one length. Ordered, so that sums over it do not depend on a hasher.
pub(super) type Counts<'a> = BTreeMap<&'a [&'a str], u32>;

/// The longest n-gram that BLEU-4 and CIDEr-D look at.
pub(super) const MAX_N: usize = 4;

/// Counts of the 1-grams to 4-grams of `tokens`.
pub(super) fn counts<'a>(tokens: &'a [&'a str]) -> [Counts<'a>; MAX_N] {
    std::array::from_fn(|index| {
        let mut counts = Counts::new();
        for ngram in tokens.windows(index + 1) {
            *counts.entry(ngram).or_default() += 1;
        }
        counts
    })
}
