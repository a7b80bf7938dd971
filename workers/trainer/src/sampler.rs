//! In which order a run sees its pairs.

use capfilt_models::random::Stream;

use crate::{TrainPair, TrainerError};

/// One draw: a pair, one of its texts, and how often the pair came before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Draw {
    pub(crate) pair: usize,
    pub(crate) text: usize,
    pub(crate) epoch: u64,
}

/// An endless sequence of draws, each a function of the seed and its number alone, so that a run can go on anywhere.
///
/// Human-annotated pairs and the others are two pools. Each pool is walked in a new order every epoch; draws alternate between the
/// pools so evenly that after any number of draws the share of the human ones is off by less than one.
pub(crate) struct Sampler {
    seed: u64,
    human: Pool,
    other: Pool,
    human_share: f64,
}

struct Pool {
    name: &'static str,
    /// Pairs in the order of their ids, so that the order of the input does not matter.
    pairs: Vec<usize>,
    /// Order of the epoch that was asked for last.
    order: Option<(u64, Vec<usize>)>,
}

impl Sampler {
    /// A sampler in which a human-annotated pair comes `human_weight` times as often as another.
    pub(crate) fn new(pairs: &[TrainPair], human_weight: f64, seed: u64) -> Result<Self, TrainerError> {
        if let Some(bare) = pairs.iter().find(|pair| pair.texts.is_empty()) {
            return Err(TrainerError::NoPairs { purpose: "train on", reason: format!("image {} has no text", bare.sample_id) });
        }
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by(|&a, &b| pairs[a].sample_id.cmp(&pairs[b].sample_id));
        if let Some(twice) = order.windows(2).find(|two| pairs[two[0]].sample_id == pairs[two[1]].sample_id) {
            let reason = format!("image {} is there twice", pairs[twice[0]].sample_id);
            return Err(TrainerError::NoPairs { purpose: "train on", reason });
        }
        let (human, other): (Vec<usize>, Vec<usize>) = order.into_iter().partition(|&pair| pairs[pair].is_human());
        let weight = human_weight * human.len() as f64;
        let total = weight + other.len() as f64;
        if total <= 0.0 {
            return Err(TrainerError::NoPairs { purpose: "train on", reason: "the set is empty".to_owned() });
        }
        Ok(Self {
            seed,
            human: Pool { name: "human", pairs: human, order: None },
            other: Pool { name: "other", pairs: other, order: None },
            human_share: weight / total,
        })
    }

    /// Draw `number`, counted from 0.
    pub(crate) fn draw(&mut self, number: u64, pairs: &[TrainPair]) -> Draw {
        let human_before = |draws: u64| (draws as f64 * self.human_share).floor() as u64;
        let (before, after) = (human_before(number), human_before(number + 1));
        let (pool, ordinal) = if after > before { (&mut self.human, before) } else { (&mut self.other, number - before) };
        let (pair, epoch) = pool.at(ordinal, self.seed);
        let texts = pairs[pair].texts.len();
        let mut stream = Stream::new("text of a pair", self.seed, &[pairs[pair].sample_id.as_bytes(), &epoch.to_le_bytes()]);
        Draw { pair, text: below(&mut stream, texts), epoch }
    }
}

impl Pool {
    /// The pair at a position of the endless walk, and the number of the round.
    fn at(&mut self, position: u64, seed: u64) -> (usize, u64) {
        let size = self.pairs.len() as u64;
        let (epoch, place) = (position / size, (position % size) as usize);
        let order = match self.order.take() {
            Some((known, order)) if known == epoch => order,
            _ => self.shuffled(epoch, seed),
        };
        let pair = order[place];
        self.order = Some((epoch, order));
        (pair, epoch)
    }

    /// Fisher and Yates.
    fn shuffled(&self, epoch: u64, seed: u64) -> Vec<usize> {
        let mut order = self.pairs.clone();
        let mut stream = Stream::new("order of an epoch", seed, &[self.name.as_bytes(), &epoch.to_le_bytes()]);
        for last in (1..order.len()).rev() {
            order.swap(last, below(&mut stream, last + 1));
        }
        order
    }
}

