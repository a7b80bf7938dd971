//! Training of a MED by the three losses of BLIP and of a CLIP by its own: an optimiser with public state, and steps that resume bit for bit.
//!
//! A [`Trainer`] takes batches of [`Example`]s, [`Prepared`], and changes weights. It never knows where examples come from or how many there
//! are. Every random choice (fresh weights, augmentation, hard negatives) is keyed by the seed and by what it is for, so a run depends on
//! its inputs alone, and a run that was stopped and resumed ends in the same bytes.

mod augment;
mod clip;
mod feature_maps;
mod groups;
mod losses;
mod med;
mod momentum;
mod optimizer;
mod prepare;
mod recipe;
mod schedule;
mod state;
#[cfg(test)]
mod tests;
mod trainer;
mod words;

pub use augment::{Augmentation, shrink};
pub use feature_maps::FeatureMaps;
pub use optimizer::{AdamW, AdamWConfig};
pub use prepare::{Example, Prepared, Preparer};
pub use recipe::{Recipe, Role, StoredDType};
pub use schedule::Schedule;
pub use trainer::{Architecture, Losses, Pretrained, StepReport, Trainer};
