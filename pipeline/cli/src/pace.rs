//! How fast something goes, and how long it will take.

use std::time::Duration;

use crate::output::duration;

/// How fast something goes.
pub(crate) struct Pace {
    /// Units a second.
    rate: f64,
    /// Seconds until it is over.
    pub(crate) left: u64,
}

impl Pace {
    /// Nothing is left.
    pub(crate) const OVER: Self = Self { rate: 0.0, left: 0 };

    /// That of `done` units of `of` in some time; none while it cannot be told.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a few digits are shown"
    )]
    pub(crate) fn of(elapsed: Duration, done: u64, of: u64) -> Option<Self> {
        let rate = done as f64 / elapsed.as_secs_f64();
        (elapsed > Duration::from_millis(500) && done > 0)
            .then(|| Self { rate, left: (of.saturating_sub(done) as f64 / rate) as u64 })
    }

    pub(crate) fn words(&self) -> String {
        format!("{:.1}/s, {} left", self.rate, duration(self.left))
    }
}
