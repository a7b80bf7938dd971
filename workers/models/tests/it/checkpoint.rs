//! Checkpoints on disk, whole and broken.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::error::TensorProblem;
use capfilt_models::med::Parts;
use capfilt_models::parameters::fresh_tensors;
use capfilt_models::preprocess::{Pixels, Preprocessor};
use capfilt_models::{ModelError, med::Med};
use tempfile::TempDir;

use crate::fixture::{config, difference, goldens, images, tokenizer_json};

const DENSE: &str = "text_encoder.encoder.layer.1.output.dense.weight";

fn fresh(parts: Parts) -> BTreeMap<String, Tensor> {
    fresh_tensors(&config(), parts, 5, &Device::Cpu).unwrap()
}

fn save(dir: &Path, tensors: &BTreeMap<String, Tensor>, dtype: DType) -> capfilt_models::Result<Checkpoint> {
    Checkpoint::save(dir, &config(), tensors, dtype, &tokenizer_json(), &Preprocessor::new(config().vision_config.image_size))
}

fn states(med: &Med) -> Tensor {
    med.encode_image(&Pixels::stack(&images(1), &Device::Cpu).unwrap()).unwrap()
}

/// What is wrong with a checkpoint whose tensors were changed so.
fn broken(change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> (Vec<TensorProblem>, String) {
    let dir = TempDir::new().unwrap();
    let mut tensors = fresh(Parts::FILTER);
    change(&mut tensors);
    let error = save(dir.path(), &tensors, DType::F32).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("model.safetensors") && !error.is_retryable(), "{text}");
    match error {
        ModelError::Tensors { problems, .. } => (problems.0, text),
        other => panic!("{other}"),
    }
}

#[test]
fn what_was_saved_is_opened_again() {
    for parts in [Parts::CAPTIONER, Parts::FILTER, Parts::FULL] {
        let dir = TempDir::new().unwrap();
        let tensors = fresh(parts);
        let saved = save(dir.path(), &tensors, DType::F32).unwrap();
        let opened = Checkpoint::open(dir.path()).unwrap();
        assert_eq!((opened.parts(), opened.config().unwrap()), (parts, &config()));
        assert_eq!(opened.digest().unwrap(), saved.digest().unwrap());
        for (name, tensor) in opened.tensors(&Device::Cpu).unwrap() {
            assert_eq!(difference_or_zero(&tensor, &tensors[&name]), 0.0, "{name}");
        }
        assert_eq!(opened.tokenizer().unwrap().json(), tokenizer_json());
        assert_eq!(opened.preprocessor().unwrap().side(), 32);
        opened.med(&Device::Cpu, DType::F32).unwrap();
    }
}

fn difference_or_zero(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().sum_all().unwrap().to_scalar().unwrap()
}

#[test]
fn half_precision_files_work_and_are_half_as_large() {
    let dir = TempDir::new().unwrap();
    let exact = save(&dir.path().join("f32"), &fresh(Parts::CAPTIONER), DType::F32).unwrap();
    let expected = states(&exact.med(&Device::Cpu, DType::F32).unwrap());
    let size = |name: &str| std::fs::metadata(dir.path().join(name).join("model.safetensors")).unwrap().len();
    for (dtype, name, tolerance) in [(DType::F16, "f16", 5e-3), (DType::BF16, "bf16", 4e-2)] {
        let half = save(&dir.path().join(name), &fresh(Parts::CAPTIONER), dtype).unwrap();
        let got = states(&half.med(&Device::Cpu, DType::F32).unwrap());
        assert!(difference(&got, &expected) < tolerance, "{name}: {}", difference(&got, &expected));
        assert!(size(name) * 10 < size("f32") * 6);
        assert_ne!(half.digest().unwrap(), exact.digest().unwrap());
    }
}

#[test]
fn same_arguments_give_the_same_bytes() {
    let dir = TempDir::new().unwrap();
    let digests: Vec<String> = ["a", "b"]
        .iter()
        .map(|name| save(&dir.path().join(name), &fresh(Parts::FULL), DType::F32).unwrap().digest().unwrap())
        .collect();
    assert_eq!(digests[0], digests[1]);
    assert_eq!(digests[0].len(), 64);
    // A changed tokenizer is another model.
    std::fs::write(dir.path().join("a/tokenizer.json"), "{}").unwrap();
    assert_ne!(Checkpoint::open(&dir.path().join("a")).unwrap().digest().unwrap(), digests[1]);
}

#[test]
fn a_missing_tensor_is_named() {
    let (problems, text) = broken(|tensors| drop(tensors.remove(DENSE)));
    assert_eq!(problems, [TensorProblem::Missing { name: DENSE.to_owned(), expected: vec![32, 64] }]);
    assert!(text.contains(&format!("tensor {DENSE} of shape [32, 64] is missing")), "{text}");
}

