//! The momentum side of contrastive learning (`MoCo`, arXiv 1911.05722; ALBEF, arXiv 2107.07651; `models/blip_pretrain.py`): encoders that follow
//! the trained ones as a moving average, and queues of the features that they made of earlier batches.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;

use super::groups::TextGroups;
use super::losses::Key;
use super::optimizer::average;
use crate::config::MedConfig;
use crate::error::{ModelError, Result};
use crate::med::{Med, Parts};
use crate::random::Stream;

/// Prefixes of what the momentum encoders have of their own: what makes the features of ITC.
const ENCODERS: [&str; 4] = ["vision_model.", "vision_proj.", "text_encoder.", "text_proj."];
/// No feature of ITC comes through cross-attention.
const UNUSED: &str = ".crossattention.";

/// What names of the state's tensors start with.
const WEIGHTS: &str = "momentum/";
const QUEUE: &str = "queue/";

/// The momentum encoders and their queues.
#[derive(Debug)]
pub(super) struct Momentum {
    med: Med,
    weights: BTreeMap<String, Var>,
    decay: f64,
    queue: Queue,
}

/// Features `(n, p)` of the images and the texts of earlier batches, and what they belong to. A ring: the oldest are overwritten.
#[derive(Debug)]
struct Queue {
    images: Tensor,
    texts: Tensor,
    keys: Vec<Key>,
    next: usize,
}

/// Features of a batch by the momentum encoders, followed by those of the queue: `(b + n, p)` each.
pub(super) struct MomentumFeatures {
    pub(super) images: Tensor,
    pub(super) texts: Tensor,
    pub(super) keys: Vec<Key>,
    /// Pairs that are of the batch.
    batch: usize,
}

impl Momentum {
    /// Copies of the trained weights with these names, and a queue of `length` random features, keyed by `seed`, that belong to nothing.
    pub(super) fn new(
        config: &MedConfig,
        (online, frozen): (&BTreeMap<String, Var>, &BTreeMap<String, Tensor>),
        decay: f64,
        length: usize,
        (seed, device): (u64, &Device),
    ) -> Result<Self> {
        let is_encoder = |name: &str| ENCODERS.iter().any(|prefix| name.starts_with(prefix)) && !name.contains(UNUSED);
        let weights = online
            .iter()
            .filter(|(name, _)| is_encoder(name))
            .map(|(name, variable)| Ok((name.clone(), Var::from_tensor(&variable.as_tensor().copy()?)?)))
            .collect::<Result<BTreeMap<_, _>>>()?;
        // What is not used needs a shape all the same: the trained weights have it.
        let trained =
            online.iter().map(|(name, trained)| (name.clone(), weights.get(name).unwrap_or(trained).as_tensor().clone()));
        let tensors: HashMap<String, Tensor> = frozen.clone().into_iter().chain(trained).collect();
        let med = Med::load(config, VarBuilder::from_tensors(tensors, DType::F32, device), Parts::FILTER)?;
        Ok(Self { med, weights, decay, queue: Queue::new(length, config.image_text_hidden_size, (seed, device))? })
    }

    /// Moves the weights towards the trained ones: `decay · weight + (1 − decay) · trained`.
    pub(super) fn follow(&mut self, online: &BTreeMap<String, Var>) -> Result<()> {
        for (name, weight) in &self.weights {
            if let Some(trained) = online.get(name) {
                average(weight, trained.as_tensor(), self.decay)?;
            }
        }
        Ok(())
    }

    /// The features of a batch: what [`Med::patches`] makes of its images, and its texts with `[CLS]` first. Without gradients.
    pub(super) fn features(&self, patches: &Tensor, texts: &TextGroups, keys: &[Key]) -> Result<MomentumFeatures> {
        let images = self.med.patch_features(patches)?.detach();
        let texts = texts.forward(|group| self.med.text_features(&group.ids, &group.mask))?.detach();
        let behind = |batch: &Tensor, queue: &Tensor| match self.queue.keys.is_empty() {
            true => Ok(batch.clone()),
            false => Tensor::cat(&[batch, queue], 0),
        };
        Ok(MomentumFeatures {
            images: behind(&images, &self.queue.images)?,
            texts: behind(&texts, &self.queue.texts)?,
            keys: keys.iter().chain(&self.queue.keys).copied().collect(),
            batch: keys.len(),
        })
    }

    /// Puts the features of a batch in the place of the oldest.
    pub(super) fn enqueue(&mut self, features: &MomentumFeatures) -> Result<()> {
        self.queue.push(features)
    }

