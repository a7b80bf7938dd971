//! Whole small runs: training, resuming, judging.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::config::{MedConfig, VisionConfig};
use capfilt_models::device::{DType, Device};
use capfilt_models::med::Parts;
use capfilt_models::moments::ImageMoments;
use capfilt_models::parameters::fresh_tensors;
use capfilt_models::score::Itc;
use capfilt_models::train::{Pretrained, Role, StoredDType};
use capfilt_models::trunk::TrunkKind;
use capfilt_schemas::Origin;
use capfilt_trainer::{
    EvaluateConfig, Init, Member, ModelSize, PairText, Progress, ResNetSize, Saves, TrainConfig, TrainPair, TrainSet,
    TrainerError, ZeroShot, evaluate, train,
};

const SIDE: usize = 16;
const COLOURS: [(&str, [u8; 3]); 4] =
    [("red", [230, 20, 20]), ("green", [20, 200, 30]), ("blue", [20, 30, 230]), ("white", [250, 250, 250])];
const SHAPES: [&str; 3] = ["bar", "column", "square"];

/// A shape in a colour on black, with some grain so that no two are the same.
fn pair(colour: usize, shape: usize, copy: usize, origin: Origin) -> TrainPair {
    let (name, rgb) = COLOURS[colour];
    let inside = |x: usize, y: usize| match shape {
        0 => (6..10).contains(&y),
        1 => (6..10).contains(&x),
        _ => (4..12).contains(&x) && (4..12).contains(&y),
    };
    let pixels: Vec<u8> = (0..SIDE * SIDE)
        .flat_map(|i| {
            let grain = ((i * 31 + copy * 17) % 13) as u8;
            if inside(i % SIDE, i / SIDE) { rgb.map(|c| c.saturating_sub(grain)) } else { [grain; 3] }
        })
        .collect();
    let text = format!("a {name} {}", SHAPES[shape]);
    TrainPair {
        sample_id: format!("{name}-{}-{copy}", SHAPES[shape]),
        texts: vec![PairText { text, origin }],
        pixels: pixels.into(),
    }
}

fn pairs(copies: std::ops::Range<usize>, origin: Origin) -> Vec<TrainPair> {
    copies.flat_map(|copy| (0..12).map(move |i| pair(i % 4, i / 4, copy, origin))).collect()
}

fn config(role: Role) -> TrainConfig {
    TrainConfig {
        role,
        model: ModelSize {
            image_size: SIDE,
            patch_size: 4,
            width: 32,
            heads: 2,
            vision_layers: 2,
            text_layers: 2,
            projection: 16,
            positions: 24,
            trunk: None,
            resnet: None,
        },
        vocab_size: 100,
        steps: Some(120),
        batch: 16,
        peak_lr: 3e-3,
        warmup_steps: 10,
        prompt: String::new(),
        max_tokens: 12,
        distort: 0.0,
        log_every: 10,
        stored_dtype: StoredDType::F32,
        ..TrainConfig::default()
    }
}

type Files = BTreeMap<String, Vec<u8>>;

/// A training that is saved every 20 steps, and stops after step `stop` if it comes to that.
fn until(
    stop: u64,
    pairs: &[TrainPair],
    config: &TrainConfig,
    parent: Option<&Checkpoint>,
    folder: &Path,
) -> Result<Files, TrainerError> {
    let halt = |p: Progress<'_>| if p.line.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let (set, saves) = (TrainSet::in_memory(pairs.to_vec()), Saves { folder, every: 20 });
    train(&set, config, Member::ONLY, (parent, Pretrained::default()), &Device::Cpu, saves, halt)
}

fn attempt(pairs: &[TrainPair], config: &TrainConfig, dir: &Path) -> Result<Files, TrainerError> {
    until(0, pairs, config, None, dir)
}

fn run(pairs: &[TrainPair], config: &TrainConfig, parent: Option<&Checkpoint>, dir: &Path) -> Files {
    until(0, pairs, config, parent, dir).unwrap()
}

fn open(files: &Files, dir: &Path) -> Checkpoint {
    std::fs::create_dir_all(dir).unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    Checkpoint::open(dir).unwrap()
}

