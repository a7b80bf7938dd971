//! Balancing: which of the candidates to fetch. One pair for each image address, then at most `per_query` pairs for a query.
//!
//! This is the last step of CLIP's WIT recipe (arXiv 2103.00020, section 2.2: "up to 20,000 pairs per query") as a hard cap: each
//! query takes the `per_query` of its pairs with the smallest [`draw`], and a pair stays if at least one query took it. Queries
//! draw independently, as in `MetaCLIP` (arXiv 2309.16671), so that a pair refused by a frequent query can be kept by a rare one.
//!
//! The work is three passes over the candidates, each a plain window or sort that spills to disk; what a pass found out goes to
//! the next as a bit a row or a border a query, never as a join.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{
    Array, ArrayRef, AsArray, ListArray, ListBuilder, RecordBatch, StringArray, StringBuilder, UInt32Builder, UInt64Array,
    UInt64Builder,
};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef, UInt32Type, UInt64Type};
use capfilt_schemas::{Digest, Output, StatusCounts, Table, TextSource, column};
use capfilt_store::Store;
use datafusion::common::ScalarValue;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::scan::{self, Map, RowSet, Scan, Slice};
use crate::shards::Shards;
use crate::sql::{Sql, SqlConfig};
use crate::{CoordinatorError, Result};

/// Raised whenever the same candidates would give other pairs than before.
pub const STAGE_VERSION: u32 = 1;

/// Which candidates count as the same pair.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dedup {
    /// One pair for an image address: the text from the best [`TextSource`], among equals the one with the smallest draw.
    #[default]
    Url,
    /// One pair for an image address and text.
    UrlText,
}

/// What is fetched. All of it is part of the task's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalanceConfig {
    /// The most pairs that one query may take.
    pub per_query: u64,
    /// Which candidates count as the same pair.
    pub dedup: Dedup,
    /// The most pairs in all; those with the smallest draw stay. Absent: no such cap. Under it a query may end below `per_query`.
    pub max_pairs: Option<u64>,
    /// Decides all draws.
    pub seed: u64,
    /// Pairs in a `selected` shard: the size of a fetch, caption and score task.
    pub shard_rows: usize,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self { per_query: 20_000, dedup: Dedup::Url, max_pairs: None, seed: 0, shard_rows: 1000 }
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
            _ => Ok(()),
        }
    }
}

/// What balancing gave.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceOutcome {
    /// The `selected` shards, sorted by `sample_id` over all of them.
    pub outputs: Vec<Output>,
    /// `ok`: the selected pairs.
    pub counts: StatusCounts,
    /// `candidates`, `matched` (hold a query), `unique` (after deduplication), `selected`; `queries_matched`, `queries_capped`;
    /// `heads`: the twenty queries with most matches, as `{query, matches}`.
    pub facts: Value,
}

/// The number by which a query chooses among its pairs, smallest first: the first 8 bytes, big-endian, of SHA-256 over `seed`
/// (8 bytes, little-endian), `query` (4 bytes, little-endian) and the sample id.
#[must_use]
pub fn draw(seed: u64, query: u32, sample_id: &str) -> u64 {
    let hash =
        Sha256::new().chain_update(seed.to_le_bytes()).chain_update(query.to_le_bytes()).chain_update(sample_id).finalize();
    hash.iter().take(8).fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// Takes the place of a query in draws that are not a query's.
const NO_QUERY: u32 = u32::MAX;

/// Selects what to fetch from `candidates` shards. The order of `inputs`, and how the rows are spread over them, does not matter.
///
/// # Errors
/// [`CoordinatorError::Setting`] for settings that cannot be used; [`CoordinatorError::Store`] and [`CoordinatorError::Rows`] for a
/// shard that is missing or damaged; [`CoordinatorError::Memory`] and [`CoordinatorError::Sql`].
pub async fn balance(store: &Store, sql: &SqlConfig, config: &BalanceConfig, inputs: &[Digest]) -> Result<BalanceOutcome> {
    config.validate()?;
    let mut shards = inputs.to_vec();
    shards.sort_unstable();
    shards.dedup();
    let job = Job { store, sql: Sql::new(sql)?, config, shards };
    let unique = job.unique().await?;
    let rows = Arc::new(unique.rows);
    let queries = job.borders(&rows).await?;
    let outputs = job.select(&rows, queries.borders).await?;
    let selected: u64 = outputs.iter().map(|o| o.rows).sum();
    let facts = json!({
        "candidates": unique.candidates,
        "matched": unique.matched,
        "unique": unique.unique,
        "selected": selected,
        "queries_matched": queries.matched,
        "queries_capped": queries.capped,
        "heads": queries.heads.iter().map(|(query, matches)| json!({"query": query, "matches": matches})).collect::<Vec<_>>(),
    });
    Ok(BalanceOutcome { outputs, counts: StatusCounts::from([("ok".to_owned(), selected)]), facts })
}

struct Job<'a> {
    store: &'a Store,
    sql: Sql,
    config: &'a BalanceConfig,
    shards: Vec<Digest>,
}

