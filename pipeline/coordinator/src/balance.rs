//! Balancing: which of the candidates to fetch. One pair for each image address, then at most `per_query` pairs for a query.
//!
//! This is the last step of CLIP's WIT recipe (arXiv 2103.00020, section 2.2: "up to 20,000 pairs per query") as a hard cap, or
//! with `MetaCLIP`'s soft rule: see [`Rule`]. A pair stays if at least one of its queries takes it. Queries draw independently, as in
//! `MetaCLIP` (arXiv 2309.16671), so that a pair refused by a frequent query can be kept by a rare one.
//!
//! The work is four passes over the candidates, on all threads and in whatever order the rows come: which are unique
//! (`unique.rs`), how many each query has, where the borders of the frequent ones lie (`cap.rs`), and the rows that were taken
//! (`select.rs`). What a pass found out goes to the next as a bit a row, a counter or a border a query; there is no join, and no sort
//! of more than one partition.

mod select;
mod unique;

use std::sync::Arc;

use capfilt_schemas::{Digest, Output, StatusCounts, Table, column};
use capfilt_store::Store;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use crate::cap::HardCap;
use crate::cap::{Borders, Contest, DEVIATIONS, Pairs, Windows, contests};
use crate::draw::Draws;
use crate::readers::Readers;
use crate::scan::RowSet;
use crate::shards::each_once;
use crate::sql::SqlConfig;
use crate::{CoordinatorError, Result};

/// Raised whenever the same candidates would give other pairs than before.
pub const STAGE_VERSION: u32 = 3;

/// How a query that has more pairs than it may take chooses among them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// It takes exactly as many as it may, those with the smallest draws: CLIP's "up to 20,000 pairs per query" (arXiv 2103.00020,
    /// section 2.2).
    #[default]
    Cap,
    /// It takes each with probability t / max(count, t), so about t of them: `MetaCLIP`'s rule (arXiv 2309.16671, section 3.3).
    Soft,
}

/// Which candidates count as the same pair. Addresses are compared as they stand: what finds candidates has resolved them, with
/// scheme and host in lower case, default ports left out and fragments cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dedup {
    /// One pair for an image address: the text from the best [`TextSource`](capfilt_schemas::TextSource), among equals the one with
    /// the smallest draw.
    #[default]
    Url,
    /// One pair for an image address and text.
    UrlText,
}

/// What is fetched. All of it is part of the task's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// The most pairs that one query may take; with the soft rule, about how many it takes.
    pub per_query: u64,
    /// How a query with more pairs than that chooses.
    pub rule: Rule,
    /// The share of downloads that is expected to succeed, above 0 and at most 1. Each query takes `per_query` / `expected_success`
    /// pairs, so that about `per_query` of them arrive; should more arrive, the hard cap is applied again when the dataset is built.
    pub expected_success: f64,
    /// Which candidates count as the same pair.
    pub dedup: Dedup,
    /// The most pairs to fetch in all; those with the smallest draw stay. Absent: no such cap. Under it a query may end below
    /// `per_query`.
    pub max_pairs: Option<u64>,
    /// Decides all draws.
    pub seed: u64,
    /// Pairs in a `selected` shard: the size of a fetch, caption and score task.
    pub shard_rows: usize,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            per_query: 20_000,
            rule: Rule::Cap,
            expected_success: 1.0,
            dedup: Dedup::Url,
            max_pairs: None,
            seed: 0,
            shard_rows: 1000,
        }
    }
}

impl BalanceConfig {
    /// Refuses what would select nothing.
    ///
    /// # Errors
    /// [`CoordinatorError::Setting`].
    pub fn validate(&self) -> Result<()> {
        let bad = |setting, problem: &str| Err(CoordinatorError::Setting { setting, problem: problem.to_owned() });
        match self {
            Self { per_query: 0, .. } => bad("balance.per_query", "is 0, which selects nothing; use 1 or more (CLIP used 20000)"),
            Self { max_pairs: Some(0), .. } => bad("balance.max_pairs", "is 0, which selects nothing; leave it out for no cap"),
            Self { shard_rows: 0, .. } => bad("balance.shard_rows", "is 0; use 1 or more (1000 is usual)"),
            Self { expected_success, .. } if !(*expected_success >= 0.01 && *expected_success <= 1.0) => {
                let problem =
                    format!("is {expected_success}; a share of downloads is from 0.01 to 1 (0.7 is usual for old links)");
                bad("balance.expected_success", &problem)
            }
            _ => Ok(()),
        }
    }

    /// How many pairs a query takes for the download.
    pub(crate) fn quota(&self) -> u64 {
        (self.per_query as f64 / self.expected_success).ceil() as u64
    }

    /// The cap that has to be applied again to what was downloaded, because more was selected than it allows.
    #[must_use]
    pub fn cap_after_fetch(&self) -> Option<HardCap> {
        let surplus = self.rule == Rule::Cap && self.quota() > self.per_query;
        surplus.then_some(HardCap { per_query: self.per_query, seed: self.seed })
    }
}

