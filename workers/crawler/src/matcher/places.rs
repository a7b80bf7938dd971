//! Where hashes lead to numbers: a table of four bytes for each, much smaller than what the numbers stand for.

use prefetch_index::prefetch_index;

/// The numbers of no entry: there is none, and there may be one farther on.
pub(super) const NOWHERE: u32 = 0;
pub(super) const ELSEWHERE: u32 = 1;
/// The number of the first entry.
pub(super) const FIRST: u32 = 2;

/// A table of numbers from 1, in buckets: an entry stands in the bucket that its hash names, or in the next one that is not full. Each
/// place holds a number in the bits of `numbers`, and bits of the hash above them.
pub(super) struct Places {
    buckets: Box<[Bucket]>,
    numbers: u32,
}

/// One line of the cache, full from the front on.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Bucket([u32; 16]);

impl Bucket {
    const fn is_full(&self) -> bool {
        self.0[15] != 0
    }
}

impl Places {
    /// A table for `n` numbers, the largest of which is `n` + 1. Three of ten places stay free.
    pub(super) fn new(n: usize) -> Self {
        Self { buckets: vec![Bucket::default(); n / 11 + 1].into(), numbers: (n + 2).next_power_of_two() as u32 - 1 }
    }

    pub(super) const fn bytes(&self) -> usize {
        size_of_val(&*self.buckets)
    }

    #[inline(always)]
    const fn mark(&self, hash: u64) -> u32 {
        hash as u32 & !self.numbers
    }

    const fn after(&self, bucket: usize) -> usize {
        if bucket + 1 == self.buckets.len() { 0 } else { bucket + 1 }
    }

    pub(super) fn put(&mut self, hash: u64, number: u32) {
        let mut at = scale(hash, self.buckets.len());
        while self.buckets[at].is_full() {
            at = self.after(at);
        }
        let mark = self.mark(hash);
        if let Some(free) = self.buckets[at].0.iter_mut().find(|place| **place == 0) {
            *free = mark | number;
        }
    }

    #[inline(always)]
    pub(super) fn prefetch(&self, hash: u64) {
        prefetch_index(&self.buckets, scale(hash, self.buckets.len()));
    }

    /// The number of a hash in the bucket that it names, perhaps that of another hash; [`NOWHERE`] if it stands in none.
    #[inline(always)]
    pub(super) fn first(&self, hash: u64) -> u32 {
        let bucket = &self.buckets[scale(hash, self.buckets.len())];
        let mark = self.mark(hash);
        // The lowest number is the most used one; an empty place becomes the highest one.
        let least = bucket.0.iter().fold(u32::MAX, |least, place| least.min((place ^ mark).wrapping_sub(1)));
        let none = if bucket.is_full() { ELSEWHERE } else { NOWHERE };
        if least < self.numbers { least + 1 } else { none }
    }

    /// The number of a hash that `is_it`, or 0.
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> u32 {
        let (mark, mut at) = (self.mark(hash), scale(hash, self.buckets.len()));
        loop {
            let bucket = &self.buckets[at];
            for place in bucket.0 {
                if place == 0 || (place & !self.numbers == mark && is_it(place & self.numbers)) {
                    return place & self.numbers;
                }
            }
            at = self.after(at);
        }
    }
}

/// A number below `n` by the upper half of a hash.
pub(super) const fn scale(hash: u64, n: usize) -> usize {
    (((hash >> 32) * n as u64) >> 32) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_full_buckets_too() {
        for n in [1, 10, 17, 100, 3000] {
            let mut places = Places::new(n as usize);
            // All in one bucket and the ones after it, then in a few: the last bucket of all goes on in the first one.
            let hash = |number: u32| if n == 100 { u64::MAX } else { u64::from(number % 7) << 60 | u64::from(number) << 20 };
            for number in FIRST..n + FIRST {
                places.put(hash(number), number);
            }
            for number in FIRST..n + FIRST {
                assert_eq!(places.find(hash(number), |found| found == number), number);
                assert_ne!(places.first(hash(number)), NOWHERE);
            }
            assert_eq!(places.find(hash(2), |_| false), NOWHERE);
        }
        assert_eq!(Places::new(0).first(7), NOWHERE);
    }
}
