//! How captions are written: the strategy and its settings.

use serde::{Deserialize, Serialize};

use crate::error::{ModelError, Result};

/// How the next token is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Draws from the likeliest tokens (arXiv 1904.09751): BLIP's choice for CapFilt.
    #[default]
    Nucleus,
    /// Takes the likeliest token.
    Greedy,
    /// Keeps the likeliest texts as they grow: Hugging Face's `generate` with `num_beams`.
    Beam,
}

impl Strategy {
    /// Task names from before there was a choice stay as they are.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_nucleus(&self) -> bool {
        *self == Self::Nucleus
    }
}

/// How captions are written. Where a setting is missing, it is that of BLIP's captioner (`models/blip.py` and
/// `configs/caption_coco.yaml`) for the strategy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Settings")]
pub struct Sampling {
    /// How the next token is found.
    #[serde(skip_serializing_if = "Strategy::is_nucleus")]
    pub strategy: Strategy,
    /// For `nucleus`: the likeliest tokens that reach this share of the mass; 1 keeps all.
    pub top_p: f64,
    /// For `nucleus`: the likeliest tokens kept before the nucleus is taken; 0 keeps all.
    pub top_k: usize,
    /// For `nucleus`: divides all scores before the draw.
    pub temperature: f64,
    /// For `beam`: texts that grow side by side, 3 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_beams: Option<usize>,
    /// For `beam`: a text is worth its log-probability divided by (its tokens after the prompt) to this power, 1 if not given; above 0
    /// longer texts gain, below 0 shorter ones do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length_penalty: Option<f64>,
    /// Divides the score of tokens that are already in the text (multiplies, if below zero); 1 does nothing. If not given, 1.1 for
    /// `nucleus` and 1 for the others.
    pub repetition_penalty: f64,
    /// Tokens, prompt included, before which a caption does not end.
    pub min_length: usize,
    /// Tokens, prompt included, at which a caption is cut.
    pub max_length: usize,
    /// Captions per image: as many draws, or the best of the beams. `greedy` writes one.
    pub captions: usize,
    /// Text that every caption starts with; it is cut off again. May be empty.
    pub prompt: String,
}

/// The settings as they are written: what is missing depends on the strategy.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    strategy: Strategy,
    top_p: Option<f64>,
    top_k: Option<usize>,
    temperature: Option<f64>,
    num_beams: Option<usize>,
    length_penalty: Option<f64>,
    repetition_penalty: Option<f64>,
    min_length: Option<usize>,
    max_length: Option<usize>,
    captions: Option<usize>,
    prompt: Option<String>,
}

impl From<Settings> for Sampling {
    fn from(given: Settings) -> Self {
        let usual = Self::new(given.strategy);
        Self {
            strategy: given.strategy,
            top_p: given.top_p.unwrap_or(usual.top_p),
            top_k: given.top_k.unwrap_or(usual.top_k),
            temperature: given.temperature.unwrap_or(usual.temperature),
            num_beams: given.num_beams,
            length_penalty: given.length_penalty,
            repetition_penalty: given.repetition_penalty.unwrap_or(usual.repetition_penalty),
            min_length: given.min_length.unwrap_or(usual.min_length),
            max_length: given.max_length.unwrap_or(usual.max_length),
            captions: given.captions.unwrap_or(usual.captions),
            prompt: given.prompt.unwrap_or(usual.prompt),
        }
    }
}

impl Default for Sampling {
    fn default() -> Self {
        Self::new(Strategy::default())
    }
}

