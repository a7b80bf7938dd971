//! How good a model is on held-out pairs.

use std::collections::{BTreeMap, BTreeSet};

use capfilt_models::checkpoint::{Checkpoint, Family};
use capfilt_models::clip::{ClipScorer, cosine};
use capfilt_models::device::{DType, Device};
use capfilt_models::generate::Captioner;
use capfilt_models::med::Med;
use capfilt_models::preprocess::Pixels;
use capfilt_models::random::Stream;
use capfilt_models::retrieval::retrieval_scores;
use capfilt_models::sampling::{Sampling, Strategy};
use capfilt_models::score::{FilterScorer, Itc, ItmToken};
use capfilt_models::tokenizer::{MAX_WORDS, TextTokenizer, clean_caption};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::metrics::{CaptionCase, Confusion, Ranks, Relevance, auroc, bleu, bleu_counts, cider_d, ranks, recall, rouge_l};
use crate::pair::prepared;
use crate::{TrainPair, TrainerError, ZeroShot};

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
    /// Classes that a CLIP tells apart by their names alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_shot: Option<ZeroShot>,
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
            zero_shot: None,
        }
    }
}

impl EvaluateConfig {
    /// Checks what serde cannot.
    ///
    /// # Errors
    /// [`TrainerError::Config`] names the setting that makes no sense.
    pub fn check(&self) -> Result<(), TrainerError> {
        self.zero_shot.as_ref().map_or(Ok(()), ZeroShot::check)
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

/// Metrics of a model on held-out pairs, in one role or in all that it can play, in the order of their names: `captioner/…` if it has a decoder,
/// `filter/…` if it has an encoder, `clip/…` of a CLIP. All are in `0..=1` but CIDEr-D, which is in `0..=10`; higher is better for each.
///
/// `captioner/`: `bleu_4`, `cider_d`, `rouge_l`. `filter/`: `auroc` by ITM, `auroc_itc`, `precision` and `recall` at `min_itm`, and of retrieval
/// `tr_at_1`, `_5`, `_10` and `ir_at_…`. `clip/`: `auroc`, the same of retrieval, `zero_shot_at_1` and `_5`.
///
/// Scores of texts are means over all `members`, none of which has seen a held-out pair, and `itc` tells what ITC is, as for the texts that the model
/// judges; captions and retrieval are the first member's. It computes in f32 on `device`. Captions are written greedily. Areas under the ROC curve set each image's own captions against as many
/// captions of other images, drawn by key; those of an image that shares one with it, word by word, are never drawn as wrong for it.
/// The pairs' pixels must be as large as the model's images.
///
/// # Errors
///
/// No pairs, no model, an image without captions, or a failing model.
pub fn evaluate(
    members: &[Checkpoint],
    role: Option<&str>,
    pairs: &[TrainPair],
    config: &EvaluateConfig,
    itc: Itc,
    device: &Device,
) -> Result<Vec<Metric>, TrainerError> {
    config.check()?;
    if pairs.is_empty() {
        return Err(TrainerError::NoPairs { purpose: "judge by", reason: "the held-out set is empty".to_owned() });
    }
    let Some(checkpoint) = members.first() else { return Err(TrainerError::Config("there is no model to judge".to_owned())) };
    let asked = |name: &str| role.is_none_or(|role| role == name);
    let preprocessor = checkpoint.preprocessor()?;
    let pixels = pairs
        .iter()
        .map(|pair| prepared(&preprocessor, &pair.sample_id, &pair.pixels))
        .collect::<Result<Vec<Pixels>, TrainerError>>()?;
    let set = HeldOut { pairs, pixels };

    let mut metrics = Metrics::new(pairs.len(), config);
    if let Family::Clip(_) = checkpoint.family() {
        if asked("clip") {
            let scorer = ClipScorer::new(checkpoint.clip(device, DType::F32)?, checkpoint.clip_tokenizer()?)?;
            set.judge_clip(&scorer, config, &mut metrics)?;
        }
    } else {
        let (med, tokenizer) = (checkpoint.med(device, DType::F32)?, checkpoint.tokenizer()?);
        let parts = med.parts();
        if parts.decoder && asked("captioner") {
            set.judge_captioner(&med, &tokenizer, config, &mut metrics)?;
        }
        if parts.encoder && asked("filter") {
            set.judge_matching(members, (config, itc), device, &mut metrics)?;
            set.judge_retrieval(&med, &tokenizer, config, &mut metrics)?;
        }
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
            (0..images).for_each(|_| counts[stream.below(images)] += 1.0);
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

/// The captions of each image, those of other images after them.
struct Captions<'a> {
    texts: Vec<Vec<&'a str>>,
    /// Of each caption, in that order: whether it is the image's own.
    right: Vec<bool>,
    /// And the image.
    image_of: Vec<usize>,
}

impl Captions<'_> {
    /// Weights of the images as weights of the captions.
    fn weights(&self, of_images: &[f64]) -> Vec<f64> {
        self.image_of.iter().map(|&image| of_images[image]).collect()
    }
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
        members: &[Checkpoint],
        (config, told): (&EvaluateConfig, Itc),
        device: &Device,
        metrics: &mut Metrics,
    ) -> Result<(), TrainerError> {
        let captions = self.captions(config.seed);
        let (mut itm, mut itc) = (vec![0.0; captions.right.len()], vec![0.0; captions.right.len()]);
        for member in members {
            let med = member.med(device, DType::F32)?;
            let together = self.together(&med);
            let scorer = FilterScorer::new(med, member.tokenizer()?, config.first_token)?.telling(told, member, device)?;
            let mut means = itm.iter_mut().zip(&mut itc);
            for (pixels, texts) in self.pixels.chunks(together).zip(captions.texts.chunks(together)) {
                for (score, (itm, itc)) in scorer.score(pixels, texts)?.into_iter().flatten().zip(&mut means) {
                    *itm += score.itm / members.len() as f32;
                    *itc += score.itc / members.len() as f32;
                }
            }
        }
        let kept = |weights: &[f64]| Confusion::at(config.min_itm, &itm, &captions.right, &captions.weights(weights));
        metrics.add("filter/auroc", |weights| auroc(&itm, &captions.right, &captions.weights(weights)));
        metrics.add("filter/auroc_itc", |weights| auroc(&itc, &captions.right, &captions.weights(weights)));
        metrics.add("filter/precision", |weights| kept(weights).precision());
        metrics.add("filter/recall", |weights| kept(weights).recall());
        Ok(())
    }

    fn captions(&self, seed: u64) -> Captions<'_> {
        let mut captions = Captions { texts: Vec::new(), right: Vec::new(), image_of: Vec::new() };
        for (image, pair) in self.pairs.iter().enumerate() {
            let own = pair.texts.iter().map(|text| text.text.as_str());
            let texts: Vec<&str> = own.chain(self.wrong_captions(image, seed)).collect();
            captions.right.extend((0..texts.len()).map(|place| place < pair.texts.len()));
            captions.image_of.resize(captions.right.len(), image);
            captions.texts.push(texts);
        }
        captions
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
            let other = &self.pairs[stream.below(self.pairs.len())];
            if other.texts.iter().any(|text| own.contains(&clean_caption(&text.text, MAX_WORDS))) {
                continue;
            }
            if !other.texts.is_empty() {
                wrong.push(other.texts[stream.below(other.texts.len())].text.as_str());
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
        let (texts, relevance) = self.distinct_captions()?;
        let scores = retrieval_scores(med, tokenizer, &self.pixels, &texts, config.rerank)?;
        let ranks = ranks(&scores.texts_of_image, &scores.images_of_text, &relevance)?;
        add_recall(metrics, "filter", &ranks, &relevance);
        Ok(())
    }

    /// Every caption once, as models see it, and which images it describes: they may share one.
    fn distinct_captions(&self) -> Result<(Vec<String>, Relevance), TrainerError> {
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
        Ok((numbers.into_keys().collect(), relevance))
    }

    /// Retrieval, matching and zero-shot classification by cosines alone.
    fn judge_clip(&self, scorer: &ClipScorer, config: &EvaluateConfig, metrics: &mut Metrics) -> Result<(), TrainerError> {
        let images = scorer.image_features(&self.pixels)?;
        let (texts, relevance) = self.distinct_captions()?;
        let features = scorer.text_features(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let cosines: Vec<f32> = images.iter().flat_map(|image| features.iter().map(move |text| cosine(image, text))).collect();
        add_recall(metrics, "clip", &ranks(&cosines, &cosines, &relevance)?, &relevance);

        let captions = self.captions(config.seed);
        let features = scorer.text_features(&captions.texts.concat())?;
        let scores: Vec<f32> =
            captions.image_of.iter().zip(&features).map(|(&image, text)| cosine(&images[image], text)).collect();
        metrics.add("clip/auroc", |weights| auroc(&scores, &captions.right, &captions.weights(weights)));

        let Some(zero_shot) = &config.zero_shot else { return Ok(()) };
        let classes = zero_shot.features(scorer)?;
        // Of each image that is of a class, whether that is among the first 1 and 5.
        let mut found = Vec::new();
        for (image, pair) in self.pairs.iter().enumerate() {
            let Some(class) = zero_shot.class_of(pair) else { continue };
            let near: Vec<f32> = classes.iter().map(|class| cosine(&images[image], class)).collect();
            let before = near.iter().enumerate().filter(|(other, x)| *other != class && **x >= near[class]).count();
            found.push((image, before));
        }
        for k in [1, 5].into_iter().filter(|k| *k < classes.len()) {
            let hits: Vec<f64> = found.iter().map(|(_, before)| f64::from(u8::from(*before < k))).collect();
            let of_images = |weights: &[f64]| found.iter().map(|(image, _)| weights[*image]).collect::<Vec<f64>>();
            metrics.add(&format!("clip/zero_shot_at_{k}"), |weights| mean(&hits, &of_images(weights)));
        }
        Ok(())
    }
}

/// Recall at 1, 5 and 10 in both directions.
fn add_recall(metrics: &mut Metrics, role: &str, ranks: &Ranks, relevance: &Relevance) {
    for (place, k) in [1, 5, 10].into_iter().enumerate() {
        metrics.add(&format!("{role}/tr_at_{k}"), |weights| Some(recall(ranks, relevance, weights)?.text_at[place]));
        metrics.add(&format!("{role}/ir_at_{k}"), |weights| Some(recall(ranks, relevance, weights)?.image_at[place]));
    }
}
