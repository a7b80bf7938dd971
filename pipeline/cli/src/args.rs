//! The command line.

use std::path::PathBuf;

use capfilt_coordinator::export;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::by_hand::{CaptionArgs, ScoreArgs};
use crate::config::RunConfig;
use crate::download::DownloadArgs;
use crate::output::Failure;

/// Makes vision-language training sets: gathers image-text pairs by query, captions and filters them (CapFilt), rebuilds the dataset,
/// retrains the models, and goes round again.
#[derive(Parser, Debug)]
#[command(
    name = "capfilt",
    version,
    max_term_width = 110,
    after_help = "Exit codes: 0 done; 1 failed; 2 wrong arguments or config; 3 the store cannot be used or is not sound; \
                  4 done, but some tasks were given up; 130 interrupted.\n\n\
                  Start with:  capfilt doctor configs/demo.toml  and  capfilt run configs/demo.toml"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
    /// Say more about what is going on (twice: even more)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub(crate) verbose: u8,
    /// Write messages as JSON lines
    #[arg(long, global = true)]
    pub(crate) log_json: bool,
}

impl Cli {
    /// The arguments of this process; it ends here if they cannot be read. Flags of `download` may be written with `-` for `_`.
    pub(crate) fn read() -> Self {
        let dashes = |flag: clap::Arg| match flag.get_long().map(|long| long.replace('_', "-")) {
            // Names of flags live as long as the program.
            Some(long) if flag.get_long() != Some(&long) => flag.alias(&*long.leak()),
            _ => flag,
        };
        let matches = Self::command().mut_subcommand("download", |verb| verb.mut_args(dashes)).get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
    }
}

#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Do everything that a config asks for and that is not done yet, in this process
    Run(RunArgs),
    /// Fetch failed downloads again, and do everything that follows from it
    Retry(RetryArgs),
    /// Show what `run` would do, without doing it
    Plan(ViewArgs),
    /// Show how far a run is: stages, rounds, failures, history
    Status(ViewArgs),
    /// Download a list of image addresses into files for training, with img2dataset's flags and layouts
    Download(Box<DownloadArgs>),
    /// Caption images with a model, to try it by hand
    Caption(Box<CaptionArgs>),
    /// Score texts against images with a filter, a CLIP model or both, to try them by hand
    Score(ScoreArgs),
    /// Make query lists, and look at how they and texts meet
    #[command(subcommand)]
    Queries(QueriesVerb),
    /// Look at dataset versions, compare and export them
    #[command(subcommand)]
    Dataset(DatasetVerb),
    /// Look at models, and change which one plays a role
    #[command(subcommand)]
    Model(ModelVerb),
    /// Check and clean the store
    #[command(subcommand)]
    Store(StoreVerb),
    /// Check that this machine and a config are fit for a run
    Doctor(DoctorArgs),
}

/// Which config, and what to change in it.
#[derive(Args, Debug)]
pub(crate) struct ConfigArgs {
    /// The config, a TOML file; paths in it start from its folder
    pub(crate) config: PathBuf,
    /// Change a setting: `build.min_itm=0.6`, `run.rounds=3`, `models.captioner=promoted`; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Where models work and train, in place of `worker.vision.device` and `worker.trainer.device`: `cpu`, `cuda` or `cuda:N`
    #[arg(long)]
    pub(crate) device: Option<String>,
}

impl ConfigArgs {
    /// The config with what is changed in it.
    pub(crate) fn load(&self) -> Result<RunConfig, Failure> {
        let named = |device| ["vision", "trainer"].map(|part| format!("worker.{part}.device={device}"));
        let device = self.device.iter().flat_map(named);
        RunConfig::load(&self.config, &self.set.iter().cloned().chain(device).collect::<Vec<_>>())
    }
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Show the plan only
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Try tasks again that were given up
    #[arg(long)]
    pub(crate) retry_failed: bool,
    /// Write the result as JSON to standard output; progress goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "The samples are those that a first success would have given: captions, scores and the dataset follow for the \
                        shards that change. A retry that was interrupted goes on with the same command, or with `capfilt run`; \
                        asked for again when it is over, it tries again what still fails."
)]
pub(crate) struct RetryArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Statuses of the rows to fetch again; without it those that may pass: `dns`, `connect`, `tls`, `timeout`, `http_429`, `http_5xx`,
    /// `truncated`
    #[arg(long, value_name = "STATUS", value_delimiter = ',', num_args = 1)]
    pub(crate) status: Vec<String>,
    /// Show how many rows would be fetched again
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Write the result as JSON to standard output; progress goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
}

