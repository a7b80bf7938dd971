//! When to train, and when the new model is better.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The role that writes synthetic captions.
pub const CAPTIONER: &str = "captioner";
/// The role that judges texts.
pub const FILTER: &str = "filter";

/// `[retrain]`: whether a new dataset version leads to new models.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrainConfig {
    /// Whether to train at all.
    pub enabled: bool,
    /// A dataset version with fewer rows than this is not trained on.
    pub min_pairs: u64,
    /// The metric that decides for a role; larger is better. A role that is not named keeps its default.
    pub metric: BTreeMap<String, String>,
    /// How much larger the challenger's metric must be.
    pub min_gain: f64,
}

impl Default for RetrainConfig {
    fn default() -> Self {
        Self { enabled: false, min_pairs: 1_000, metric: BTreeMap::new(), min_gain: 0.0 }
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

    pub(crate) const fn wanted(&self, rows: u64) -> bool {
        self.enabled && rows >= self.min_pairs
    }

    /// Whether the challenger wins a role. A metric that is missing on either side, or not a number, never does.
    pub(crate) fn is_better(&self, role: &str, champion: &BTreeMap<String, f64>, challenger: &BTreeMap<String, f64>) -> bool {
        let Some(metric) = self.metric(role) else { return false };
        match (champion.get(metric), challenger.get(metric)) {
            (Some(now), Some(new)) => *new > now + self.min_gain,
            _ => false,
        }
    }

    /// Why a promotion was made, for the registry.
    pub(crate) fn reason(&self, role: &str, champion: &BTreeMap<String, f64>, challenger: &BTreeMap<String, f64>) -> String {
        let metric = self.metric(role).unwrap_or_default();
        let value = |m: &BTreeMap<String, f64>| m.get(metric).copied().unwrap_or(f64::NAN);
        format!("{metric} {:.4} instead of {:.4}", value(challenger), value(champion))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_larger_known_metric_wins() {
        let config = RetrainConfig { min_gain: 0.01, ..RetrainConfig::default() };
        let m = |v: f64| BTreeMap::from([("filter/auroc".to_owned(), v)]);
        assert!(config.is_better(FILTER, &m(0.70), &m(0.72)));
        assert!(!config.is_better(FILTER, &m(0.70), &m(0.705)));
        assert!(!config.is_better(FILTER, &m(0.70), &m(f64::NAN)));
        assert!(!config.is_better(FILTER, &m(0.70), &BTreeMap::new()));
        assert!(!config.is_better(CAPTIONER, &m(0.1), &m(0.9)));
        // One role's metric set leaves the other's as it was.
        let metric = BTreeMap::from([(CAPTIONER.to_owned(), "captioner/bleu_4".to_owned())]);
        assert!(RetrainConfig { metric, ..RetrainConfig::default() }.is_better(FILTER, &m(0.70), &m(0.72)));
        assert!(!RetrainConfig::default().wanted(5_000));
    }
}
