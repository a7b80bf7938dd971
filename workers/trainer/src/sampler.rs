//! In which order a run sees its pairs.

use std::collections::BTreeMap;

use capfilt_models::random::Stream;
use capfilt_schemas::{Origin, fold};

use crate::TrainerError;
use crate::set::{Entry, TrainSet};

/// One draw: a pair, one of its texts, and how often the pair came before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Draw {
    pub(crate) pair: usize,
    pub(crate) text: usize,
    pub(crate) epoch: u64,
}

/// How often what is drawn, for one draw of something else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mixture {
    /// A human-annotated pair, for one draw of another.
    pub(crate) human: f64,
    /// A text of the web, among the texts of its image.
    pub(crate) web: f64,
    /// A synthetic text, among the texts of its image.
    pub(crate) synthetic: f64,
}

impl Mixture {
    fn of_text(&self, origin: Origin) -> f64 {
        match origin {
            Origin::Web => self.web,
            Origin::Synthetic => self.synthetic,
            Origin::Human => 1.0,
        }
    }
}

/// A member of a cross-fitted model; any other has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The fold that it judges, and is not trained on; counted from 0.
    pub fold: usize,
    /// Folds of each split, and so its members.
    pub folds: usize,
    /// Number of the split, counted from 0.
    pub repeat: usize,
}

impl Member {
    /// The only one of a model, which is trained on everything.
    pub const ONLY: Self = Self { fold: 0, folds: 1, repeat: 0 };

    /// Whether the sample is one that the member judges, and so is not trained on.
    pub(crate) fn judges(self, sample_id: &str) -> bool {
        self.folds > 1 && fold(sample_id, self.folds, self.repeat) == self.fold
    }
}

/// An endless sequence of draws, each a function of the seed and its number alone, so that a run can go on anywhere.
///
/// Human-annotated pairs and the others are two pools. Each pool is walked in a new order every epoch: its shards in a new order, and the
/// pairs of every few shards mixed, so that no more than those need be at hand. Draws alternate between the pools so evenly that after any
/// number of draws the share of the human ones is off by less than one.
pub(crate) struct Sampler {
    seed: u64,
    mixture: Mixture,
    human: Pool,
    other: Pool,
    human_share: f64,
}

struct Pool {
    name: &'static str,
    /// The pairs of each shard, in the order of their ids.
    shards: Vec<Vec<usize>>,
    size: u64,
    /// Shards whose pairs are mixed.
    window: usize,
    /// Order of the epoch that was asked for last.
    order: Option<(u64, Vec<usize>)>,
}

impl Sampler {
    /// A sampler over a set's pairs that mixes those of `window` shards. Of pairs that no person annotated it leaves those out that a member's
    /// fold has.
    pub(crate) fn new(set: &TrainSet, mixture: Mixture, window: usize, member: Member, seed: u64) -> Result<Self, TrainerError> {
        let fail = |reason: String| Err(TrainerError::NoPairs { purpose: "train on", reason });
        let entries = set.entries();
        let drawable = |entry: &Entry| {
            let trained_on = entry.is_human() || !member.judges(&entry.sample_id);
            trained_on && entry.texts.iter().any(|text| mixture.of_text(text.origin) > 0.0)
        };
        if let Some(bare) = entries.iter().find(|entry| entry.texts.is_empty()) {
            return fail(format!("image {} has no text", bare.sample_id));
        }
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by(|&a, &b| entries[a].sample_id.cmp(&entries[b].sample_id));
        if let Some(twice) = order.windows(2).find(|two| entries[two[0]].sample_id == entries[two[1]].sample_id) {
            return fail(format!("image {} is there twice", entries[twice[0]].sample_id));
        }
        let (human, other): (Vec<usize>, Vec<usize>) =
            order.into_iter().filter(|&pair| drawable(&entries[pair])).partition(|&pair| entries[pair].is_human());
        let weight = mixture.human * human.len() as f64;
        let total = weight + other.len() as f64;
        if total <= 0.0 {
            return fail(
                "no pair may be drawn: the set is empty, all its weights are 0, or all pairs are in the fold that is left out"
                    .to_owned(),
            );
        }
        let pool = |name, pairs: Vec<usize>| Pool::new(name, &pairs, |pair| entries[pair].shard, window);
        Ok(Self { seed, mixture, human: pool("human", human), other: pool("other", other), human_share: weight / total })
    }

