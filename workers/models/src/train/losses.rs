//! The losses of BLIP (arXiv 2201.12086, section 3.2; `models/blip_pretrain.py`), with in-batch negatives.

use candle_core::{D, Tensor};

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
pub fn lm_loss(logits: &Tensor, ids: &Tensor, mask: &Tensor, prompt: usize, smoothing: f32) -> Result<Tensor> {
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

/// Which pairs of a batch belong together: the same image, or images with the very same text.
///
/// Such pairs share the target of the contrastive loss and are never drawn as negatives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matches {
    size: usize,
    matching: Vec<bool>,
}

impl Matches {
    /// From the image keys and texts of a batch, pair by pair.
    #[must_use]
    pub fn new(images: &[&str], texts: &[&str]) -> Self {
        let size = images.len().min(texts.len());
        let matching = (0..size * size)
            .map(|cell| (cell / size, cell % size))
            .map(|(i, j)| images[i] == images[j] || texts[i] == texts[j])
            .collect();
        Self { size, matching }
    }

    /// Whether image `i` and text `j` belong together.
    #[must_use]
    pub fn get(&self, i: usize, j: usize) -> bool {
        self.matching[i * self.size + j]
    }

    /// Rows of the relation, each with sum 1. The relation is symmetric, so they serve both directions.
    fn targets(&self) -> Vec<f32> {
        self.matching
            .chunks(self.size.max(1))
            .flat_map(|row| {
                let share = 1.0 / row.iter().filter(|&&matching| matching).count().max(1) as f32;
                row.iter().map(move |&matching| if matching { share } else { 0.0 })
            })
            .collect()
    }
}

/// Cosines over temperature `(b, b)` of image features and text features `(b, p)`, both of length 1: row = image, column = text.
///
/// # Errors
///
/// Shapes that do not fit.
pub fn similarities(image_features: &Tensor, text_features: &Tensor, temperature: &Tensor) -> Result<Tensor> {
    Ok(image_features.matmul(&text_features.t()?)?.broadcast_div(temperature)?)
}

/// Image-text contrastive loss (symmetric `InfoNCE` with soft targets), a scalar: the mean of both directions.
///
/// # Errors
///
/// `similarities` is not `(b, b)` for the `b` pairs of `matches`.
pub fn itc_loss(similarities: &Tensor, matches: &Matches) -> Result<Tensor> {
    let size = matches.size;
    let targets = Tensor::from_vec(matches.targets(), (size, size), similarities.device())?.to_dtype(similarities.dtype())?;
    let direction = |scores: &Tensor| -> candle_core::Result<Tensor> {
        let log_p = candle_nn::ops::log_softmax(scores, D::Minus1)?;
        (log_p * &targets)?.sum_all()
    };
    let both = (direction(similarities)? + direction(&similarities.t()?.contiguous()?)?)?;
    Ok((both * (-0.5 / size.max(1) as f64))?)
}

/// For each pair of a batch, a text that does not describe its image and an image that its text does not describe.
///
/// An entry is `None` when everything in the batch belongs to that pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardNegatives {
    /// Number of the text for each image.
    pub text_for_image: Vec<Option<usize>>,
    /// Number of the image for each text.
    pub image_for_text: Vec<Option<usize>>,
}

impl HardNegatives {
    /// Draws by `softmax(similarities) + 1e-4` over the pairs that do not belong together. `similarities` is `(b, b)`, row = image.
    ///
    /// The draws are keyed by seed and step.
    ///
    /// # Errors
    ///
    /// `similarities` is not `(b, b)` for the `b` pairs of `matches`.
    pub fn draw(similarities: &Tensor, matches: &Matches, seed: u64, step: u64) -> Result<Self> {
        let scores = similarities.to_vec2::<f32>()?;
        let size = matches.size;
        if scores.len() != size || scores.iter().any(|row| row.len() != size) {
            return Err(ModelError::Input(format!("hard negatives: similarities {:?} for {size} pairs", similarities.dims())));
        }
        let mut stream = Stream::new("hard negatives", seed, &[&step.to_le_bytes()]);
        let text_for_image = (0..size).map(|i| pick(size, |j| scores[i][j], |j| matches.get(i, j), stream.uniform())).collect();
        let image_for_text = (0..size).map(|j| pick(size, |i| scores[i][j], |i| matches.get(i, j), stream.uniform())).collect();
        Ok(Self { text_for_image, image_for_text })
    }
}

