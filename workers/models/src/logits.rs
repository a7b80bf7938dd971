//! From next-token scores to tokens, in the order of Hugging Face's `generate`: repetition penalty, minimum length, then (for a draw)
//! temperature, top-k, top-p. A row of scores is changed in place and never sorted as a whole.

use crate::error::{ModelError, Result};
use crate::sampling::Sampling;

/// Tokens first looked at for a nucleus without top-k; if they do not reach it, that many times more.
const NUCLEUS_START: usize = 64;
const NUCLEUS_GROWTH: usize = 8;

impl Sampling {
    /// Draws the next token after `history` (all tokens so far, prompt included): logits `(vocab)`, which are used up, and a uniform
    /// number in [0, 1) in, id out.
    ///
    /// # Errors
    /// No logit is a finite number.
    pub fn draw(&self, logits: &mut [f32], history: &[u32], end: u32, uniform: f64) -> Result<u32> {
        let kept = self.distribution(logits, history, end)?;
        let mut rest = uniform;
        for (id, probability) in &kept {
            rest -= probability;
            if rest < 0.0 {
                return Ok(*id);
            }
        }
        // Rounding can leave a crumb of mass after the last token.
        kept.last().map(|(id, _)| *id).ok_or_else(|| ModelError::Input("no token is left to choose".to_owned()))
    }

    /// The tokens that may be drawn and their probabilities (sum 1), likeliest first, equal ones by id.
    ///
    /// # Errors
    /// No logit is a finite number.
    pub fn distribution(&self, logits: &mut [f32], history: &[u32], end: u32) -> Result<Vec<(u32, f64)>> {
        self.process(logits, history, end);
        if self.temperature != 1.0 {
            let temperature = self.temperature as f32;
            for score in &mut *logits {
                *score /= temperature;
            }
        }
        let likeliest = likeliest(logits)?.1;
        let weight = |score: f32| f64::from(score - likeliest).exp();
        if self.top_k > 0 && self.top_k < logits.len() {
            let kept: Vec<(u32, f64)> = best(logits, self.top_k).into_iter().map(|(id, score)| (id, weight(score))).collect();
            let total = kept.iter().map(|(_, weight)| weight).sum();
            return Ok(nucleus(kept, self.top_p, total).0);
        }
        let total = logits.iter().filter(|score| !score.is_nan()).map(|score| weight(*score)).sum();
        let mut looked_at = if self.top_p < 1.0 { NUCLEUS_START } else { logits.len() };
        loop {
            let kept = best(logits, looked_at).into_iter().map(|(id, score)| (id, weight(score))).collect();
            let (kept, reached) = nucleus(kept, self.top_p, total);
            if reached || looked_at >= logits.len() {
                return Ok(kept);
            }
            looked_at *= NUCLEUS_GROWTH;
        }
    }

