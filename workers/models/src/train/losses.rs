//! The losses of BLIP (arXiv 2201.12086, section 3.2; `models/blip_pretrain.py`) and of CLIP.

use candle_core::{D, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::error::{ModelError, Result};
use crate::ops::smoothed_cross_entropy;
use crate::random::Stream;

/// Added to every probability that a negative is drawn with, so that a collapsed softmax still reaches all of them.
const NEGATIVE_FLOOR: f64 = 1e-4;

/// Language-model loss: cross-entropy of the next token with label smoothing, a scalar.
///
/// `logits` is `(b, t, vocab)` as the decoder returns them for `ids` and `mask` `(b, t)`. The logits at position `i` are judged by
/// token `i + 1`; padding is left out, and so are the first `prompt` tokens, which the model is given and need not write.
///
/// # Errors
///
/// Shapes that do not fit.
pub(super) fn lm_loss(logits: &Tensor, ids: &Tensor, mask: &Tensor, prompt: usize, smoothing: f32) -> Result<Tensor> {
    let (rows, tokens, vocab) = logits.dims3()?;
    if ids.dims() != [rows, tokens] || mask.dims() != ids.dims() {
        return Err(ModelError::Input(format!(
            "language-model loss: logits {:?} with ids {:?} and mask {:?}",
            logits.dims(),
            ids.dims(),
            mask.dims()
        )));
    }
    let (ids, mask) = (ids.to_vec2::<u32>()?, mask.to_vec2::<u32>()?);
    let targets = ids
        .iter()
        .zip(&mask)
        .flat_map(|(ids, mask)| {
            (1..=tokens).map(move |next| (next < tokens && next >= prompt && mask[next] == 1).then(|| ids[next]))
        })
        .collect();
    Ok(smoothed_cross_entropy(&logits.reshape((rows * tokens, vocab))?, targets, smoothing)?)
}

/// What tells whether an image and a text belong together: hashes of the image's name and of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    image: u64,
    text: u64,
}

impl Key {
    /// Of the name of an image and of a cleaned text.
    #[must_use]
    pub(super) fn new(image: &str, text: &str) -> Self {
        let hash = |part: &str| {
            let digest: [u8; 32] = Sha256::digest(part.as_bytes()).into();
            u64::from_le_bytes([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7]])
        };
        Self { image: hash(image), text: hash(text) }
    }

    /// Of nothing: it belongs to no pair.
    pub(super) const NONE: Self = Self { image: 0, text: 0 };

    pub(super) fn to_numbers(self) -> [i64; 2] {
        [self.image.cast_signed(), self.text.cast_signed()]
    }

    pub(super) fn from_numbers([image, text]: [i64; 2]) -> Self {
        Self { image: image.cast_unsigned(), text: text.cast_unsigned() }
    }

    /// The same image, or the very same text.
    fn matches(self, other: Self) -> bool {
        self != Self::NONE && (self.image == other.image || self.text == other.text)
    }
}

/// Which pairs belong together: the same image, or images with the very same text.
///
/// Such pairs share the target of the contrastive loss and are never drawn as negatives. BLIP does so by images when it fine-tunes
/// (`models/blip_retrieval.py`); pictures of the web share texts too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Matches {
    rows: usize,
    columns: usize,
    matching: Vec<bool>,
}

impl Matches {
    /// Of each pair of a batch with each pair of `all`.
    #[must_use]
    pub(super) fn new(batch: &[Key], all: &[Key]) -> Self {
        let matching = batch.iter().flat_map(|one| all.iter().map(|other| one.matches(*other))).collect();
        Self { rows: batch.len(), columns: all.len(), matching }
    }

    /// Whether pair `row` of the batch and pair `column` of all belong together.
    #[must_use]
    pub(super) fn get(&self, row: usize, column: usize) -> bool {
        self.matching[row * self.columns + column]
    }