fn metrics(checkpoint: &Checkpoint, pairs: &[TrainPair]) -> BTreeMap<String, f64> {
    let config = EvaluateConfig { prompt: String::new(), rerank: 6, ..EvaluateConfig::default() };
    evaluate(std::slice::from_ref(checkpoint), None, pairs, &config, Itc::Cosine, &Device::Cpu)
        .unwrap()
        .into_iter()
        .map(|metric| (metric.name, metric.value))
        .collect()
}

#[test]
fn a_captioner_and_a_filter_learn_colours_and_shapes() {
    let dir = tempfile::tempdir().unwrap();
    let training = pairs(0..8, Origin::Human);
    let held_out = pairs(8..10, Origin::Human);
    let learn = |name: &str, config: &TrainConfig, parent: Option<&Checkpoint>| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let files = run(&training, config, parent, &folder);
        let log = String::from_utf8(files["training_log.jsonl"].clone()).unwrap();
        assert_eq!(log.lines().count() as u64, config.steps.unwrap() / config.log_every);
        let checkpoint = open(&files, &folder.join("model"));
        let found = metrics(&checkpoint, &held_out);
        assert_eq!(found.contains_key("captioner/cider_d"), config.role != Role::Filter);
        assert_eq!(found.contains_key("filter/auroc"), config.role != Role::Captioner);
        assert!(config.role == Role::Filter || found["captioner/rouge_l"] > 0.85, "{name} {found:?}");
        assert!(config.role == Role::Captioner || found["filter/ir_at_5"] > 0.8, "{name} {found:?}");
        (checkpoint, found)
    };
    // Matching is learnt late: it needs both transformers and what binds them.
    let config = |role| TrainConfig { steps: Some(240), ..config(role) };
    let (captioner, _) = learn("captioner", &config(Role::Captioner), None);
    let (_, found) = learn("filter", &TrainConfig { init: Init::Parent, ..config(Role::Filter) }, Some(&captioner));
    assert!(found["filter/auroc"] > 0.9, "{found:?}");
    let (_, found) = learn("med", &config(Role::Med), None);
    assert!(found["filter/auroc"] > 0.9, "{found:?}");
}

#[test]
fn a_clip_learns_colours_and_shapes_by_either_image_side() {
    let dir = tempfile::tempdir().unwrap();
    let training = pairs(0..8, Origin::Web);
    let held_out = pairs(8..10, Origin::Human);
    let classes = COLOURS.iter().flat_map(|(colour, _)| SHAPES.map(|shape| format!("{colour} {shape}"))).collect();
    let zero_shot = Some(ZeroShot { classes, templates: vec!["a {}".to_owned(), "the {}".to_owned()] });
    let judge = EvaluateConfig { zero_shot, resamples: 20, ..EvaluateConfig::default() };
    for (name, resnet) in [("vit", None), ("resnet", Some(ResNetSize { layers: [1, 1, 1, 1], width: 8 }))] {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut config = TrainConfig { vocab_size: 600, steps: Some(100), ..config(Role::Clip) };
        // The ResNet makes one feature of 32 by 32 pixels.
        config.model = ModelSize { resnet, image_size: if name == "vit" { SIDE } else { 32 }, ..config.model };
        let enlarge = |pair: &TrainPair| {
            let side = config.model.image_size / SIDE;
            let pixel = |i: usize| {
                let (x, y) = (i % (SIDE * side) / side, i / (SIDE * side) / side);
                pair.pixels[3 * (y * SIDE + x)..][..3].to_vec()
            };
            let pixels: Vec<u8> = (0..(SIDE * side).pow(2)).flat_map(pixel).collect();
            TrainPair { pixels: pixels.into(), ..pair.clone() }
        };
        let training: Vec<TrainPair> = training.iter().map(enlarge).collect();
        let files = run(&training, &config, None, &folder);
        let trained = open(&files, &folder.join("model"));
        let held_out: Vec<TrainPair> = held_out.iter().map(enlarge).collect();
        let found: BTreeMap<String, f64> =
            evaluate(std::slice::from_ref(&trained), None, &held_out, &judge, Itc::Cosine, &Device::Cpu)
                .unwrap()
                .into_iter()
                .map(|m| (m.name, m.value))
                .collect();
        assert!(found["clip/ir_at_5"] > 0.8 && found["clip/auroc"] > 0.9, "{name} {found:?}");
        assert!(found["clip/zero_shot_at_1"] > 0.7, "{name} {found:?}");
        // It goes on from there, and its tokenizer is kept.
        let onward = TrainConfig { init: Init::Parent, steps: Some(1), peak_lr: 1e-7, min_lr: 0.0, ..config.clone() };
        let onward_folder = dir.path().join(format!("{name}-onward"));
        std::fs::create_dir_all(&onward_folder).unwrap();
        let child = run(&training, &onward, Some(&trained), &onward_folder);
        let vocabulary = |files: &Files| {
            serde_json::from_slice::<serde_json::Value>(&files["tokenizer.json"]).unwrap()["model"]["vocab"].take()
        };
        assert!(vocabulary(&child) == vocabulary(&files), "{name}");
    }
}

