//! Trains one model on pictures and captions in COCO's layout, judges it on held-out ones, and writes its files.
//!
//! ```text
//! cargo run -p capfilt-trainer --example train_coco -- SETTINGS.json TRAIN.json HELDOUT.json OUT_DIR [PARENT_DIR]
//! ```
//!
//! `PARENT_DIR` is a checkpoint to start from, for settings with `"init": "parent"`.
//! `SETTINGS.json` holds `{"train": {…}, "evaluate": {…}}` ([`TrainConfig`], [`EvaluateConfig`]; what is left out keeps its default).
//! The same pictures and settings write the same files on the same kind of CPU. An unfinished run goes on from where it was saved.

#![allow(clippy::print_stdout, reason = "a command line tool")]

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use capfilt_models::checkpoint::Checkpoint;
use capfilt_models::device::Device;
use capfilt_models::score::Itc;
use capfilt_models::train::Pretrained;
use capfilt_schemas::Origin;
use capfilt_trainer::{EvaluateConfig, Member, Metric, PairText, Saves, TrainConfig, TrainPair, TrainSet, evaluate, train};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    train: TrainConfig,
    evaluate: EvaluateConfig,
}

#[derive(Deserialize)]
struct Coco {
    images: Vec<CocoImage>,
    annotations: Vec<CocoCaption>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: String,
    file_name: String,
}

#[derive(Deserialize)]
struct CocoCaption {
    image_id: String,
    caption: String,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [settings, training, held_out, out, parent @ ..] = arguments.as_slice() else {
        return Err("usage: train_coco SETTINGS.json TRAIN.json HELDOUT.json OUT_DIR [PARENT_DIR]".into());
    };
    let parent = parent.first().map(|folder| Checkpoint::open(folder)).transpose()?;
    let settings: Settings = serde_json::from_slice(&std::fs::read(settings)?)?;
    let side = settings.train.model.image_size;
    let pairs = read_pairs(training, side)?;
    let judged = read_pairs(held_out, side)?;
    println!("{} pictures to train on, {} held out, {side} pixels", pairs.len(), judged.len());

    let unfinished = out.with_extension("unfinished");
    std::fs::create_dir_all(&unfinished)?;
    let began = Instant::now();
    let files = train(
        &TrainSet::in_memory(pairs),
        &settings.train,
        Member::ONLY,
        (parent.as_ref(), Pretrained::default()),
        &Device::Cpu,
        Saves { folder: &unfinished, every: 100 },
        |progress| {
            println!(
                "{:.0} pairs/s, {:.0} % of the time waiting for pairs, step {} of {}: {}",
                progress.pairs_per_second,
                100.0 * progress.waited,
                progress.line.step,
                progress.steps,
                serde_json::to_string(&progress.line.losses).unwrap_or_default()
            );
            ControlFlow::Continue(())
        },
    )?;
    println!("trained in {:.1} s", began.elapsed().as_secs_f64());
    if out.exists() {
        std::fs::remove_dir_all(out)?;
    }
    std::fs::create_dir_all(out)?;
    for (name, bytes) in &files {
        std::fs::write(out.join(name), bytes)?;
    }
    std::fs::remove_dir_all(&unfinished)?;

    let began = Instant::now();
    for Metric { name, value, .. } in
        evaluate(&[Checkpoint::open(out)?], None, &judged, &settings.evaluate, Itc::Cosine, &Device::Cpu)?
    {
        println!("{name} {value:.4}");
    }
    println!("judged in {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// The pictures of a COCO caption file with all their captions, in the order of their ids.
fn read_pairs(file: &Path, side: usize) -> Result<Vec<TrainPair>, Box<dyn Error>> {
    let coco: Coco = serde_json::from_slice(&std::fs::read(file)?)?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut texts = BTreeMap::<String, Vec<PairText>>::new();
    for annotation in coco.annotations {
        let text = PairText { text: annotation.caption, origin: Origin::Human };
        texts.entry(annotation.image_id).or_default().push(text);
    }
    let mut pairs = Vec::with_capacity(coco.images.len());
    for image in coco.images {
        let decoded = image::open(folder.join(&image.file_name))?.into_rgb8();
        let texts = texts.remove(&image.id).unwrap_or_default();
        pairs.push(TrainPair::new(image.id, texts, &decoded, side)?);
    }
    pairs.sort_by(|a, b| a.sample_id.cmp(&b.sample_id));
    Ok(pairs)
}
