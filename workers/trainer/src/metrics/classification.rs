//! How well a score tells right pairs from wrong ones.

/// Area under the ROC curve of `scores` for `labels` (true = should score high): the probability that a right pair outranks a wrong
/// one, ties counting one half. `None` when one of the two classes is empty or a score is NaN.
///
/// # Panics
///
/// When the two slices differ in length.
pub fn auroc(scores: &[f32], labels: &[bool]) -> Option<f64> {
    assert_eq!(scores.len(), labels.len(), "one label for each score");
    let positives = labels.iter().filter(|&&label| label).count();
    let negatives = labels.len() - positives;
    if positives == 0 || negatives == 0 || scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));

    // Sum of the positives' ranks, where equal scores share the mean of their ranks (Mann-Whitney U).
    let mut rank_sum = 0.0;
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && scores[order[end]] == scores[order[start]] {
            end += 1;
        }
        let mean_rank = (start + 1 + end) as f64 / 2.0;
        let right = order[start..end].iter().filter(|&&index| labels[index]).count();
        rank_sum += mean_rank * right as f64;
        start = end;
    }
    let (positives, negatives) = (positives as f64, negatives as f64);
    Some((rank_sum - positives * (positives + 1.0) / 2.0) / (positives * negatives))
}

/// What a threshold does to right and wrong pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Confusion {
    /// Right pairs kept.
    pub kept_right: usize,
    /// Wrong pairs kept.
    pub kept_wrong: usize,
    /// Right pairs dropped.
    pub dropped_right: usize,
    /// Wrong pairs dropped.
    pub dropped_wrong: usize,
}

impl Confusion {
    /// Counts the pairs with `score >= threshold` as kept.
    pub fn at(threshold: f32, scores: &[f32], labels: &[bool]) -> Self {
        let mut counts = Self::default();
        for (score, label) in scores.iter().zip(labels) {
            let cell = match (*score >= threshold, *label) {
                (true, true) => &mut counts.kept_right,
                (true, false) => &mut counts.kept_wrong,
                (false, true) => &mut counts.dropped_right,
                (false, false) => &mut counts.dropped_wrong,
            };
            *cell += 1;
        }
        counts
    }

    /// Share of the kept pairs that are right; `None` when nothing was kept.
    pub fn precision(&self) -> Option<f64> {
        share(self.kept_right, self.kept_right + self.kept_wrong)
    }

    /// Share of the right pairs that were kept; `None` when there was none.
    pub fn recall(&self) -> Option<f64> {
        share(self.kept_right, self.kept_right + self.dropped_right)
    }
}

fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auroc_counts_ordered_pairs_and_halves_ties() {
        let labels = [true, true, false, false];
        assert_eq!(auroc(&[0.9, 0.8, 0.2, 0.1], &labels), Some(1.0));
        assert_eq!(auroc(&[0.1, 0.2, 0.8, 0.9], &labels), Some(0.0));
        assert_eq!(auroc(&[0.5; 4], &labels), Some(0.5));
        // Pairs: (0.7 > 0.5), (0.7 = 0.7), (0.5 = 0.5), (0.5 < 0.7) -> (1 + ½ + ½ + 0) / 4.
        assert_eq!(auroc(&[0.7, 0.5, 0.5, 0.7], &labels), Some(0.5));
        assert_eq!(auroc(&[0.7, 0.6, 0.5, 0.7], &labels), Some(2.5 / 4.0));
    }

    #[test]
    fn auroc_equals_the_definition_on_many_ties() {
        let scores: Vec<f32> = (0..60).map(|i| ((i * 7) % 11) as f32).collect();
        let labels: Vec<bool> = (0..60).map(|i| (i * 13) % 5 < 2).collect();
        let (mut won, mut pairs) = (0.0, 0.0);
        for (p, _) in labels.iter().enumerate().filter(|(_, label)| **label) {
            for (n, _) in labels.iter().enumerate().filter(|(_, label)| !**label) {
                pairs += 1.0;
                won += if scores[p] > scores[n] {
                    1.0
                } else if scores[p] == scores[n] {
                    0.5
                } else {
                    0.0
                };
            }
        }
        let got = auroc(&scores, &labels);
        assert!(got.is_some_and(|got| (got - won / pairs).abs() < 1e-12), "{got:?}");
    }

    #[test]
    fn auroc_of_one_class_or_nan_is_not_defined() {
        assert_eq!(auroc(&[0.5, 0.6], &[true, true]), None);
        assert_eq!(auroc(&[f32::NAN, 0.6], &[true, false]), None);
        assert_eq!(auroc(&[], &[]), None);
    }

    #[test]
    fn precision_and_recall_at_a_threshold() {
        let counts = Confusion::at(0.5, &[0.9, 0.5, 0.4, 0.6, 0.1], &[true, true, true, false, false]);
        assert_eq!(counts.precision(), Some(2.0 / 3.0));
        assert_eq!(counts.recall(), Some(2.0 / 3.0));
        assert_eq!(Confusion::at(2.0, &[0.9], &[true]).precision(), None);
        assert_eq!(Confusion::at(0.5, &[0.9], &[false]).recall(), None);
    }
}