#[test]
fn an_unknown_tensor_is_named() {
    let extra = "text_encoder.pooler.dense.bias";
    let (problems, text) = broken(|tensors| {
        tensors.insert(extra.to_owned(), Tensor::zeros(32, DType::F32, &Device::Cpu).unwrap());
    });
    assert_eq!(problems, [TensorProblem::Unknown { name: extra.to_owned(), found: vec![32] }]);
    assert!(text.contains(extra), "{text}");
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let (problems, text) = broken(|tensors| {
        let turned = tensors[DENSE].t().unwrap().contiguous().unwrap();
        tensors.insert(DENSE.to_owned(), turned);
    });
    assert_eq!(problems, [TensorProblem::Shape { name: DENSE.to_owned(), expected: vec![32, 64], found: vec![64, 32] }]);
    assert!(text.contains("has shape [64, 32], the config says [32, 64]"), "{text}");
}

#[test]
fn all_problems_are_reported_at_once_and_the_message_stays_short() {
    let (problems, text) = broken(|tensors| tensors.retain(|name, _| !name.contains(".layer.1.")));
    assert!(problems.len() > 20);
    assert!(text.contains("more") && text.len() < 800, "{text}");
}

#[test]
fn unreadable_files_are_told_apart() {
    let dir = TempDir::new().unwrap();
    let message = |dir: &Path| {
        let error = Checkpoint::open(dir).unwrap_err();
        assert!(!error.is_retryable());
        error.to_string()
    };
    assert!(message(dir.path()).contains("config.json"));
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(message(dir.path()).contains("JSON"));
    std::fs::write(dir.path().join("config.json"), r#"{"vision_config": {"image_size": 30, "patch_size": 16}}"#).unwrap();
    assert!(message(dir.path()).contains("does not divide"));
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(message(dir.path()).contains("model.safetensors"));
    std::fs::write(dir.path().join("model.safetensors"), "not a weight file").unwrap();
    assert!(message(dir.path()).contains("not a readable safetensors file"));

    let whole = dir.path().join("whole");
    save(&whole, &fresh(Parts::FILTER), DType::F32).unwrap();
    let weights = std::fs::read(whole.join("model.safetensors")).unwrap();
    std::fs::write(whole.join("model.safetensors"), &weights[..weights.len() - 4]).unwrap();
    assert!(message(&whole).contains("not a readable safetensors file"));
}

#[test]
fn a_checkpoint_is_never_written_over_another() {
    let dir = TempDir::new().unwrap();
    let first = save(dir.path(), &fresh(Parts::FILTER), DType::F32).unwrap().digest().unwrap();
    let error = save(dir.path(), &fresh(Parts::CAPTIONER), DType::F32).unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    assert_eq!(Checkpoint::open(dir.path()).unwrap().digest().unwrap(), first);
}

#[test]
fn a_preprocessor_for_another_size_is_refused() {
    let dir = TempDir::new().unwrap();
    let checkpoint = save(dir.path(), &fresh(Parts::FILTER), DType::F32).unwrap();
    let file = dir.path().join("preprocessor_config.json");
    std::fs::write(&file, r#"{"size": {"height": 64, "width": 64}}"#).unwrap();
    assert!(checkpoint.preprocessor().unwrap_err().to_string().contains("side 64"));
    std::fs::write(&file, r#"{"size": {"height": 32, "width": 64}}"#).unwrap();
    assert!(checkpoint.preprocessor().unwrap_err().to_string().contains("squares"));
    std::fs::write(&file, r#"{"size": 32, "resample": 1}"#).unwrap();
    assert!(checkpoint.preprocessor().unwrap_err().to_string().contains("filter 1"));
}

#[test]
fn old_files_with_copies_and_constants_open() {
    // Public checkpoints carry an untied head, a second bias and, the older ones, position ids.
    let golden = Checkpoint::open(&goldens().join("captioner")).unwrap();
    let mut tensors = golden.tensors(&Device::Cpu).unwrap();
    let words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"].clone();
    let bias = tensors["text_decoder.cls.predictions.bias"].clone();
    tensors.insert("text_decoder.cls.predictions.decoder.weight".to_owned(), (words * 2.0).unwrap());
    tensors.insert("text_decoder.cls.predictions.decoder.bias".to_owned(), bias);
    let positions = Tensor::arange(0f32, 40.0, &Device::Cpu).unwrap();
    tensors.insert("text_decoder.bert.embeddings.position_ids".to_owned(), positions);
    let dir = TempDir::new().unwrap();
    let checkpoint = Checkpoint::save(
        dir.path(),
        golden.config().unwrap(),
        &tensors,
        DType::F32,
        "{}",
        &Preprocessor::new(golden.config().unwrap().vision_config.image_size),
    )
    .unwrap();
    let logits = |checkpoint: &Checkpoint| {
        let med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
        let ids = Tensor::new(&[[100u32, 7, 8]], &Device::Cpu).unwrap();
        med.lm_logits(&ids, &ids.ones_like().unwrap(), &states(&med)).unwrap()
    };
    assert!(difference(&logits(&checkpoint), &logits(&golden)) > 0.1, "the untied head must be used");
}
