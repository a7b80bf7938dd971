//! What comes out does not depend on how rows were batched, and is what the models say when tried by hand.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::Float32Type;
use capfilt_models::ops::{Precision, multiplies};
use capfilt_schemas::{Digest, Table, column, fold};
use capfilt_vision::{
    CaptionConfig, CaptionStage, ImageCaptioner, ImageScorer, NumberType, Sampling, ScoreConfig, ScoreStage, Strategy,
    VisionWorkerConfig,
};
use serde_json::json;

use crate::fixture::{Place, beside, checkpoint, clip, image_files, other_filter, samples};

fn worker() -> VisionWorkerConfig {
    VisionWorkerConfig::default()
}

fn strategies() -> [Sampling; 3] {
    [
        Sampling { captions: 2, ..Sampling::default() },
        Sampling::new(Strategy::Greedy),
        Sampling { captions: 2, min_length: 0, ..Sampling::new(Strategy::Beam) },
    ]
}

fn statuses(rows: &RecordBatch) -> Vec<&str> {
    rows.column_by_name(column::STATUS).unwrap().as_string::<i32>().iter().flatten().collect()
}

#[tokio::test]
async fn captions_do_not_depend_on_batches() {
    let place = Place::new().await;
    let model = place.model(&checkpoint("captioner")).await;
    for sampling in strategies() {
        let config = CaptionConfig { seed: 3, sampling: sampling.clone(), dtype: None };
        let params = json!(config.params(&worker()));
        let stage = CaptionStage::new(worker());
        let all = place.run(&stage, params.clone(), model, &samples(), 64).await.unwrap();
        for at_once in [1, 4] {
            let again = place.run(&CaptionStage::new(worker()), params.clone(), model, &samples(), at_once).await.unwrap();
            assert_eq!(all, again, "{:?} in batches of {at_once}", sampling.strategy);
        }
        assert_eq!(statuses(&all), ["ok", "ok", "decode", "ok", "no_image", "ok", "ok", "ok", "ok"]);
        let captions = all.column(3).as_list::<i32>();
        for row in 0..all.num_rows() {
            let there = statuses(&all)[row] == "ok";
            assert_eq!(captions.value(row).len(), if there { sampling.captions } else { 0 }, "row {row}");
        }
    }
}

/// Samples beside two captions each, as the score stage gets them.
async fn captioned(place: &Place) -> RecordBatch {
    let model = place.model(&checkpoint("captioner")).await;
    let config = CaptionConfig { sampling: strategies()[0].clone(), ..CaptionConfig::default() };
    let stage = CaptionStage::new(worker());
    let captions = place.run(&stage, json!(config.params(&worker())), model, &samples(), 64).await.unwrap();
    let column: ArrayRef = Arc::clone(captions.column(3));
    beside(Some(&samples()), &[(column::CAPTIONS, column)])
}

