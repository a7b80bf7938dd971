//! Scores of texts against images.

use capfilt_models::ModelError;
use capfilt_models::med::Parts;
use capfilt_models::preprocess::Pixels;
use capfilt_models::score::{FilterScorer, ItmToken, ScoredText};

use crate::fixture::{CAPTIONS, images, med, tokenizer};

fn scorer(token: ItmToken) -> FilterScorer {
    FilterScorer::new(med(Parts::FILTER), tokenizer(), token).unwrap()
}

/// Different numbers of texts per image, one image without any.
fn texts() -> Vec<Vec<&'static str>> {
    let long = "a man and a woman and two dogs and a cat and a bus and a bowl of apples on the wet street in the rain";
    vec![vec![CAPTIONS[0], "dog", long], vec![], vec![CAPTIONS[1]], vec!["", CAPTIONS[2], CAPTIONS[3], "cat"]]
}

#[test]
fn a_score_does_not_depend_on_its_batch() {
    let scorer = scorer(ItmToken::Enc);
    let (images, texts) = (images(4), texts());
    let batch = scorer.score(&images, &texts).unwrap();
    assert_eq!(batch.iter().map(Vec::len).collect::<Vec<_>>(), [3, 0, 1, 4]);
    for (i, list) in texts.iter().enumerate() {
        for (j, text) in list.iter().enumerate() {
            let alone = scorer.score(&images[i..=i], &[vec![*text]]).unwrap();
            assert_eq!(alone, [vec![batch[i][j]]], "text {j} of image {i}");
        }
    }
    let distinct: std::collections::BTreeSet<u32> = batch.iter().flatten().map(|score| score.itm.to_bits()).collect();
    assert_eq!(distinct.len(), 8, "every pair has a score of its own");
    let softmax = |s: &ScoredText| 1.0 / (1.0 + (s.logits[0] - s.logits[1]).exp());
    assert!(batch.iter().flatten().all(|score| (softmax(score) - score.itm).abs() < 1e-6));
    let in_range = |s: &ScoredText| (0.0..=1.0).contains(&s.itm) && (-1.0..=1.0).contains(&s.itc);
    assert!(batch.iter().flatten().all(in_range));
}

#[test]
fn texts_are_cleaned_before_scoring() {
    let scorer = scorer(ItmToken::Enc);
    let scores =
        scorer.score(&images(1), &[vec!["two dogs and a cat", "Two DOGS,\n and a (cat)!!!", "two dogs and a bus"]]).unwrap();
    let [plain, shouted, other] = scores[0][..] else { panic!("three scores") };
    assert_ne!(plain, other);
    // The comma is a token of its own; everything else is cleaned away.
    assert_ne!(plain, shouted);
    let scores = scorer.score(&images(1), &[vec!["Two DOGS\n and a (cat)!!!"]]).unwrap();
    assert_eq!(scores[0][0], plain);
}

#[test]
fn the_first_token_changes_the_match_and_not_the_cosine() {
    let texts = [vec![CAPTIONS[0], CAPTIONS[1]]];
    let enc = scorer(ItmToken::Enc).score(&images(1), &texts).unwrap();
    let cls = scorer(ItmToken::Cls).score(&images(1), &texts).unwrap();
    for (enc, cls) in enc[0].iter().zip(&cls[0]) {
        assert_eq!(enc.itc, cls.itc);
        assert_ne!(enc.itm, cls.itm);
    }
}

#[test]
fn impossible_calls_are_refused() {
    let captioner = FilterScorer::new(med(Parts::CAPTIONER), tokenizer(), ItmToken::Enc).unwrap_err();
    assert!(matches!(captioner, ModelError::MissingPart { missing: "text_encoder", .. }));
    let scorer = scorer(ItmToken::Enc);
    assert!(scorer.score(&images(2), &[vec!["one list"]]).is_err());
    let small = Pixels::new(16, vec![0.0; 3 * 16 * 16]).unwrap();
    assert!(scorer.score(&[small], &[vec!["a dog"]]).is_err());
}
