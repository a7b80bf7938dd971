//! How good a model is on held-out pairs.

use std::collections::{BTreeMap, BTreeSet};

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::device::{DType, Device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Med;
use capfilt_models::preprocess::Pixels;
use capfilt_models::random::Stream;
use capfilt_models::retrieval::retrieval_scores;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::score::{FilterScorer, ItmToken};
use capfilt_models::tokenizer::{MAX_WORDS, TextTokenizer, clean_caption};
use image::RgbImage;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::metrics::{CaptionCase, Confusion, Relevance, auroc, bleu, bleu_counts, cider_d, ranks, recall, rouge_l};
use crate::sampler::below;
use crate::{TrainPair, TrainerError};

/// Settings of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateConfig {
    /// What a captioner is given before it writes; as in its training.
    pub prompt: String,
    /// Tokens of a caption at most, prompt included.
    pub max_length: usize,
    /// First token of a text for the matching head; as in training.
    pub first_token: ItmToken,
    /// Matching probability from which a pair counts as kept.
    pub min_itm: f32,
    /// Best candidates by contrastive similarity that the matching head ranks again.
    pub rerank: usize,
    /// How often the metrics are worked out again on held-out images that are drawn with replacement: what a promotion takes for noise.
    pub resamples: usize,
    /// Keys the choice of wrong captions and those draws.
    pub seed: u64,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            prompt: "a picture of ".to_owned(),
            max_length: 20,
            first_token: ItmToken::Enc,
            min_itm: 0.5,
            rerank: 32,
            resamples: 500,
            seed: 0,
        }
    }
}

/// A metric of a model on held-out pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Metric {
    /// Its name, `filter/auroc`.
    pub name: String,
    /// Its value.
    pub value: f64,
    /// Its values when as many images are drawn from the held-out ones with replacement (the bootstrap of Efron, 1979). Draw `i` is the same
    /// for all models, so that the difference of two models has its own spread.
    pub resampled: Vec<f64>,
}

/// Metrics of a model on held-out pairs, in the order of their names: `captioner/…` if it has a decoder, `filter/…` if it has an
/// encoder. All are in `0..=1` but CIDEr-D, which is in `0..=10`; higher is better for each.
///
/// The model computes in f32 on `device`. Captions are written greedily. The filter's area under the ROC curve sets each image's own captions against as many captions of
/// other images, drawn by key; a caption that any image of the pair's concept shares word by word is never drawn as wrong for it.
/// The pairs' pixels must be as large as the model's images.
///
/// # Errors
///
/// No pairs, an image without captions, or a failing model.
pub fn evaluate(
    checkpoint: &Checkpoint,
    pairs: &[TrainPair],
    config: &EvaluateConfig,
    device: &Device,
) -> Result<Vec<Metric>, TrainerError> {
    if pairs.is_empty() {
        return Err(TrainerError::NoPairs { purpose: "judge by", reason: "the held-out set is empty".to_owned() });
    }
    let (med, tokenizer) = (checkpoint.med(device, DType::F32)?, checkpoint.tokenizer()?);
    let preprocessor = checkpoint.preprocessor()?;
    let side = preprocessor.side() as u32;
    let pixels = pairs
        .iter()
        .map(|pair| {
            let image = RgbImage::from_raw(side, side, pair.pixels.to_vec()).ok_or_else(|| TrainerError::NoPairs {
                purpose: "judge by",
                reason: format!("image {} is not {side}x{side}", pair.sample_id),
            })?;
            Ok(preprocessor.prepare(&image)?)
        })
        .collect::<Result<Vec<Pixels>, TrainerError>>()?;
    let set = HeldOut { pairs, pixels };

    let mut metrics = Metrics::new(pairs.len(), config);
    let parts = med.parts();
    if parts.decoder {
        set.judge_captioner(&med, &tokenizer, config, &mut metrics)?;
    }
    if parts.encoder {
        set.judge_matching(&med, &tokenizer, config, &mut metrics)?;
        set.judge_retrieval(&med, &tokenizer, config, &mut metrics)?;
    }
    metrics.found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(metrics.found)
}