    /// The relation as targets `(rows, columns)`, f32, each row with sum 1. It is symmetric, so it serves both directions.
    ///
    /// # Errors
    ///
    /// The device has no memory.
    pub(super) fn targets(&self, device: &Device) -> Result<Tensor> {
        let shares = self.matching.chunks(self.columns.max(1)).flat_map(|row| {
            let share = 1.0 / row.iter().filter(|matching| **matching).count().max(1) as f32;
            row.iter().map(move |matching| if *matching { share } else { 0.0 })
        });
        Ok(Tensor::from_vec(shares.collect::<Vec<f32>>(), (self.rows, self.columns), device)?)
    }
}

/// Cosines over temperature `(b, n)` of features `(b, p)` and `(n, p)`, all of length 1.
///
/// # Errors
///
/// Shapes that do not fit.
pub(super) fn similarities(of: &Tensor, with: &Tensor, temperature: &Tensor) -> Result<Tensor> {
    Ok(of.matmul(&with.t()?)?.broadcast_div(temperature)?)
}

/// `alpha · softmax(teacher) + (1 − alpha) · targets`, all `(b, n)`: the targets of ALBEF and BLIP, in which a pair that the momentum encoders find
/// similar is no full negative.
///
/// # Errors
///
/// Shapes that do not fit.
pub(super) fn soft_targets(teacher: &Tensor, targets: &Tensor, alpha: f64) -> Result<Tensor> {
    let soft = candle_nn::ops::softmax(&teacher.detach(), D::Minus1)?;
    Ok(((soft * alpha)? + (targets * (1.0 - alpha))?)?)
}

/// One direction of the image-text contrastive loss (`InfoNCE` with soft targets), a scalar: the mean cross-entropy of the rows of
/// `similarities` `(b, n)` with the rows of `targets` `(b, n)`.
///
/// # Errors
///
/// Shapes that do not fit.
pub(super) fn contrastive_loss(similarities: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_p = candle_nn::ops::log_softmax(similarities, D::Minus1)?;
    Ok(((log_p * targets)?.sum_all()? * (-1.0 / similarities.dim(0)?.max(1) as f64))?)
}

/// For each pair of a batch, a text that does not describe its image and an image that its text does not describe.
///
/// An entry is `None` when everything in the batch belongs to that pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HardNegatives {
    /// Number of the text for each image.
    pub(super) text_for_image: Vec<Option<usize>>,
    /// Number of the image for each text.
    pub(super) image_for_text: Vec<Option<usize>>,
}

impl HardNegatives {
    /// Draws by `softmax(similarities) + 1e-4` over the pairs that do not belong together. The similarities are those of each image to
    /// the `b` texts, and of each text to the `b` images, both `(b, b)`.
    ///
    /// The draws are keyed by seed and number.
    ///
    /// # Errors
    ///
    /// Similarities of another shape than the batch of `matches` has.
    pub(super) fn draw(
        image_to_text: &Tensor,
        text_to_image: &Tensor,
        matches: &Matches,
        seed: u64,
        number: u64,
    ) -> Result<Self> {
        let mut stream = Stream::new("hard negatives", seed, &[&number.to_le_bytes()]);
        let mut side = |scores: &Tensor| -> Result<Vec<Option<usize>>> {
            let scores = scores.to_vec2::<f32>()?;
            let size = matches.rows;
            if scores.len() != size || scores.iter().any(|row| row.len() != size) {
                return Err(ModelError::Input(format!("hard negatives: {} rows of similarities for {size} pairs", scores.len())));
            }
            Ok(scores.iter().enumerate().map(|(i, row)| pick(row, |j| matches.get(i, j), &mut stream)).collect())
        };
        Ok(Self { text_for_image: side(image_to_text)?, image_for_text: side(text_to_image)? })
    }
}

/// A draw in proportion to the softmax of `scores`, among those that are not barred.
fn pick(scores: &[f32], barred: impl Fn(usize) -> bool, stream: &mut Stream) -> Option<usize> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = scores.iter().map(|score| f64::from(score - max).exp()).collect();
    let total: f64 = exponentials.iter().sum();
    let weight = |(k, e): (usize, &f64)| if barred(k) { 0.0 } else { e / total + NEGATIVE_FLOOR };
    stream.weighted(&exponentials.iter().enumerate().map(weight).collect::<Vec<_>>())
}