/// One multinomial draw by inversion.
fn pick(size: usize, score: impl Fn(usize) -> f32, barred: impl Fn(usize) -> bool, uniform: f64) -> Option<usize> {
    let max = (0..size).map(&score).fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f64> = (0..size).map(|k| f64::from(score(k) - max).exp()).collect();
    let total: f64 = exponentials.iter().sum();
    let weights: Vec<f64> =
        exponentials.iter().enumerate().map(|(k, e)| if barred(k) { 0.0 } else { e / total + NEGATIVE_FLOOR }).collect();
    let mut left = uniform * weights.iter().sum::<f64>();
    let mut last = None;
    for (k, weight) in weights.into_iter().enumerate() {
        if weight > 0.0 {
            last = Some(k);
            if left < weight {
                break;
            }
            left -= weight;
        }
    }
    last
}

/// Image-text matching loss, a scalar: cross-entropy of `logits` `(n, 2)`, class 1 = match.
///
/// # Errors
///
/// Not one label for each row.
pub fn itm_loss(logits: &Tensor, labels: &[bool]) -> Result<Tensor> {
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

    #[test]
    fn same_image_and_same_text_share_the_contrastive_target() {
        let matches = Matches::new(&["a", "a", "b", "c"], &["x", "y", "z", "x"]);
        assert!(matches.get(0, 1) && matches.get(0, 3) && !matches.get(1, 3) && !matches.get(2, 0));
        let third = 1.0 / 3.0;
        let expected = [third, third, 0.0, third, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.5];
        assert_eq!(matches.targets(), expected);
    }

    #[test]
    fn itc_loss_is_the_mean_cross_entropy_of_both_directions() {
        let device = &Device::Cpu;
        let matches = Matches::new(&["a", "b"], &["x", "y"]);
        let scores = Tensor::new(&[[2.0f32, 0.0], [1.0, 3.0]], device).unwrap();
        let nll = |right: f32, wrong: f32| (1.0 + (wrong - right).exp()).ln();
        let expected = (nll(2.0, 0.0) + nll(3.0, 1.0) + nll(2.0, 1.0) + nll(3.0, 0.0)) / 4.0;
        assert!((scalar(&itc_loss(&scores, &matches).unwrap()) - expected).abs() < 1e-6);
        // Uniform scores cost ln b, whatever the temperature did.
        let flat = Tensor::zeros((2, 2), candle_core::DType::F32, device).unwrap();
        assert!((scalar(&itc_loss(&flat, &matches).unwrap()) - 2f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn negatives_never_belong_to_the_pair_and_follow_the_similarities() {
        let device = &Device::Cpu;
        let images: Vec<String> = (0..8).map(|i| format!("{}", i / 2)).collect();
        let texts: Vec<String> = (0..8).map(|i| format!("t{}", if i == 7 { 0 } else { i })).collect();
        let images: Vec<&str> = images.iter().map(String::as_str).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let matches = Matches::new(&images, &texts);
        // Image 4 looks most like text 0 (and like its own).
        let mut scores = vec![0.0f32; 64];
        scores[4 * 8] = 6.0;
        scores[4 * 8 + 4] = 9.0;
        let scores = Tensor::from_vec(scores, (8, 8), device).unwrap();
        let mut hard = 0;
        for step in 0..200 {
            let drawn = HardNegatives::draw(&scores, &matches, 1, step).unwrap();
            assert_eq!(drawn, HardNegatives::draw(&scores, &matches, 1, step).unwrap());
            for i in 0..8 {
                assert!(!matches.get(i, drawn.text_for_image[i].unwrap()));
                assert!(!matches.get(drawn.image_for_text[i].unwrap(), i));
            }
            hard += usize::from(drawn.text_for_image[4] == Some(0));
        }
        assert!(hard > 150, "the hard text was drawn {hard} times of 200");
        assert_ne!(HardNegatives::draw(&scores, &matches, 1, 0).unwrap(), HardNegatives::draw(&scores, &matches, 2, 0).unwrap());
    }

    #[test]
    fn a_batch_of_one_image_has_no_negatives() {
        let scores = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        let drawn = HardNegatives::draw(&scores, &Matches::new(&["a", "a"], &["x", "y"]), 0, 0).unwrap();
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
