//! Building a dataset version: join, deduplicate, filter, mix.
//!
//! The scores are in the store; everything that decides over them is here, so that a new threshold costs a query and no model.
//! `samples`, `captions` and `scores` are row-aligned (row i answers row i), so their join is a zip: no hash table, no sort, and a
//! shard that does not answer its neighbour is found at once. Images are judged first (`images.rs`: size, exact and near duplicates,
//! held-out set), on hashes alone; then, if more was selected
//! than may stay, the cap per query is applied again (`cap.rs`); then the texts of the images that stay (`texts.rs`: the policy), in SQL. Pixels are never read.

mod config;
mod images;
mod texts;

use std::collections::BTreeMap;
use std::sync::Arc;

use capfilt_schemas::{Digest, Funnel, Origin, Output, StatusCounts, Table};
use capfilt_store::{Store, TakenDown};
use serde_json::{Value, json};

pub use config::{BuildConfig, Policy, Score};
pub use texts::normalise;

use crate::Result;
use crate::cap::HardCap;
use crate::readers::Readers;
use crate::sql::{Sql, SqlConfig};

/// Raised whenever the same inputs would give another dataset than before.
pub const STAGE_VERSION: u32 = 1;

/// Bins of the score histograms: bin i holds scores from i/20 up to, but not including, (i + 1)/20; 1 is in the last.
pub const BINS: usize = 20;

/// A shard of samples and what the models made of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Triplet {
    /// The `samples` shard.
    pub samples: Digest,
    /// The `captions` shard that answers it.
    pub captions: Digest,
    /// The `scores` shard that answers both.
    pub scores: Digest,
}

/// What a dataset is built from. The order of shards does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildInputs {
    /// Pairs found before balancing: for the funnel only.
    pub candidates: u64,
    /// Pairs selected for the download: for the funnel only.
    pub selected: u64,
    /// The web pairs.
    pub triplets: Vec<Triplet>,
    /// In place of those, `samples` shards that no model has judged: every text is kept.
    pub unjudged: Vec<Digest>,
    /// The cap on what was fetched for each query, if more was selected than may stay; see
    /// [`BalanceConfig::expected_success`](crate::balance::BalanceConfig::expected_success).
    pub cap: Option<HardCap>,
    /// `annotated` shards to mix in.
    pub annotated: Vec<Digest>,
    /// `annotated` shards on which models are judged; their images must not get into the dataset.
    pub heldout: Vec<Digest>,
    /// What must not be in the dataset.
    pub taken_down: Arc<TakenDown>,
}

/// What a build gave.
#[derive(Clone, Debug, PartialEq)]
pub struct BuildOutcome {
    /// The `dataset` shards, sorted by (`sample_id`, `origin`, `text`) over all of them. None if nothing was kept.
    pub shards: Vec<Output>,
    /// Kept texts by origin; all three origins are there.
    pub counts: StatusCounts,
    /// The way of the pairs: `candidates`, `selected`, `fetched`, `large enough`, `unique (exact)`, `unique (perceptual)`,
    /// `not held out` and, with a cap, `within per_query` count images; `texts judged`, `kept web`, `kept synthetic`, `added human` count texts.
    pub funnel: Funnel,
    /// Rejected by judged texts, web and synthetic; `None` if none was judged.
    pub noise_ratio: Option<f64>,
    /// `fetch_status` (rows by status, those that were taken down since under `taken_down`), `duplicates`, `texts` by origin (`judged`, `kept`, `unjudged`, `noise_ratio`),
    /// `itm_histogram` by origin ([`BINS`] counts of judged texts), `human` (images and texts, and images dropped as held out).
    pub facts: Value,
}

