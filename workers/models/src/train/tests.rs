//! A whole small model in training: gradients everywhere, learning, resuming.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::*;
use crate::clip::{ClipConfig, ClipFamily, ClipScorer, ClipTextConfig, ClipTokenizer, ClipVision, ResNetConfig};
use crate::config::MedConfig;
use crate::parameters::fresh_tensors;
use crate::tokenizer::train_wordpiece;
use crate::trunk::{TRUNK, TrunkKind};

const TEXTS: [&str; 6] =
    ["a red square", "a green square on black", "a blue circle", "two white dots", "a red line to the left", "nothing at all"];
const SIDE: usize = 16;

fn config(vocab: usize) -> MedConfig {
    let mut config = MedConfig::tiny(vocab);
    config.vision_config.hidden_size = 32;
    config.vision_config.intermediate_size = 64;
    config.vision_config.num_hidden_layers = 2;
    config.vision_config.image_size = SIDE;
    config.text_config.hidden_size = 24;
    config.text_config.intermediate_size = 48;
    config.text_config.num_hidden_layers = 2;
    config.image_text_hidden_size = 16;
    config
}

fn recipe(role: Role) -> Recipe {
    Recipe {
        role,
        seed: 5,
        schedule: Schedule { peak: 2e-3, floor: 1e-5, warmup_steps: 2, steps: 100 },
        optimizer: AdamWConfig::default(),
        accumulate: 1,
        dtype: DType::F32,
        momentum: 0.9,
        queue: 10,
        alpha: 0.4,
        alpha_ramp: 4,
        label_smoothing: 0.1,
        prompt: "a picture of ".to_owned(),
        max_tokens: 24,
        augmentation: Augmentation::default(),
    }
}

fn trainer(recipe: Recipe) -> Trainer {
    let mut texts = TEXTS.to_vec();
    texts.push("a picture of");
    let json = train_wordpiece(&texts, 120).unwrap();
    let config = match recipe.role {
        Role::Clip => return clip_trainer(ClipVision::Vit(config(120).vision_config), recipe),
        Role::Captioner | Role::Filter | Role::Med => Architecture::Med(config(120)),
    };
    Trainer::fresh(&config, json, Pretrained::default(), recipe, &Device::Cpu).unwrap()
}

fn clip_trainer(vision: ClipVision, recipe: Recipe) -> Trainer {
    let tokenizer = ClipTokenizer::train(&TEXTS.map(str::to_owned), 560).unwrap();
    let text = ClipTextConfig {
        vocab_size: 560,
        hidden_size: 24,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        max_position_embeddings: 24,
        eos_token_id: 2,
        ..ClipTextConfig::clip()
    };
    let config = ClipConfig { family: ClipFamily::Clip, vision, text, projection_dim: 16 };
    Trainer::fresh(
        &Architecture::Clip(config),
        tokenizer,
        Pretrained::default(),
        Recipe { role: Role::Clip, ..recipe },
        &Device::Cpu,
    )
    .unwrap()
}

fn resnet() -> ClipVision {
    ClipVision::ResNet(ResNetConfig { layers: [1; 4], width: 4, heads: 4, image_size: 32 })
}

/// One plain colour for each text.
fn images() -> Vec<Vec<u8>> {
    (0..TEXTS.len() as u8)
        .map(|i| (0..SIDE * SIDE).flat_map(|_| [40 * i, 255 - 40 * i, if i % 2 == 0 { 200 } else { 10 }]).collect())
        .collect()
}

fn examples<'a>(images: &'a [Vec<u8>], epoch: u64) -> Vec<Example<'a>> {
    const NAMES: [&str; 6] = ["s0", "s1", "s2", "s3", "s4", "s5"];
    images.iter().enumerate().map(|(i, pixels)| Example { sample_id: NAMES[i], epoch, text: TEXTS[i], pixels }).collect()
}

/// What a step takes of the images, once more.
fn batch(trainer: &Trainer, images: &[Vec<u8>], epoch: u64) -> Prepared {
    trainer.preparer().prepare(&examples(images, epoch)).unwrap()
}

