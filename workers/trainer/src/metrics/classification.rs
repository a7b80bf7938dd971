//! How well a score tells right pairs from wrong ones.

/// Area under the ROC curve of `scores` for `labels` (true = should score high): the probability that a right pair outranks a wrong
/// one, ties counting one half. Each pair counts as often as its weight says. `None` when one of the two classes is empty or a score is
/// NaN.
///
/// # Panics
///
/// When the slices differ in length.
pub fn auroc(scores: &[f32], labels: &[bool], weights: &[f64]) -> Option<f64> {
    assert!(scores.len() == labels.len() && scores.len() == weights.len(), "one label and one weight for each score");
    if scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));

    // Wrong pairs below each right one, equal scores counting half (Mann-Whitney U).
    let (mut won, mut rights, mut wrongs) = (0.0, 0.0, 0.0);
    for equal in order.chunk_by(|&a, &b| scores[a] == scores[b]) {
        let of = |label: bool| equal.iter().filter(|&&index| labels[index] == label).map(|&index| weights[index]).sum::<f64>();
        let (right, wrong) = (of(true), of(false));
        won += right * (wrongs + 0.5 * wrong);
        rights += right;
        wrongs += wrong;
    }
    (rights > 0.0 && wrongs > 0.0).then(|| won / (rights * wrongs))
}

/// What a threshold does to right and wrong pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Confusion {
    /// Right pairs kept.
    pub kept_right: f64,
    /// Wrong pairs kept.
    pub kept_wrong: f64,
    /// Right pairs dropped.
    pub dropped_right: f64,
    /// Wrong pairs dropped.
    pub dropped_wrong: f64,
}

impl Confusion {
    /// Counts the pairs with `score >= threshold` as kept, each as often as its weight says.
    pub fn at(threshold: f32, scores: &[f32], labels: &[bool], weights: &[f64]) -> Self {
        let mut counts = Self::default();
        for ((score, label), weight) in scores.iter().zip(labels).zip(weights) {
            let cell = match (*score >= threshold, *label) {
                (true, true) => &mut counts.kept_right,
                (true, false) => &mut counts.kept_wrong,
                (false, true) => &mut counts.dropped_right,
                (false, false) => &mut counts.dropped_wrong,
            };
            *cell += weight;
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

fn share(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auroc(scores: &[f32], labels: &[bool]) -> Option<f64> {
        super::auroc(scores, labels, &vec![1.0; scores.len()])
    }

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
    fn a_weight_counts_as_so_many_pairs() {
        let (scores, labels, weights) = ([0.9, 0.4, 0.4, 0.7], [true, true, false, false], [2.0, 1.0, 3.0, 0.0]);
        let (mut many, mut of_many) = (Vec::new(), Vec::new());
        for (i, weight) in weights.iter().enumerate() {
            many.extend(std::iter::repeat_n(scores[i], *weight as usize));
            of_many.extend(std::iter::repeat_n(labels[i], *weight as usize));
        }
        assert_eq!(super::auroc(&scores, &labels, &weights), auroc(&many, &of_many));
        let ones = vec![1.0; many.len()];
        assert_eq!(Confusion::at(0.5, &scores, &labels, &weights), Confusion::at(0.5, &many, &of_many, &ones));
    }

    #[test]
    fn precision_and_recall_at_a_threshold() {
        let counts = Confusion::at(0.5, &[0.9, 0.5, 0.4, 0.6, 0.1], &[true, true, true, false, false], &[1.0; 5]);
        assert_eq!(counts.precision(), Some(2.0 / 3.0));
        assert_eq!(counts.recall(), Some(2.0 / 3.0));
        assert_eq!(Confusion::at(2.0, &[0.9], &[true], &[1.0]).precision(), None);
        assert_eq!(Confusion::at(0.5, &[0.9], &[false], &[1.0]).recall(), None);
    }
}
