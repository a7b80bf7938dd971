//! Caption metrics against pycocoevalcap's own figures (`tests/goldens/make_caption_goldens.py`), to 1e-6.

use capfilt_trainer::metrics::{CaptionCase, bleu, bleu_counts, cider_d, rouge_l};
use serde::Deserialize;

const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct Goldens {
    cases: Vec<Case>,
    bleu: Vec<f64>,
    cider_d: f64,
    cider_d_each: Vec<f64>,
    rouge_l: f64,
    rouge_l_each: Vec<f64>,
}

#[derive(Deserialize)]
struct Case {
    candidate: String,
    references: Vec<String>,
}

fn goldens() -> (Goldens, Vec<CaptionCase>) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/caption_metrics.json");
    let goldens: Goldens = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = goldens
        .cases
        .iter()
        .map(|case| CaptionCase::from_tokenized(case.candidate.clone(), case.references.clone()).unwrap())
        .collect();
    (goldens, cases)
}

fn assert_close(name: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() < TOLERANCE, "{name} {index}: {got} is not {expected}");
    }
}

#[test]
fn bleu_equals_the_reference() {
    let (goldens, cases) = goldens();
    let counts: Vec<_> = cases.iter().map(bleu_counts).collect();
    assert_close("bleu", &bleu(&counts, &vec![1.0; counts.len()]).unwrap(), &goldens.bleu);
    // A weight counts as so many captions.
    let (twice, weights) = ([&counts[..], &counts[..1]].concat(), [vec![2.0], vec![1.0; counts.len() - 1]].concat());
    let whole = bleu(&twice, &vec![1.0; twice.len()]).unwrap();
    assert_close("weighted bleu", &bleu(&counts, &weights).unwrap(), &whole);
}

#[test]
fn cider_d_equals_the_reference_for_every_caption() {
    let (goldens, cases) = goldens();
    let each = cider_d(&cases);
    assert_close("cider-d", &each, &goldens.cider_d_each);
    assert_close("mean cider-d", &[each.iter().sum::<f64>() / each.len() as f64], &[goldens.cider_d]);
}

#[test]
fn rouge_l_equals_the_reference_for_every_caption() {
    let (goldens, cases) = goldens();
    let each = rouge_l(&cases);
    assert_close("rouge-l", &each, &goldens.rouge_l_each);
    assert_close("mean rouge-l", &[each.iter().sum::<f64>() / each.len() as f64], &[goldens.rouge_l]);
}

#[test]
fn an_empty_set_scores_nothing() {
    assert_eq!(bleu(&[], &[]), None);
    assert!(cider_d(&[]).is_empty());
    assert!(rouge_l(&[]).is_empty());
}
