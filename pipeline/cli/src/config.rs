//! The config of a run: one TOML file, joined from the settings of all crates.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use capfilt_coordinator::SqlConfig;
use capfilt_coordinator::balance::BalanceConfig;
use capfilt_coordinator::build::{BuildConfig, Policy, Score};
use capfilt_coordinator::plan::{PlanConfig, StageParams};
use capfilt_coordinator::retrain::RetrainConfig;
use capfilt_crawler::{
    Annotate, AnnotateConfig, AnnotateParams, CrawlError, CrawlerWorkerConfig, DiscoverConfig, DiscoverParams, FetchConfig,
    QueryList, SourceConfig,
};
use capfilt_runtime::WorkerConfig;
use capfilt_schemas::{Digest, RunId, StageKind};
use capfilt_trainer::{EvaluateConfig, TrainConfig, TrainerWorkerConfig};
use capfilt_vision::{CaptionConfig, ScoreConfig, VisionWorkerConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Format;
use crate::models::Source;
use crate::output::Failure;

/// Everything a run can be told. What can change a byte of the result stands outside of `[worker]`; what only changes speed and route
/// stands in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunConfig {
    /// The run itself.
    pub(crate) run: RunSection,
    /// The query list.
    pub(crate) queries: QueriesSection,
    /// Sources of candidates.
    #[serde(default)]
    pub(crate) discover: DiscoverConfig,
    #[serde(default)]
    pub(crate) balance: BalanceConfig,
    #[serde(default)]
    pub(crate) fetch: FetchConfig,
    /// Clean, human-annotated pairs that are mixed in.
    #[serde(default)]
    pub(crate) annotated: AnnotateConfig,
    /// Pairs on which models are judged and which never get into a dataset.
    #[serde(default)]
    pub(crate) heldout: AnnotateConfig,
    /// The models of the first round. A run without them trains its first ones on what it finds.
    #[serde(default)]
    pub(crate) models: ModelsSection,
    #[serde(default)]
    pub(crate) caption: CaptionConfig,
    #[serde(default)]
    pub(crate) score: ScoreConfig,
    #[serde(default)]
    pub(crate) build: BuildConfig,
    #[serde(default)]
    pub(crate) retrain: RetrainConfig,
    /// How each role is trained.
    #[serde(default)]
    pub(crate) train: BTreeMap<String, TrainSection>,
    #[serde(default)]
    pub(crate) evaluate: EvaluateConfig,
    /// A copy of the last version, made when the run is over.
    pub(crate) export: Option<ExportSection>,
    #[serde(default)]
    pub(crate) report: ReportSection,
    #[serde(default)]
    pub(crate) worker: WorkerSection,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunSection {
    /// The run's name.
    pub(crate) name: RunId,
    /// Where everything is kept: a folder or a URL.
    pub(crate) store: String,
    /// The name of the dataset; the run's own if not given.
    pub(crate) dataset: Option<String>,
    /// Which state of the web is meant: under the same name nothing is downloaded twice.
    pub(crate) snapshot: String,
    /// Rounds of caption, score, build and retrain. With 0 the run ends with the download: its `samples` shards are what was gathered.
    #[serde(default = "one")]
    pub(crate) rounds: u32,
}

const fn one() -> u32 {
    1
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct QueriesSection {
    /// A text file with one query a line (after a tab may stand its source), the same with `.gz`, or Parquet with a column `text`.
    pub(crate) path: PathBuf,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelsSection {
    /// A checkpoint folder, a repository of the Hugging Face hub (`owner/name`, `owner/name@revision`), the first characters of the
    /// digest of a model in the store, or `promoted` for the one that plays the role there.
    pub(crate) captioner: Option<String>,
    /// As `captioner`; there are both or neither.
    pub(crate) filter: Option<String>,
    /// As `captioner`, of a CLIP, whose cosines stand beside the filter's scores.
    pub(crate) clip: Option<String>,
}

/// The settings of `[train.<role>]` that name files.
const WEIGHTS: [&str; 2] = ["trunk_weights", "word_weights"];

/// `[train.<role>]`: the built-in trainer's settings, or a command and whatever settings it wants.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum TrainSection {
    External(ExternalTrainer),
    BuiltIn(Box<toml::Table>),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ExternalTrainer {
    /// Program and arguments; see ARCHITECTURE.md for what it is given and has to leave.
    pub(crate) command: Vec<String>,
    #[serde(flatten)]
    pub(crate) settings: toml::Table,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExportSection {
    /// The folder; `{version}` in it stands for the version's number.
    pub(crate) folder: String,
    #[serde(default = "all_formats")]
    pub(crate) formats: Vec<Format>,
}

fn all_formats() -> Vec<Format> {
    vec![Format::Webdataset, Format::Parquet, Format::Blip]
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ReportSection {
    /// The HTML file; `{run}` in it stands for the run's name.
    pub(crate) path: PathBuf,
    /// Pairs shown in it.
    pub(crate) samples: usize,
}

impl Default for ReportSection {
    fn default() -> Self {
        Self { path: PathBuf::from("capfilt-{run}.html"), samples: 48 }
    }
}

/// What changes speed and route only.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct WorkerSection {
    /// Where metrics are served for Prometheus, `127.0.0.1:9464`; nowhere if not given.
    pub(crate) metrics: Option<SocketAddr>,
    /// The price of this machine an hour, in any currency: progress and result then say what a million images cost.
    pub(crate) hourly_price: Option<f64>,
    pub(crate) runtime: WorkerConfig,
    pub(crate) crawler: CrawlerWorkerConfig,
    pub(crate) vision: VisionWorkerConfig,
    pub(crate) trainer: TrainerWorkerConfig,
    pub(crate) sql: SqlConfig,
}

/// The local files that a run starts from, as its tasks know them.
pub(crate) struct Inputs {
    pub(crate) queries: QueryList,
    pub(crate) discover: Vec<DiscoverParams>,
    /// The stage that reads the clean and the held-out sets.
    pub(crate) annotate: Annotate,
    pub(crate) annotated: Vec<AnnotateParams>,
    pub(crate) heldout: Vec<AnnotateParams>,
}

/// The models that a run is given.
#[derive(Default)]
pub(crate) struct Models {
    /// The captioner and the filter of the first round.
    pub(crate) first: Option<(Digest, Digest)>,
    /// That of all rounds.
    pub(crate) clip: Option<Digest>,
    /// By role and setting, the files that its fresh models begin with.
    pub(crate) pretrained: BTreeMap<(String, &'static str), Digest>,
}

impl RunConfig {
    /// Reads a config, changes it by `set` (`key.path=value`), and makes its paths absolute: they start from the config's folder.
    ///
    /// # Errors
    /// [`Failure::Usage`] names the file, the place in it and what is wrong.
    pub(crate) fn load(path: &Path, set: &[String]) -> Result<Self, Failure> {
        let usage = |what: String| Failure::Usage(format!("config `{}`: {what}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| usage(format!("cannot be read: {e}")))?;
        // Read once as it stands, for the line and column in the message; then again with the changes.
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| usage(e.to_string().trim_end().to_owned()))?;
        if set.is_empty() {
            toml::from_str::<Self>(&text).map_err(|e| usage(e.to_string().trim_end().to_owned()))?;
        }
        for change in set {
            apply(&mut table, change).map_err(Failure::Usage)?;
        }
        let mut config: Self = table.try_into().map_err(|e: toml::de::Error| usage(e.to_string().trim_end().to_owned()))?;
        let folder = std::path::absolute(path).map_err(|e| usage(e.to_string()))?;
        config.make_absolute(folder.parent().unwrap_or(&folder)).map_err(|f| usage(f.text()))?;
        config.check().map_err(|f| usage(f.text()))?;
        Ok(config)
    }

    fn make_absolute(&mut self, folder: &Path) -> Result<(), Failure> {
        let join = |path: &mut PathBuf| *path = clean(&folder.join(&path));
        join(&mut self.queries.path);
        join(&mut self.report.path);
        join(&mut self.worker.runtime.work_dir);
        let webs = [&mut self.discover.web, &mut self.fetch.web].map(|web| &mut web.opt_out_lists);
        webs.into_iter().flatten().chain(&mut self.worker.crawler.ca_files).for_each(join);
        for source in &mut self.discover.sources {
            match source {
                SourceConfig::List(list) => join(&mut list.path),
                SourceConfig::Archive(archive) => archive.make_absolute(folder),
                SourceConfig::Pages(_) | SourceConfig::Sitemaps(_) | SourceConfig::Search(_) => {}
            }
        }
        for source in self.annotated.sources.iter_mut().chain(&mut self.heldout.sources) {
            join(&mut source.annotations);
            if let Some(images) = &mut source.images {
                join(images);
            }
        }
        let text = |value: &mut String| *value = clean(&folder.join(&*value)).display().to_string();
        if !self.run.store.contains(':') {
            text(&mut self.run.store);
        }
        let ModelsSection { captioner, filter, clip } = &mut self.models;
        for model in [captioner, filter, clip].into_iter().flatten() {
            if let Source::Folder(_) = Source::of_config(model, folder)? {
                text(model);
            }
        }
        for section in self.train.values_mut() {
            if let TrainSection::BuiltIn(table) = section {
                for setting in WEIGHTS {
                    if let Some(toml::Value::String(weights)) = table.get_mut(setting)
                        && let Source::Folder(_) = Source::of_config(weights, folder)?
                    {
                        text(weights);
                    }
                }
            }
        }
        if let Some(export) = &mut self.export {
            text(&mut export.folder);
        }
        Ok(())
    }

    /// Whether models can work as is asked for, by this program and on this machine.
    pub(crate) fn check_machine(&self) -> Result<(), Failure> {
        let vision = &self.worker.vision;
        vision.check_build().map_err(|e| Failure::Usage(e.to_string()))?;
        self.worker.trainer.check_build().map_err(|e| Failure::Usage(e.to_string()))?;
        for (section, dtype) in [("caption", self.caption.dtype), ("score", self.score.dtype)] {
            vision.check_dtype(dtype).map_err(|e| Failure::Usage(format!("[{section}] {e}")))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        let usage = |e: &dyn std::fmt::Display| Failure::Usage(e.to_string());
        self.discover.check().map_err(|e| usage(&e))?;
        self.fetch.check().map_err(|e| usage(&e))?;
        self.annotated.check("annotated").map_err(|e| usage(&e))?;
        self.heldout.check("heldout").map_err(|e| usage(&e))?;
        self.balance.validate().map_err(|e| usage(&e))?;
        self.build.validate().map_err(|e| usage(&e))?;
        self.worker.sql.validate().map_err(|e| usage(&e))?;
        self.worker.crawler.check().map_err(|e| usage(&e))?;
        self.worker.vision.check().map_err(|e| usage(&format!("worker.vision.device: {e}")))?;
        self.worker.trainer.check().map_err(|e| usage(&format!("worker.trainer.device: {e}")))?;
        self.caption.check().map_err(|e| usage(&format!("[caption] {e}")))?;
        self.evaluate.check().map_err(|e| usage(&format!("[evaluate] {e}")))?;
        self.retrain.check().map_err(|e| usage(&e))?;
        if self.discover.sources.is_empty() && self.annotated.sources.is_empty() {
            return Err(Failure::Usage("nothing says where pairs come from; add [[discover.sources]]".to_owned()));
        }
        let ModelsSection { captioner, filter, clip } = &self.models;
        if captioner.is_some() != filter.is_some() {
            return Err(Failure::Usage("[models] has a `captioner` or a `filter` alone; name both, or neither".to_owned()));
        }
        let trained = |role: &str| self.retrain.enabled && self.train.contains_key(role);
        if self.run.rounds > 0 && captioner.is_none() && !capfilt_store::ROLES.iter().all(|role| trained(role)) {
            let what = "there is no model to begin with; name a `captioner` and a `filter` in [models], have them trained ([retrain], \
                        [train.captioner], [train.filter]), or set `run.rounds = 0` to gather only";
            return Err(Failure::Usage(what.to_owned()));
        }
        if self.build.policy == Policy::Rank && self.build.rank_by == Score::Clip && clip.is_none() {
            let what = "build.rank_by is \"clip\", but no CLIP scores the texts; name one in `models.clip`, or rank by \"itc\" or \"itm\"";
            return Err(Failure::Usage(what.to_owned()));
        }
        if self.retrain.enabled && self.train.is_empty() {
            let roles = capfilt_store::ROLES.join("] or [train.");
            return Err(Failure::Usage(format!("[retrain] is on, but nothing says how to train; add [train.{roles}]")));
        }
        if self.retrain.enabled && self.heldout.sources.is_empty() {
            let what = "[retrain] is on, but there are no held-out pairs to compare models on; add [[heldout.sources]]";
            return Err(Failure::Usage(what.to_owned()));
        }
        if self.retrain.enabled && self.retrain.confidence > 0.0 && self.evaluate.resamples == 0 {
            let what = "evaluate.resamples is 0, so nobody knows how sure a gain is; draw some, or set `retrain.confidence = 0`";
            return Err(Failure::Usage(what.to_owned()));
        }
        self.check_training()
    }

    /// Whether the models that are to be trained can be, and fit together.
    fn check_training(&self) -> Result<(), Failure> {
        let (med, clip) = (capfilt_coordinator::retrain::MED, capfilt_coordinator::retrain::CLIP);
        let roles = capfilt_store::ROLES;
        if let Some(role) =
            self.train.keys().find(|role| ![med, clip].contains(&role.as_str()) && !roles.contains(&role.as_str()))
        {
            let what = format!("[train.{role}]: there are {}, {med} before them, and {clip}", roles.join(" and "));
            return Err(Failure::Usage(what));
        }
        let params = self.train_params()?;
        // What a captioner is trained to go on from, it is asked to go on from.
        let prompts = [("evaluate", &self.evaluate.prompt), ("caption.sampling", &self.caption.sampling.prompt)];
        if let Some(own) = params.get(capfilt_coordinator::retrain::CAPTIONER).and_then(|params| params["prompt"].as_str())
            && let Some((section, prompt)) = prompts.iter().find(|(_, prompt)| prompt.as_str() != own)
        {
            let what =
                format!("train.captioner.prompt is \"{own}\", but {section}.prompt is \"{prompt}\"; write the same to both");
            return Err(Failure::Usage(what));
        }
        if params.get(clip).is_some_and(|params| params["init"] == "parent") {
            return Err(Failure::Usage(format!(
                "train.{clip}.init is \"parent\", but a CLIP plays no role that it could start from"
            )));
        }
        if let Some(role) = params.keys().find(|role| params[*role]["init"] == med && !params.contains_key(med)) {
            return Err(Failure::Usage(format!("train.{role}.init is \"{med}\", but there is no [train.{med}]")));
        }
        let filter = capfilt_coordinator::retrain::FILTER;
        let from_med = params.get(filter).is_some_and(|params| params["init"] == med);
        for key in ["folds", "repeats"] {
            let of = |role: &str| params.get(role).map_or(1, |params| params[key].as_u64().unwrap_or(1));
            let (own, meds) = (of(filter), of(med));
            // Of the MED's repeats the first ones will do.
            if from_med && (own > meds || (own < meds && key == "folds")) {
                return Err(Failure::Usage(format!(
                    "train.{filter}.{key} is {own}, but train.{med}.{key} is {meds}: it would start from a MED that has seen what it judges"
                )));
            }
        }
        let cold = self.run.rounds > 0 && self.models.captioner.is_none();
        if let Some(role) = params.keys().find(|role| cold && params[*role]["init"] == "parent") {
            let what = format!(
                "train.{role}.init is \"parent\", but the run begins without models; use \"fresh\" or \"{med}\", or name some in [models]"
            );
            return Err(Failure::Usage(what));
        }
        Ok(())
    }

    /// The name under which dataset versions are kept.
    pub(crate) fn dataset(&self) -> String {
        self.run.dataset.clone().unwrap_or_else(|| self.run.name.to_string())
    }

    /// Reads every local file that the config names.
    ///
    /// # Errors
    /// [`Failure::Usage`] names the file and what is wrong with it.
    pub(crate) fn inputs(&self) -> Result<Inputs, Failure> {
        let usage = |e: &CrawlError| Failure::Usage(capfilt_store::chain(e));
        let queries = QueryList::load(&self.queries.path).map_err(|e| usage(&e))?;
        let discover = self.discover.params(&queries, &self.run.snapshot).map_err(|e| usage(&e))?;
        let (clean, annotated) = Annotate::new(&self.annotated).map_err(|e| usage(&e))?;
        let (kept_apart, heldout) = Annotate::new(&self.heldout).map_err(|e| usage(&e))?;
        Ok(Inputs { queries, discover, annotate: clean.and(kept_apart), annotated, heldout })
    }

    /// Where the files are to be found that fresh models of a role begin with: role, setting and place.
    pub(crate) fn weights(&self) -> impl Iterator<Item = (&str, &'static str, &str)> {
        let all = self.train.iter().flat_map(|section| WEIGHTS.map(|setting| (section, setting)));
        all.filter_map(|((role, section), setting)| match section {
            TrainSection::BuiltIn(table) => Some((role.as_str(), setting, table.get(setting)?.as_str()?)),
            TrainSection::External(_) => None,
        })
    }

    fn train_params(&self) -> Result<BTreeMap<String, Value>, Failure> {
        let mut params = BTreeMap::new();
        for (role, section) in &self.train {
            let usage = |e: &dyn std::fmt::Display| Failure::Usage(format!("[train.{role}]: {e}"));
            let value = match section {
                TrainSection::External(external) => {
                    let mut value = json(external)?;
                    value["role"] = role.as_str().into();
                    value
                }
                TrainSection::BuiltIn(table) => {
                    let mut table = (**table).clone();
                    table.insert("role".to_owned(), toml::Value::String(role.clone()));
                    let config: TrainConfig = table.try_into().map_err(|e: toml::de::Error| usage(&e))?;
                    config.check().map_err(|e| usage(&e))?;
                    json(&config)?
                }
            };
            params.insert(role.clone(), value);
        }
        Ok(params)
    }

    /// A filter is measured by what its texts are scored by.
    fn evaluate_params(&self) -> Result<Value, Failure> {
        let mut params = json(&self.evaluate)?;
        if !self.score.itc.is_cosine() {
            params["itc"] = json(&self.score.itc)?;
        }
        Ok(params)
    }

    /// What the planner needs.
    pub(crate) fn plan(&self, inputs: &Inputs, models: &Models) -> Result<PlanConfig, Failure> {
        let mut train = self.train_params()?;
        for ((role, setting), digest) in &models.pretrained {
            if let Some(params) = train.get_mut(role) {
                params[*setting] = digest.to_string().into();
            }
        }
        let stages = StageParams {
            discover: inputs.discover.iter().map(json).collect::<Result<_, _>>()?,
            balance: json(&self.balance)?,
            fetch: json(&self.fetch.params(&self.run.snapshot).map_err(|e| Failure::Usage(capfilt_store::chain(&e)))?)?,
            annotated: inputs.annotated.iter().map(json).collect::<Result<_, _>>()?,
            heldout: inputs.heldout.iter().map(json).collect::<Result<_, _>>()?,
            caption: json(&self.caption.params(&self.worker.vision))?,
            score: json(&self.score.params(&self.worker.vision, models.clip))?,
            build: json(&self.build)?,
            train,
            evaluate: self.evaluate_params()?,
            versions: BTreeMap::from([
                (StageKind::Discover, capfilt_crawler::DISCOVER_VERSION),
                (StageKind::Fetch, capfilt_crawler::FETCH_VERSION),
                (StageKind::Annotate, capfilt_crawler::ANNOTATE_VERSION),
                (StageKind::Balance, capfilt_coordinator::balance::STAGE_VERSION),
                (StageKind::Caption, capfilt_vision::STAGE_VERSION),
                (StageKind::Score, capfilt_vision::STAGE_VERSION),
                (StageKind::Build, capfilt_coordinator::build::STAGE_VERSION),
                (StageKind::Train, capfilt_trainer::TRAIN_VERSION),
                (StageKind::Evaluate, capfilt_trainer::EVALUATE_VERSION),
            ]),
        };
        Ok(PlanConfig {
            run: self.run.name.clone(),
            dataset: self.dataset(),
            rounds: self.run.rounds,
            models: models.first,
            stages,
            retrain: self.retrain.clone(),
            max_attempts: self.worker.runtime.max_attempts,
            sql: self.worker.sql.clone(),
            work_dir: self.worker.runtime.work_dir.clone(),
            check_model: |folder, role| {
                capfilt_vision::check_checkpoint(folder, Some(role)).map_err(|e| capfilt_store::chain(&e))
            },
        })
    }
}

fn json<T: Serialize>(value: &T) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|e| Failure::Other(e.into()))
}

/// Sets `key.path=value` in `table`; the value is TOML, or text if it is none. A number in the path is a place in a list.
pub(crate) fn apply(table: &mut toml::Table, change: &str) -> Result<(), String> {
    let bad = |why: &str| format!("--set `{change}`: {why}");
    let (path, value) = change.split_once('=').ok_or_else(|| bad("write key=value"))?;
    let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let keys: Vec<&str> = path.trim().split('.').collect();
    let Some((last, folders)) = keys.split_last().filter(|_| keys.iter().all(|k| !k.is_empty())) else {
        return Err(bad("write the key as section.name"));
    };
    let mut root = toml::Value::Table(std::mem::take(table));
    let mut place = Some(&mut root);
    for key in folders {
        place = match place {
            Some(toml::Value::Table(t)) => {
                Some(t.entry((*key).to_owned()).or_insert_with(|| toml::Value::Table(toml::Table::new())))
            }
            Some(toml::Value::Array(items)) => key.parse::<usize>().ok().and_then(|i| items.get_mut(i)),
            _ => None,
        };
    }
    let done = match place {
        Some(toml::Value::Table(t)) => {
            t.insert((*last).to_owned(), value);
            true
        }
        Some(toml::Value::Array(items)) => {
            let item = last.parse::<usize>().ok().and_then(|i| items.get_mut(i));
            item.map(|i| *i = value).is_some()
        }
        _ => false,
    };
    if let toml::Value::Table(t) = root {
        *table = t;
    }
    if done { Ok(()) } else { Err(bad("there is no such place in the config")) }
}

/// `path` without `.` and with `name/..` taken out, so that the same file has the same name however it was written.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => _ = out.pop(),
            std::path::Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests;