/// Metrics found so far, and how often each held-out image counts in each draw.
struct Metrics {
    found: Vec<Metric>,
    draws: Vec<Vec<f64>>,
    once: Vec<f64>,
}

impl Metrics {
    fn new(images: usize, config: &EvaluateConfig) -> Self {
        let draw = |number: usize| {
            let mut stream = Stream::new("held-out images drawn again", config.seed, &[&(number as u64).to_le_bytes()]);
            let mut counts = vec![0.0; images];
            (0..images).for_each(|_| counts[below(&mut stream, images)] += 1.0);
            counts
        };
        Self { found: Vec::new(), draws: (0..config.resamples).map(draw).collect(), once: vec![1.0; images] }
    }

    /// Adds a metric, a function of how often each image counts, unless it has no value.
    fn add(&mut self, name: &str, of: impl Fn(&[f64]) -> Option<f64> + Sync) {
        let Some(value) = of(&self.once) else { return };
        // Where a draw gives none, it says nothing about the spread.
        let resampled = self.draws.par_iter().map(|weights| of(weights).unwrap_or(value)).collect();
        self.found.push(Metric { name: name.to_owned(), value, resampled });
    }
}

/// The mean of values of which each counts as often as its weight says.
fn mean(values: &[f64], weights: &[f64]) -> Option<f64> {
    let all: f64 = weights.iter().sum();
    (all > 0.0).then(|| values.iter().zip(weights).map(|(value, weight)| value * weight).sum::<f64>() / all)
}

struct HeldOut<'a> {
    pairs: &'a [TrainPair],
    pixels: Vec<Pixels>,
}

