//! Near-duplicates among 64-bit perceptual hashes.

use std::collections::HashMap;

/// The largest distance for which the search stays far from comparing all pairs.
pub(crate) const MAX_DISTANCE: u32 = 8;

/// An index of hashes that answers: is there one within `distance` bits of this?
///
/// The 64 bits are cut into m = ⌈(d + 1) / 2⌉ bands. Two hashes that differ in at most d bits differ in at most ⌊d / m⌋ ≤ 1 bit in
/// some band (pigeonhole principle; multi-index hashing, Norouzi et al., arXiv 1307.2982). So every hash within d is found by
/// looking up, in every band, the band's value and the values one bit away, and comparing what stands there in full.
#[derive(Debug)]
pub(crate) struct HashIndex {
    distance: u32,
    bands: Vec<Band>,
    hashes: Vec<u64>,
}

#[derive(Debug)]
struct Band {
    shift: u32,
    bits: u32,
    /// The last hash added with a band value.
    heads: HashMap<u64, u32>,
    /// For every hash the one before it with the same band value.
    before: Vec<u32>,
}

/// The end of a chain in [`Band::before`].
const NONE: u32 = u32::MAX;

impl Band {
    const fn value(&self, hash: u64) -> u64 {
        hash >> self.shift & (u64::MAX >> (64 - self.bits))
    }
}

impl HashIndex {
    /// An empty index for pairs at most `distance` bits apart; distances above [`MAX_DISTANCE`] count as that.
    #[must_use]
    pub(crate) fn new(distance: u32) -> Self {
        let distance = distance.min(MAX_DISTANCE);
        let count = (distance + 1).div_ceil(2);
        let bands = (0..count).map(|i| {
            let (from, to) = (64 * i / count, 64 * (i + 1) / count);
            Band { shift: from, bits: to - from, heads: HashMap::new(), before: Vec::new() }
        });
        Self { distance, bands: bands.collect(), hashes: Vec::new() }
    }

    /// Whether a hash within the distance was added before.
    #[must_use]
    pub(crate) fn has_near(&self, hash: u64) -> bool {
        let near = |band: &Band, value: u64| {
            let mut next = band.heads.get(&value).copied().unwrap_or(NONE);
            while next != NONE {
                if (self.hashes[next as usize] ^ hash).count_ones() <= self.distance {
                    return true;
                }
                next = band.before[next as usize];
            }
            false
        };
        // Equal band values first: most duplicates are found there.
        self.bands.iter().any(|b| near(b, b.value(hash)))
            || self.distance > 0 && self.bands.iter().any(|b| (0..b.bits).any(|bit| near(b, b.value(hash) ^ 1 << bit)))
    }

    /// Adds a hash. At most 2³² − 1 of them fit; further ones are not found again.
    pub(crate) fn add(&mut self, hash: u64) {
        let Ok(place) = u32::try_from(self.hashes.len()) else { return };
        if place == NONE {
            return;
        }
        self.hashes.push(hash);
        for band in &mut self.bands {
            let before = band.heads.insert(band.value(hash), place).unwrap_or(NONE);
            band.before.push(before);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// A hash and what is flipped in it: up to `bits` distinct bits.
    fn flipped(bits: usize) -> impl Strategy<Value = (u64, u64)> {
        (any::<u64>(), proptest::collection::btree_set(0_u32..64, bits))
            .prop_map(|(hash, set)| (hash, set.iter().fold(0, |mask, bit| mask | 1 << bit)))
    }

    proptest! {
        #[test]
        fn finds_exactly_what_comparing_all_finds(
            hashes in proptest::collection::vec(any::<u64>(), 0..40),
            (hash, flips) in (0_usize..11).prop_flat_map(flipped),
            distance in 0_u32..=MAX_DISTANCE,
        ) {
            let mut index = HashIndex::new(distance);
            for h in &hashes {
                index.add(*h);
            }
            index.add(hash);
            let probe = hash ^ flips;
            let naive = hashes.iter().chain([&hash]).any(|h| (h ^ probe).count_ones() <= distance);
            prop_assert_eq!(index.has_near(probe), naive);
        }
    }

    #[test]
    fn chains_of_equal_bands_are_followed_to_the_end() {
        let mut index = HashIndex::new(4);
        for i in 0..100 {
            index.add(i << 32);
        }
        assert!(index.has_near(1 << 63 | 1 << 32));
        assert!(!index.has_near(u64::MAX));
        assert!(!HashIndex::new(4).has_near(0));
    }
}
