//! From next-token logits to a token, in the order of Hugging Face's `generate`: repetition penalty, minimum length, then
//! temperature, top-k, top-p.

use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};

/// How captions are drawn. The defaults are those of BLIP's captioner (`models/blip.py` and `configs/caption_coco.yaml`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Nucleus: the likeliest tokens that reach this share of the mass; 1 keeps all.
    pub top_p: f64,
    /// The likeliest tokens kept before the nucleus is taken; 0 keeps all.
    pub top_k: usize,
    /// Divides the score of tokens that are already in the text (multiplies, if below zero); 1 does nothing.
    pub repetition_penalty: f64,
    /// Divides all scores; 0 takes the likeliest token instead of drawing.
    pub temperature: f64,
    /// Tokens, prompt included, before which a caption does not end.
    pub min_length: usize,
    /// Tokens, prompt included, at which a caption is cut.
    pub max_length: usize,
    /// Captions per image.
    pub captions: usize,
    /// Text that every caption starts with; it is cut off again. May be empty.
    pub prompt: String,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            top_p: 0.9,
            top_k: 50,
            repetition_penalty: 1.1,
            temperature: 1.0,
            min_length: 5,
            max_length: 20,
            captions: 1,
            prompt: "a picture of ".to_owned(),
        }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`ModelError::Input`] names the first value that makes no sense.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(ModelError::Input(what));
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail(format!("top_p is {}, it must be above 0 and at most 1", self.top_p));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return fail(format!("repetition_penalty is {}, it must be above 0", self.repetition_penalty));
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return fail(format!("temperature is {}, it must be 0 or more", self.temperature));
        }
        if self.min_length > self.max_length {
            return fail(format!("min_length {} is above max_length {}", self.min_length, self.max_length));
        }
        if self.captions == 0 {
            return fail("captions is 0, it must be at least 1".to_owned());
        }
        if self.captions > 1 && self.temperature == 0.0 {
            return fail(format!("temperature 0 makes all {} captions the same; set captions to 1", self.captions));
        }
        Ok(())
    }

    /// The next token after `history` (all tokens so far, prompt included): logits `(vocab)` and a uniform number in [0, 1) in, id out.
    ///
    /// # Errors
    /// No logit is a finite number.
    pub fn choose(&self, logits: &[f32], history: &[u32], end: u32, uniform: f64) -> Result<u32> {
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

    /// The tokens that may follow and their probabilities (sum 1), likeliest first, equal ones by id.
    ///
    /// # Errors
    /// No logit is a finite number.
    pub fn distribution(&self, logits: &[f32], history: &[u32], end: u32) -> Result<Vec<(u32, f64)>> {
        let mut scores = logits.to_vec();
        self.penalise(&mut scores, history);
        if history.len() < self.min_length
            && let Some(score) = scores.get_mut(end as usize)
        {
            *score = f32::NEG_INFINITY;
        }
        if self.temperature > 0.0 {
            for score in &mut scores {
                *score /= self.temperature as f32;
            }
        }
        let mut ranked: Vec<(u32, f32)> =
            (0u32..).zip(scores).filter(|(_, score)| *score > f32::NEG_INFINITY && !score.is_nan()).collect();
        let by_rank = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let best = match ranked.iter().min_by(|a, b| by_rank(a, b)) {
            Some(best) if best.1.is_finite() => *best,
            _ => return Err(ModelError::Input("the model gave no finite score to any token; are its weights sound?".to_owned())),
        };
        if self.temperature == 0.0 {
            return Ok(vec![(best.0, 1.0)]);
        }
        if self.top_k > 0 && self.top_k < ranked.len() {
            // As in the reference, tokens as good as the k-th stay.
            let (_, kth, _) = ranked.select_nth_unstable_by(self.top_k - 1, by_rank);
            let least = kth.1;
            ranked.retain(|(_, score)| *score >= least);
        }
        ranked.sort_unstable_by(by_rank);

        let weights: Vec<f64> = ranked.iter().map(|(_, score)| f64::from(score - best.1).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = Vec::new();
        let mut mass = 0.0;
        for ((id, _), weight) in ranked.iter().zip(&weights) {
            // The first token always stays; a later one only if those before it do not yet reach the nucleus.
            if !kept.is_empty() && self.top_p < 1.0 && mass >= self.top_p * total {
                break;
            }
            kept.push((*id, *weight));
            mass += weight;
        }
        for (_, weight) in &mut kept {
            *weight /= mass;
        }
        Ok(kept)
    }

    fn penalise(&self, scores: &mut [f32], history: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
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
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn open() -> Sampling {
        Sampling { top_p: 1.0, top_k: 0, repetition_penalty: 1.0, min_length: 0, ..Sampling::default() }
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let choose = |u| open().choose(&logits, &[], 9, u).unwrap();
        // Likeliest first: 1 up to 0.6, then 2 up to 0.9, then 0.
        assert_eq!([choose(0.0), choose(0.59), choose(0.61), choose(0.89), choose(0.91)], [1, 1, 2, 2, 0]);
        assert_eq!(choose(1.0), 0);
    }

    #[test]
    fn zero_temperature_takes_the_first_of_the_likeliest() {
        let greedy = Sampling { temperature: 0.0, ..open() };
        assert_eq!(greedy.choose(&[1.0, 3.0, 3.0], &[], 9, 0.99).unwrap(), 1);
        let penalised = Sampling { repetition_penalty: 2.0, ..greedy };
        assert_eq!(penalised.choose(&[2.0, 3.0, -1.0], &[1], 9, 0.0).unwrap(), 0);
        assert_eq!(penalised.choose(&[-3.0, -2.0], &[1], 9, 0.0).unwrap(), 0);
    }

    #[test]
    fn a_caption_does_not_end_before_its_minimum_length() {
        let sampling = Sampling { min_length: 3, temperature: 0.0, ..open() };
        assert_eq!(sampling.choose(&[0.0, 9.0], &[0, 0], 1, 0.0).unwrap(), 0);
        assert_eq!(sampling.choose(&[0.0, 9.0], &[0, 0, 0], 1, 0.0).unwrap(), 1);
    }

    #[test]
    fn broken_logits_are_an_error() {
        for logits in [[f32::NAN, f32::NAN], [f32::NEG_INFINITY, f32::NAN], [f32::INFINITY, 0.0]] {
            assert!(open().choose(&logits, &[], 9, 0.5).is_err());
        }
        assert_eq!(open().choose(&[f32::NAN, 1.0], &[], 9, 0.5).unwrap(), 1);
    }

    #[test]
    fn senseless_settings_are_refused() {
        let bad = [
            Sampling { top_p: 0.0, ..open() },
            Sampling { top_p: f64::NAN, ..open() },
            Sampling { repetition_penalty: 0.0, ..open() },
            Sampling { temperature: -1.0, ..open() },
            Sampling { min_length: 21, ..open() },
            Sampling { captions: 0, ..open() },
            Sampling { captions: 2, temperature: 0.0, ..open() },
        ];
        assert!(bad.iter().all(|sampling| sampling.check().is_err()));
        assert!(Sampling::default().check().is_ok());
    }
}