// For verbs that look and change nothing.
#[derive(Args, Debug)]
pub(crate) struct ViewArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    pub(crate) view: ViewArgs,
    /// Measure bandwidth: download this address for up to ten seconds
    #[arg(long, value_name = "URL")]
    pub(crate) bandwidth: Option<url::Url>,
}

/// Where the store is.
#[derive(Args, Debug)]
pub(crate) struct StoreArgs {
    /// The store: a folder or a URL, or a config whose store is meant
    #[arg(long, short, value_name = "STORE|CONFIG")]
    pub(crate) store: String,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum QueriesVerb {
    /// Make a query list of Wikipedia, its page views and WordNet, by CLIP's recipe
    #[command(after_help = "Where the files come from:\n  \
        --dump        dumps.wikimedia.org/enwiki/latest/enwiki-latest-pages-articles-multistream.xml.bz2 (its index is not needed)\n  \
        --page-views  dumps.wikimedia.org/other/pageviews/ (hours), other/pageview_complete/ (days, months); MetaCLIP took all hours of 26 days\n  \
        --wordnet     the folder `dict` of WordNet 3, or /usr/share/wordnet of Debian's wordnet-base\n\n\
        The budget goes to WordNet first, then to words, pairs of words and titles; within each the more frequent come first.\n\n\
        The defaults are the thresholds of MetaCLIP's table 1. A PMI of 30 bits leaves, of the English Wikipedia, pairs of words that \
        are hardly used but together; for phrases in common use: --bigram-pmi 8 --bigram-count 100.")]
    Build(Box<QueriesBuildArgs>),
    /// Show what a query table holds and how it was made
    Show(QueriesShowArgs),
    /// Show how a run's texts are spread over the queries, before and after balancing
    #[command(
        after_help = "To compare with: MetaCLIP (arXiv 2309.16671) reports, for 1.6 billion matched texts and 500,000 queries, that \
                            about half of all texts match, with 3.5 entries per text; that 114,000 queries match nothing; and that \
                            the 16,000 queries above 20,000 texts hold 94.5% of all entries."
    )]
    Stats(QueriesStatsArgs),
}