/// Uniform in `0..n`, for `n` of at least 1.
pub(crate) fn below(stream: &mut Stream, n: usize) -> usize {
    ((stream.uniform() * n as f64) as usize).min(n - 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use capfilt_schemas::Origin;

    use super::*;
    use crate::PairText;

    fn pairs(human: usize, web: usize) -> Vec<TrainPair> {
        let pair = |i: usize, origin| TrainPair {
            sample_id: format!("{i:04}"),
            texts: (0..3).map(|t| PairText { text: format!("text {t}"), origin }).collect(),
            pixels: Vec::new().into(),
        };
        (0..human).map(|i| pair(i, Origin::Human)).chain((human..human + web).map(|i| pair(i, Origin::Web))).collect()
    }

    #[test]
    fn every_pair_comes_once_in_an_epoch() {
        let pairs = pairs(0, 10);
        let mut sampler = Sampler::new(&pairs, 1.0, 3).unwrap();
        for epoch in 0..3 {
            let draws: Vec<Draw> = (0..10).map(|i| sampler.draw(epoch * 10 + i, &pairs)).collect();
            assert_eq!(draws.iter().map(|d| d.pair).collect::<BTreeSet<_>>().len(), 10);
            assert!(draws.iter().all(|d| d.epoch == epoch));
        }
    }

    #[test]
    fn a_draw_depends_on_its_number_alone() {
        let pairs = pairs(7, 12);
        let mut straight = Sampler::new(&pairs, 2.0, 3).unwrap();
        let all: Vec<Draw> = (0..100).map(|i| straight.draw(i, &pairs)).collect();
        let mut jumping = Sampler::new(&pairs, 2.0, 3).unwrap();
        for number in [99u64, 3, 50, 0, 98] {
            assert_eq!(jumping.draw(number, &pairs), all[number as usize]);
        }
        let mut other = Sampler::new(&pairs, 2.0, 4).unwrap();
        assert_ne!((0..100).map(|i| other.draw(i, &pairs)).collect::<Vec<_>>(), all);
    }

    #[test]
    fn the_order_of_the_input_does_not_matter() {
        let forward = pairs(5, 9);
        let mut backward = forward.clone();
        backward.reverse();
        let (mut a, mut b) = (Sampler::new(&forward, 1.5, 1).unwrap(), Sampler::new(&backward, 1.5, 1).unwrap());
        for number in 0..60 {
            let (x, y) = (a.draw(number, &forward), b.draw(number, &backward));
            assert_eq!(forward[x.pair].sample_id, backward[y.pair].sample_id);
            assert_eq!((x.text, x.epoch), (y.text, y.epoch));
        }
    }

    #[test]
    fn human_weight_sets_the_share() {
        let pairs = pairs(10, 30);
        for (weight, share) in [(1.0, 0.25), (3.0, 0.5), (0.0, 0.0)] {
            let mut sampler = Sampler::new(&pairs, weight, 1).unwrap();
            let human = (0..400).filter(|&i| sampler.draw(i, &pairs).pair < 10).count();
            assert!((human as f64 - 400.0 * share).abs() <= 1.0, "weight {weight}: {human} of 400");
        }
    }

    #[test]
    fn texts_of_a_pair_take_turns() {
        let pairs = pairs(0, 1);
        let mut sampler = Sampler::new(&pairs, 1.0, 1).unwrap();
        let texts: BTreeSet<usize> = (0..40).map(|i| sampler.draw(i, &pairs).text).collect();
        assert_eq!(texts, BTreeSet::from([0, 1, 2]));
    }

    #[test]
    fn sets_that_cannot_be_drawn_from_are_refused() {
        assert!(Sampler::new(&[], 1.0, 0).is_err());
        assert!(Sampler::new(&pairs(3, 0), 0.0, 0).is_err());
        let mut bare = pairs(1, 1);
        bare[1].texts.clear();
        assert!(Sampler::new(&bare, 1.0, 0).err().unwrap().to_string().contains("0001 has no text"));
        let mut twice = pairs(2, 0);
        twice[1].sample_id = twice[0].sample_id.clone();
        assert!(Sampler::new(&twice, 1.0, 0).err().unwrap().to_string().contains("there twice"));
    }
}