/// What balancing gave.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceOutcome {
    /// The `selected` shards, sorted by `sample_id` over all of them.
    pub outputs: Vec<Output>,
    /// `ok`: the selected pairs.
    pub counts: StatusCounts,
    /// `candidates`, `matched` (hold a query), `unique` (after deduplication), `selected`; `matches` (queries of the unique pairs,
    /// all added up); `queries_matched`, `queries_capped`; `heads`: the twenty queries with most matches, as `{query, matches}`.
    pub facts: Value,
}

/// Selects what to fetch from `candidates` shards. The order of `inputs`, and how the rows are spread over them, does not matter.
///
/// `sql` says how much memory and how many threads to use, and where to put what does not fit.
///
/// # Errors
/// [`CoordinatorError::Setting`] for settings that cannot be used; [`CoordinatorError::Store`] and [`CoordinatorError::Rows`] for a
/// shard that is missing or damaged; [`CoordinatorError::Spill`] if the folder for what does not fit into memory is full.
pub async fn balance(store: &Store, sql: &SqlConfig, config: &BalanceConfig, inputs: &[Digest]) -> Result<BalanceOutcome> {
    config.validate()?;
    sql.validate()?;
    let shards = each_once(inputs.iter().copied());
    let threads = sql.threads();
    let job = Job { store, sql, config, threads, readers: Readers::new(store, Table::Candidates, &shards, threads) };
    let unique = job.unique().await?;
    tracing::info!(candidates = unique.candidates, unique = unique.unique, "unique candidates found");
    let rows = Arc::new(unique.rows);
    let pairs = job.pairs(&rows);
    let counts = pairs.counts().await?;
    let contests = contests(&counts, config.quota());
    let borders = Arc::new(job.borders(&pairs, &contests).await?);
    tracing::info!(capped = contests.len(), "borders of frequent queries found");
    let last_of_all = job.last_of_all(&pairs, &borders).await?;
    let outputs = job.select(&rows, &borders, last_of_all).await?;
    let selected: u64 = outputs.iter().map(|o| o.rows).sum();
    let heads = heads(&counts, 20).into_iter().map(|(query, matches)| json!({"query": query, "matches": matches}));
    let facts = json!({
        "candidates": unique.candidates,
        "matched": unique.matched,
        "unique": unique.unique,
        "selected": selected,
        "matches": counts.iter().sum::<u64>(),
        "queries_matched": counts.iter().filter(|n| **n > 0).count(),
        "queries_capped": contests.len(),
        "heads": heads.collect::<Vec<_>>(),
    });
    Ok(BalanceOutcome { outputs, counts: StatusCounts::from([("ok".to_owned(), selected)]), facts })
}

/// The `most` queries with the highest counts, highest first, among equals in the order of the list; those without any are left out.
pub(crate) fn heads(counts: &[u64], most: usize) -> Vec<(u32, u64)> {
    let mut heads: Vec<(u32, u64)> = (0..).zip(counts.iter().copied()).filter(|(_, n)| *n > 0).collect();
    let order = |(query, n): &(u32, u64)| (std::cmp::Reverse(*n), *query);
    if heads.len() > most {
        heads.select_nth_unstable_by_key(most, order);
        heads.truncate(most);
    }
    heads.sort_unstable_by_key(order);
    heads
}

struct Job<'a> {
    store: &'a Store,
    sql: &'a SqlConfig,
    config: &'a BalanceConfig,
    threads: usize,
    readers: Readers,
}

impl Job<'_> {
    fn pairs(&self, rows: &Arc<RowSet>) -> Pairs {
        const COLUMNS: &[&str; 2] = &[column::SAMPLE_ID, column::QUERIES];
        let memory = (self.sql.memory_mib << 20) / 2;
        Pairs { readers: self.readers.clone(), rows: Arc::clone(rows), columns: COLUMNS, memory, deviations: DEVIATIONS }
    }

    async fn borders(&self, pairs: &Pairs, contests: &[Contest]) -> Result<Borders> {
        if self.config.rule == Rule::Soft {
            return Ok(Borders::soft(contests));
        }
        pairs.query_borders(contests, Draws::new(self.config.seed)).await
    }

    /// The place of the last pair that `max_pairs` leaves of those that some query takes.
    async fn last_of_all(&self, pairs: &Pairs, borders: &Arc<Borders>) -> Result<u128> {
        let Some(max) = self.config.max_pairs else { return Ok(u128::MAX) };
        let draws = Draws::new(self.config.seed);
        let takes = {
            let borders = Arc::clone(borders);
            move |id: u128, queries: &[u32]| queries.iter().any(|q| borders.takes(draws, *q, id))
        };
        let taken = takes.clone();
        let count = move |n: &mut u64, id: u128, queries: &[u32]| *n += u64::from(taken(id, queries));
        let taken: u64 = pairs.each(self.readers.states(|| 0), count).await?.iter().sum();
        if taken <= max {
            return Ok(u128::MAX);
        }
        // All that was taken is one more contest, with a number of its own.
        let all = Contest { query: 0, count: taken, quota: max };
        let offer = move |windows: &mut Windows, id: u128, queries: &[u32]| {
            if takes(id, queries) {
                windows.offer(all.query, || draws.place_of_all(id));
            }
        };
        Ok(pairs.borders(&[all], offer).await?.of(all.query))
    }
}

#[cfg(test)]
mod tests;
