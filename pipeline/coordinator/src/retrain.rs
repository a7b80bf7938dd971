//! When to train, and when the new model is better.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The role that writes synthetic captions.
pub const CAPTIONER: &str = "captioner";
/// The role that judges texts.
pub const FILTER: &str = "filter";
/// A model that plays no role: how well one is that was trained on a version measures the version.
pub const CLIP: &str = "clip";
/// What a model is trained as that captioner and filter can both start from.
pub const MED: &str = "med";

/// `[retrain]`: whether a new dataset version leads to new models.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrainConfig {
    /// Whether to train at all.
    pub enabled: bool,
    /// A dataset version with fewer rows than this is not trained on.
    pub min_pairs: u64,
    /// Nor one that is not so many rows larger than the version on which the captioner in service was trained; all rows are new to a model that was
    /// not trained here. First models are trained on any.
    pub min_new_pairs: u64,
    /// But one is trained on all the same that was built so many days after that captioner was trained; without it, age is no reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age_days: Option<f64>,
    /// The metric that decides for a role; larger is better. A role that is not named keeps its default.
    pub metric: BTreeMap<String, String>,
    /// How much larger the challenger's metric must be.
    pub min_gain: f64,
    /// How sure of that a promotion must be: the share of draws of held-out images, with replacement, in which it is so. 0 looks at the
    /// metrics alone.
    pub confidence: f64,
}

/// Metrics of models on held-out pairs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// By name.
    pub values: BTreeMap<String, f64>,
    /// Of the same pairs drawn again; draw `i` is the same for all models.
    pub resampled: BTreeMap<String, Vec<f64>>,
}

/// What a model in service was trained on, and how long ago.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Rows of the version; 0 if the model was not trained here.
    pub(crate) rows: u64,
    /// From then until the version in question was built.
    pub(crate) age_ms: u64,
}

const MS_PER_DAY: f64 = 86_400_000.0;

/// What is measured of a model in a role on held-out pairs.
const METRICS: [(&str, &[&str]); 2] = [
    (CAPTIONER, &["cider_d", "bleu_4", "rouge_l"]),
    (FILTER, &["auroc", "auroc_itc", "precision", "recall", "tr_at_1", "tr_at_5", "tr_at_10", "ir_at_1", "ir_at_5", "ir_at_10"]),
];

/// Who plays a role from now on, and why.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) challenger_wins: bool,
    pub(crate) why: String,
}

impl Default for RetrainConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            min_pairs: 1_000,
            min_new_pairs: 0,
            max_age_days: None,
            metric: BTreeMap::new(),
            min_gain: 0.0,
            confidence: 0.95,
        }
    }
}

impl RetrainConfig {
    fn metric(&self, role: &str) -> Option<&str> {
        let default = match role {
            CAPTIONER => Some("captioner/cider_d"),
            FILTER => Some("filter/auroc"),
            _ => None,
        };
        self.metric.get(role).map(String::as_str).or(default)
    }

