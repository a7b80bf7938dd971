//! ROUGE-L (Lin and Och 2004), the longest-common-subsequence F-measure.

use super::CaptionCase;

/// Weight of recall over precision, as in `pycocoevalcap`.
const BETA: f64 = 1.2;

/// ROUGE-L of every case, in the order given; the score of the set is their mean.
///
/// The best precision and the best recall over the references enter one F-measure, whichever references they came from.
pub fn rouge_l(cases: &[CaptionCase]) -> Vec<f64> {
    cases
        .iter()
        .map(|case| {
            let candidate = case.candidate_tokens();
            let (mut precision, mut recall) = (0.0f64, 0.0f64);
            for reference in case.reference_tokens() {
                let common = longest_common_subsequence(&candidate, &reference) as f64;
                // An empty text counts as one empty token in the reference code; nothing can match it either way.
                precision = precision.max(common / candidate.len().max(1) as f64);
                recall = recall.max(common / reference.len().max(1) as f64);
            }
            if precision == 0.0 || recall == 0.0 {
                0.0
            } else {
                (1.0 + BETA * BETA) * precision * recall / (recall + BETA * BETA * precision)
            }
        })
        .collect()
}

fn longest_common_subsequence(a: &[&str], b: &[&str]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for token in a {
        let mut diagonal = 0;
        for (column, other) in b.iter().enumerate() {
            let above = row[column + 1];
            row[column + 1] = if token == other { diagonal + 1 } else { above.max(row[column]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
