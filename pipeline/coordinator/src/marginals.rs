//! Marginals: how a run's texts are spread over the queries, before and after balancing. For people, not for another stage.
//!
//! These are the figures by which `MetaCLIP` describes its data (arXiv 2309.16671, section 3): the share of texts that match, entries
//! per text, entries that no text matches, and how much of all counts the head and the tail hold.

use capfilt_schemas::{Commit, Digest, Table, column};
use capfilt_store::Store;
use serde::Serialize;

use arrow::array::{AsArray, RecordBatch};

use crate::Result;
use crate::balance::{BalanceConfig, heads};
use crate::cap::{add, count};
use crate::draw::Wanted;
use crate::readers::Readers;
use crate::scan::Trust;
use crate::shards::each_once;
use crate::sql::SqlConfig;

/// How texts and queries meet in a run.
#[derive(Clone, Debug, Serialize)]
pub struct Marginals {
    /// Texts that the sources held, where the tasks that read them have noted it.
    pub texts_seen: Option<u64>,
    /// The share of them that hold a query.
    pub share_matched: Option<f64>,
    /// The count from which on a query belongs to the head: what one query may take.
    pub threshold: u64,
    /// Of the texts that hold a query, as they were found.
    pub before: Side,
    /// Of the pairs that were selected, counting for each the queries that took it; `None` before balancing.
    pub after: Option<Side>,
    /// The queries with the highest counts before balancing, highest first.
    pub top: Vec<Top>,
}

/// Counts of texts by query.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Side {
    /// Texts.
    pub texts: u64,
    /// Queries of all texts, added up.
    pub entries: u64,
    /// The mean of queries of a text.
    pub entries_per_text: f64,
    /// Texts by number of queries: place n counts those with n, the last place those with as many or more.
    pub texts_by_entries: Vec<u64>,
    /// Queries with at least one text.
    pub queries: u64,
    /// Queries with more texts than the threshold.
    pub head_queries: u64,
    /// Their share of all entries.
    pub head_share: f64,
    /// The share of the other queries.
    pub tail_share: f64,
    /// Texts by query.
    #[serde(skip)]
    pub counts: Vec<u64>,
}

/// A query and how many texts it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Top {
    /// Its place in the list.
    pub query: u32,
    /// Texts that were found for it.
    pub before: u64,
    /// Pairs that it took; `None` before balancing.
    pub after: Option<u64>,
}

/// Places of [`Side::texts_by_entries`].
const MOST_ENTRIES: usize = 21;

/// The marginals of what the `found` discover tasks and the `balanced` task wrote. `settings` say what the threshold is; the `top`
/// queries are listed.
///
/// # Errors
/// [`CoordinatorError::Store`](crate::CoordinatorError::Store) and [`CoordinatorError::Rows`](crate::CoordinatorError::Rows) for a
/// shard that is missing or damaged.
pub async fn marginals(
    store: &Store,
    sql: &SqlConfig,
    found: &[&Commit],
    balanced: Option<&Commit>,
    settings: &BalanceConfig,
    top: usize,
) -> Result<Marginals> {
    let fact = |name: &str| {
        let known = found.iter().filter_map(|c| c.facts[name].as_u64());
        known.reduce(|a, b| a + b)
    };
    let texts_seen = fact("texts_seen").filter(|n| *n > 0);
    let missed = fact("texts_without_query").unwrap_or(0);
    let threshold = settings.quota();
    let shards = |commits: &[&Commit]| each_once(commits.iter().flat_map(|c| c.outputs.iter().map(|o| o.digest)));
    let before = side(store, sql, Table::Candidates, &shards(found), &[column::QUERIES], threshold).await?;
    let after = match balanced {
        None => None,
        Some(b) => Some(side(store, sql, Table::Selected, &shards(&[b]), &[column::SELECTED_FOR], threshold).await?),
    };
    let of = |side: &Side, query: u32| side.counts.get(query as usize).copied().unwrap_or(0);
    let top = heads(&before.counts, top).into_iter();
    let top = top.map(|(query, n)| Top { query, before: n, after: after.as_ref().map(|side| of(side, query)) });
    Ok(Marginals {
        texts_seen,
        share_matched: texts_seen.map(|seen| seen.saturating_sub(missed) as f64 / seen as f64),
        threshold,
        top: top.collect(),
        before,
        after,
    })
}

