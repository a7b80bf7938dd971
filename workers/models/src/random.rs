//! Randomness that is a function of names: every draw is keyed by a seed, what it is for, and the thing it is drawn for.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// A stream of random numbers that depends on its key alone, never on order, thread or time.
#[derive(Debug, Clone)]
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of a purpose, a seed and a list of keys.
    #[must_use]
    pub fn new(purpose: &str, seed: u64, keys: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for key in [purpose.as_bytes(), &seed.to_le_bytes()].iter().chain(keys) {
            // The length keeps ("ab", "c") apart from ("a", "bc").
            hash.update((key.len() as u64).to_le_bytes());
            hash.update(key);
        }
        Self(ChaCha8Rng::from_seed(hash.finalize().into()))
    }

    /// The next number, uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Number `position` of the stream, uniform in [0, 1), whatever was drawn before.
    pub fn uniform_at(&mut self, position: u64) -> f64 {
        // One draw takes two words of 32 bits.
        self.0.set_word_pos(2 * u128::from(position));
        self.uniform()
    }

    /// Uniform in `0..n`, for `n` of at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        ((self.uniform() * n as f64) as usize).min(n - 1)
    }

    /// A place in `weights`, drawn in proportion to them; `None` where none is more than 0.
    pub fn weighted(&mut self, weights: &[f64]) -> Option<usize> {
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        let mut last = None;
        for (place, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            last = Some(place);
            if left < *weight {
                break;
            }
            left -= weight;
        }
        last
    }

    /// The next standard normal number (Box and Muller, two uniform draws).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_every_part_of_its_key() {
        let first = |purpose, seed, keys: &[&[u8]]| Stream::new(purpose, seed, keys).uniform();
        let base = first("a", 1, &[b"ab", b"c"]);
        assert_eq!(base, first("a", 1, &[b"ab", b"c"]));
        for other in
            [first("b", 1, &[b"ab", b"c"]), first("a", 2, &[b"ab", b"c"]), first("a", 1, &[b"a", b"bc"]), first("a", 1, &[b"ab"])]
        {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn positions_are_independent_of_what_was_drawn() {
        let mut straight = Stream::new("x", 0, &[]);
        let drawn: Vec<f64> = (0..5).map(|_| straight.uniform()).collect();
        let mut jumping = Stream::new("x", 0, &[]);
        for position in [3, 0, 4, 1, 2] {
            assert_eq!(jumping.uniform_at(position), drawn[position as usize]);
        }
    }

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let mut stream = Stream::new("n", 7, &[]);
        let drawn: Vec<f64> = (0..20_000).map(|_| stream.normal()).collect();
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        let variance = drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / drawn.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "mean {mean}, variance {variance}");
    }
}