struct Unique {
    rows: RowSet,
    candidates: u64,
    matched: u64,
    unique: u64,
}

struct Queries {
    borders: Borders,
    matched: u64,
    capped: u64,
    heads: Vec<(u32, u64)>,
}

/// The last (draw, sample id) that a query takes; queries that take all they have are absent.
type Borders = HashMap<u32, (u64, String)>;

/// One candidate for each key, the best first. `sample_id` stands for address and text, so the order leaves no ties that matter.
const UNIQUE: &str = "
    SELECT part, row_no
    FROM (SELECT part, row_no,
                 row_number() OVER (PARTITION BY key
                                    ORDER BY source_rank, pick, sample_id, page_url, source, part, row_no) AS nth
          FROM candidates)
    WHERE nth = 1";

/// For each query how many pairs it has, and the draw of the last one that it may take, if it has as many.
const BORDERS: &str = "
    SELECT query,
           count(*) AS matches,
           max(CASE WHEN nth = $per_query THEN draw END) AS last_draw,
           max(CASE WHEN nth = $per_query THEN sample_id END) AS last_sample
    FROM (SELECT query, draw, sample_id,
                 row_number() OVER (PARTITION BY query ORDER BY draw, sample_id) AS nth
          FROM matches)
    GROUP BY query";

/// All that some query took.
const SELECTED: &str = "SELECT * FROM taken ORDER BY sample_id";

/// The same under `max_pairs`.
const SELECTED_CAPPED: &str = "
    SELECT *
    FROM (SELECT *, row_number() OVER (ORDER BY pick, sample_id) AS nth FROM taken)
    WHERE nth <= $max_pairs
    ORDER BY sample_id";

