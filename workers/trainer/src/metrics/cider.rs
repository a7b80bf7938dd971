//! CIDEr-D (Vedantam, Zitnick and Parikh 2015, arXiv 1411.5726).

use std::collections::BTreeMap;

use super::CaptionCase;
use super::ngrams::{MAX_N, counts};

/// Standard deviation of the Gaussian penalty on the difference in length.
const SIGMA: f64 = 6.0;

/// In how many images of the set each n-gram occurs among the references.
type DocumentFrequency<'a> = BTreeMap<&'a [&'a str], f64>;

/// CIDEr-D of every case, in the order given; the score of the set is their mean.
///
/// Document frequencies come from the references of the very set, so a score depends on the set it is part of. As in
/// `pycocoevalcap` (whose class `Cider` is CIDEr-D): 1-grams to 4-grams weighted equally, candidate weights clipped to the
/// reference's, mean over references, times ten. Length is counted in 2-grams there, and so it is here.
pub fn cider_d(cases: &[CaptionCase]) -> Vec<f64> {
    let references: Vec<Vec<Vec<&str>>> = cases.iter().map(CaptionCase::reference_tokens).collect();
    let mut frequency = DocumentFrequency::new();
    for of_image in &references {
        let mut seen = BTreeMap::new();
        for tokens in of_image {
            for (&ngram, _) in counts(tokens).iter().flatten() {
                seen.insert(ngram, ());
            }
        }
        for ngram in seen.into_keys() {
            *frequency.entry(ngram).or_insert(0.0) += 1.0;
        }
    }

    let log_images = (cases.len() as f64).ln();
    cases
        .iter()
        .zip(&references)
        .map(|(case, of_image)| {
            let tokens = case.candidate_tokens();
            let candidate = TfIdf::new(&tokens, &frequency, log_images);
            let sum: f64 = of_image.iter().map(|tokens| candidate.similarity(&TfIdf::new(tokens, &frequency, log_images))).sum();
            10.0 * sum / of_image.len() as f64
        })
        .collect()
}

/// Tf-idf vectors of one caption, one for each length of n-gram.
struct TfIdf<'a> {
    weights: [BTreeMap<&'a [&'a str], f64>; MAX_N],
    norms: [f64; MAX_N],
    length: f64,
}

impl<'a> TfIdf<'a> {
    fn new(tokens: &'a [&'a str], frequency: &DocumentFrequency<'_>, log_images: f64) -> Self {
        let weights = counts(tokens).map(|of_n| {
            of_n.into_iter()
                .map(|(ngram, count)| {
                    let documents = frequency.get(ngram).copied().unwrap_or(0.0).max(1.0);
                    (ngram, f64::from(count) * (log_images - documents.ln()))
                })
                .collect::<BTreeMap<_, _>>()
        });
        let norms = std::array::from_fn(|n| weights[n].values().map(|w| w * w).sum::<f64>().sqrt());
        Self { weights, norms, length: tokens.len().saturating_sub(1) as f64 }
    }

    /// Mean over n of the clipped cosine, with the length penalty.
    fn similarity(&self, reference: &TfIdf<'_>) -> f64 {
        let delta = self.length - reference.length;
        let penalty = (-(delta * delta) / (2.0 * SIGMA * SIGMA)).exp();
        let cosines = (0..MAX_N).map(|n| {
            let dot: f64 = self.weights[n]
                .iter()
                .filter_map(|(ngram, weight)| reference.weights[n].get(ngram).map(|other| weight.min(*other) * other))
                .sum();
            let norms = self.norms[n] * reference.norms[n];
            if norms == 0.0 { dot } else { dot / norms }
        });
        penalty * cosines.sum::<f64>() / MAX_N as f64
    }
}