#[test]
fn a_stopped_run_goes_on_to_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let training = pairs(0..3, Origin::Web);
    let config = TrainConfig { steps: Some(60), ..config(Role::Filter) };
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    let straight = run(&training, &config, None, &folder("straight"));
    // Stopped after a saved state, and between two.
    for stop in [20, 50] {
        let resumed = folder(&format!("resumed-{stop}"));
        let error = until(stop, &training, &config, None, &resumed).unwrap_err();
        assert!(matches!(error, TrainerError::Stopped { step } if step == stop) && error.is_retryable());
        let files = run(&training, &config, None, &resumed);
        assert!(files == straight, "stopped at {stop}: {:?}", files.keys().filter(|k| files[*k] != straight[*k]));
    }
    // A state that is cut short is lost work, and nothing else.
    let damaged = folder("damaged");
    until(20, &training, &config, None, &damaged).unwrap_err();
    let state = damaged.join("state.safetensors");
    let whole = std::fs::read(&state).unwrap();
    std::fs::write(&state, &whole[..whole.len() / 2]).unwrap();
    assert!(run(&training, &config, None, &damaged) == straight);
    // The order of the pairs makes no difference either, nor the number of threads.
    let mut reversed = training.clone();
    reversed.reverse();
    assert!(run(&reversed, &config, None, &folder("reversed")) == straight);
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let files = pool.install(|| run(&training, &config, None, &folder(&format!("threads-{threads}"))));
        assert!(files == straight, "with {threads} threads");
    }
}