#[tokio::test]
async fn scores_are_those_of_the_models_tried_by_hand() {
    let place = Place::new().await;
    let rows = captioned(&place).await;
    let folder = tempfile::tempdir().unwrap();
    clip(folder.path());
    let (filter, clip) = (place.model(&checkpoint("filter")).await, place.model(folder.path()).await);
    let config = ScoreConfig::default();
    let scored = async |clip: Option<Digest>, at_once: usize| {
        place.run(&ScoreStage::new(worker()), json!(config.params(&worker(), clip)), filter, &rows, at_once).await.unwrap()
    };
    let all = scored(Some(clip), 64).await;
    assert_eq!(all, scored(Some(clip), 2).await);

    let scorer = ImageScorer::open(&[folder.path(), &checkpoint("filter")], &config, &worker()).unwrap();
    let number = |name: &str, row: usize| {
        let column = all.column_by_name(name).unwrap().as_primitive::<Float32Type>();
        column.is_valid(row).then(|| column.value(row))
    };
    let numbers = |name: &str, row: usize| {
        all.column_by_name(name).unwrap().as_list::<i32>().value(row).as_primitive::<Float32Type>().values().to_vec()
    };
    let mut files = image_files().into_iter();
    for row in 0..rows.num_rows() {
        if statuses(&all)[row] != "ok" {
            assert_eq!((number(column::WEB_ITM, row), number(column::WEB_CLIP, row)), (None, None));
            assert!(all.column_by_name(column::SYNTHETIC_CLIP).unwrap().is_null(row));
            continue;
        }
        let captions = rows.column_by_name(column::CAPTIONS).unwrap().as_list::<i32>().value(row);
        let texts: Vec<String> = [format!("a picture, number {row}")]
            .into_iter()
            .chain(captions.as_string::<i32>().iter().flatten().map(str::to_owned))
            .collect();
        let by_hand = scorer.score(&[files.next().unwrap()], &texts).unwrap().remove(0).unwrap();
        assert_eq!((by_hand[0].itm, by_hand[0].itc), (number(column::WEB_ITM, row), number(column::WEB_ITC, row)));
        assert_eq!(by_hand[0].clip, number(column::WEB_CLIP, row));
        let of_captions: Vec<f32> = by_hand[1..].iter().filter_map(|scores| scores.clip).collect();
        assert_eq!(of_captions, numbers(column::SYNTHETIC_CLIP, row));
        for scores in by_hand {
            let [apart, together] = scores.itm_logits.unwrap();
            assert!((scores.itm.unwrap() - 1.0 / (1.0 + (apart - together).exp())).abs() < 1e-6);
            let cosine = scores.clip.unwrap();
            assert!((-1.0..=1.0).contains(&cosine));
            assert_eq!(scores.clip_score, Some(2.5 * cosine.max(0.0)));
        }
    }

    // Without a CLIP its columns hold nothing, and the filter's are the same.
    let alone = scored(None, 64).await;
    assert_eq!(alone.columns()[..7], all.columns()[..7]);
    let optional = Table::Scores.optional().iter().map(|name| alone.column_by_name(name).unwrap());
    assert!(optional.clone().count() == 2 && optional.clone().all(|column| column.null_count() == alone.num_rows()));
}

#[tokio::test]
async fn each_member_of_a_filter_judges_its_fold() {
    let place = Place::new().await;
    let rows = captioned(&place).await;
    let other = tempfile::tempdir().unwrap();
    other_filter(other.path());
    let params = json!(ScoreConfig::default().params(&worker(), None));
    let scored = async |members: &[&std::path::Path], at_once: usize| {
        let model = place.members(members).await;
        place.run(&ScoreStage::new(worker()), params.clone(), model, &rows, at_once).await.unwrap()
    };
    let filter = checkpoint("filter");
    let both = scored(&[&filter, other.path()], 64).await;
    assert_eq!(both, scored(&[&filter, other.path()], 2).await);
    let alone = [scored(&[&filter], 64).await, scored(&[other.path()], 64).await];
    let mut seen = [0; 2];
    for row in 0..rows.num_rows() {
        let member = fold(&format!("sample-{row}"), 2, 0);
        assert_eq!(both.slice(row, 1), alone[member].slice(row, 1), "row {row}");
        seen[member] += usize::from(alone[0].slice(row, 1) != alone[1].slice(row, 1));
    }
    assert!(seen.iter().all(|rows| *rows > 0), "{seen:?}");

    // Two splits: the mean of what the members say that have not seen the row, one of each.
    let four = scored(&[&filter, other.path(), other.path(), &filter], 64).await;
    let itm = |scores: &RecordBatch, row: usize| scores["web_itm"].as_primitive::<Float32Type>().value(row);
    for row in 0..rows.num_rows() {
        let id = format!("sample-{row}");
        let [first, second] = [fold(&id, 2, 0), 1 - fold(&id, 2, 1)];
        let mean = 0.5 * itm(&alone[first], row) + 0.5 * itm(&alone[second], row);
        assert!((itm(&four, row) - mean).abs() < 1e-6, "row {row}");
    }
    assert_ne!(
        (0..64).map(|i| fold(&format!("{i}"), 2, 0)).collect::<Vec<_>>(),
        (0..64).map(|i| fold(&format!("{i}"), 2, 1)).collect::<Vec<_>>()
    );
}