    /// Pairs that may be drawn.
    pub(crate) fn pairs(&self) -> usize {
        (self.human.size + self.other.size) as usize
    }

    /// Draw `number`, counted from 0.
    pub(crate) fn draw(&mut self, number: u64, set: &TrainSet) -> Draw {
        let human_before = |draws: u64| (draws as f64 * self.human_share).floor() as u64;
        let (before, after) = (human_before(number), human_before(number + 1));
        let (pool, ordinal) = if after > before { (&mut self.human, before) } else { (&mut self.other, number - before) };
        let (pair, epoch) = pool.at(ordinal, self.seed);
        let entry = &set.entries()[pair];
        let mut stream = Stream::new("text of a pair", self.seed, &[entry.sample_id.as_bytes(), &epoch.to_le_bytes()]);
        let weights: Vec<f64> = entry.texts.iter().map(|text| self.mixture.of_text(text.origin)).collect();
        Draw { pair, text: stream.weighted(&weights).unwrap_or_default(), epoch }
    }
}

impl Pool {
    fn new(name: &'static str, pairs: &[usize], shard_of: impl Fn(usize) -> usize, window: usize) -> Self {
        let mut shards = BTreeMap::<usize, Vec<usize>>::new();
        for &pair in pairs {
            shards.entry(shard_of(pair)).or_default().push(pair);
        }
        Self { name, shards: shards.into_values().collect(), size: pairs.len() as u64, window: window.max(1), order: None }
    }

    /// The pair at a position of the endless walk, and the number of the round.
    fn at(&mut self, position: u64, seed: u64) -> (usize, u64) {
        let (epoch, place) = (position / self.size, (position % self.size) as usize);
        let order = match self.order.take() {
            Some((known, order)) if known == epoch => order,
            _ => self.shuffled(epoch, seed),
        };
        let pair = order[place];
        self.order = Some((epoch, order));
        (pair, epoch)
    }

    /// The order of an epoch.
    fn shuffled(&self, epoch: u64, seed: u64) -> Vec<usize> {
        let mut stream = Stream::new("order of an epoch", seed, &[self.name.as_bytes(), &epoch.to_le_bytes()]);
        let mut shards: Vec<usize> = (0..self.shards.len()).collect();
        if self.shards.len() > self.window {
            shuffle(&mut shards, &mut stream);
        }
        let mut order = Vec::with_capacity(self.size as usize);
        for window in shards.chunks(self.window) {
            let first = order.len();
            order.extend(window.iter().flat_map(|&shard| &self.shards[shard]));
            shuffle(&mut order[first..], &mut stream);
        }
        order
    }
}

