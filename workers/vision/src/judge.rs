//! The models that judge texts: a filter, a CLIP, or both, on images that are decoded once.

use std::path::{Path, PathBuf};

use capfilt_models::ModelError;
use capfilt_models::clip::{ClipScorer, clip_score};
use capfilt_models::device::Device;
use capfilt_models::preprocess::Preprocessor;
use capfilt_models::score::{FilterScorer, Itc, ItmToken};
use capfilt_schemas::fold;
use serde::Serialize;

use crate::model::{NumberType, clip, filter};
use crate::pixels::{Views, take_view};

/// What the models say of one text for one image; nothing where a model is not there.
#[derive(Clone, Copy, Default, PartialEq, Debug, Serialize)]
pub struct TextScores {
    /// Logits of the filter's ITM head: no match, match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itm_logits: Option<[f32; 2]>,
    /// Probability of a match by the ITM head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itm: Option<f32>,
    /// Cosine of the filter's ITC features.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub itc: Option<f32>,
    /// Cosine of the CLIP features.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f32>,
    /// CLIPScore: 2.5 times that cosine, at least 0 (Hessel et al. 2021, arXiv 2104.08718).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_score: Option<f32>,
}

/// A filter, a CLIP, or both.
pub(crate) struct Judge {
    /// Of the filter: of each split into folds, the one that judges each fold. None without a filter.
    members: Vec<Vec<FilterScorer>>,
    clip: Option<ClipScorer>,
}

impl Judge {
    /// From checkpoint folders, of the filter those of its members; the image transforms are in the order of the models.
    pub(crate) fn open(
        filter_folders: &[Vec<PathBuf>],
        clip_folder: Option<&Path>,
        scores: (ItmToken, Itc),
        dtype: Option<NumberType>,
        device: &Device,
    ) -> Result<(Self, Vec<Preprocessor>), ModelError> {
        let (mut members, mut preprocessors) = (Vec::new(), Vec::new());
        for folders in filter_folders {
            let opened = folders.iter().map(|folder| filter(folder, scores, dtype, device));
            let (of_split, of_members): (Vec<_>, Vec<_>) = opened.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
            members.push(of_split);
            preprocessors.extend(of_members);
        }
        // Members are alike but for their weights; those of the trunk, if they have one, are the same.
        preprocessors.truncate(1);
        let clip = clip_folder.map(|folder| clip(folder, dtype, device)).transpose()?;
        let (clip, of_clip) = clip.unzip();
        preprocessors.extend(of_clip);
        Ok((Self { members, clip }, preprocessors))
    }

    /// Scores `texts[i]`, each, against `images[i]`. Each image goes through each model once; of a filter with several members, through those
    /// that were not trained on the sample `ids[i]`, one of each split, and scores are their means.
    ///
    /// # Errors
    /// A model fails, or what it says is not a number.
    pub(crate) fn score(
        &self,
        mut images: Vec<Views>,
        texts: &[Vec<String>],
        ids: &[String],
    ) -> Result<Vec<Vec<TextScores>>, ModelError> {
        let mut scores: Vec<Vec<TextScores>> = texts.iter().map(|texts| vec![TextScores::default(); texts.len()]).collect();
        let patches = match self.members.first() {
            Some(members) if !images.is_empty() => Some(members[0].patches(&take_view(&mut images))?),
            _ => None,
        };
        let share = 1.0 / self.members.len() as f32;
        for (repeat, members) in self.members.iter().enumerate() {
            for (number, member) in members.iter().enumerate() {
                let judges = |place: &usize| fold(&ids[*place], members.len(), repeat) == number;
                let places: Vec<usize> = (0..ids.len()).filter(judges).collect();
                let Some(patches) = patches.as_ref().filter(|_| !places.is_empty()) else { continue };
                let its_texts: Vec<Vec<_>> = places.iter().map(|&place| texts[place].iter().collect()).collect();
                for (&place, judged) in places.iter().zip(member.score_patches(&patches.select(&places)?, &its_texts)?) {
                    for (text, judged) in scores[place].iter_mut().zip(judged) {
                        let add = |sum: Option<f32>, score: f32| Some(sum.unwrap_or(0.0) + share * score);
                        let [no, yes] = text.itm_logits.unwrap_or_default();
                        text.itm_logits = Some([no + share * judged.logits[0], yes + share * judged.logits[1]]);
                        (text.itm, text.itc) = (add(text.itm, judged.itm), add(text.itc, judged.itc));
                    }
                }
            }
        }
        if let Some(clip) = &self.clip {
            let cosines = clip.score(&take_view(&mut images), texts)?;
            for (text, cosine) in scores.iter_mut().flatten().zip(cosines.into_iter().flatten()) {
                (text.clip, text.clip_score) = (Some(cosine), Some(clip_score(cosine)));
            }
        }
        match scores.iter().flatten().all(TextScores::is_finite) {
            true => Ok(scores),
            false => {
                Err(ModelError::Input("a score is not a number: the weights are damaged, or too large for this dtype".to_owned()))
            }
        }
    }
}

impl TextScores {
    fn is_finite(&self) -> bool {
        let one = [self.itm, self.itc, self.clip, self.clip_score].into_iter().flatten();
        one.chain(self.itm_logits.into_iter().flatten()).all(f32::is_finite)
    }
}