fn step(trainer: &mut Trainer, images: &[Vec<u8>], epoch: u64) -> StepReport {
    let batch = batch(trainer, images, epoch);
    trainer.step(&batch).unwrap()
}

fn losses(trainer: &mut Trainer, batch: &Prepared) -> crate::error::Result<(Losses, Tensor)> {
    let variables = trainer.variables();
    trainer.losses(batch, 0..batch.len(), &variables, 0)
}

fn weights(trainer: &Trainer) -> BTreeMap<String, Vec<u32>> {
    let bits = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    trainer.optimizer.slots().iter().map(|(name, slot)| (name.clone(), bits(slot.variable.as_tensor()))).collect()
}

#[test]
fn every_variable_gets_a_finite_gradient_that_is_not_zero() {
    let images = images();
    for role in [Role::Captioner, Role::Filter, Role::Med, Role::Clip] {
        let mut trainer = trainer(recipe(role));
        let batch = batch(&trainer, &images, 0);
        let (losses, total) = losses(&mut trainer, &batch).unwrap();
        assert_eq!(losses.lm.is_some(), [Role::Captioner, Role::Med].contains(&role));
        assert_eq!(losses.itm.is_some(), [Role::Filter, Role::Med].contains(&role));
        let gradients = total.backward().unwrap();
        for (name, slot) in trainer.optimizer.slots() {
            let gradient = gradients.get(slot.variable.as_tensor()).unwrap_or_else(|| panic!("{role:?}: {name} has no gradient"));
            let size: f32 = gradient.abs().unwrap().sum_all().unwrap().to_scalar().unwrap();
            // Adding the same number to every key changes no softmax: the gradient of a key bias is zero but for rounding.
            let is_key_bias = name.ends_with("self.key.bias") || name.ends_with("k_proj.bias");
            assert!(size.is_finite() && (size > 0.0 || is_key_bias), "{role:?}: the gradient of {name} is {size}");
        }
    }
}

#[test]
fn passes_in_bf16_teach_weights_in_f32() {
    let images = images();
    for role in [Role::Med, Role::Clip] {
        let of = |dtype| {
            let mut trainer = trainer(Recipe { dtype, ..recipe(role) });
            let batch = batch(&trainer, &images, 0);
            let (_, total) = losses(&mut trainer, &batch).unwrap();
            let gradients = trainer.optimizer.gradients(&total.backward().unwrap()).unwrap();
            assert!(gradients.iter().all(|gradient| gradient.dtype() == DType::F32), "{role:?}");
            let report = trainer.step(&batch).unwrap();
            (total.to_scalar::<f32>().unwrap(), report.gradient_norm)
        };
        let ((exact, norm), (half, half_norm)) = (of(DType::F32), of(DType::BF16));
        assert!((half - exact).abs() < 0.03 * exact, "{role:?}: {half} is not {exact}");
        assert!((half_norm - norm).abs() < 0.1 * norm, "{role:?}: a gradient of {half_norm}, not {norm}");
    }
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let images = images();
    // Without a queue a loss leaves nothing behind; soft targets would move with what they are targets of.
    let mut trainer = trainer(Recipe { queue: 0, alpha: 0.0, ..recipe(Role::Med) });
    let batch = batch(&trainer, &images, 0);
    let (_, total) = losses(&mut trainer, &batch).unwrap();
    let gradients = total.backward().unwrap();
    // A step against the gradient of one variable at a time must lower the loss by rate · |gradient|².
    for name in [
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        "text_encoder.encoder.layer.1.crossattention.self.value.weight",
        "text_encoder.encoder.layer.0.attention.output.LayerNorm.weight",
        "text_decoder.bert.encoder.layer.0.attention.self.value.weight",
        "text_encoder.embeddings.word_embeddings.weight",
        "text_proj.weight",
        "temperature",
    ] {
        let variable = trainer.optimizer.slots()[name].variable.clone();
        let gradient = gradients.get(variable.as_tensor()).unwrap();
        let square: f32 = gradient.sqr().unwrap().sum_all().unwrap().to_scalar().unwrap();
        let before = variable.as_tensor().copy().unwrap();
        let rate = f64::from(2e-3 / square.max(1e-12));
        let mut loss_at = |sign: f64| -> f32 {
            let moved = (gradient * (sign * rate)).and_then(|shift| &before + shift).unwrap();
            variable.set(&moved).unwrap();
            // Hard negatives are drawn by similarity; the draw is the same as long as the step is small.
            losses(&mut trainer, &batch).unwrap().1.to_scalar().unwrap()
        };
        let slope = (loss_at(0.5) - loss_at(-0.5)) / 2e-3;
        variable.set(&before).unwrap();
        assert!((slope - 1.0).abs() < 0.05, "{name}: the loss moves by {slope} of what the gradient says");
    }
}