/// Image-text matching loss, a scalar: cross-entropy of `logits` `(n, 2)`, class 1 = match.
///
/// # Errors
///
/// Not one label for each row.
pub(super) fn itm_loss(logits: &Tensor, labels: &[bool]) -> Result<Tensor> {
    let targets = labels.iter().map(|&label| Some(u32::from(label))).collect();
    Ok(smoothed_cross_entropy(logits, targets, 0.0)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Device;

    use super::*;

    fn scalar(tensor: &Tensor) -> f32 {
        tensor.to_scalar().unwrap()
    }

    #[test]
    fn lm_loss_shifts_by_one_and_leaves_out_prompt_and_padding() {
        let device = &Device::Cpu;
        let (vocab, tokens) = (5, 4);
        // Row 0: prompt 0 1, then 2 3; row 1: prompt 0 1, then 4 and padding.
        let ids = Tensor::new(&[[0u32, 1, 2, 3], [0, 1, 4, 0]], device).unwrap();
        let mask = Tensor::new(&[[1u32, 1, 1, 1], [1, 1, 1, 0]], device).unwrap();
        // The model is certain of the right next token exactly where a target counts, and of token 0 elsewhere.
        let mut logits = vec![0.0f32; 2 * tokens * vocab];
        for (row, position, token) in [(0, 0, 0), (0, 1, 2), (0, 2, 3), (0, 3, 0), (1, 0, 0), (1, 1, 4), (1, 2, 3), (1, 3, 3)] {
            logits[(row * tokens + position) * vocab + token] = 50.0;
        }
        let logits = Tensor::from_vec(logits, (2, tokens, vocab), device).unwrap();
        assert!(scalar(&lm_loss(&logits, &ids, &mask, 2, 0.0).unwrap()) < 1e-6);
        // Without the prompt, position 0 must predict token 1 and does not: 2 of 5 targets are 50 off.
        let with_prompt = scalar(&lm_loss(&logits, &ids, &mask, 1, 0.0).unwrap());
        assert!((with_prompt - 50.0 * 2.0 / 5.0).abs() < 1e-3, "{with_prompt}");
        // Smoothing 0.1 costs 0.1 · mean distance: four of five classes are 50 below.
        let smoothed = scalar(&lm_loss(&logits, &ids, &mask, 2, 0.1).unwrap());
        assert!((smoothed - 0.1 * 40.0).abs() < 1e-3, "{smoothed}");
        assert!(lm_loss(&logits, &ids.narrow(1, 0, 3).unwrap(), &mask, 2, 0.0).is_err());
    }

    fn keys(images: &[&str], texts: &[&str]) -> Vec<Key> {
        images.iter().zip(texts).map(|(image, text)| Key::new(image, text)).collect()
    }

    #[test]
    fn same_image_and_same_text_share_the_contrastive_target() {
        let batch = keys(&["a", "a", "b", "c"], &["x", "y", "z", "x"]);
        let all: Vec<Key> = batch.iter().copied().chain([Key::NONE, Key::new("b", "w")]).collect();
        let matches = Matches::new(&batch, &all);
        assert!(matches.get(0, 1) && matches.get(0, 3) && !matches.get(1, 3) && !matches.get(2, 0) && matches.get(2, 5));
        let third = 1.0 / 3.0;
        let expected = [
            [third, third, 0.0, third, 0.0, 0.0],
            [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.5, 0.0, 0.0, 0.5],
            [0.5, 0.0, 0.0, 0.5, 0.0, 0.0],
        ];
        assert_eq!(matches.targets(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap(), expected);
        assert!(!Matches::new(&[Key::NONE], &[Key::NONE]).get(0, 0));
    }

    #[test]
    fn contrastive_loss_is_the_mean_cross_entropy_of_the_rows() {
        let device = &Device::Cpu;
        let scores = Tensor::new(&[[2.0f32, 0.0, 0.0], [1.0, 3.0, 0.0]], device).unwrap();
        let targets = Tensor::new(&[[1.0f32, 0.0, 0.0], [0.25, 0.75, 0.0]], device).unwrap();
        let log_sum = |row: [f32; 3]| row.iter().map(|x| x.exp()).sum::<f32>().ln();
        let (first, second) = (log_sum([2.0, 0.0, 0.0]), log_sum([1.0, 3.0, 0.0]));
        let expected = ((first - 2.0) + 0.25 * (second - 1.0) + 0.75 * (second - 3.0)) / 2.0;
        assert!((scalar(&contrastive_loss(&scores, &targets).unwrap()) - expected).abs() < 1e-6);
    }

    #[test]
    fn soft_targets_lie_between_the_teacher_and_the_truth() {
        let device = &Device::Cpu;
        let teacher = Tensor::new(&[[0.0f32, 3f32.ln()]], device).unwrap();
        let truth = Tensor::new(&[[1.0f32, 0.0]], device).unwrap();
        let mixed = soft_targets(&teacher, &truth, 0.4).unwrap().to_vec2::<f32>().unwrap();
        assert!((mixed[0][0] - (0.4 * 0.25 + 0.6)).abs() < 1e-6 && (mixed[0][1] - 0.4 * 0.75).abs() < 1e-6, "{mixed:?}");
    }

    #[test]
    fn negatives_never_belong_to_the_pair_and_follow_the_similarities() {
        let device = &Device::Cpu;
        let images: Vec<String> = (0..8).map(|i| format!("{}", i / 2)).collect();
        let texts: Vec<String> = (0..8).map(|i| format!("t{}", if i == 7 { 0 } else { i })).collect();
        let batch: Vec<Key> = images.iter().zip(&texts).map(|(image, text)| Key::new(image, text)).collect();
        let matches = Matches::new(&batch, &batch);
        // Image 4 looks most like text 0 (and like its own).
        let mut scores = vec![0.0f32; 64];
        scores[4 * 8] = 6.0;
        scores[4 * 8 + 4] = 9.0;
        let scores = Tensor::from_vec(scores, (8, 8), device).unwrap();
        let draw = |seed, number| HardNegatives::draw(&scores, &scores.t().unwrap(), &matches, seed, number).unwrap();
        let mut hard = [0, 0];
        for step in 0..200 {
            let drawn = draw(1, step);
            assert_eq!(drawn, draw(1, step));
            for i in 0..8 {
                assert!(!matches.get(i, drawn.text_for_image[i].unwrap()));
                assert!(!matches.get(drawn.image_for_text[i].unwrap(), i));
            }
            hard[0] += usize::from(drawn.text_for_image[4] == Some(0));
            hard[1] += usize::from(drawn.image_for_text[0] == Some(4));
        }
        assert!(hard[0] > 150 && hard[1] > 150, "the hard pair was drawn {hard:?} times of 200");
        assert_ne!(draw(1, 0), draw(2, 0));
    }

    #[test]
    fn a_batch_of_one_image_has_no_negatives() {
        let scores = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let batch = keys(&["a", "a"], &["x", "y"]);
        let drawn = HardNegatives::draw(&scores, &scores, &Matches::new(&batch, &batch), 0, 0).unwrap();
        assert_eq!(drawn.text_for_image, [None, None]);
        assert_eq!(drawn.image_for_text, [None, None]);
    }

    #[test]
    fn itm_loss_takes_class_one_as_match() {
        let logits = Tensor::new(&[[-20.0f32, 20.0], [20.0, -20.0]], &Device::Cpu).unwrap();
        assert!(scalar(&itm_loss(&logits, &[true, false]).unwrap()) < 1e-6);
        assert!((scalar(&itm_loss(&logits, &[false, true]).unwrap()) - 40.0).abs() < 1e-4);
        assert!(itm_loss(&logits, &[true]).is_err());
    }
}