#[test]
fn a_filter_is_measured_by_the_mean_of_its_members_and_by_the_itc_that_it_tells() {
    let dir = tempfile::tempdir().unwrap();
    let (training, held_out) = (pairs(0..3, Origin::Web), pairs(8..10, Origin::Human));
    let learn = |seed: u64| {
        let folder = dir.path().join(seed.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        let files = run(&training, &TrainConfig { steps: Some(40), seed, ..config(Role::Filter) }, None, &folder);
        open(&files, &folder.join("model"));
        folder.join("model")
    };
    let by = |members: &[&Path], itc: Itc| {
        let members: Vec<Checkpoint> = members.iter().map(|folder| Checkpoint::open(folder).unwrap()).collect();
        let found = evaluate(&members, Some("filter"), &held_out, &EvaluateConfig::default(), itc, &Device::Cpu).unwrap();
        found.into_iter().find(|metric| metric.name == "filter/auroc_itc").unwrap().value
    };
    let (one, two) = (learn(1), learn(2));
    let alone = by(&[&one], Itc::Standardized);
    assert_eq!(by(&[&one, &one], Itc::Standardized), alone);
    assert_ne!(by(&[&one], Itc::Cosine), alone);
    assert_ne!(by(&[&one, &two], Itc::Standardized), alone);
}

/// Random weights of a trunk, in a safetensors file named as timm names them; name → bytes.
fn trunk_weights(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let trunk = Some(TrunkKind::EfficientNetLite0);
    let vision_config = VisionConfig { trunk, image_size: 32, patch_size: 32, ..MedConfig::tiny(100).vision_config };
    let config = MedConfig { vision_config, ..MedConfig::tiny(100) };
    let drawn = fresh_tensors(&config, Parts::FILTER, 5, &Device::Cpu).unwrap();
    let (mut entries, mut numbers, mut named) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (name, tensor) in drawn {
        let Some(name) = name.strip_prefix("vision_model.trunk.") else { continue };
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (start, end) = (numbers.len(), numbers.len() + bytes.len());
        entries.push(format!(r#""{name}":{{"dtype":"F32","shape":{:?},"data_offsets":[{start},{end}]}}"#, tensor.dims()));
        numbers.extend_from_slice(&bytes);
        named.insert(name.to_owned(), bytes);
    }
    let header = format!("{{{}}}", entries.join(","));
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &numbers].concat();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
    named
}

#[test]
fn a_trunk_stays_as_it_came_and_goes_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    let enlarged = |pair: TrainPair| {
        let image = image::RgbImage::from_raw(SIDE as u32, SIDE as u32, pair.pixels.to_vec()).unwrap();
        TrainPair::new(pair.sample_id, pair.texts, &image, 32).unwrap()
    };
    let training: Vec<TrainPair> = pairs(0..3, Origin::Web).into_iter().map(enlarged).collect();
    let trunk = Some(TrunkKind::EfficientNetLite0);
    let config = TrainConfig {
        model: ModelSize { image_size: 32, patch_size: 32, trunk, ..config(Role::Med).model },
        trunk_weights: Some("a digest".to_owned()),
        // So that its feature maps are kept.
        crop_min_area: 1.0,
        steps: Some(4),
        batch: 6,
        momentum: 0.9,
        queue: 12,
        log_every: 2,
        ..config(Role::Med)
    };
    let (weights, set) = (folder("weights"), || TrainSet::in_memory(training.clone()));
    let given = trunk_weights(&weights);
    let learn = |config: &TrainConfig, (parent, trunk): (Option<&Checkpoint>, Option<&Path>), name: &str, stop: u64| {
        let halt = |p: Progress<'_>| if p.line.step == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let (pretrained, folder) = (Pretrained { trunk, words: None }, folder(name));
        let saves = Saves { folder: &folder, every: 2 };
        train(&set(), config, Member::ONLY, (parent, pretrained), &Device::Cpu, saves, halt)
    };
    let files = learn(&config, (None, Some(&weights)), "med", 0).unwrap();
    learn(&config, (None, Some(&weights)), "resumed", 2).unwrap_err();
    assert!(learn(&config, (None, Some(&weights)), "resumed", 0).unwrap() == files);

    let med = open(&files, &folder("med-files"));
    let trunk_of = |checkpoint: &Checkpoint| -> BTreeMap<String, Vec<u8>> {
        let mut named = BTreeMap::new();
        for (name, tensor) in checkpoint.tensors(&Device::Cpu).unwrap() {
            if let Some(name) = name.strip_prefix("vision_model.trunk.") {
                let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                named.insert(name.to_owned(), values.iter().flat_map(|x| x.to_le_bytes()).collect());
            }
        }
        named
    };
    assert_eq!(trunk_of(&med), given);
    // What starts from the MED brings the trunk along, and needs no weights.
    let tuned = TrainConfig { role: Role::Filter, init: Init::Med, trunk_weights: None, ..config.clone() };
    let filter = open(&learn(&tuned, (Some(&med), None), "filter", 0).unwrap(), &folder("filter-files"));
    assert_eq!(trunk_of(&filter), given);
    assert!(metrics(&filter, &training).contains_key("filter/auroc"));

    // The model knows how its image features are spread.
    let moments = folder("filter-files").join("image_moments.safetensors");
    ImageMoments::read(&moments, 16, &Device::Cpu).unwrap();
    assert!(filter.med(&Device::Cpu, DType::F32).is_ok());

    std::fs::write(weights.join("model.safetensors"), std::fs::read(folder("med-files").join("model.safetensors")).unwrap())
        .unwrap();
    let error = learn(&config, (None, Some(&weights)), "wrong", 0).unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("blocks.0.0.bn1.bias"), "{cause}");
}