#[derive(Args, Debug)]
pub(crate) struct QueriesBuildArgs {
    /// Where to: a `.parquet` file, which runs read as `queries.path`
    #[arg(long, short)]
    pub(crate) out: PathBuf,
    /// A Wikipedia dump (pages-articles): .xml, .xml.gz, .xml.bz2 of one or many streams; may be given many times
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) dump: Vec<PathBuf>,
    /// Words with their counts (`word<TAB>count`, also .gz), in place of a dump's words
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) word_counts: Vec<PathBuf>,
    /// Wikimedia's page view files, of hours, days or months
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) page_views: Vec<PathBuf>,
    /// Titles, one a line, that need no page views
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) titles: Vec<PathBuf>,
    /// A folder with WordNet's data.noun, data.verb, data.adj and data.adv
    #[arg(long, value_name = "FOLDER")]
    pub(crate) wordnet: Vec<PathBuf>,
    /// The most queries
    #[arg(long, default_value_t = 500_000)]
    pub(crate) budget: usize,
    /// Words used at least this often
    #[arg(long, value_name = "USES", default_value_t = 100)]
    pub(crate) unigram_count: u64,
    /// Pairs of words with at least this pointwise mutual information, in bits (log2, over all words)
    #[arg(long, value_name = "BITS", default_value_t = 30.0, allow_negative_numbers = true)]
    pub(crate) bigram_pmi: f64,
    /// Pairs of words used at least this often
    #[arg(long, value_name = "USES", default_value_t = 1)]
    pub(crate) bigram_count: u64,
    /// Titles with at least this many views, over all page view files
    #[arg(long, value_name = "VIEWS", default_value_t = 70)]
    pub(crate) title_views: u64,
    /// The wiki whose page views count and whose titles are read
    #[arg(long, default_value = "en")]
    pub(crate) wiki: String,
    /// Memory to stay within, roughly, in MiB; what does not fit is kept in files meanwhile
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub(crate) memory: usize,
    /// Threads; by default one for each core
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Where those files are; by default beside the table
    #[arg(long, value_name = "FOLDER")]
    pub(crate) work_dir: Option<PathBuf>,
    /// Replace what is there
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Count and show the result, but write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Write the result as JSON to standard output; progress goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct QueriesShowArgs {
    /// A list: a table of `queries build`, a text file with one query a line, or Parquet with a column `text`
    pub(crate) list: PathBuf,
    /// Examples shown of each source
    #[arg(long, default_value_t = 5)]
    pub(crate) examples: usize,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct QueriesStatsArgs {
    /// A config, or a store, of which the newest balanced run is meant
    #[arg(value_name = "CONFIG|STORE")]
    pub(crate) from: String,
    /// Change a setting of the config: `balance.per_query=1000`; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// The run that is meant, in a store
    #[arg(long)]
    pub(crate) run: Option<String>,
    /// The query list, for the names of queries; that of the config if not given
    #[arg(long, value_name = "FILE")]
    pub(crate) queries: Option<PathBuf>,
    /// How many of the most frequent queries to list
    #[arg(long, default_value_t = 20)]
    pub(crate) top: usize,
    /// Draw the rank-count curve and the cumulative counts into a file that ends in .svg or .html
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Subcommand, Debug)]
pub(crate) enum DatasetVerb {
    /// List datasets and their versions
    List(StoreArgs),
    /// Show one version: counts, funnel, settings, lineage
    Show(DatasetArgs),
    /// Show what moved between two versions
    Diff(DiffArgs),
    /// Copy a version out, with its images
    Export(ExportArgs),
    /// Take images down: by address, host or hash, out of every new version and export
    Takedown(TakedownArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DatasetArgs {
    /// The dataset, `name` for the newest version or `name@3`
    pub(crate) dataset: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct DiffArgs {
    /// The older version, `name@1`
    pub(crate) from: String,
    /// The newer version, `name@2`, or `name` for the newest
    pub(crate) to: String,
    /// Examples shown of what came and went
    #[arg(long, default_value_t = 5)]
    pub(crate) examples: usize,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// The dataset, `name` for the newest version or `name@3`
    pub(crate) dataset: String,
    /// Where to; must not exist, or hold the same export
    #[arg(long, short)]
    pub(crate) out: PathBuf,
    /// Formats
    #[arg(long, value_enum, value_delimiter = ',', default_value = "webdataset,parquet,blip")]
    pub(crate) format: Vec<Format>,
    /// Replace what is there
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Afterwards `capfilt run` builds a version without them, and `capfilt store sweep` removes their bytes from the store. \
                        Models that were trained on them, and copies outside of the store, are not reached."
)]
pub(crate) struct TakedownArgs {
    /// The address of an image; `http` and `https` are the same; may be given many times
    #[arg(long, value_name = "URL")]
    pub(crate) url: Vec<String>,
    /// A host of images, with all hosts below it; may be given many times
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Vec<String>,
    /// The SHA-256 of an image as its server sent it; may be given many times
    #[arg(long, value_name = "DIGEST")]
    pub(crate) sha256: Vec<String>,
    /// A text file with an address, a host or a SHA-256 a line; `-` is standard input
    #[arg(long, value_name = "LIST")]
    pub(crate) file: Option<PathBuf>,
    /// Also every image with the same bytes as one that is found in the store
    #[arg(long)]
    pub(crate) copies: bool,
    /// Why, for the record
    #[arg(long)]
    pub(crate) reason: Option<String>,
    /// Show what it would reach
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Show the takedowns made so far
    #[arg(long, conflicts_with_all = ["url", "host", "sha256", "file", "copies", "reason", "dry_run"])]
    pub(crate) list: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Format {
    /// Tar files for the Python `webdataset` package and its like
    Webdataset,
    /// Parquet that Hugging Face `datasets` opens with its image feature
    Parquet,
    /// BLIP's JSON list beside a folder of images
    Blip,
}

impl Format {
    /// The coordinator's name for it.
    pub(crate) const fn into_export(self) -> export::Format {
        match self {
            Self::Webdataset => export::Format::Webdataset,
            Self::Parquet => export::Format::Parquet,
            Self::Blip => export::Format::Blip,
        }
    }
}

#[derive(Subcommand, Debug)]
pub(crate) enum ModelVerb {
    /// List the roles, who plays them, and their history
    List(StoreArgs),
    /// Show a model: its roles, config and metrics
    Show(ModelArgs),
    /// Put a checkpoint of any format into the store
    #[command(after_help = MODEL_NAMES)]
    Import(ImportArgs),
    /// Write a model as a folder that Hugging Face transformers opens
    #[command(after_help = MODEL_NAMES)]
    Export(ModelExportArgs),
    /// Let a model play a role
    #[command(after_help = MODEL_NAMES)]
    Promote(PromoteArgs),
    /// Give a role back to the model that played it before
    Rollback(RollbackArgs),
}

/// How models are named.
const MODEL_NAMES: &str = "How a model is named:\n  \
    owner/name           a repository of the Hugging Face hub; owner/name@REVISION is its branch, tag, pull request (refs/pr/18) or commit\n  \
    folder               a local checkpoint; it comes before a repository of the same name\n  \
    captioner, filter    what plays the role in the store\n  \
    1a2b3c               a model of the store, by the first characters of its digest\n\n\
    ./name is always a folder, hf:owner/name always a repository. Checkpoints are those of BLIP, CLIP and SigLIP in the layout of \
    transformers, OpenCLIP's, and BLIP's own .pth files with a tokenizer.json beside: safetensors, .bin, .pth, also in shards.\n\n\
    The hub: files go to the cache of its own tools, and are not fetched twice (HF_HOME, HF_HUB_CACHE). HF_TOKEN opens restricted \
    repositories, HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 keeps to the cache.";

#[derive(Args, Debug)]
pub(crate) struct ImportArgs {
    /// The checkpoint
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// Let it play this role: `captioner` or `filter`
    #[arg(long)]
    pub(crate) role: Option<String>,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ModelExportArgs {
    /// The model
    pub(crate) model: String,
    /// Where to: a folder that is not there, or empty
    pub(crate) folder: PathBuf,
    /// Which member of a model with `folds` or `repeats`, counted from 0
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) member: usize,
    /// Replace what is there
    #[arg(long)]
    pub(crate) overwrite: bool,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// A role (`captioner`, `filter`) or a digest, of which the first characters do
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PromoteArgs {
    /// The role: `captioner` or `filter`
    pub(crate) role: String,
    /// The model
    pub(crate) model: String,
    /// Why, for the history
    #[arg(long, default_value = "by hand")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Args, Debug)]
pub(crate) struct RollbackArgs {
    /// The role: `captioner` or `filter`
    pub(crate) role: String,
    /// Why, for the history
    #[arg(long, default_value = "by hand")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) store: StoreArgs,
}

#[derive(Subcommand, Debug)]
pub(crate) enum StoreVerb {
    /// Read every record and every object that a record names, and report what does not fit
    Check(StoreArgs),
    /// Remove objects that no record names, and the bytes of what was taken down
    Sweep(SweepArgs),
}

#[derive(Args, Debug)]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    pub(crate) store: StoreArgs,
    /// Leave objects younger than this many hours: they may belong to a worker that is about to commit
    #[arg(long, default_value_t = 24.0)]
    pub(crate) grace_hours: f64,
    /// Only count
    #[arg(long)]
    pub(crate) dry_run: bool,
}