    /// Repetition penalty and minimum length, on logits or log-probabilities.
    pub(crate) fn process(&self, scores: &mut [f32], history: &[u32], end: u32) {
        if self.repetition_penalty != 1.0 {
            let penalty = self.repetition_penalty as f32;
            let mut seen: Vec<u32> = history.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                if let Some(score) = scores.get_mut(id as usize) {
                    *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
                }
            }
        }
        if history.len() < self.min_length
            && let Some(score) = scores.get_mut(end as usize)
        {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Of weights in descending order, those that reach the share `top_p` of `total`, as probabilities, and whether they reach it.
fn nucleus(mut kept: Vec<(u32, f64)>, top_p: f64, total: f64) -> (Vec<(u32, f64)>, bool) {
    // The first token always stays; a later one only if those before it do not yet reach the nucleus.
    let (mut mass, mut count) = (0.0, 0);
    for (_, weight) in &kept {
        if count > 0 && top_p < 1.0 && mass >= top_p * total {
            break;
        }
        mass += weight;
        count += 1;
    }
    let reached = count < kept.len() || mass >= top_p * total;
    kept.truncate(count);
    for (_, weight) in &mut kept {
        *weight /= mass;
    }
    (kept, reached)
}

/// The token with the highest score and that score; of equal ones the first.
///
/// # Errors
/// There is none, or the score is no finite number.
pub(crate) fn likeliest(scores: &[f32]) -> Result<(u32, f32)> {
    let mut found = (0, f32::NEG_INFINITY);
    for (id, score) in (0u32..).zip(scores) {
        if *score > found.1 {
            found = (id, *score);
        }
    }
    if !found.1.is_finite() {
        return Err(ModelError::Input("the model gave no finite score to any token; are its weights sound?".to_owned()));
    }
    Ok(found)
}

/// The `k` best scores and, as in the reference, those as good as the last of them: best first, equal ones by id. Only candidates are
/// copied and sorted.
pub(crate) fn best(scores: &[f32], k: usize) -> Vec<(u32, f32)> {
    let by_rank = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(2 * k);
    if k == 0 {
        return kept;
    }
    let (mut least, mut limit) = (f32::MIN, 2 * k);
    let cut = |kept: &mut Vec<(u32, f32)>| {
        let (_, kth, _) = kept.select_nth_unstable_by(k - 1, by_rank);
        let least = kth.1;
        kept.retain(|(_, score)| *score >= least);
        least
    };
    for (id, score) in (0u32..).zip(scores) {
        if *score >= least {
            kept.push((id, *score));
            if kept.len() >= limit {
                least = cut(&mut kept);
                limit = 2 * kept.len().max(k);
            }
        }
    }
    if kept.len() > k {
        cut(&mut kept);
    }
    kept.sort_unstable_by(by_rank);
    kept
}

/// Log-probabilities in place of logits.
///
/// # Errors
/// No logit is a finite number.
pub(crate) fn log_softmax(logits: &mut [f32]) -> Result<()> {
    let (_, most) = likeliest(logits)?;
    let total: f64 = logits.iter().map(|logit| f64::from((logit - most).exp())).sum();
    let log_total = total.ln() as f32;
    for logit in logits {
        *logit = (*logit - most) - log_total;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Stream;

    fn open() -> Sampling {
        Sampling { top_p: 1.0, top_k: 0, repetition_penalty: 1.0, min_length: 0, ..Sampling::default() }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let draw = |u| open().draw(&mut logits.clone(), &[], 9, u).unwrap();
        // Likeliest first: 1 up to 0.6, then 2 up to 0.9, then 0.
        assert_eq!([draw(0.0), draw(0.59), draw(0.61), draw(0.89), draw(0.91)], [1, 1, 2, 2, 0]);
        assert_eq!(draw(1.0), 0);
    }

    #[test]
    fn the_first_of_the_likeliest_is_taken() {
        let after = |sampling: &Sampling, mut logits: Vec<f32>, history: &[u32]| {
            sampling.process(&mut logits, history, 1);
            likeliest(&logits).unwrap().0
        };
        assert_eq!(after(&open(), vec![1.0, 3.0, 3.0], &[]), 1);
        let penalised = Sampling { repetition_penalty: 2.0, ..open() };
        assert_eq!(after(&penalised, vec![2.0, 3.0, -1.0], &[1]), 0);
        assert_eq!(after(&penalised, vec![-3.0, -2.0], &[1, 1]), 0);
        // A text does not end before its minimum length.
        let long = Sampling { min_length: 3, ..open() };
        assert_eq!(after(&long, vec![0.0, 9.0], &[0, 0]), 0);
        assert_eq!(after(&long, vec![0.0, 9.0], &[0, 0, 0]), 1);
    }

    #[test]
    fn broken_logits_are_an_error() {
        for logits in [[f32::NAN, f32::NAN], [f32::NEG_INFINITY, f32::NAN], [f32::INFINITY, 0.0]] {
            assert!(open().draw(&mut logits.clone(), &[], 9, 0.5).is_err());
            assert!(log_softmax(&mut logits.clone()).is_err());
        }
        assert_eq!(open().draw(&mut [f32::NAN, 1.0], &[], 9, 0.5).unwrap(), 1);
    }

    /// Scores with many equal ones.
    fn scores(count: usize, levels: f64) -> Vec<f32> {
        let mut stream = Stream::new("scores", count as u64, &[]);
        (0..count).map(|_| (stream.normal() * levels).round() as f32).collect()
    }

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        for (count, levels) in [(1, 1.0), (7, 1.0), (300, 3.0), (5000, 1e6), (5000, 0.0)] {
            let scores = scores(count, levels);
            let mut sorted: Vec<(u32, f32)> = (0..).zip(scores.iter().copied()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            for k in [1, 2, 6, 50, 4999, 5000, 9000] {
                let least = sorted.get(k - 1).map_or(f32::MIN, |kth| kth.1);
                let expected: Vec<(u32, f32)> = sorted.iter().copied().filter(|(_, score)| *score >= least).collect();
                assert_eq!(best(&scores, k), expected, "{k} of {count}");
            }
        }
    }

    #[test]
    fn a_nucleus_is_the_same_however_much_is_looked_at() {
        // 3,000 tokens, of which some hundred make the nucleus: it is found in the third look.
        let logits: Vec<f32> = scores(3000, 1e4).iter().map(|score| score / 1e4).collect();
        let sampling = Sampling { top_p: 0.8, ..open() };
        let kept = sampling.distribution(&mut logits.clone(), &[], 9).unwrap();
        assert!(kept.len() > NUCLEUS_START * NUCLEUS_GROWTH && kept.len() < 3000, "{}", kept.len());
        let weights: Vec<f64> = best(&logits, 3000).iter().map(|(_, score)| f64::from(*score).exp()).collect();
        let (mass, total) = (weights[..kept.len()].iter().sum::<f64>(), weights.iter().sum::<f64>());
        assert!(mass >= 0.8 * total && mass - weights[kept.len() - 1] < 0.8 * total);
        assert!((kept.iter().map(|(_, probability)| probability).sum::<f64>() - 1.0).abs() < 1e-9);
        assert!((kept[0].1 - weights[0] / mass).abs() < 1e-9);
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let mut logits = scores(500, 4.0);
        let before = logits.clone();
        log_softmax(&mut logits).unwrap();
        assert!((logits.iter().map(|x| f64::from(*x).exp()).sum::<f64>() - 1.0).abs() < 1e-5);
        assert!((logits[3] - logits[8] - (before[3] - before[8])).abs() < 1e-5);
    }
}