/// Fisher and Yates.
fn shuffle<T>(items: &mut [T], stream: &mut Stream) {
    for last in (1..items.len()).rev() {
        items.swap(last, stream.below(last + 1));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use capfilt_schemas::Origin;

    use super::*;
    use crate::{PairText, TrainPair};

    const EVEN: Mixture = Mixture { human: 1.0, web: 1.0, synthetic: 1.0 };

    /// Human pairs and others, in shards of five.
    fn set(human: usize, web: usize) -> TrainSet {
        let pair = |i: usize, origin| TrainPair {
            sample_id: format!("{i:04}"),
            texts: (0..3).map(|t| PairText { text: format!("text {t}"), origin }).collect(),
            pixels: Vec::new().into(),
        };
        let pairs = (0..human).map(|i| pair(i, Origin::Human)).chain((human..human + web).map(|i| pair(i, Origin::Web)));
        let mut set = TrainSet::in_memory(pairs.collect());
        set.entries_mut().iter_mut().enumerate().for_each(|(i, entry)| entry.shard = i / 5);
        set
    }

    fn sampler(set: &TrainSet, human: f64, seed: u64) -> Sampler {
        Sampler::new(set, Mixture { human, ..EVEN }, 2, Member::ONLY, seed).unwrap()
    }

    #[test]
    fn every_pair_comes_once_in_an_epoch_and_few_shards_are_at_hand() {
        let set = set(0, 40);
        let mut sampler = sampler(&set, 1.0, 3);
        let mut orders = BTreeSet::new();
        for epoch in 0..3 {
            let draws: Vec<Draw> = (0..40).map(|i| sampler.draw(epoch * 40 + i, &set)).collect();
            assert_eq!(draws.iter().map(|d| d.pair).collect::<BTreeSet<_>>().len(), 40);
            assert!(draws.iter().all(|d| d.epoch == epoch));
            for window in draws.chunks(10) {
                assert_eq!(window.iter().map(|d| d.pair / 5).collect::<BTreeSet<_>>().len(), 2);
            }
            orders.insert(draws.iter().map(|d| d.pair).collect::<Vec<_>>());
        }
        assert_eq!(orders.len(), 3);
    }

    #[test]
    fn a_draw_depends_on_its_number_alone() {
        let set = set(7, 12);
        let mut straight = sampler(&set, 2.0, 3);
        let all: Vec<Draw> = (0..100).map(|i| straight.draw(i, &set)).collect();
        let mut jumping = sampler(&set, 2.0, 3);
        for number in [99u64, 3, 50, 0, 98] {
            assert_eq!(jumping.draw(number, &set), all[number as usize]);
        }
        let mut other = sampler(&set, 2.0, 4);
        assert_ne!((0..100).map(|i| other.draw(i, &set)).collect::<Vec<_>>(), all);
    }

    #[test]
    fn the_order_of_the_input_does_not_matter() {
        let forward = set(5, 9);
        let mut backward = set(5, 9);
        backward.entries_mut().reverse();
        let (mut a, mut b) = (sampler(&forward, 1.5, 1), sampler(&backward, 1.5, 1));
        for number in 0..60 {
            let (x, y) = (a.draw(number, &forward), b.draw(number, &backward));
            assert_eq!(forward.entries()[x.pair].sample_id, backward.entries()[y.pair].sample_id);
            assert_eq!((x.text, x.epoch), (y.text, y.epoch));
        }
    }

    #[test]
    fn human_weight_sets_the_share() {
        let set = set(10, 30);
        for (weight, share) in [(1.0, 0.25), (3.0, 0.5), (0.0, 0.0)] {
            let mut sampler = sampler(&set, weight, 1);
            let human = (0..400).filter(|&i| sampler.draw(i, &set).pair < 10).count();
            assert!((human as f64 - 400.0 * share).abs() <= 1.0, "weight {weight}: {human} of 400");
        }
    }

    #[test]
    fn a_member_is_trained_on_all_but_its_fold() {
        let set = set(10, 30);
        let mut left_out = Vec::new();
        for fold in 0..3 {
            let sampler = Sampler::new(&set, EVEN, 2, Member { fold, folds: 3, repeat: 1 }, 1).unwrap();
            let trained: BTreeSet<usize> = sampler.human.shards.iter().chain(&sampler.other.shards).flatten().copied().collect();
            assert_eq!(sampler.pairs(), trained.len());
            left_out.extend((0..40).filter(|pair| !trained.contains(pair)));
        }
        left_out.sort_unstable();
        assert_eq!(left_out, (10..40).collect::<Vec<_>>(), "each pair but the human ones is left out once");
    }

    #[test]
    fn texts_of_a_pair_take_turns_by_their_weights() {
        let mut set = set(0, 1);
        let texts = |set: &TrainSet, mixture: Mixture| {
            let mut sampler = Sampler::new(set, mixture, 1, Member::ONLY, 1).unwrap();
            let mut counts = [0; 3];
            (0..3000).for_each(|i| counts[sampler.draw(i, set).text] += 1);
            counts
        };
        assert!(texts(&set, EVEN).iter().all(|n| (900..1100).contains(n)));
        set.entries_mut()[0].texts[1].origin = Origin::Synthetic;
        let twice = texts(&set, Mixture { synthetic: 2.0, ..EVEN });
        assert!((1400..1600).contains(&twice[1]), "{twice:?}");
        assert_eq!(texts(&set, Mixture { web: 0.0, ..EVEN }), [0, 3000, 0]);
    }

    #[test]
    fn sets_that_cannot_be_drawn_from_are_refused() {
        let refused = |set: &TrainSet, mixture| Sampler::new(set, mixture, 1, Member::ONLY, 0).err().unwrap().to_string();
        assert!(refused(&set(0, 0), EVEN).contains("the set is empty"));
        refused(&set(3, 0), Mixture { human: 0.0, ..EVEN });
        refused(&set(0, 3), Mixture { web: 0.0, ..EVEN });
        let mut bare = set(1, 1);
        bare.entries_mut()[1].texts.clear();
        assert!(refused(&bare, EVEN).contains("0001 has no text"));
        let mut twice = set(2, 0);
        twice.entries_mut()[1].sample_id = "0000".to_owned();
        assert!(refused(&twice, EVEN).contains("there twice"));
    }
}