#[test]
fn a_parent_gives_its_tokenizer_and_on_request_its_weights() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    let training = pairs(0..3, Origin::Human);
    let first = run(&training, &TrainConfig { steps: Some(10), ..config(Role::Filter) }, None, &folder("first"));
    let parent = open(&first, &folder("parent"));
    let fresh = TrainConfig { steps: Some(1), seed: 9, vocab_size: 40, ..config(Role::Filter) };
    let from_fresh = run(&training, &fresh, Some(&parent), &folder("fresh"));
    assert_eq!(from_fresh["tokenizer.json"], first["tokenizer.json"]);
    assert_ne!(from_fresh["model.safetensors"], first["model.safetensors"]);

    // One tiny step from the parent's weights stays beside them: the parent's metrics hold.
    let onward = TrainConfig { init: Init::Parent, peak_lr: 1e-7, min_lr: 0.0, ..fresh };
    let held_out = pairs(8..9, Origin::Human);
    let child = open(&run(&training, &onward, Some(&parent), &folder("onward")), &folder("child"));
    let (before, after) = (metrics(&parent, &held_out), metrics(&child, &held_out));
    assert!((before["filter/auroc"] - after["filter/auroc"]).abs() < 1e-3, "{before:?} {after:?}");

    let orphan = attempt(&training, &onward, &folder("orphan"));
    assert!(orphan.unwrap_err().to_string().contains("needs a parent"));
}

#[test]
fn bad_settings_and_sets_are_refused_before_any_step() {
    let dir = tempfile::tempdir().unwrap();
    let training = pairs(0..1, Origin::Human);
    let refused = |config: TrainConfig, pairs: &[TrainPair]| attempt(pairs, &config, dir.path()).unwrap_err().to_string();
    let base = config(Role::Filter);
    assert!(refused(TrainConfig { epochs: Some(1.0), ..base.clone() }, &training).contains("exactly one"));
    assert!(refused(TrainConfig { steps: None, ..base.clone() }, &training).contains("exactly one"));
    assert!(refused(TrainConfig { batch: 1, ..base.clone() }, &training).contains("`batch`"));
    assert!(refused(TrainConfig { role: Role::Clip, folds: 2, ..base.clone() }, &training).contains("`folds`"));
    assert!(refused(TrainConfig { folds: 21, ..base.clone() }, &training).contains("1 to 20"));
    assert!(refused(TrainConfig { role: Role::Captioner, folds: 2, ..base.clone() }, &training).contains("`folds`"));
    let resnet = Some(ResNetSize { layers: [1; 4], width: 8 });
    let model = ModelSize { resnet, ..base.model };
    assert!(refused(TrainConfig { model, ..base.clone() }, &training).contains("`model.resnet`"));
    assert!(refused(TrainConfig { max_grad_norm: f64::NAN, ..base.clone() }, &training).contains("`max_grad_norm`"));
    assert!(refused(base.clone(), &[]).contains("no pairs"));
    let mut misshapen = training;
    misshapen[0].pixels = vec![0; 12].into();
    assert!(attempt(&misshapen, &base, dir.path()).is_err());
    let unknown = serde_json::from_str::<TrainConfig>(r#"{"role": "filter", "peak_learning_rate": 1}"#);
    assert!(unknown.unwrap_err().to_string().contains("peak_learning_rate"));
}

#[test]
fn judging_nothing_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let training = pairs(0..1, Origin::Human);
    let files = run(&training, &TrainConfig { steps: Some(1), ..config(Role::Filter) }, None, dir.path());
    let checkpoint = open(&files, &dir.path().join("model"));
    let judge = |pairs: &[TrainPair]| {
        evaluate(std::slice::from_ref(&checkpoint), None, pairs, &EvaluateConfig::default(), Itc::Cosine, &Device::Cpu)
    };
    assert!(judge(&[]).unwrap_err().to_string().contains("held-out"));
    let mut wrong_size = training;
    wrong_size[0].pixels = vec![0; 30].into();
    assert!(judge(&wrong_size).is_err());
}