/// Builds a dataset. The same inputs and settings give the same bytes, in whatever order the inputs come.
///
/// Of the images that are duplicates of each other the one with the smallest `sample_id` stays, but an annotated one (if
/// `human` is on) stays before any from the web. Near duplicates are found greedily in that order: every image dropped is within
/// `max_phash_distance` of one that stayed.
///
/// # Errors
/// [`CoordinatorError::Setting`](crate::CoordinatorError::Setting) for settings that cannot be used;
/// [`CoordinatorError::Store`](crate::CoordinatorError::Store) and [`CoordinatorError::Rows`](crate::CoordinatorError::Rows) for a
/// shard that is missing, damaged or does not answer its neighbour; [`CoordinatorError::Memory`](crate::CoordinatorError::Memory)
/// and [`CoordinatorError::Sql`](crate::CoordinatorError::Sql).
pub async fn build(store: &Store, sql: &SqlConfig, config: &BuildConfig, inputs: BuildInputs) -> Result<BuildOutcome> {
    config.validate()?;
    let sorted = |mut digests: Vec<Digest>| {
        digests.sort_unstable();
        digests.dedup();
        digests
    };
    let mut triplets = inputs.triplets;
    triplets.sort_unstable();
    triplets.dedup();
    let annotated = if config.human { sorted(inputs.annotated) } else { Vec::new() };
    let heldout = sorted(inputs.heldout);
    let unjudged = if triplets.is_empty() { sorted(inputs.unjudged) } else { Vec::new() };
    let job = Job { store, sql: Sql::new(sql)?, config, triplets, unjudged, annotated, heldout, taken_down: inputs.taken_down };
    let mut images = job.images().await?;
    // The cap comes last: a query whose images were lost, small or known already makes up for them with others that it has.
    if let Some(cap) = inputs.cap {
        let readers = Readers::new(store, Table::Samples, &job.samples(), sql.threads());
        images.web = Arc::new(cap.keep(&readers, &images.web, (sql.memory_mib << 20) / 2).await?);
    }
    let within = images.web.len();
    let texts = job.texts(&images).await?;
    let mut steps = vec![
        ("candidates", inputs.candidates),
        ("selected", inputs.selected),
        ("fetched", images.fetched),
        ("large enough", images.large),
        ("unique (exact)", images.unique),
        ("unique (perceptual)", images.distinct),
        ("not held out", images.kept),
    ];
    steps.extend(inputs.cap.map(|_| ("within per_query", within)));
    steps.extend([
        ("texts judged", texts.judged(&[Origin::Web, Origin::Synthetic])),
        ("kept web", texts.kept(Origin::Web)),
        ("kept synthetic", texts.kept(Origin::Synthetic)),
        ("added human", texts.kept(Origin::Human)),
    ]);
    let judged: BTreeMap<_, _> = [Origin::Web, Origin::Synthetic].iter().map(|o| (o.as_str(), texts.facts(*o))).collect();
    let facts = json!({
        "fetch_status": images.statuses,
        "duplicates": {
            "exact": images.large - images.unique,
            "perceptual": images.unique - images.distinct,
            "held_out": images.distinct - images.kept,
        },
        "texts": judged,
        "itm_histogram": texts.histograms,
        "human": {
            "images": images.human,
            "held_out": images.human_heldout,
            "texts": texts.kept(Origin::Human),
        },
    });
    Ok(BuildOutcome {
        counts: Origin::ALL.iter().map(|o| (o.as_str().to_owned(), texts.kept(*o))).collect(),
        funnel: Funnel { steps: steps.into_iter().map(|(name, n)| (name.to_owned(), n)).collect() },
        noise_ratio: texts.noise_ratio(&[Origin::Web, Origin::Synthetic]),
        facts,
        shards: texts.shards,
    })
}

/// One build.
struct Job<'a> {
    store: &'a Store,
    sql: Sql,
    config: &'a BuildConfig,
    triplets: Vec<Triplet>,
    unjudged: Vec<Digest>,
    annotated: Vec<Digest>,
    heldout: Vec<Digest>,
    taken_down: Arc<TakenDown>,
}

impl Job<'_> {
    /// The `samples` shards: the parts of the web tables.
    fn samples(&self) -> Vec<Digest> {
        self.triplets.iter().map(|t| t.samples).chain(self.unjudged.iter().copied()).collect()
    }
}

#[cfg(test)]
mod tests;
