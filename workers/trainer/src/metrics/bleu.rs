//! BLEU over a corpus (Papineni et al. 2002).

use super::CaptionCase;
use super::ngrams::{Counts, MAX_N, counts};

/// What one caption adds to the BLEU of a set.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BleuCounts {
    matched: [f64; MAX_N],
    guessed: [f64; MAX_N],
    candidate_length: f64,
    reference_length: f64,
}

/// Of one caption, as in `pycocoevalcap`: counts clipped against the maximum over the references, and the length of the reference that is
/// closest to the candidate (the shorter of two equally close).
pub fn bleu_counts(case: &CaptionCase) -> BleuCounts {
    let candidate = case.candidate_tokens();
    let references = case.reference_tokens();
    let closest = references.iter().map(Vec::len).min_by_key(|&length| (length.abs_diff(candidate.len()), length)).unwrap_or(0);
    let mut counted =
        BleuCounts { candidate_length: candidate.len() as f64, reference_length: closest as f64, ..BleuCounts::default() };
    let reference_counts: Vec<[Counts<'_>; MAX_N]> = references.iter().map(|tokens| counts(tokens)).collect();
    for (n, candidate_counts) in counts(&candidate).iter().enumerate() {
        counted.guessed[n] = candidate.len().saturating_sub(n) as f64;
        for (ngram, &count) in candidate_counts {
            let ceiling = reference_counts.iter().map(|each| each[n].get(ngram).copied().unwrap_or(0)).max().unwrap_or(0);
            counted.matched[n] += count.min(ceiling) as f64;
        }
    }
    counted
}

/// BLEU-1 to BLEU-4 of a whole set, each in `0..=1`; each caption counts as often as its weight says. Nothing if none counts.
///
/// As in `pycocoevalcap`: with the brevity penalty, and the same tiny constants that keep an empty count from dividing by zero.
pub fn bleu(cases: &[BleuCounts], weights: &[f64]) -> Option<[f64; MAX_N]> {
    const SMALL: f64 = 1e-9;
    const TINY: f64 = 1e-15;

    let sum = |of: &dyn Fn(&BleuCounts) -> f64| cases.iter().zip(weights).map(|(case, weight)| of(case) * weight).sum::<f64>();
    let ratio = (sum(&|case| case.candidate_length) + TINY) / (sum(&|case| case.reference_length) + SMALL);
    let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    let found = std::array::from_fn(|n| {
        product *= (sum(&|case| case.matched[n]) + TINY) / (sum(&|case| case.guessed[n]) + SMALL);
        product.powf(1.0 / (n + 1) as f64) * brevity
    });
    weights.iter().take(cases.len()).any(|weight| *weight > 0.0).then_some(found)
}
