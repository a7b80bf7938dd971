//! Training of a MED: the three losses of BLIP, an optimiser with public state, and steps that resume bit for bit.
//!
//! A [`Trainer`] takes batches of [`Example`]s and changes weights. It never knows where examples come from or how many there are.
//! Every random choice (fresh weights, augmentation, hard negatives) is keyed by the seed and by what it is for, so a run depends on
//! its inputs alone, and a run that was stopped and resumed ends in the same bytes.

pub mod augment;
pub mod losses;
pub mod optimizer;
pub mod schedule;
mod state;
#[cfg(test)]
mod tests;
mod trainer;

pub use augment::{Augmentation, shrink};
pub use optimizer::{AdamW, AdamWConfig};
pub use schedule::Schedule;
pub use trainer::{Example, Losses, Precision, Recipe, Role, StepReport, Trainer};
