//! Retrieval scores as BLIP evaluates them (`train_retrieval.py`): contrastive similarity of all pairs, and for the best candidates of
//! each query the matching logit on top.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::error::{ModelError, Result};
use crate::med::Med;
use crate::preprocess::Pixels;
use crate::tokenizer::{FirstToken, MAX_WORDS, TextBatch, TextTokenizer, clean_caption};

/// Images or texts that go through an encoder together.
const BATCH: usize = 64;

/// Score of a pair that was not among the candidates: below every real one.
const NOT_RANKED: f32 = -100.0;

/// Scores of every pair, row-major `(images, texts)`; higher is better.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalScores {
    /// To rank the texts of an image.
    pub texts_of_image: Vec<f32>,
    /// To rank the images of a text.
    pub images_of_text: Vec<f32>,
}

/// Scores all `images` against all `texts`. The `candidates` best by contrastive similarity, of each image and of each text, are ranked
/// by that similarity plus the matching logit; the others come after them.
///
/// # Errors
///
/// The model has no encoder, an image has another size than it takes, or there is nothing to score.
pub fn retrieval_scores<S: AsRef<str>>(
    med: &Med,
    tokenizer: &TextTokenizer,
    images: &[Pixels],
    texts: &[S],
    candidates: usize,
) -> Result<RetrievalScores> {
    if images.is_empty() || texts.is_empty() {
        return Err(ModelError::Input(format!("retrieval over {} images and {} texts", images.len(), texts.len())));
    }
    let longest = crate::score::FilterScorer::MAX_LENGTH.min(med.config().text_config.max_position_embeddings);
    let encode = |first| -> Result<Vec<Vec<u32>>> {
        texts.iter().map(|text| tokenizer.encode(&clean_caption(text.as_ref(), MAX_WORDS), first, longest)).collect()
    };
    let (itc_ids, itm_ids) = (encode(FirstToken::Cls)?, encode(FirstToken::Enc)?);

    let (mut states, mut image_features) = (Vec::new(), Vec::new());
    for chunk in images.chunks(BATCH) {
        let of_chunk = med.encode_images(chunk)?;
        image_features.push(med.image_features(&of_chunk)?);
        states.push(of_chunk);
    }
    let states = Tensor::cat(&states, 0)?;
    let text_features = itc_ids
        .chunks(BATCH)
        .map(|chunk| {
            let (ids, mask) = TextBatch::pad(chunk, 0, tokenizer.pad_id()).tensors(med.device())?;
            med.text_features(&ids, &mask)
        })
        .collect::<Result<Vec<_>>>()?;
    let similarities = Tensor::cat(&image_features, 0)?.matmul(&Tensor::cat(&text_features, 0)?.t()?)?;
    let similarities: Vec<f32> = similarities.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let (count, width) = (images.len(), texts.len());
    let at = |image: usize, text: usize| similarities[image * width + text];

    let texts_first: Vec<(usize, usize)> =
        (0..count).flat_map(|i| best(width, candidates, |t| at(i, t)).into_iter().map(move |t| (i, t))).collect();
    let images_first: Vec<(usize, usize)> =
        (0..width).flat_map(|t| best(count, candidates, |i| at(i, t)).into_iter().map(move |i| (i, t))).collect();

    // A pair that both directions ask for is judged once.
    let mut wanted: Vec<(usize, usize)> = texts_first.iter().chain(&images_first).copied().collect();
    wanted.sort_unstable();
    wanted.dedup();
    let judge = |pairs: &[(usize, usize)]| matching_logits(med, tokenizer, &states, &itm_ids, pairs);
    let logits = match med.device().is_cpu() {
        true => wanted.par_chunks(BATCH).map(judge).collect::<Result<Vec<_>>>()?,
        false => wanted.chunks(BATCH).map(judge).collect::<Result<Vec<_>>>()?,
    };
    let logits = logits.concat();
    let ranked = |pairs: &[(usize, usize)]| {
        let mut scores: Vec<f32> = similarities.iter().map(|similarity| NOT_RANKED + similarity).collect();
        for &(image, text) in pairs {
            if let Ok(place) = wanted.binary_search(&(image, text)) {
                scores[image * width + text] = at(image, text) + logits[place];
            }
        }
        scores
    };
    Ok(RetrievalScores { texts_of_image: ranked(&texts_first), images_of_text: ranked(&images_first) })
}

/// The `k` of `0..n` with the highest scores; among equal ones the lower number.
fn best(n: usize, k: usize, score: impl Fn(usize) -> f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// Logit of class 1 (match) for pairs of image number and text number.
fn matching_logits(
    med: &Med,
    tokenizer: &TextTokenizer,
    states: &Tensor,
    ids: &[Vec<u32>],
    pairs: &[(usize, usize)],
) -> Result<Vec<f32>> {
    let rows: Vec<&[u32]> = pairs.iter().map(|&(_, text)| ids[text].as_slice()).collect();
    let (ids, mask) = TextBatch::pad(&rows, 0, tokenizer.pad_id()).tensors(med.device())?;
    // Pairs are sorted by image, so each image's keys and values are computed once in a batch.
    let mut distinct: Vec<u32> = pairs.iter().map(|&(image, _)| image as u32).collect();
    distinct.dedup();
    let places: Vec<u32> =
        pairs.iter().map(|&(image, _)| distinct.partition_point(|&known| known < image as u32) as u32).collect();
    let states = states.index_select(&Tensor::new(distinct, med.device())?, 0)?;
    let cross = med.encoder_cross_cache(&states)?.select(&Tensor::new(places, med.device())?)?;
    let logits = med.itm_logits_cached(&ids, &mask, &cross)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    Ok(logits.into_iter().map(|pair| pair[1]).collect())
}