#[tokio::test]
async fn a_caption_tried_by_hand_is_keyed_by_its_key_alone() {
    let config = CaptionConfig { seed: 3, sampling: strategies()[0].clone(), dtype: None };
    let captioner = ImageCaptioner::open(&checkpoint("captioner"), &config, &worker()).unwrap();
    let files: Vec<(Vec<u8>, String)> = image_files().into_iter().map(|bytes| (bytes, "a key".to_owned())).collect();
    let mut with_bad = files.clone();
    with_bad.insert(1, (b"GIF89a, and nothing more".to_vec(), "a key".to_owned()));
    let all = captioner.write(&with_bad).unwrap();
    assert!(all[1].is_err() && all.iter().filter(|answer| answer.is_err()).count() == 1);
    let alone = captioner.write(&files[3..4]).unwrap();
    assert_eq!(alone[0], all[4]);
    let captions = all[0].as_ref().unwrap();
    assert!(captions.len() == 2 && captions.iter().all(|caption| !caption.text.is_empty() && caption.score.is_none()));
}

#[tokio::test]
async fn fewer_digits_change_the_numbers_but_little() {
    let score = |dtype| {
        let config = ScoreConfig { dtype: Some(dtype), ..ScoreConfig::default() };
        let scorer = ImageScorer::open(&[checkpoint("filter")], &config, &worker()).map_err(|e| e.to_string())?;
        Ok::<_, String>(scorer.score(&image_files()[..1], &["a picture of a dog".to_owned()]).unwrap().remove(0).unwrap()[0])
    };
    let full = score(NumberType::F32).unwrap();
    assert!(score(NumberType::F16).unwrap_err().contains("for GPUs"));
    let fewer = [
        (NumberType::Bf16x3, Precision::Bf16x3, 1e-4),
        (NumberType::Bf16, Precision::Bf16, 0.05),
        (NumberType::Int8, Precision::Int8, 0.05),
    ];
    for (dtype, precision, most) in fewer {
        match score(dtype) {
            Ok(half) => {
                let difference = (half.itm.unwrap() - full.itm.unwrap()).abs();
                assert!(difference > 0.0 && difference < most, "{dtype:?}: {half:?} for {full:?}");
            }
            // Another type than the named one is never computed in.
            Err(refused) => assert!(!multiplies(precision) && refused.contains("use f32"), "{dtype:?}: {refused}"),
        }
    }
}

#[tokio::test]
async fn models_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    clip(folder.path());
    let caption =
        |folder: &std::path::Path| ImageCaptioner::open(folder, &CaptionConfig::default(), &worker()).err().unwrap().to_string();
    assert!(caption(&checkpoint("filter")).contains("text_decoder"));
    assert!(caption(folder.path()).contains("decoder"));
    let score =
        |folders: &[&std::path::Path]| ImageScorer::open(folders, &ScoreConfig::default(), &worker()).err().unwrap().to_string();
    assert!(score(&[&checkpoint("captioner")]).contains("text_encoder"));
    assert!(score(&[&checkpoint("filter"), &checkpoint("filter")]).contains("one of each kind"));
    assert!(capfilt_vision::check_checkpoint(folder.path(), Some("clip")).is_ok());
    let other = capfilt_vision::check_checkpoint(folder.path(), Some("filter")).unwrap_err().to_string();
    assert!(other.contains("CLIP"), "{other}");
    assert!(capfilt_vision::check_checkpoint(&checkpoint("filter"), Some("clip")).is_err());
}
