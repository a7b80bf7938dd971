//! The command line.

use std::path::PathBuf;

use capfilt_coordinator::export;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

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

#[derive(Subcommand, Debug)]
pub(crate) enum Verb {
    /// Do everything that a config asks for and that is not done yet, in this process
    Run(RunArgs),
    /// Show what `run` would do, without doing it
    Plan(ViewArgs),
    /// Show how far a run is: stages, rounds, failures, history
    Status(ViewArgs),
    /// Make query lists, and look at them
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
    Doctor(ViewArgs),
}

/// Which config, and what to change in it.
#[derive(Args, Debug)]
pub(crate) struct ConfigArgs {
    /// The config, a TOML file; paths in it start from its folder
    pub(crate) config: PathBuf,
    /// Change a setting: `build.min_itm=0.6`, `run.rounds=3`, `models.captioner=promoted`; may be given many times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
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

// For verbs that look and change nothing.
#[derive(Args, Debug)]
pub(crate) struct ViewArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Write JSON
    #[arg(long)]
    pub(crate) json: bool,
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
    /// The wiki whose page views count
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
    /// Let a model play a role
    Promote(PromoteArgs),
    /// Give a role back to the model that played it before
    Rollback(RollbackArgs),
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
    /// A digest, of which the first characters do, or a folder with a checkpoint
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
    /// Remove objects that no record names
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
