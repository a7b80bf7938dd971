//! BLEU over a corpus (Papineni et al. 2002).

use super::CaptionCase;
use super::ngrams::{Counts, MAX_N, counts};

/// BLEU-1 to BLEU-4 of a whole set, each in `0..=1`; zeros for an empty set.
///
/// As in `pycocoevalcap`: clipped counts against the maximum over the references, brevity penalty with the reference length closest
/// to the candidate (the shorter of two equally close), and the same tiny constants that keep an empty count from dividing by zero.
pub fn bleu(cases: &[CaptionCase]) -> [f64; MAX_N] {
    const SMALL: f64 = 1e-9;
    const TINY: f64 = 1e-15;

    let mut matched = [0u64; MAX_N];
    let mut guessed = [0u64; MAX_N];
    let (mut candidate_length, mut reference_length) = (0usize, 0usize);
    for case in cases {
        let candidate = case.candidate_tokens();
        let references = case.reference_tokens();
        candidate_length += candidate.len();
        reference_length +=
            references.iter().map(Vec::len).min_by_key(|&length| (length.abs_diff(candidate.len()), length)).unwrap_or(0);

        let reference_counts: Vec<[Counts<'_>; MAX_N]> = references.iter().map(|tokens| counts(tokens)).collect();
        for (n, candidate_counts) in counts(&candidate).iter().enumerate() {
            guessed[n] += candidate.len().saturating_sub(n) as u64;
            for (ngram, &count) in candidate_counts {
                let ceiling = reference_counts.iter().map(|each| each[n].get(ngram).copied().unwrap_or(0)).max().unwrap_or(0);
                matched[n] += u64::from(count.min(ceiling));
            }
        }
    }
    if cases.is_empty() {
        return [0.0; MAX_N];
    }

    let ratio = (candidate_length as f64 + TINY) / (reference_length as f64 + SMALL);
    let brevity = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
    let mut product = 1.0;
    std::array::from_fn(|n| {
        product *= (matched[n] as f64 + TINY) / (guessed[n] as f64 + SMALL);
        product.powf(1.0 / (n + 1) as f64) * brevity
    })
}
