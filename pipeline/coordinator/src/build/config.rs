//! The `[build]` settings.

use serde::{Deserialize, Serialize};

use crate::dedup::MAX_DISTANCE;
use crate::{CoordinatorError, Result};

/// How texts are chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// BLIP's rule (arXiv 2201.12086, section 3.3): a text stays if the filter's ITM head takes it for a match, web and synthetic
    /// texts alike.
    #[default]
    Itm,
    /// The same by the filter's ITC: a text stays from `min_itc` on.
    Itc,
    /// BLIP-2's rule (arXiv 2301.12597, section 3.4): the texts of an image, web and synthetic, are ranked by score and the best
    /// `keep` stay.
    Rank,
}

/// A score of a text.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Cosine of image and text by the filter, or what `score.itc` says.
    #[default]
    Itc,
    /// Probability that image and text match, by the filter.
    Itm,
    /// Cosine of image and text by the run's CLIP model, as BLIP-2 does.
    Clip,
}

/// What a dataset version holds. All of it is part of the task's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuildConfig {
    /// How texts are chosen.
    pub policy: Policy,
    /// For `itm`: the least probability of a match, 0 to 1.
    pub min_itm: f64,
    /// For `itc`: the least ITC; a cosine, or with `score.itc = "standardized"` standard deviations above those of other images.
    #[serde(skip_serializing_if = "is_zero")]
    pub min_itc: f64,
    /// For `rank`: the score to rank by.
    pub rank_by: Score,
    /// For `rank`: texts kept of an image.
    pub keep: u64,
    /// The least width of the image as the server sent it, in pixels.
    pub min_width: u32,
    /// The least height of the image as the server sent it, in pixels.
    pub min_height: u32,
    /// Whether images that look the same count as duplicates, not only those with the same bytes. The held-out set is guarded
    /// against images that look the same in any case.
    pub perceptual: bool,
    /// Bits of the 64-bit perceptual hash in which images that look the same may differ; 0: none.
    pub max_phash_distance: u32,
    /// Whether human-annotated pairs are mixed in.
    pub human: bool,
    /// Texts in a `dataset` shard.
    pub shard_rows: usize,
}

/// What settings that no ITC is asked of leave out.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(least: &f64) -> bool {
    *least == 0.0
}

impl Default for BuildConfig {
    fn default() -> Self {
        Self {
            policy: Policy::Itm,
            min_itm: 0.5,
            min_itc: 0.0,
            rank_by: Score::Itc,
            keep: 2,
            min_width: 0,
            min_height: 0,
            perceptual: true,
            max_phash_distance: 4,
            human: true,
            shard_rows: 100_000,
        }
    }
}

impl BuildConfig {
    /// Refuses what cannot be meant.
    ///
    /// # Errors
    /// [`CoordinatorError::Setting`].
    pub fn validate(&self) -> Result<()> {
        let bad = |setting, problem: String| Err(CoordinatorError::Setting { setting, problem });
        if !(0.0..=1.0).contains(&self.min_itm) {
            return bad("build.min_itm", format!("is {}; a probability is from 0 to 1 (BLIP used 0.5)", self.min_itm));
        }
        if !self.min_itc.is_finite() {
            return bad("build.min_itc", format!("is {}; it is a number", self.min_itc));
        }
        if self.keep == 0 {
            return bad("build.keep", "is 0, which keeps nothing; use 1 or more (BLIP-2 kept 2)".to_owned());
        }
        if self.max_phash_distance > MAX_DISTANCE {
            let problem = format!("is {}; beyond {MAX_DISTANCE} of 64 bits unlike images collide", self.max_phash_distance);
            return bad("build.max_phash_distance", problem);
        }
        if self.shard_rows == 0 {
            return bad("build.shard_rows", "is 0; use 1 or more (100000 is usual)".to_owned());
        }
        Ok(())
    }
}