impl HeldOut<'_> {
    /// Images that a device works on together: a CPU divides them itself.
    fn together(&self, med: &Med) -> usize {
        const GPU_BATCH: usize = 64;
        if med.device().is_cpu() { self.pairs.len() } else { GPU_BATCH }
    }

    fn judge_captioner(
        &self,
        med: &Med,
        tokenizer: &TextTokenizer,
        config: &EvaluateConfig,
        metrics: &mut Metrics,
    ) -> Result<(), TrainerError> {
        let greedy = Sampling {
            min_length: 0,
            max_length: config.max_length,
            prompt: config.prompt.clone(),
            ..Sampling::new(Strategy::Greedy)
        };
        let captioner = Captioner::new(med.clone(), tokenizer.clone(), greedy)?;
        let keys: Vec<&str> = self.pairs.iter().map(|pair| pair.sample_id.as_str()).collect();
        let mut written = Vec::new();
        for (pixels, keys) in self.pixels.chunks(self.together(med)).zip(keys.chunks(self.together(med))) {
            written.extend(captioner.caption(pixels, keys, config.seed)?);
        }
        let cases = self
            .pairs
            .iter()
            .zip(written)
            .map(|(pair, captions)| {
                let references: Vec<&str> = pair.texts.iter().map(|text| text.text.as_str()).collect();
                CaptionCase::from_text(captions.first().map_or("", String::as_str), &references)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let (counts, cider, rouge) = (cases.iter().map(bleu_counts).collect::<Vec<_>>(), cider_d(&cases), rouge_l(&cases));
        metrics.add("captioner/bleu_4", |weights| Some(bleu(&counts, weights)?[3]));
        metrics.add("captioner/cider_d", |weights| mean(&cider, weights));
        metrics.add("captioner/rouge_l", |weights| mean(&rouge, weights));
        Ok(())
    }

    fn judge_matching(
        &self,
        med: &Med,
        tokenizer: &TextTokenizer,
        config: &EvaluateConfig,
        metrics: &mut Metrics,
    ) -> Result<(), TrainerError> {
        let scorer = FilterScorer::new(med.clone(), tokenizer.clone(), config.first_token)?;
        // Own captions first, wrong ones after them.
        let texts: Vec<Vec<&str>> = (0..self.pairs.len())
            .map(|i| {
                let own = self.pairs[i].texts.iter().map(|text| text.text.as_str());
                own.chain(self.wrong_captions(i, config.seed)).collect()
            })
            .collect();
        let mut scored = Vec::new();
        for (pixels, texts) in self.pixels.chunks(self.together(med)).zip(texts.chunks(self.together(med))) {
            scored.extend(scorer.score(pixels, texts)?);
        }
        let (mut itm, mut itc, mut right, mut image_of) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (image, (pair, scores)) in self.pairs.iter().zip(scored).enumerate() {
            for (place, score) in scores.iter().enumerate() {
                itm.push(score.itm);
                itc.push(score.itc);
                right.push(place < pair.texts.len());
                image_of.push(image);
            }
        }
        let of_texts = |weights: &[f64]| image_of.iter().map(|&image| weights[image]).collect::<Vec<f64>>();
        let kept = |weights: &[f64]| Confusion::at(config.min_itm, &itm, &right, &of_texts(weights));
        metrics.add("filter/auroc", |weights| auroc(&itm, &right, &of_texts(weights)));
        metrics.add("filter/auroc_itc", |weights| auroc(&itc, &right, &of_texts(weights)));
        metrics.add("filter/precision", |weights| kept(weights).precision());
        metrics.add("filter/recall", |weights| kept(weights).recall());
        Ok(())
    }

    /// As many captions of other images as pair `i` has of its own, or fewer if there are not as many.
    fn wrong_captions(&self, i: usize, seed: u64) -> Vec<&str> {
        const ATTEMPTS: usize = 50;
        let own: BTreeSet<String> = self.pairs[i].texts.iter().map(|text| clean_caption(&text.text, MAX_WORDS)).collect();
        let mut stream = Stream::new("wrong captions", seed, &[self.pairs[i].sample_id.as_bytes()]);
        let mut wrong = Vec::new();
        for _ in 0..ATTEMPTS {
            if wrong.len() == self.pairs[i].texts.len() {
                break;
            }
            let other = &self.pairs[below(&mut stream, self.pairs.len())];
            if other.texts.iter().any(|text| own.contains(&clean_caption(&text.text, MAX_WORDS))) {
                continue;
            }
            if !other.texts.is_empty() {
                wrong.push(other.texts[below(&mut stream, other.texts.len())].text.as_str());
            }
        }
        wrong
    }

    fn judge_retrieval(
        &self,
        med: &Med,
        tokenizer: &TextTokenizer,
        config: &EvaluateConfig,
        metrics: &mut Metrics,
    ) -> Result<(), TrainerError> {
        // Images may share a caption: it is one text with several right images.
        let mut numbers = BTreeMap::new();
        for text in self.pairs.iter().flat_map(|pair| &pair.texts) {
            numbers.insert(clean_caption(&text.text, MAX_WORDS), 0);
        }
        for (number, place) in numbers.values_mut().enumerate() {
            *place = number;
        }
        let texts_of_image = self
            .pairs
            .iter()
            .map(|pair| {
                let texts: BTreeSet<usize> =
                    pair.texts.iter().filter_map(|text| numbers.get(&clean_caption(&text.text, MAX_WORDS)).copied()).collect();
                texts.into_iter().collect()
            })
            .collect();
        let relevance = Relevance::new(texts_of_image, numbers.len())?;
        let texts: Vec<&String> = numbers.keys().collect();
        let scores = retrieval_scores(med, tokenizer, &self.pixels, &texts, config.rerank)?;
        let ranks = ranks(&scores.texts_of_image, &scores.images_of_text, &relevance)?;
        for (place, k) in [1, 5, 10].into_iter().enumerate() {
            metrics.add(&format!("filter/tr_at_{k}"), |weights| Some(recall(&ranks, &relevance, weights)?.text_at[place]));
            metrics.add(&format!("filter/ir_at_{k}"), |weights| Some(recall(&ranks, &relevance, weights)?.image_at[place]));
        }
        Ok(())
    }
}