    /// All that the next step depends on, by name.
    pub(super) fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state: Vec<_> =
            self.weights.iter().map(|(name, weight)| (format!("{WEIGHTS}{name}"), weight.as_tensor().clone())).collect();
        let numbers: Vec<i64> = self.queue.keys.iter().flat_map(|key| key.to_numbers()).collect();
        let device = self.queue.images.device();
        state.push((format!("{QUEUE}images"), self.queue.images.clone()));
        state.push((format!("{QUEUE}texts"), self.queue.texts.clone()));
        state.push((format!("{QUEUE}keys"), Tensor::from_vec(numbers, (self.queue.keys.len(), 2), device)?));
        state.push((format!("{QUEUE}next"), Tensor::new(self.queue.next as u32, device)?));
        Ok(state)
    }

    /// Goes on from [`Self::state`].
    pub(super) fn restore(&mut self, saved: &HashMap<String, Tensor>) -> Result<()> {
        let get = |kind: &str, name: &str, shape: &[usize]| {
            let key = format!("{kind}{name}");
            let found = saved.get(&key).filter(|tensor| tensor.dims() == shape);
            found.cloned().ok_or_else(|| ModelError::Input(format!("the training state has no {key} of shape {shape:?}")))
        };
        for (name, weight) in &self.weights {
            weight.set(&get(WEIGHTS, name, weight.dims())?)?;
        }
        let queue = &mut self.queue;
        let length = queue.keys.len();
        let (images, texts) = (get(QUEUE, "images", queue.images.dims())?, get(QUEUE, "texts", queue.texts.dims())?);
        // Features are overwritten in place, so they must not share memory with the caller's tensors.
        (queue.images, queue.texts) = (images.copy()?, texts.copy()?);
        let numbers = get(QUEUE, "keys", &[length, 2])?.to_vec2::<i64>()?;
        queue.keys = numbers.into_iter().filter_map(|pair| Some(Key::from_numbers(pair.try_into().ok()?))).collect();
        queue.next = get(QUEUE, "next", &[])?.to_scalar::<u32>()? as usize;
        Ok(())
    }
}

impl MomentumFeatures {
    /// The features of a batch itself stand for those of momentum encoders, and there is no queue: plain contrast within the batch.
    pub(super) fn of_batch(images: &Tensor, texts: &Tensor, keys: &[Key]) -> Self {
        Self { images: images.clone(), texts: texts.clone(), keys: keys.to_vec(), batch: keys.len() }
    }
}

impl Queue {
    fn new(length: usize, width: usize, (seed, device): (u64, &Device)) -> Result<Self> {
        let random = |side: &str| -> Result<Tensor> {
            let mut stream = Stream::new("queue", seed, &[side.as_bytes()]);
            let values: Vec<f32> = (0..length * width).map(|_| stream.normal() as f32).collect();
            let mut rows = values;
            for row in rows.chunks_exact_mut(width.max(1)) {
                let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
                row.iter_mut().for_each(|x| *x /= norm);
            }
            Ok(Tensor::from_vec(rows, (length, width), device)?)
        };
        Ok(Self { images: random("images")?, texts: random("texts")?, keys: vec![Key::NONE; length], next: 0 })
    }

    fn push(&mut self, features: &MomentumFeatures) -> Result<()> {
        let length = self.keys.len();
        let mut taken = 0;
        // In two pieces where the ring's end is in between; of a batch longer than the ring, its beginning.
        while taken < features.batch.min(length) {
            let count = (features.batch.min(length) - taken).min(length - self.next);
            for (kept, new) in [(&self.images, &features.images), (&self.texts, &features.texts)] {
                kept.slice_set(&new.narrow(0, taken, count)?.contiguous()?, 0, self.next)?;
            }
            self.keys[self.next..self.next + count].copy_from_slice(&features.keys[taken..taken + count]);
            taken += count;
            self.next = (self.next + count) % length;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_queue_is_a_ring_of_unit_vectors_of_which_the_oldest_go() {
        let device = &Device::Cpu;
        let mut queue = Queue::new(5, 4, (1, device)).unwrap();
        let lengths = queue.images.sqr().unwrap().sum(1).unwrap().to_vec1::<f32>().unwrap();
        assert!(lengths.iter().all(|length| (length - 1.0).abs() < 1e-5), "{lengths:?}");
        assert_ne!(queue.images.to_vec2::<f32>().unwrap(), queue.texts.to_vec2::<f32>().unwrap());
        let feature = |batch: usize| {
            let rows: Vec<f32> = (0..3).flat_map(|i| [(10 * batch + i) as f32; 4]).collect();
            let rows = Tensor::from_vec(rows, (3, 4), device).unwrap();
            let keys: Vec<Key> = (0..3).map(|i| Key::new(&format!("{batch}/{i}"), "t")).collect();
            MomentumFeatures::of_batch(&rows, &(&rows * -1.0).unwrap(), &keys)
        };
        for batch in 0..3 {
            queue.push(&feature(batch)).unwrap();
        }
        // Nine went in; of the last five, 21 and 22 lie behind the ring's end.
        let firsts = |rows: &Tensor| rows.to_vec2::<f32>().unwrap().iter().map(|row| row[0]).collect::<Vec<f32>>();
        assert_eq!(firsts(&queue.images), [12.0, 20.0, 21.0, 22.0, 11.0]);
        assert_eq!(firsts(&queue.texts), [-12.0, -20.0, -21.0, -22.0, -11.0]);
        assert_eq!(queue.keys[3], Key::new("2/2", "t"));
        assert_eq!(queue.next, 4);
    }
}