impl Job<'_> {
    fn scan(&self, columns: &'static [&'static str]) -> Scan {
        Scan::of(self.store, Table::Candidates, &self.shards, columns)
    }

    async fn unique(&self) -> Result<Unique> {
        let seen = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let (counted, config) = (Arc::clone(&seen), self.config.clone());
        let schema = candidate_schema();
        let map: Map = Arc::new(move |scan, slice| {
            counted.0.fetch_add(slice.rows.len() as u64, Ordering::Relaxed);
            let rows = candidate_rows(scan, slice, &config)?;
            counted.1.fetch_add(rows.num_rows() as u64, Ordering::Relaxed);
            Ok(rows)
        });
        const COLUMNS: &[&str] =
            &[column::SAMPLE_ID, column::URL, column::TEXT_SOURCE, column::PAGE_URL, column::SOURCE, column::QUERIES];
        self.scan(COLUMNS).register(&self.sql, "candidates", &schema, &map)?;
        let (mut rows, mut unique) = (RowSet::default(), 0);
        let mut found = self.sql.query("unique candidates", UNIQUE, &[]).await?;
        while let Some(batch) = found.next().await? {
            let (parts, numbers) = (batch.column(0).as_primitive::<UInt32Type>(), batch.column(1).as_primitive::<UInt32Type>());
            for (part, row) in parts.values().iter().zip(numbers.values()) {
                rows.insert(*part, *row);
            }
            unique += batch.num_rows() as u64;
        }
        Ok(Unique { rows, candidates: seen.0.load(Ordering::Relaxed), matched: seen.1.load(Ordering::Relaxed), unique })
    }

    async fn borders(&self, rows: &Arc<RowSet>) -> Result<Queries> {
        let schema = Arc::new(Schema::new(vec![
            Field::new("query", DataType::UInt32, false),
            Field::new("draw", DataType::UInt64, false),
            Field::new(column::SAMPLE_ID, DataType::Utf8, false),
        ]));
        let (seed, columns) = (self.config.seed, Arc::clone(&schema));
        let map: Map = Arc::new(move |_, slice| match_rows(slice, seed, &columns));
        let scan = Scan { only: Some(Arc::clone(rows)), ..self.scan(&[column::SAMPLE_ID, column::QUERIES]) };
        scan.register(&self.sql, "matches", &schema, &map)?;
        let mut queries = Queries { borders: Borders::new(), matched: 0, capped: 0, heads: Vec::new() };
        let per_query = [("per_query", ScalarValue::UInt64(Some(self.config.per_query)))];
        let mut found = self.sql.query("cap per query", BORDERS, &per_query).await?;
        while let Some(batch) = found.next().await? {
            let query = batch.column(0).as_primitive::<UInt32Type>();
            let matches = batch.column(1).as_primitive::<Int64Type>();
            let draws = batch.column(2).as_primitive::<UInt64Type>();
            let samples = batch.column(3).as_string::<i32>();
            for i in 0..batch.num_rows() {
                let count = matches.value(i).unsigned_abs();
                queries.matched += 1;
                queries.heads.push((query.value(i), count));
                if count > self.config.per_query && draws.is_valid(i) {
                    queries.capped += 1;
                    queries.borders.insert(query.value(i), (draws.value(i), samples.value(i).to_owned()));
                }
            }
            queries.heads.sort_unstable_by_key(|(query, matches)| (std::cmp::Reverse(*matches), *query));
            queries.heads.truncate(20);
        }
        Ok(queries)
    }

    async fn select(&self, rows: &Arc<RowSet>, borders: Borders) -> Result<Vec<Output>> {
        let mut fields: Vec<_> = Table::Selected.schema().fields().iter().cloned().collect();
        fields.push(Arc::new(Field::new("pick", DataType::UInt64, false)));
        let schema = Arc::new(Schema::new(fields));
        let (seed, columns) = (self.config.seed, Arc::clone(&schema));
        let map: Map = Arc::new(move |_, slice| taken_rows(slice, seed, &borders, &columns));
        const COLUMNS: &[&str] = &[
            column::SAMPLE_ID,
            column::URL,
            column::TEXT,
            column::TEXT_SOURCE,
            column::PAGE_URL,
            column::SOURCE,
            column::QUERIES,
        ];
        let scan = Scan { only: Some(Arc::clone(rows)), ..self.scan(COLUMNS) };
        scan.register(&self.sql, "taken", &schema, &map)?;
        let mut found = match self.config.max_pairs {
            None => self.sql.query("selected pairs", SELECTED, &[]).await?,
            Some(max) => {
                let max = [("max_pairs", ScalarValue::UInt64(Some(max)))];
                self.sql.query("selected pairs", SELECTED_CAPPED, &max).await?
            }
        };
        let schema = Table::Selected.schema();
        let mut shards = Shards::new(self.store, Table::Selected, self.config.shard_rows);
        while let Some(batch) = found.next().await? {
            let columns = batch.columns().iter().take(schema.fields().len()).cloned().collect();
            shards.write(&scan::batch("selected pairs", &schema, columns)?).await?;
        }
        shards.finish().await
    }
}

fn candidate_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("part", DataType::UInt32, false),
        Field::new("row_no", DataType::UInt32, false),
        Field::new("key", DataType::Utf8, false),
        Field::new("source_rank", DataType::UInt32, false),
        Field::new("pick", DataType::UInt64, false),
        Field::new(column::SAMPLE_ID, DataType::Utf8, false),
        Field::new(column::PAGE_URL, DataType::Utf8, true),
        Field::new(column::SOURCE, DataType::Utf8, false),
    ]))
}

