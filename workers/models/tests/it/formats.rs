//! Every format that checkpoints come in, written by torch and transformers (`goldens/make_checkpoints.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use capfilt_models::checkpoint::{Checkpoint, Family};
use capfilt_models::files::Files;
use capfilt_models::med::{Med, Parts};
use capfilt_models::tokenizer::train_wordpiece;
use tempfile::TempDir;

use crate::fixture::goldens;

fn folder(name: &str) -> PathBuf {
    goldens().join("formats").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&folder(name)).unwrap()
}

fn failure(folder: &Path) -> String {
    let error = Checkpoint::open(folder).unwrap_err();
    assert!(!error.is_retryable());
    let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// A copy of a folder that a test may change.
fn copy(name: &str) -> TempDir {
    let target = TempDir::new().unwrap();
    for entry in std::fs::read_dir(folder(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, target.path().join(path.file_name().unwrap())).unwrap();
    }
    target
}

fn numbers(checkpoint: &Checkpoint) -> BTreeMap<String, (DType, Vec<usize>, Vec<f32>)> {
    let read = |name: &str| {
        let tensor = checkpoint.weights().read(name, &Device::Cpu).unwrap();
        let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (name.to_owned(), (tensor.dtype(), tensor.dims().to_vec(), values))
    };
    checkpoint.weights().tensors().map(|(name, _)| read(name)).collect()
}

/// What the model makes of an image and a text, bit for bit.
fn outputs(checkpoint: &Checkpoint) -> Vec<u32> {
    let med = checkpoint.med(&Device::Cpu, DType::F32).unwrap();
    let pixels = Tensor::arange(0_f32, 768.0, &Device::Cpu).unwrap().reshape((1, 3, 16, 16)).unwrap();
    let states = med.encode_image(&(pixels / 768.0).unwrap()).unwrap();
    let ids = Tensor::new(&[[5_u32, 7, 8, 3]], &Device::Cpu).unwrap();
    let mask = ids.ones_like().unwrap();
    let output = |med: &Med| match checkpoint.parts().decoder {
        true => med.lm_logits(&ids, &mask, &states).unwrap(),
        false => med.itm_logits(&ids, &mask, &states).unwrap(),
    };
    let output: Vec<f32> = output(&med).flatten_all().unwrap().to_vec1().unwrap();
    assert!(output.iter().all(|x| x.is_finite()) && output.iter().any(|x| *x != output[0]));
    output.into_iter().map(f32::to_bits).collect()
}

#[test]
fn every_format_holds_the_same_numbers() {
    for (format, reference) in [
        ("captioner-bin", "captioner"),
        ("captioner-sharded", "captioner"),
        ("captioner-pth", "captioner"),
        ("filter-pth", "filter"),
        ("filter-bin-sharded", "filter"),
        ("before-1.6", "filter"),
    ] {
        let (checkpoint, reference) = (open(format), open(reference));
        assert_eq!(numbers(&checkpoint), numbers(&reference), "{format}");
        assert_eq!(outputs(&checkpoint), outputs(&reference), "{format}");
        assert_eq!(checkpoint.digest().unwrap().len(), 64);
        assert_ne!(checkpoint.digest().unwrap(), reference.digest().unwrap());
    }
}

#[test]
fn a_clip_opens_by_the_same_call() {
    let (reference, other) = (open("clip"), open("clip-bin"));
    assert_eq!(numbers(&other), numbers(&reference));
    assert!(matches!(other.family(), Family::Clip(config) if config.projection_dim == 6));
    let features = |checkpoint: &Checkpoint| {
        let clip = checkpoint.clip(&Device::Cpu, DType::F32).unwrap();
        let pixels = Tensor::arange(0_f32, 768.0, &Device::Cpu).unwrap().reshape((1, 3, 16, 16)).unwrap();
        let image = clip.image_features(&(pixels / 768.0).unwrap()).unwrap();
        let text = clip.encode_texts(&Tensor::new(&[[18_u32, 4, 19]], &Device::Cpu).unwrap()).unwrap();
        Tensor::cat(&[image, text], 0).unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(features(&other), features(&reference));
    assert!(other.med(&Device::Cpu, DType::F32).unwrap_err().to_string().contains("holds no captioner or filter"));
    assert!(open("filter").clip(&Device::Cpu, DType::F32).unwrap_err().to_string().contains("holds no CLIP"));
    assert_eq!(other.parts(), Parts { decoder: false, encoder: false });

    let folder = copy("clip-bin");
    std::fs::write(folder.path().join("preprocessor_config.json"), r#"{"size": 16}"#).unwrap();
    let text = Checkpoint::open(folder.path()).unwrap().clip_tokenizer().unwrap_err().to_string();
    assert!(text.contains("has no tokenizer.json; put there") && text.contains("merges.txt"), "{text}");
    std::fs::write(folder.path().join("vocab.json"), r#"{"a": 0, "b</w>": 1, "<|startoftext|>": 18, "<|endoftext|>": 19}"#)
        .unwrap();
    std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\n").unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"pad_token": "<|endoftext|>"}"#).unwrap();
    let target = TempDir::new().unwrap();
    Checkpoint::open(folder.path()).unwrap().write(target.path()).unwrap();
    let written = Checkpoint::open(target.path()).unwrap();
    assert_eq!(numbers(&written), numbers(&reference));
    assert_eq!(written.clip_tokenizer().unwrap().pad_id(), 19);

    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("\"image_size\": 16", "\"image_size\": 24")).unwrap();
    assert!(failure(folder.path()).contains("images of side 16, config.json says image_size 24"));
    std::fs::write(&path, config.replace("\"clip\"", "\"bert\"")).unwrap();
    assert!(failure(folder.path()).contains("has the model_type \"bert\"; known are blip, clip and siglip"));
    std::fs::write(&path, r#"{"model_type": "clip", "vision_config": {"hidden_size": 4611686018427387904}}"#).unwrap();
    assert!(failure(folder.path()).contains("has size 4611686018427387904"));
    std::fs::write(&path, r#"{"model_type": "clip", "vision_config": {"num_hidden_layers": 4000000000}}"#).unwrap();
    assert!(failure(folder.path()).contains("has 4000000000 layers"));
}

#[test]
fn the_layout_of_openclip_is_that_of_transformers() {
    let (reference, checkpoint) = (open("clip"), open("clip-open"));
    assert_eq!(numbers(&checkpoint), numbers(&reference));
    let preprocessor = checkpoint.preprocessor().unwrap();
    assert_eq!(preprocessor.side(), 16);

    let folder = copy("clip-open");
    std::fs::write(folder.path().join("vocab.json"), r#"{"<|startoftext|>": 18, "<|endoftext|>": 19}"#).unwrap();
    std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\n").unwrap();
    let target = TempDir::new().unwrap();
    Checkpoint::open(folder.path()).unwrap().write(target.path()).unwrap();
    let written = Checkpoint::open(target.path()).unwrap();
    assert_eq!(numbers(&written), numbers(&reference));
    let config = std::fs::read_to_string(target.path().join("config.json")).unwrap();
    assert!(config.contains("CLIPModel") && config.contains("quick_gelu"), "{config}");
    let image = image::RgbImage::from_fn(40, 22, |x, y| image::Rgb([x as u8 * 6, y as u8 * 11, 90]));
    assert_eq!(written.preprocessor().unwrap().prepare(&image).unwrap(), preprocessor.prepare(&image).unwrap());

    let cut = copy("clip-open");
    let path = cut.path().join("open_clip_config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("\"layers\": 1", "\"layers\": 2")).unwrap();
    let text = failure(cut.path());
    assert!(text.contains("text_model.encoder.layers.1.layer_norm1.bias of shape [8] is missing"), "{text}");
}

#[test]
fn a_model_that_answers_questions_is_told_by_its_parts() {
    let (reference, checkpoint) = (open("vqa"), open("vqa-pth"));
    assert_eq!(numbers(&checkpoint), numbers(&reference));
    assert!(matches!(checkpoint.family(), Family::Vqa(_)));
    checkpoint.vqa(&Device::Cpu, DType::F32).unwrap();
    assert!(checkpoint.med(&Device::Cpu, DType::F32).unwrap_err().to_string().contains("holds no captioner or filter"));
    assert!(open("filter").vqa(&Device::Cpu, DType::F32).is_err());
}

#[test]
fn views_of_storages_are_laid_out() {
    let (views, exact) = (open("filter-bf16-views"), numbers(&open("filter")));
    for (name, (dtype, shape, values)) in numbers(&views) {
        let rounded = Tensor::new(exact[&name].2.as_slice(), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let rounded: Vec<f32> = rounded.to_dtype(DType::F32).unwrap().to_vec1().unwrap();
        assert_eq!((dtype, &shape), (DType::BF16, &exact[&name].1), "{name}");
        assert_eq!(values, rounded, "{name}");
    }
    outputs(&views);
}

#[test]
fn the_reader_of_candle_sees_the_same() {
    let path = folder("captioner-bin").join("pytorch_model.bin");
    let ours = numbers(&open("captioner-bin"));
    let mut seen = 0;
    for (name, tensor) in candle_core::pickle::read_all(path).unwrap() {
        if let Some((_, shape, values)) = ours.get(&name) {
            assert_eq!((tensor.dims(), tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()), (&shape[..], values.clone()));
            seen += 1;
        }
    }
    assert_eq!(seen, ours.len());
}

#[test]
fn each_is_written_as_transformers_would() {
    let tokenizer = train_wordpiece(&["a dog"], 40).unwrap();
    for (format, reference, class) in [
        ("captioner-pth", "captioner", "BlipForConditionalGeneration"),
        ("filter-bin-sharded", "filter", "BlipForImageTextRetrieval"),
    ] {
        let source = copy(format);
        std::fs::write(source.path().join("tokenizer.json"), &tokenizer).unwrap();
        std::fs::write(source.path().join("preprocessor_config.json"), r#"{"size": 16, "kept": true}"#).unwrap();
        let target = TempDir::new().unwrap();
        let checkpoint = Checkpoint::open(source.path()).unwrap();
        checkpoint.write(target.path()).unwrap();

        let read = |name: &str| std::fs::read_to_string(target.path().join(name)).unwrap();
        assert_eq!(read("tokenizer.json"), tokenizer);
        assert!(read("preprocessor_config.json").contains("kept"));
        let config: serde_json::Value = serde_json::from_str(&read("config.json")).unwrap();
        assert_eq!((config["model_type"].as_str(), config["architectures"][0].as_str()), (Some("blip"), Some(class)));
        assert_eq!(Files::of_folder(target.path()).unwrap().weights, "model.safetensors");
        let written = Checkpoint::open(target.path()).unwrap();
        assert_eq!(numbers(&written), numbers(&open(reference)));
        // The very file of transformers, and the same again.
        let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).unwrap();
        assert_eq!(bytes(target.path()), bytes(&folder(reference)));
        let again = TempDir::new().unwrap();
        written.write(again.path()).unwrap();
        assert_eq!(Checkpoint::open(again.path()).unwrap().digest().unwrap(), written.digest().unwrap());
        assert!(written.write(again.path()).unwrap_err().to_string().contains("not empty"));
    }
}

#[test]
fn what_is_missing_beside_the_weights_is_told() {
    // BLIP's own files come alone: their images are prepared as all of its models', their words are not told by anything in them.
    let checkpoint = open("filter-pth");
    assert_eq!(checkpoint.preprocessor().unwrap().side(), 16);
    assert!(checkpoint.tokenizer().unwrap_err().to_string().contains("has no tokenizer.json; put there"));
    assert!(open("filter").preprocessor().unwrap_err().to_string().contains("preprocessor_config.json"));

    let alone = copy("filter-pth");
    std::fs::remove_file(alone.path().join("config.json")).unwrap();
    let text = failure(alone.path());
    assert!(text.contains("has no config.json") && text.contains("add the file"), "{text}");
    let alone = copy("captioner-bin");
    std::fs::remove_file(alone.path().join("config.json")).unwrap();
    assert!(failure(alone.path()).contains("config.json"));
}

#[test]
fn programs_are_told() {
    assert!(failure(&folder("torchscript")).contains("TorchScript"));
}

#[test]
fn shards_and_index_are_held_against_each_other() {
    let index = |folder: &TempDir, change: &dyn Fn(&str) -> String| {
        let path = folder.path().join("model.safetensors.index.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, change(&text)).unwrap();
        failure(folder.path())
    };
    let sharded = || copy("captioner-sharded");
    let name = "text_decoder.cls.predictions.bias";

    let gone = sharded();
    std::fs::remove_file(gone.path().join("model-00002-of-00003.safetensors")).unwrap();
    assert!(failure(gone.path()).contains("names the shard `model-00002-of-00003.safetensors`, which is not there"));
    let text = index(&sharded(), &|text| text.replace(name, "text_decoder.more"));
    assert!(text.contains("says that the tensor text_decoder.more is in `model-0000"), "{text}");
    let text = index(&sharded(), &|text| text.replace(&format!("{name}\": \"model-00003"), &format!("{name}\": \"model-00001")));
    assert!(
        text.contains(&format!("the tensor {name} is in `model-00001-of-00003.safetensors`, but it is in `model-00003")),
        "{text}"
    );
    let line = |line: &&str| !line.contains(name);
    let text = index(&sharded(), &|text| text.lines().filter(line).collect::<Vec<_>>().join("\n"));
    assert!(text.contains(&format!("does not name the tensor {name}, which a shard has")), "{text}");

    let twice = sharded();
    let shard = |number: u32| twice.path().join(format!("model-0000{number}-of-00003.safetensors"));
    std::fs::copy(shard(1), shard(2)).unwrap();
    let text = failure(twice.path());
    assert!(
        text.contains("model-00002-of-00003.safetensors has the tensor") && text.contains("-00001-of-00003.safetensors has too"),
        "{text}"
    );
}

#[test]
fn files_that_were_cut_off_are_refused() {
    for (format, file) in [
        ("captioner", "model.safetensors"),
        ("captioner-bin", "pytorch_model.bin"),
        ("filter-pth", "model_base_retrieval_tiny.pth"),
        ("captioner-sharded", "model-00003-of-00003.safetensors"),
        ("filter-bin-sharded", "pytorch_model-00001-of-00003.bin"),
    ] {
        let whole = std::fs::read(folder(format).join(file)).unwrap();
        for length in [0, 3, 100, whole.len() / 2, whole.len() - 1] {
            let cut = copy(format);
            std::fs::write(cut.path().join(file), &whole[..length]).unwrap();
            let text = failure(cut.path());
            assert!(text.contains(file) && text.contains("again"), "{length} of {format}: {text}");
        }
    }
}

#[test]
fn images_of_another_size_are_named() {
    let other = copy("captioner");
    let path = other.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap().replace("\"image_size\": 16", "\"image_size\": 32");
    std::fs::write(path, config).unwrap();
    let text = failure(other.path());
    assert!(text.contains("images of side 16, config.json says image_size 32"), "{text}");
}

#[test]
fn numbers_of_another_format_are_named() {
    let folder = copy("captioner");
    let mut tensors = candle_core::safetensors::load(folder.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let name = "text_decoder.cls.predictions.bias";
    let wide = tensors[name].to_dtype(DType::F64).unwrap();
    tensors.insert(name.to_owned(), wide);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    assert!(failure(folder.path()).contains(&format!("tensor {name} is stored as F64, expected F32, F16 or BF16")));
}

#[test]
fn configs_that_no_machine_could_hold_are_refused() {
    let folder = copy("captioner");
    for (config, part) in [
        (r#"{"vision_config": {"num_hidden_layers": 4000000000}}"#, "num_hidden_layers is 4000000000"),
        (r#"{"vision_config": {"hidden_size": 9223372036854775807}}"#, "hidden_size is 9223372036854775807"),
        (r#"{"text_config": {"vocab_size": 18446744073709551615}}"#, "vocab_size is 18446744073709551615"),
        // Of the size of the images that the weights are for.
        (
            r#"{"vision_config": {"hidden_size": 16777216, "num_attention_heads": 16, "image_size": 32, "patch_size": 16}}"#,
            "has shape",
        ),
    ] {
        std::fs::write(folder.path().join("config.json"), config).unwrap();
        let text = failure(folder.path());
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn the_bias_of_the_head_counts_under_either_name() {
    const BIAS: &str = "text_decoder.cls.predictions.bias";
    let folder = copy("captioner");
    let path = folder.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let other = (&tensors[BIAS] + 1.0).unwrap();
    // As transformers has it: that of the head, if there are both.
    tensors.insert("text_decoder.cls.predictions.decoder.bias".to_owned(), other.clone());
    for both in [true, false] {
        if !both {
            tensors.remove(BIAS);
        }
        candle_core::safetensors::save(&tensors, &path).unwrap();
        let read = Checkpoint::open(folder.path()).unwrap().weights().read(BIAS, &Device::Cpu).unwrap();
        assert_eq!(read.to_vec1::<f32>().unwrap(), other.to_vec1::<f32>().unwrap());
    }
}

#[test]
fn the_image_processor_may_be_a_part_of_a_processor() {
    let folder = copy("captioner");
    let path = |name: &str| folder.path().join(name);
    let whole = r#"{"image_processor_type": "BlipImageProcessor", "resample": 3, "size": {"height": 16, "width": 16}}"#;
    std::fs::write(path("preprocessor_config.json"), whole).unwrap();
    let expected = Checkpoint::open(folder.path()).unwrap().preprocessor().unwrap();
    std::fs::remove_file(path("preprocessor_config.json")).unwrap();
    let error = Checkpoint::open(folder.path()).unwrap().preprocessor().unwrap_err().to_string();
    assert!(error.contains("has no preprocessor_config.json"), "{error}");
    // As transformers 5 writes it.
    let processor = format!(r#"{{"image_processor": {whole}, "processor_class": "BlipProcessor"}}"#);
    std::fs::write(path("processor_config.json"), processor).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().preprocessor().unwrap().to_json(), expected.to_json());
}