#[test]
fn a_small_model_learns_its_batch() {
    let images = images();
    let mut trainer =
        trainer(Recipe { augmentation: Augmentation { min_area: 1.0, flip: false, distort: 0.0 }, ..recipe(Role::Med) });
    let first = step(&mut trainer, &images, 0);
    let mut last = first;
    for epoch in 1..60 {
        last = step(&mut trainer, &images, epoch);
    }
    assert_eq!(last.step, 60);
    let (first, last) = (first.losses, last.losses);
    assert!(last.lm < first.lm.map(|lm| lm * 0.6), "{first:?} {last:?}");
    assert!(last.itc < first.itc.map(|itc| itc * 0.5), "{first:?} {last:?}");
    assert!(last.itm < first.itm, "{first:?} {last:?}");
}

#[test]
fn a_resumed_run_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let small = images();
    let large: Vec<Vec<u8>> = small.iter().map(|image| image.repeat(4)).collect();
    // Two batches a step in one of them.
    let kinds = [
        (recipe(Role::Captioner), &small),
        (recipe(Role::Filter), &small),
        (Recipe { accumulate: 2, ..recipe(Role::Med) }, &small),
        (recipe(Role::Clip), &small),
        (recipe(Role::Clip), &large),
    ];
    for (number, (recipe, images)) in kinds.into_iter().enumerate() {
        let fresh = || match images == &large {
            true => clip_trainer(resnet(), recipe.clone()),
            false => trainer(recipe.clone()),
        };
        let mut straight = fresh();
        let mut reports = Vec::new();
        for epoch in 0..4 {
            if epoch == 2 {
                straight.save_state(&path).unwrap();
            }
            reports.push(step(&mut straight, images, epoch));
        }
        let mut resumed = fresh();
        resumed.load_state(&path).unwrap();
        assert_eq!(resumed.steps(), 2);
        for epoch in 2..4 {
            assert_eq!(step(&mut resumed, images, epoch), reports[epoch as usize], "{number}");
        }
        assert!(weights(&straight) == weights(&resumed), "{number}: the weights differ");
        let [straight, resumed] = [straight, resumed].map(|trainer| {
            trainer.save_state(&path).unwrap();
            std::fs::read(&path).unwrap()
        });
        assert!(straight == resumed, "{number}: momentum encoders, queues or running means differ");
    }
}

#[test]
fn batches_of_a_step_add_up_where_contrast_does_not_bind_them() {
    let images = images();
    let still = Augmentation { min_area: 1.0, flip: false, distort: 0.0 };
    let losses = |accumulate| {
        let recipe = Recipe { accumulate, augmentation: still, ..recipe(Role::Captioner) };
        let mut trainer = trainer(recipe);
        let report = step(&mut trainer, &images, 0);
        let lm = report.losses.lm.unwrap();
        (lm, report.gradient_norm)
    };
    let ((whole, norm), (cut, norm_of_cut)) = (losses(1), losses(2));
    // The mean of two means: texts of different lengths do not weigh quite alike.
    assert!((whole - cut).abs() < 0.05 * whole && (norm - norm_of_cut).abs() < 0.1 * norm, "{whole} {cut} {norm} {norm_of_cut}");
}

