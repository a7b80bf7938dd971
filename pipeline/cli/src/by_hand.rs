//! `capfilt caption` and `capfilt score`: models tried by hand.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use capfilt_runtime::on_blocking;
use capfilt_schemas::Digest;
use capfilt_vision::{
    Caption, CaptionConfig, ImageCaptioner, ImageScorer, ItmToken, NumberType, Sampling, ScoreConfig, Strategy, TextScores,
    VisionWorkerConfig,
};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use crate::args::StoreArgs;
use crate::models::{CheckpointFolder, Source, checkpoint};
use crate::output::{Failure, complain, say, table};
use crate::store::open;

/// Images that go through a model together, and after which answers are shown.
const TOGETHER: usize = 16;

/// Files that count as images where a folder is named.
const IMAGES: [&str; 6] = ["jpg", "jpeg", "png", "webp", "gif", "bmp"];

/// What both verbs are told.
#[derive(Args, Debug)]
pub(crate) struct HandArgs {
    /// Image files, or folders with image files
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// A store, or a config that names one: a model of it can then be named by its role or the first characters of its digest
    #[arg(long, short, value_name = "STORE|CONFIG")]
    store: Option<String>,
    /// Where the model runs: `cpu`, `cuda` or `cuda:N`
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The number type it computes in; if not given, bf16 on a GPU, bf16x3 (as exact as f32 to five digits, and faster) on a CPU with AMX, f32 on another; int8 is fastest on a CPU with AVX-512 VNNI and no AMX, and the least exact
    #[arg(long, value_name = "TYPE")]
    dtype: Option<DtypeArg>,
    /// Write one JSON object a line for each image
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "What is not given is as BLIP has it. The same image gives the same caption, whatever its file is called: draws are \
                        keyed by the seed and the bytes of the image. An image is turned upright and brought to sRGB before, as `capfilt run` does."
)]
pub(crate) struct CaptionArgs {
    /// The captioner: a checkpoint folder, or a name of the hub (`owner/name`, `owner/name@revision`)
    #[arg(long)]
    model: String,
    /// How the next token is found
    #[arg(long, value_enum, default_value = "nucleus")]
    strategy: StrategyArg,
    /// For nucleus: the likeliest tokens that reach this share of the mass [default: 0.9]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// For nucleus: the likeliest tokens kept before that; 0 keeps all [default: 50]
    #[arg(long, value_name = "TOKENS")]
    top_k: Option<usize>,
    /// For nucleus: divides all scores [default: 1]
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// For beam: texts that grow side by side [default: 3]
    #[arg(long, value_name = "BEAMS")]
    num_beams: Option<usize>,
    /// For beam: above 0 longer texts gain, below 0 shorter ones [default: 1]
    #[arg(long, value_name = "EXPONENT", allow_negative_numbers = true)]
    length_penalty: Option<f64>,
    /// Divides the scores of tokens that are in the text already [default: 1.1 for nucleus, else 1]
    #[arg(long, value_name = "FACTOR", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// Tokens, prompt included, before which a caption does not end [default: 5]
    #[arg(long, value_name = "TOKENS")]
    min_length: Option<usize>,
    /// Tokens, prompt included, at which a caption is cut [default: 20]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<usize>,
    /// Captions of each image: as many draws, or the best beams
    #[arg(long, default_value_t = 1)]
    captions: usize,
    /// Text that every caption starts with; it is cut off again [default: "a picture of "]
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Keys the draws, together with the image
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    #[command(flatten)]
    hand: HandArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "A filter (BLIP for image-text retrieval) gives the probability that image and text match (ITM), and the cosine of \
                        their features (ITC). A CLIP model gives the cosine of its features, and CLIPScore: 2.5 times that, at least 0.\n\n\
                        A filter reads texts as BLIP was trained on them: in lower case, without . ! \" ( ) * # : ; ~, of at most 50 words and 35 \
                        tokens. An image is turned upright and brought to sRGB before, as `capfilt run` does."
)]
pub(crate) struct ScoreArgs {
    /// A filter or a CLIP model; one of each may be given
    #[arg(long, required = true)]
    model: Vec<String>,
    /// A text; may be given many times
    #[arg(long)]
    text: Vec<String>,
    /// A file with a text a line; `-` is standard input
    #[arg(long, value_name = "LIST")]
    texts: Option<PathBuf>,
    /// The first token of a text for ITM: enc, as BLIP was trained, or cls, as transformers does
    #[arg(long, value_enum, default_value = "enc", value_name = "TOKEN")]
    first_token: FirstTokenArg,
    #[command(flatten)]
    hand: HandArgs,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum StrategyArg {
    /// Draw from the likeliest tokens
    Nucleus,
    /// Take the likeliest token
    Greedy,
    /// Keep the likeliest texts as they grow
    Beam,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum DtypeArg {
    F32,
    Bf16,
    #[value(name = "bf16x3")]
    Bf16x3,
    F16,
    Int8,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum FirstTokenArg {
    Enc,
    Cls,
}

impl HandArgs {
    fn worker(&self) -> VisionWorkerConfig {
        VisionWorkerConfig { device: self.device.clone() }
    }

    /// Checks what does not depend on the model.
    fn check(&self) -> Result<(), Failure> {
        let worker = self.worker();
        let checked = worker.check().and_then(|()| worker.check_build()).and_then(|()| worker.check_dtype(self.dtype()));
        checked.map_err(|e| Failure::Usage(e.to_string()))
    }

    fn dtype(&self) -> Option<NumberType> {
        self.dtype.map(|dtype| match dtype {
            DtypeArg::F32 => NumberType::F32,
            DtypeArg::Bf16 => NumberType::Bf16,
            DtypeArg::Bf16x3 => NumberType::Bf16x3,
            DtypeArg::F16 => NumberType::F16,
            DtypeArg::Int8 => NumberType::Int8,
        })
    }
}

impl CaptionArgs {
    fn sampling(&self) -> Sampling {
        let usual = Sampling::new(match self.strategy {
            StrategyArg::Nucleus => Strategy::Nucleus,
            StrategyArg::Greedy => Strategy::Greedy,
            StrategyArg::Beam => Strategy::Beam,
        });
        Sampling {
            top_p: self.top_p.unwrap_or(usual.top_p),
            top_k: self.top_k.unwrap_or(usual.top_k),
            temperature: self.temperature.unwrap_or(usual.temperature),
            num_beams: self.num_beams,
            length_penalty: self.length_penalty,
            repetition_penalty: self.repetition_penalty.unwrap_or(usual.repetition_penalty),
            min_length: self.min_length.unwrap_or(usual.min_length),
            max_length: self.max_length.unwrap_or(usual.max_length),
            captions: self.captions,
            prompt: self.prompt.clone().unwrap_or(usual.prompt),
            strategy: usual.strategy,
        }
    }
}

pub(crate) async fn caption(args: CaptionArgs) -> Result<ExitCode, Failure> {
    let nucleus =
        [("--top-p", args.top_p.is_some()), ("--top-k", args.top_k.is_some()), ("--temperature", args.temperature.is_some())];
    if let (StrategyArg::Greedy | StrategyArg::Beam, Some((flag, _))) = (args.strategy, nucleus.iter().find(|(_, given)| *given))
    {
        return Err(Failure::Usage(format!("{flag} is for the strategy nucleus, which alone draws")));
    }
    let config = CaptionConfig { seed: args.seed, sampling: args.sampling(), dtype: args.hand.dtype() };
    config.check().map_err(|e| Failure::Usage(e.to_string()))?;
    args.hand.check()?;
    let folder = model(&args.model, &args.hand).await?;
    let work = move || {
        let captioner = ImageCaptioner::open(&folder.path, &config, &args.hand.worker()).with_context(|| unfit(&folder.path))?;
        each(
            &args.hand,
            |files| {
                let keyed = |bytes: Vec<u8>| {
                    let key = Digest::of(&bytes).to_string();
                    (bytes, key)
                };
                Ok(captioner.write(&files.into_iter().map(keyed).collect::<Vec<_>>())?)
            },
            |path, captions: &Vec<Caption>, as_json| told_captions(path, captions, as_json),
        )
    };
    on_blocking(work).await.map_err(anyhow::Error::from)?
}

pub(crate) async fn score(args: ScoreArgs) -> Result<ExitCode, Failure> {
    let texts = texts(&args)?;
    args.hand.check()?;
    let mut folders = Vec::new();
    for name in &args.model {
        folders.push(model(name, &args.hand).await?);
    }
    let first_token = match args.first_token {
        FirstTokenArg::Enc => ItmToken::Enc,
        FirstTokenArg::Cls => ItmToken::Cls,
    };
    let config = ScoreConfig { first_token, dtype: args.hand.dtype(), ..ScoreConfig::default() };
    let work = move || {
        let paths: Vec<&Path> = folders.iter().map(|folder| folder.path.as_path()).collect();
        let scorer = ImageScorer::open(&paths, &config, &args.hand.worker()).context("no scores can be had of these models")?;
        each(
            &args.hand,
            |files| Ok(scorer.score(&files, &texts)?),
            |path, scores, as_json| told_scores(path, &texts, scores, as_json),
        )
    };
    on_blocking(work).await.map_err(anyhow::Error::from)?
}

/// The folder of a model that a person names.
async fn model(name: &str, args: &HandArgs) -> Result<CheckpointFolder, Failure> {
    let store = match &args.store {
        Some(store) => Some(open(&StoreArgs { store: store.clone(), json: args.json }).await?),
        None => None,
    };
    checkpoint(&Source::of_argument(name)?, store.as_ref()).await
}

fn unfit(folder: &Path) -> String {
    format!("`{}` is no usable captioner", folder.display())
}

/// Sends images through `work`, some at a time, and says what `told` makes of each answer. The exit code is 1 if an image had none.
fn each<T>(
    args: &HandArgs,
    work: impl Fn(Vec<Vec<u8>>) -> anyhow::Result<Vec<Result<T, String>>>,
    told: impl Fn(&str, &T, bool) -> anyhow::Result<String>,
) -> Result<ExitCode, Failure> {
    let mut code = ExitCode::SUCCESS;
    let mut failed = |path: &str, why: &str| {
        code = ExitCode::FAILURE;
        if args.json {
            say(&json!({ "path": path, "error": why }).to_string());
        } else {
            complain(&format!("{path}: {why}"));
        }
    };
    let paths = files(&args.images)?;
    for paths in paths.chunks(TOGETHER) {
        let (mut names, mut read) = (Vec::new(), Vec::new());
        for path in paths {
            let name = path.display().to_string();
            match std::fs::read(path) {
                Ok(bytes) => {
                    names.push(name);
                    read.push(bytes);
                }
                Err(e) => failed(&name, &format!("cannot be read: {e}")),
            }
        }
        for (name, answer) in names.iter().zip(work(read)?) {
            match answer {
                Ok(answer) => say(&told(name, &answer, args.json)?),
                Err(why) => failed(name, &why),
            }
        }
    }
    Ok(code)
}

/// The files that are named, and the image files of folders that are, by name.
fn files(named: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for path in named {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let is_image = |file: &PathBuf| {
            let extension = file.extension().map(|e| e.to_string_lossy().to_lowercase());
            extension.is_some_and(|e| IMAGES.contains(&e.as_str()))
        };
        let entries = std::fs::read_dir(path).and_then(|all| all.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>());
        let entries = entries.map_err(|e| Failure::Usage(format!("cannot read the folder `{}`: {e}", path.display())))?;
        let mut found: Vec<PathBuf> = entries.into_iter().filter(is_image).collect();
        if found.is_empty() {
            return Err(Failure::Usage(format!("no image in the folder `{}`", path.display())));
        }
        found.sort_unstable();
        files.append(&mut found);
    }
    Ok(files)
}

fn texts(args: &ScoreArgs) -> Result<Vec<String>, Failure> {
    let mut texts = args.text.clone();
    if let Some(path) = &args.texts {
        let mut list = String::new();
        let read = match path.as_os_str() == "-" {
            true => std::io::stdin().read_to_string(&mut list).map(|_| ()),
            false => std::fs::read_to_string(path).map(|text| list = text),
        };
        read.map_err(|e| Failure::Usage(format!("cannot read `{}`: {e}", path.display())))?;
        texts.extend(list.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    if texts.is_empty() {
        return Err(Failure::Usage("there is no text to score; give --text or --texts".to_owned()));
    }
    Ok(texts)
}

/// What is said of one image, for programs.
#[derive(Serialize)]
struct CaptionedImage<'a> {
    path: &'a str,
    captions: &'a [Caption],
}

#[derive(Serialize)]
struct ScoredImage<'a> {
    path: &'a str,
    texts: Vec<ScoredText<'a>>,
}

#[derive(Serialize)]
struct ScoredText<'a> {
    text: &'a str,
    #[serde(flatten)]
    scores: &'a TextScores,
}

/// A line for each caption, or all in one object.
fn told_captions(path: &str, captions: &[Caption], as_json: bool) -> anyhow::Result<String> {
    if as_json {
        return Ok(serde_json::to_string(&CaptionedImage { path, captions })?);
    }
    Ok(captions.iter().map(|caption| format!("{path}\t{}", caption.text)).collect::<Vec<_>>().join("\n"))
}

/// A table of texts and their scores, or all in one object.
fn told_scores(path: &str, texts: &[String], scores: &[TextScores], as_json: bool) -> anyhow::Result<String> {
    if as_json {
        let texts = texts.iter().zip(scores).map(|(text, scores)| ScoredText { text, scores }).collect();
        return Ok(serde_json::to_string(&ScoredImage { path, texts })?);
    }
    type Column = (&'static str, fn(&TextScores) -> Option<f32>);
    let columns: [Column; 4] = [("ITM", |s| s.itm), ("ITC", |s| s.itc), ("CLIP", |s| s.clip), ("CLIPScore", |s| s.clip_score)];
    let there: Vec<Column> = columns.into_iter().filter(|(_, pick)| scores.first().and_then(pick).is_some()).collect();
    let mut rows = vec![there.iter().map(|(name, _)| (*name).to_owned()).chain([path.to_owned()]).collect::<Vec<_>>()];
    for (text, scores) in texts.iter().zip(scores) {
        let cell = |(_, pick): &Column| pick(scores).map_or_else(String::new, |score| format!("{score:.4}"));
        rows.push(there.iter().map(cell).chain([text.clone()]).collect());
    }
    Ok(table(&rows))
}
