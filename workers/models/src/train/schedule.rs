//! The learning rate over a run: linear warm-up, then a cosine (BLIP's fine-tuning schedule with ALBEF's warm-up).

use crate::error::{ModelError, Result};

/// Learning rate as a function of the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Rate at the end of the warm-up.
    pub peak: f64,
    /// Rate that the warm-up starts from and the cosine ends at.
    pub floor: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// Checks the settings against each other.
    ///
    /// # Errors
    ///
    /// A rate that is not a positive number, a floor above the peak, or a warm-up longer than the run.
    pub fn check(&self) -> Result<()> {
        if !(self.peak.is_finite() && self.peak > 0.0 && self.floor >= 0.0 && self.floor <= self.peak) {
            return Err(ModelError::Config(format!(
                "learning rates must satisfy 0 <= floor <= peak, got floor {} and peak {}",
                self.floor, self.peak
            )));
        }
        if self.warmup_steps >= self.steps {
            return Err(ModelError::Config(format!(
                "a warm-up of {} steps does not fit a run of {}",
                self.warmup_steps, self.steps
            )));
        }
        Ok(())
    }

    /// The rate of step `step`, counted from 0; the floor after the last step.
    #[must_use]
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            let share = (step + 1) as f64 / self.warmup_steps as f64;
            return self.floor + (self.peak - self.floor) * share;
        }
        let after = (self.steps - self.warmup_steps).max(1) as f64;
        let share = ((step - self.warmup_steps) as f64 / after).min(1.0);
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: Schedule = Schedule { peak: 1.0, floor: 0.1, warmup_steps: 10, steps: 110 };

    #[test]
    fn rises_to_the_peak_and_falls_to_the_floor() {
        assert!((SCHEDULE.rate(0) - 0.19).abs() < 1e-12);
        assert_eq!(SCHEDULE.rate(9), 1.0);
        assert_eq!(SCHEDULE.rate(10), 1.0);
        assert!((SCHEDULE.rate(60) - 0.55).abs() < 1e-12);
        assert!((SCHEDULE.rate(110) - 0.1).abs() < 1e-12);
        assert!((SCHEDULE.rate(500) - 0.1).abs() < 1e-12);
        let falling: Vec<f64> = (10..110).map(|step| SCHEDULE.rate(step)).collect();
        assert!(falling.windows(2).all(|pair| pair[1] <= pair[0]));
    }

    #[test]
    fn no_warmup_starts_at_the_peak() {
        let schedule = Schedule { warmup_steps: 0, ..SCHEDULE };
        assert_eq!(schedule.rate(0), 1.0);
    }

    #[test]
    fn impossible_settings_are_refused() {
        assert!(SCHEDULE.check().is_ok());
        assert!(Schedule { floor: 2.0, ..SCHEDULE }.check().is_err());
        assert!(Schedule { peak: f64::NAN, ..SCHEDULE }.check().is_err());
        assert!(Schedule { peak: 0.0, floor: 0.0, ..SCHEDULE }.check().is_err());
        assert!(Schedule { warmup_steps: 110, ..SCHEDULE }.check().is_err());
    }
}
