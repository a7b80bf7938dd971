//! Zero-shot classification: the class whose prompts are nearest to an image (CLIP, arXiv 2103.00020, section 3.1).

use capfilt_models::clip::ClipScorer;
use capfilt_models::tokenizer::{MAX_WORDS, clean_caption};
use serde::{Deserialize, Serialize};

use crate::{TrainPair, TrainerError};

/// Classes, and what a text about one says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZeroShot {
    /// Names of the classes. A held-out image is of the one that its captions name, and is left out if they name none or several.
    pub classes: Vec<String>,
    /// Prompts, with `{}` in place of the class; a class is the mean of the features of its prompts.
    #[serde(default = "usual_templates")]
    pub templates: Vec<String>,
}

fn usual_templates() -> Vec<String> {
    vec!["a photo of a {}.".to_owned()]
}

impl ZeroShot {
    /// Refuses what cannot be meant.
    pub(crate) fn check(&self) -> Result<(), TrainerError> {
        let fail = |what: String| Err(TrainerError::Config(what));
        if self.classes.len() < 2 {
            return fail(format!("zero_shot.classes: {} classes are too few to choose among", self.classes.len()));
        }
        match self.templates.iter().find(|template| !template.contains("{}")) {
            Some(template) => fail(format!("zero_shot.templates: `{template}` has no `{{}}` in place of the class")),
            None if self.templates.is_empty() => fail("zero_shot.templates: there is none".to_owned()),
            None => Ok(()),
        }
    }

    /// The number of the class that an image is of.
    pub(crate) fn class_of(&self, pair: &TrainPair) -> Option<usize> {
        let captions: Vec<String> = pair.texts.iter().map(|text| format!(" {} ", clean_caption(&text.text, MAX_WORDS))).collect();
        let named = |class: &&String| {
            let class = format!(" {} ", clean_caption(class, MAX_WORDS));
            captions.iter().any(|caption| caption.contains(&class))
        };
        let mut named = self.classes.iter().enumerate().filter(|(_, class)| named(class));
        named.next().map(|(number, _)| number).filter(|_| named.next().is_none())
    }

    /// The features of the classes, of length 1.
    pub(crate) fn features(&self, scorer: &ClipScorer) -> Result<Vec<Vec<f32>>, TrainerError> {
        let prompts: Vec<String> =
            self.classes.iter().flat_map(|class| self.templates.iter().map(move |t| t.replace("{}", class))).collect();
        let features = scorer.text_features(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mean = |prompts: &[Vec<f32>]| {
            let mut sum = vec![0.0; prompts[0].len()];
            for prompt in prompts {
                sum.iter_mut().zip(prompt).for_each(|(sum, x)| *sum += x);
            }
            let length = sum.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            sum.iter().map(|x| x / length).collect()
        };
        Ok(features.chunks(self.templates.len()).map(mean).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use capfilt_schemas::Origin;

    use super::*;
    use crate::PairText;

    #[test]
    fn an_image_is_of_the_one_class_that_its_captions_name() {
        let zero_shot =
            ZeroShot { classes: ["dog", "Cat", "fire engine"].map(str::to_owned).to_vec(), templates: usual_templates() };
        let class = |captions: &[&str]| {
            let texts = captions.iter().map(|text| PairText { text: (*text).to_owned(), origin: Origin::Human }).collect();
            zero_shot.class_of(&TrainPair { sample_id: "a".to_owned(), texts, pixels: Vec::new().into() })
        };
        assert_eq!(class(&["A dog."]), Some(0));
        assert_eq!(class(&["an animal", "a cat on a mat"]), Some(1));
        assert_eq!(class(&["a red fire engine"]), Some(2));
        assert_eq!(class(&["hotdogs"]), None);
        assert_eq!(class(&["a dog and a cat"]), None);
        zero_shot.check().unwrap();
        let refused = |classes: &[&str], template: &str| {
            let classes = classes.iter().map(|class| (*class).to_owned()).collect();
            ZeroShot { classes, templates: vec![template.to_owned()] }.check().unwrap_err().to_string()
        };
        assert!(refused(&["dog"], "a {}").contains("too few"));
        assert!(refused(&["dog", "cat"], "a photo").contains("`a photo` has no `{}`"));
    }
}