#[test]
fn a_clip_learns_its_batch_and_is_saved_in_the_layout_of_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let still = Augmentation { min_area: 1.0, flip: false, distort: 0.0 };
    let small = images();
    let large: Vec<Vec<u8>> = small.iter().map(|image| image.repeat(4)).collect();
    let of_vit = ClipVision::Vit(config(120).vision_config);
    for (name, vision, images) in [("vit", of_vit, &small), ("resnet", resnet(), &large)] {
        let mut trainer = clip_trainer(vision, Recipe { augmentation: still, ..recipe(Role::Clip) });
        let first = step(&mut trainer, images, 0).losses.itc.unwrap();
        let last = (1..100).map(|epoch| step(&mut trainer, images, epoch).losses.itc.unwrap()).last().unwrap();
        assert!(last < 0.5 * first, "{name}: {first} {last}");
        let checkpoint = trainer.save_checkpoint(&dir.path().join(name), StoredDType::F32).unwrap();
        let scorer =
            ClipScorer::new(checkpoint.clip(&Device::Cpu, DType::F32).unwrap(), checkpoint.clip_tokenizer().unwrap()).unwrap();
        let preprocessor = checkpoint.preprocessor().unwrap();
        let side = preprocessor.side() as u32;
        let pixels: Vec<_> = images
            .iter()
            .map(|image| preprocessor.prepare(&image::RgbImage::from_raw(side, side, image.clone()).unwrap()).unwrap())
            .collect();
        let texts: Vec<Vec<&str>> = images.iter().map(|_| TEXTS.to_vec()).collect();
        let right = scorer.score(&pixels, &texts).unwrap();
        let best = right.iter().map(|of_image| (0..6).max_by(|&a, &b| of_image[a].total_cmp(&of_image[b])).unwrap());
        let hits = best.enumerate().filter(|(image, text)| image == text).count();
        // What a ResNet remembers of its batches lags behind its weights.
        assert!(hits >= if name == "vit" { 6 } else { 3 }, "{name}: {hits} of 6 images find their texts");
        // And goes on from there.
        let again = Trainer::from_checkpoint(&checkpoint, recipe(Role::Clip), &Device::Cpu).unwrap();
        assert!(weights(&again) == weights(&trainer), "{name}");
    }
}

#[test]
fn a_state_of_another_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    trainer(recipe(Role::Filter)).save_state(&path).unwrap();
    for other in [recipe(Role::Captioner), Recipe { seed: 6, ..recipe(Role::Filter) }] {
        let error = trainer(other).load_state(&path).unwrap_err().to_string();
        assert!(error.contains("another model, tokenizer or recipe"), "{error}");
    }
    std::fs::write(&path, b"no tensors").unwrap();
    assert!(trainer(recipe(Role::Filter)).load_state(&path).is_err());
}

#[test]
fn a_saved_checkpoint_opens_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let images = images();
    let mut full = trainer(recipe(Role::Med));
    step(&mut full, &images, 0);
    let checkpoint = full.save_checkpoint(&dir.path().join("med"), StoredDType::F32).unwrap();
    assert_eq!(checkpoint.parts(), Role::Med.parts());
    // A filter made from it starts with the same shared weights and without the decoder's.
    let filter = Trainer::from_checkpoint(&checkpoint, recipe(Role::Filter), &Device::Cpu).unwrap();
    let (ours, theirs) = (weights(&filter), weights(&full));
    assert!(ours.keys().all(|name| !name.starts_with("text_decoder")));
    assert!(ours.iter().filter(|(name, _)| *name != "temperature").all(|(name, bits)| theirs[name] == *bits));
    let half = full.save_checkpoint(&dir.path().join("half"), StoredDType::F16).unwrap();
    assert_eq!(half.parts(), Role::Med.parts());
    assert!(half.digest().unwrap() != checkpoint.digest().unwrap());
}

#[test]
fn a_missing_text_transformer_starts_as_a_copy_of_the_other() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to, ours, theirs) in [
        (Role::Captioner, Role::Filter, "text_encoder.", "text_decoder.bert."),
        (Role::Filter, Role::Captioner, "text_decoder.bert.", "text_encoder."),
    ] {
        let parent = trainer(recipe(from));
        let checkpoint = parent.save_checkpoint(&dir.path().join(theirs), StoredDType::F32).unwrap();
        let (child, parent) =
            (weights(&Trainer::from_checkpoint(&checkpoint, recipe(to), &Device::Cpu).unwrap()), weights(&parent));
        let mut copied = 0;
        for (name, bits) in &child {
            let source = name.strip_prefix(ours).map_or_else(|| name.clone(), |rest| format!("{theirs}{rest}"));
            let known = parent.get(&source).filter(|_| name != "temperature");
            assert!(known.is_none_or(|known| known == bits), "{name}");
            copied += usize::from(known.is_some());
        }
        assert!(copied > 40, "{copied} tensors came from the parent");
    }
}