async fn side(
    store: &Store,
    sql: &SqlConfig,
    table: Table,
    shards: &[Digest],
    list: &'static [&'static str; 1],
    threshold: u64,
) -> Result<Side> {
    let readers = Readers::new(store, table, shards, sql.threads());
    let source = readers.clone();
    let visit = move |side: &mut Side, part: u32, _: u32, batch: &RecordBatch| {
        let mut wanted = Wanted::new(batch.column(0).as_list());
        for i in 0..batch.num_rows() {
            let queries = wanted.queries(i);
            count(&mut side.counts, queries).map_err(|problem| source.bad(part, problem))?;
            side.texts += 1;
            side.texts_by_entries[queries.len().min(MOST_ENTRIES - 1)] += 1;
        }
        Ok(())
    };
    let states = readers.states(|| Side { texts_by_entries: vec![0; MOST_ENTRIES], ..Side::default() });
    let sides = readers.read(list, Trust::Ranges, states, visit).await?;
    let joined = sides.into_iter().reduce(|a, b| Side {
        texts: a.texts + b.texts,
        texts_by_entries: add(a.texts_by_entries, b.texts_by_entries),
        counts: add(a.counts, b.counts),
        ..Side::default()
    });
    Ok(joined.unwrap_or_default().summed_up(threshold))
}

impl Side {
    fn summed_up(self, threshold: u64) -> Self {
        let entries: u64 = self.counts.iter().sum();
        let head: u64 = self.counts.iter().filter(|n| **n > threshold).sum();
        let share = |part: u64, of: u64| if of == 0 { 0.0 } else { part as f64 / of as f64 };
        Self {
            entries,
            entries_per_text: share(entries, self.texts),
            queries: self.counts.iter().filter(|n| **n > 0).count() as u64,
            head_queries: self.counts.iter().filter(|n| **n > threshold).count() as u64,
            head_share: share(head, entries),
            tail_share: share(entries - head, entries),
            ..self
        }
    }

    /// The counts, highest first, without the queries that have none: the rank-count curve.
    #[must_use]
    pub fn ranked(&self) -> Vec<u64> {
        let mut counts: Vec<u64> = self.counts.iter().copied().filter(|n| *n > 0).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use capfilt_schemas::{Output, RunId, StageKind, StatusCounts, Task, TaskId};
    use serde_json::json;

    use super::*;
    use crate::balance::balance;
    use crate::testing::{Candidate, candidates};

    fn commit(stage: StageKind, outputs: Vec<Output>, facts: serde_json::Value) -> Commit {
        let task = Task { stage, stage_version: 1, params: json!({}), model: None, inputs: vec![] };
        let (task_id, run) = (TaskId(Digest::of(stage.name().as_bytes())), RunId::new("test").unwrap());
        Commit { task_id, task, run, outputs, counts: StatusCounts::new(), facts, committed_at_ms: 0, elapsed_ms: 0 }
    }

    #[tokio::test]
    async fn texts_are_counted_by_query_before_and_after() {
        let store = Store::open("memory:").await.unwrap();
        let rows: Vec<_> = (0..30)
            .map(|i| Candidate {
                url: format!("http://a/{i}"),
                text: "t".to_owned(),
                source: "alt",
                page: String::new(),
                queries: if i < 6 { vec![2, 9] } else { vec![2] },
            })
            .collect();
        let shards = [candidates(&store, &rows[..20]).await, candidates(&store, &rows[20..]).await];
        let config = BalanceConfig { per_query: 8, ..BalanceConfig::default() };
        let sql = SqlConfig { memory_mib: 64, partitions: 2, spill_folder: None };
        let done = balance(&store, &sql, &config, &shards).await.unwrap();
        let outputs = shards.map(|digest| Output { table: Table::Candidates, digest, rows: 0, bytes: 0 }).to_vec();
        let found = commit(StageKind::Discover, outputs, json!({"texts_seen": 40, "texts_without_query": 10}));
        let balanced = commit(StageKind::Balance, done.outputs, json!({}));
        let m = marginals(&store, &sql, &[&found], Some(&balanced), &config, 1).await.unwrap();
        assert_eq!((m.texts_seen, m.share_matched, m.threshold), (Some(40), Some(0.75), 8));
        assert_eq!((m.before.texts, m.before.entries, m.before.queries, m.before.head_queries), (30, 36, 2, 1));
        assert_eq!((m.before.texts_by_entries[1], m.before.texts_by_entries[2]), (24, 6));
        assert!((m.before.head_share - 30.0 / 36.0).abs() < 1e-12 && (m.before.entries_per_text - 1.2).abs() < 1e-12);
        assert_eq!(m.top, [Top { query: 2, before: 30, after: Some(8) }]);
        let after = m.after.unwrap();
        assert_eq!((after.ranked(), after.head_queries), (vec![8, 6], 0));
        let early = marginals(&store, &sql, &[], None, &config, 5).await.unwrap();
        assert_eq!((early.texts_seen, early.before.texts, early.after), (None, 0, None));
    }
}