/// The candidates that hold a query at all, with what decides between those of the same key.
fn candidate_rows(scan: &Scan, slice: &Slice, config: &BalanceConfig) -> Result<RecordBatch> {
    let [id, url, text_source, page, source, queries] = slice.batches[0].columns() else {
        return Err(scan.bad(0, slice.part, "lacks columns"));
    };
    let (id, queries) = (id.as_string::<i32>(), queries.as_list::<i32>());
    let key = match config.dedup {
        Dedup::Url => url.as_string::<i32>(),
        Dedup::UrlText => id,
    };
    let mut ranks = UInt32Builder::with_capacity(id.len());
    for name in text_source.as_string::<i32>() {
        let name = name.unwrap_or_default();
        let place = TextSource::parse(name).and_then(|s| TextSource::ALL.iter().position(|t| *t == s));
        let rank = place.and_then(|p| u32::try_from(p).ok());
        ranks.append_value(rank.ok_or_else(|| scan.bad(0, slice.part, format!("has the unknown text source `{name}`")))?);
    }
    let picks: UInt64Array = id.iter().map(|id| Some(draw(config.seed, NO_QUERY, id.unwrap_or_default()))).collect();
    let columns: Vec<ArrayRef> = vec![
        scan::part_column(slice),
        Arc::new(slice.rows.clone()),
        Arc::new(key.clone()),
        Arc::new(ranks.finish()),
        Arc::new(picks),
        Arc::new(id.clone()),
        Arc::clone(page),
        Arc::clone(source),
    ];
    let all = scan::batch("candidates", &candidate_schema(), columns)?;
    let matched = (0..queries.len()).map(|i| Some(queries.value_length(i) > 0)).collect();
    arrow::compute::filter_record_batch(&all, &matched).map_err(|e| scan::encode("candidates", e))
}

/// The queries of row `i`, each once.
fn queries_of(queries: &ListArray, i: usize) -> Vec<u32> {
    let mut all = queries.value(i).as_primitive::<UInt32Type>().values().to_vec();
    all.sort_unstable();
    all.dedup();
    all
}

/// One row a (query, pair).
fn match_rows(slice: &Slice, seed: u64, schema: &SchemaRef) -> Result<RecordBatch> {
    let ids = slice.batches[0].column(0).as_string::<i32>();
    let queries = slice.batches[0].column(1).as_list::<i32>();
    let (mut query, mut draws, mut samples) = (UInt32Builder::new(), UInt64Builder::new(), StringBuilder::new());
    for (i, id) in ids.iter().enumerate() {
        let id = id.unwrap_or_default();
        for q in queries_of(queries, i) {
            query.append_value(q);
            draws.append_value(draw(seed, q, id));
            samples.append_value(id);
        }
    }
    scan::batch("matches", schema, vec![Arc::new(query.finish()), Arc::new(draws.finish()), Arc::new(samples.finish())])
}

/// The pairs that some query takes, with those queries.
fn taken_rows(slice: &Slice, seed: u64, borders: &Borders, schema: &SchemaRef) -> Result<RecordBatch> {
    let pairs = &slice.batches[0];
    let ids: &StringArray = pairs.column(0).as_string();
    let queries = pairs.column(6).as_list::<i32>();
    let item = Arc::new(Field::new("item", DataType::UInt32, false));
    let mut takers = ListBuilder::new(UInt32Builder::new()).with_field(item);
    let mut taken = Vec::with_capacity(ids.len());
    for (i, id) in ids.iter().enumerate() {
        let id = id.unwrap_or_default();
        let takes = |q: &u32| borders.get(q).is_none_or(|(last, sample)| (draw(seed, *q, id), id) <= (*last, sample.as_str()));
        let of: Vec<u32> = queries_of(queries, i).into_iter().filter(takes).collect();
        taken.push(Some(!of.is_empty()));
        takers.append_value(of.into_iter().map(Some));
    }
    let picks: UInt64Array = ids.iter().map(|id| Some(draw(seed, NO_QUERY, id.unwrap_or_default()))).collect();
    let mut columns = pairs.columns().to_vec();
    columns.push(Arc::new(takers.finish()));
    columns.push(Arc::new(picks));
    let all = scan::batch("taken pairs", schema, columns)?;
    arrow::compute::filter_record_batch(&all, &taken.into_iter().collect()).map_err(|e| scan::encode("taken pairs", e))
}

#[cfg(test)]
mod tests;