#[test]
fn bad_batches_are_refused_and_change_nothing() {
    let mut trainer = trainer(Recipe { accumulate: 2, ..recipe(Role::Captioner) });
    let before = weights(&trainer);
    assert!(trainer.preparer().prepare(&[]).is_err());
    let images = images();
    let one = Example { sample_id: "one", epoch: 0, text: TEXTS[0], pixels: &images[0] };
    let fewer_than_batches = trainer.preparer().prepare(&[one]).unwrap();
    assert!(trainer.step(&fewer_than_batches).is_err());
    let short = Example { sample_id: "tiny", epoch: 0, text: "a red square", pixels: &[0; 30] };
    assert!(trainer.preparer().prepare(&[short]).unwrap_err().to_string().contains("image tiny"));
    assert!(weights(&trainer) == before);
    assert_eq!(trainer.steps(), 0);
}

#[test]
fn impossible_recipes_are_refused() {
    let json = train_wordpiece(&TEXTS, 120).unwrap();
    for bad in [
        Recipe { max_tokens: 65, ..recipe(Role::Filter) },
        Recipe { max_tokens: 5, ..recipe(Role::Captioner) },
        Recipe { schedule: Schedule { peak: -1.0, floor: 0.0, warmup_steps: 0, steps: 9 }, ..recipe(Role::Filter) },
    ] {
        assert!(Trainer::fresh(&Architecture::Med(config(120)), json.clone(), Pretrained::default(), bad, &Device::Cpu).is_err());
    }
}

#[test]
fn kept_feature_maps_change_nothing() {
    let mut config = config(120);
    let vision = &mut config.vision_config;
    (vision.image_size, vision.patch_size, vision.trunk) = (32, 32, Some(TrunkKind::EfficientNetLite0));
    let folder = tempfile::tempdir().unwrap();
    let drawn = fresh_tensors(&config, Role::Med.parts(), 1, &Device::Cpu).unwrap();
    // So wide that an image is still seen behind it.
    let widened = |tensor: Tensor| if tensor.rank() > 1 { (tensor * 12.0).unwrap() } else { tensor };
    let trunk = drawn.into_iter().filter_map(|(name, tensor)| Some((name.strip_prefix(TRUNK)?.to_owned(), widened(tensor))));
    candle_core::safetensors::save(&trunk.collect::<HashMap<_, _>>(), folder.path().join("model.safetensors")).unwrap();

    let pretrained = Pretrained { trunk: Some(folder.path()), words: None };
    let json = train_wordpiece(&[&TEXTS[..], &["a picture of"]].concat(), 120).unwrap();
    let images: Vec<Vec<u8>> = (0..6).map(|i| (0..3 * 32 * 32).map(|place| (place * (i + 3) % 251) as u8).collect()).collect();
    let still = Augmentation { min_area: 1.0, flip: false, distort: 0.0 };
    let steps = |augmentation: Augmentation, maps: Option<&Arc<FeatureMaps>>| -> Vec<StepReport> {
        let recipe = Recipe { augmentation, ..recipe(Role::Med) };
        let mut trainer =
            Trainer::fresh(&Architecture::Med(config.clone()), json.clone(), pretrained, recipe, &Device::Cpu).unwrap();
        if let Some(maps) = maps {
            trainer.keep_feature_maps(Arc::clone(maps)).unwrap();
        }
        (0..3).map(|epoch| step(&mut trainer, &images, epoch)).collect()
    };
    let maps = FeatureMaps::new(1 << 20);
    let expected = steps(still, None);
    assert_eq!(steps(still, Some(&maps)), expected);
    assert_eq!(steps(still, Some(&maps)), expected, "with maps that were there before");
    let moving = Augmentation::default();
    assert_eq!(steps(moving, Some(&maps)), steps(moving, None), "augmented images have no maps");
    assert_ne!(steps(moving, None), expected);
}