    /// Checks what serde cannot.
    ///
    /// # Errors
    /// The setting that makes no sense, and what to write.
    pub fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.confidence) {
            return Err(format!("retrain.confidence is {}; it is a share, 0 to 1", self.confidence));
        }
        if !self.min_gain.is_finite() {
            return Err(format!("retrain.min_gain is {}; it is a number", self.min_gain));
        }
        if let Some(days) = self.max_age_days.filter(|days| !(days.is_finite() && *days > 0.0)) {
            return Err(format!("retrain.max_age_days is {days}; it is a number of days above 0"));
        }
        for (role, metric) in &self.metric {
            let Some((_, known)) = METRICS.iter().find(|(known, _)| known == role) else {
                return Err(format!("retrain.metric.{role}: the roles are {CAPTIONER} and {FILTER}"));
            };
            if !metric.strip_prefix(role.as_str()).and_then(|name| name.strip_prefix('/')).is_some_and(|m| known.contains(&m)) {
                let known: Vec<String> = known.iter().map(|metric| format!("{role}/{metric}")).collect();
                return Err(format!("retrain.metric.{role} is \"{metric}\"; there are {}", known.join(", ")));
            }
        }
        Ok(())
    }

    /// Whether a version of `rows` rows is to be trained on, where the models in service have seen one, if there are any; or why not, if it is for its
    /// size and their age.
    pub(crate) fn wanted(&self, rows: u64, seen: Option<Seen>) -> Result<bool, String> {
        if !self.enabled {
            return Ok(false);
        }
        if rows < self.min_pairs {
            return Err(format!("{rows} pairs are fewer than retrain.min_pairs, {}", self.min_pairs));
        }
        let Some(seen) = seen else { return Ok(true) };
        let (new, days) = (rows.saturating_sub(seen.rows), seen.age_ms as f64 / MS_PER_DAY);
        if new >= self.min_new_pairs || self.max_age_days.is_some_and(|most| days >= most) {
            return Ok(true);
        }
        let age = |most| format!(", and {days:.1} days are less than retrain.max_age_days, {most}");
        let age = self.max_age_days.map_or_else(String::new, age);
        Err(format!("{new} pairs more than it was trained on are fewer than retrain.min_new_pairs, {}{age}", self.min_new_pairs))
    }

    /// Whether the challenger wins a role. A metric that is missing on either side, or not a number, never does.
    pub(crate) fn verdict(&self, role: &str, champion: &Measured, challenger: &Measured) -> Verdict {
        let lost = |why: String| Verdict { challenger_wins: false, why };
        let Some(metric) = self.metric(role) else { return lost(format!("no metric decides for {role}")) };
        let (Some(now), Some(new)) = (champion.values.get(metric), challenger.values.get(metric)) else {
            return lost(format!("{metric} was not measured"));
        };
        let mut why = format!("{metric} {new:.4} instead of {now:.4}");
        let gain = new - now;
        if gain.is_nan() || gain <= self.min_gain {
            return lost(why);
        }
        let draws = |measured: &Measured| measured.resampled.get(metric).cloned().unwrap_or_default();
        let gains: Vec<f64> = draws(champion).iter().zip(draws(challenger)).map(|(now, new)| new - now).collect();
        if self.confidence <= 0.0 {
            return Verdict { challenger_wins: true, why };
        }
        if gains.is_empty() {
            return lost(format!("{why}, without draws that tell how sure that is"));
        }
        let share = gains.iter().filter(|gain| **gain > self.min_gain).count() as f64 / gains.len() as f64;
        let gain = if self.min_gain > 0.0 { format!("a gain of {}", self.min_gain) } else { "a gain".to_owned() };
        why = format!("{why}, {gain} in {:.1} % of {} draws of the held-out images", 100.0 * share, gains.len());
        Verdict { challenger_wins: share >= self.confidence, why }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(value: f64, resampled: &[f64]) -> Measured {
        let name = "filter/auroc".to_owned();
        Measured { values: BTreeMap::from([(name.clone(), value)]), resampled: BTreeMap::from([(name, resampled.to_vec())]) }
    }

    #[test]
    fn only_a_larger_known_metric_wins() {
        let config = RetrainConfig { min_gain: 0.01, confidence: 0.0, ..RetrainConfig::default() };
        let m = |v: f64| measured(v, &[]);
        let wins = |role: &str, now: &Measured, new: &Measured| config.verdict(role, now, new).challenger_wins;
        assert!(wins(FILTER, &m(0.70), &m(0.72)));
        assert!(!wins(FILTER, &m(0.70), &m(0.705)));
        assert!(!wins(FILTER, &m(0.70), &m(f64::NAN)));
        assert!(!wins(FILTER, &m(0.70), &Measured::default()));
        assert!(!wins(CAPTIONER, &m(0.1), &m(0.9)));
        // One role's metric set leaves the other's as it was.
        let metric = BTreeMap::from([(CAPTIONER.to_owned(), "captioner/bleu_4".to_owned())]);
        assert!(
            RetrainConfig { metric, confidence: 0.0, ..RetrainConfig::default() }
                .verdict(FILTER, &m(0.70), &m(0.72))
                .challenger_wins
        );
    }

    #[test]
    fn a_version_is_trained_on_for_its_size_or_the_age_of_the_models() {
        let seen = |rows, days| Some(Seen { rows, age_ms: days * MS_PER_DAY as u64 });
        assert_eq!(RetrainConfig::default().wanted(5_000, seen(0, 0)), Ok(false));
        let config = RetrainConfig { enabled: true, min_pairs: 100, min_new_pairs: 10, ..RetrainConfig::default() };
        assert_eq!(config.wanted(100, seen(90, 0)), Ok(true));
        assert!(config.wanted(99, seen(0, 0)).is_err_and(|why| why.contains("min_pairs")));
        assert!(config.wanted(120, seen(111, 1000)).is_err_and(|why| why.contains("min_new_pairs")));
        assert!(config.wanted(120, seen(200, 0)).is_err());
        let choosy = RetrainConfig { min_new_pairs: 1_000, ..config.clone() };
        assert_eq!(choosy.wanted(120, None), Ok(true), "first models have seen none");
        let config = RetrainConfig { max_age_days: Some(7.0), ..config };
        assert_eq!(config.wanted(120, seen(111, 7)), Ok(true));
        assert!(
            config.wanted(120, seen(111, 6)).is_err_and(|why| why.contains("6.0 days are less than retrain.max_age_days, 7"))
        );
        assert!(config.wanted(99, seen(0, 7)).is_err());
    }

    #[test]
    fn a_gain_within_the_noise_does_not_win() {
        let champion = measured(0.70, &[0.66, 0.70, 0.74, 0.70]);
        // Paired: better in every draw, though the draws of both overlap.
        let better = measured(0.72, &[0.67, 0.71, 0.75, 0.73]);
        let luckier = measured(0.72, &[0.80, 0.69, 0.73, 0.75]);
        let config = RetrainConfig::default();
        assert!(config.verdict(FILTER, &champion, &better).challenger_wins);
        let verdict = config.verdict(FILTER, &champion, &luckier);
        assert!(!verdict.challenger_wins && verdict.why.contains("50.0 % of 4 draws"), "{}", verdict.why);
        assert!(RetrainConfig { confidence: 0.5, ..config.clone() }.verdict(FILTER, &champion, &luckier).challenger_wins);
        assert!(!config.verdict(FILTER, &measured(0.70, &[]), &luckier).challenger_wins, "nobody knows how sure it is");
        assert!(RetrainConfig { confidence: 0.0, ..config }.verdict(FILTER, &champion, &luckier).challenger_wins);
    }

    #[test]
    fn settings_that_could_never_promote_are_refused() {
        let with = |role: &str, metric: &str| RetrainConfig {
            metric: BTreeMap::from([(role.to_owned(), metric.to_owned())]),
            ..RetrainConfig::default()
        };
        assert_eq!(with(FILTER, "filter/auroc_itc").check(), Ok(()));
        assert!(with(FILTER, "filter/aurco").check().is_err_and(|why| why.contains("filter/auroc, ")));
        assert!(with(FILTER, "captioner/cider_d").check().is_err());
        assert!(with("clip", "clip/auroc").check().is_err_and(|why| why.contains("the roles are")));
        for bad in [f64::NAN, f64::INFINITY] {
            assert!(RetrainConfig { min_gain: bad, ..RetrainConfig::default() }.check().is_err());
        }
    }
}