impl Sampling {
    /// BLIP's settings for a strategy.
    #[must_use]
    pub fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            top_p: 0.9,
            top_k: 50,
            temperature: 1.0,
            num_beams: None,
            length_penalty: None,
            repetition_penalty: if strategy == Strategy::Nucleus { 1.1 } else { 1.0 },
            min_length: 5,
            max_length: 20,
            captions: 1,
            prompt: "a picture of ".to_owned(),
        }
    }

    /// The number of beams of the strategy `beam`.
    #[must_use]
    pub fn beams(&self) -> usize {
        self.num_beams.unwrap_or(3)
    }

    /// The exponent of a text's length by which beams are compared.
    #[must_use]
    pub fn length_exponent(&self) -> f64 {
        self.length_penalty.unwrap_or(1.0)
    }

    /// Checks the ranges, and that the settings belong to the strategy.
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
        if self.temperature == 0.0 {
            return fail("temperature is 0; to take the likeliest token, set strategy to \"greedy\"".to_owned());
        }
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return fail(format!("temperature is {}, it must be above 0", self.temperature));
        }
        if self.min_length > self.max_length {
            return fail(format!("min_length {} is above max_length {}", self.min_length, self.max_length));
        }
        if self.captions == 0 {
            return fail("captions is 0, it must be at least 1".to_owned());
        }
        match self.strategy {
            Strategy::Nucleus | Strategy::Greedy if self.num_beams.is_some() || self.length_penalty.is_some() => {
                fail("num_beams and length_penalty are for beams; set strategy to \"beam\", or leave them out".to_owned())
            }
            Strategy::Greedy if self.captions > 1 => {
                fail(format!("captions is {}, but greedy writes one; set strategy to \"nucleus\" or \"beam\"", self.captions))
            }
            Strategy::Beam if self.beams() < 2 => {
                fail(format!("num_beams is {}; set strategy to \"greedy\", or num_beams to 2 or more", self.beams()))
            }
            Strategy::Beam if self.captions > self.beams() => {
                fail(format!("captions is {}, more than the {} beams; raise num_beams", self.captions, self.beams()))
            }
            // Beyond that, powers of lengths leave the range of numbers.
            Strategy::Beam if self.length_exponent().is_nan() || self.length_exponent().abs() > 10.0 => {
                fail(format!("length_penalty is {}, it must be from -10 to 10", self.length_exponent()))
            }
            Strategy::Nucleus | Strategy::Greedy | Strategy::Beam => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn senseless_settings_are_refused() {
        let (nucleus, greedy, beam) = (Sampling::default(), Sampling::new(Strategy::Greedy), Sampling::new(Strategy::Beam));
        let bad = [
            Sampling { top_p: 0.0, ..nucleus.clone() },
            Sampling { top_p: f64::NAN, ..nucleus.clone() },
            Sampling { repetition_penalty: 0.0, ..nucleus.clone() },
            Sampling { temperature: -1.0, ..nucleus.clone() },
            Sampling { min_length: 21, ..nucleus.clone() },
            Sampling { captions: 0, ..nucleus.clone() },
            Sampling { num_beams: Some(3), ..nucleus.clone() },
            Sampling { length_penalty: Some(1.0), ..greedy.clone() },
            Sampling { captions: 2, ..greedy.clone() },
            Sampling { num_beams: Some(1), ..beam.clone() },
            Sampling { captions: 4, ..beam.clone() },
            Sampling { length_penalty: Some(f64::INFINITY), ..beam.clone() },
        ];
        for sampling in bad {
            assert!(sampling.check().is_err(), "{sampling:?}");
        }
        let cold = Sampling { temperature: 0.0, ..nucleus.clone() }.check().unwrap_err().to_string();
        assert!(cold.contains("greedy"), "{cold}");
        for sampling in [nucleus, greedy, Sampling { captions: 3, ..beam }] {
            assert!(sampling.check().is_ok(), "{sampling:?}");
        }
    }

    #[test]
    fn what_is_missing_depends_on_the_strategy() {
        let read = |json: &str| serde_json::from_str::<Sampling>(json).unwrap();
        assert_eq!(read("{}"), Sampling::default());
        assert_eq!(read("{}").repetition_penalty, 1.1);
        assert_eq!(read(r#"{"strategy": "beam"}"#).repetition_penalty, 1.0);
        let beam = read(r#"{"strategy": "beam", "num_beams": 5, "repetition_penalty": 1.3}"#);
        assert_eq!((beam.beams(), beam.length_exponent(), beam.repetition_penalty), (5, 1.0, 1.3));
        assert!(serde_json::from_str::<Sampling>(r#"{"beams": 5}"#).is_err());
    }

    #[test]
    fn nucleus_is_written_as_it_was_before_there_were_strategies() {
        // These are parameters of tasks, and so part of their names.
        let json = serde_json::to_value(Sampling::default()).unwrap();
        let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
        let before = ["captions", "max_length", "min_length", "prompt", "repetition_penalty", "temperature", "top_k", "top_p"];
        assert_eq!(keys, before);
        for sampling in [Sampling::new(Strategy::Greedy), Sampling { num_beams: Some(4), ..Sampling::new(Strategy::Beam) }] {
            let json = serde_json::to_string(&sampling).unwrap();
            assert_eq!(serde_json::from_str::<Sampling>(&json).unwrap(), sampling);
        }
    }
}
