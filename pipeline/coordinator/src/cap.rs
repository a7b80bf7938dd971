//! Caps: which of its pairs each query takes, without sorting the pairs and without holding them.
//!
//! A query with more pairs than it may take takes those up to a *border*, the place of the last one. All draws are spread evenly,
//! so the border is known beforehand within a narrow window; a pass over the pairs counts what lies below the window and keeps what
//! lies in it, from which the border follows exactly. A window that misses (once in a billion) is widened and the pass repeated.

use std::sync::Arc;

use arrow::array::AsArray;
use capfilt_schemas::column;
use serde::{Deserialize, Serialize};

use crate::draw::{Draws, Wanted, id_at};
use crate::readers::Readers;
use crate::scan::{RowSet, Trust};
use crate::{CoordinatorError, Result};

/// More queries than any list has. A shard that says otherwise is not believed: a counter a query is kept in memory.
const MOST_QUERIES: u32 = 1 << 26;

/// Standard deviations on each side of where a border is expected: beyond six lies one in 10⁹.
pub(crate) const DEVIATIONS: f64 = 6.0;

/// Pairs of one table, of which only some rows count, and the column that lists the queries of each.
#[derive(Clone)]
pub(crate) struct Pairs {
    pub(crate) readers: Readers,
    pub(crate) rows: Arc<RowSet>,
    /// [`column::SAMPLE_ID`] and the list.
    pub(crate) columns: &'static [&'static str; 2],
    /// Bytes that may be used for windows.
    pub(crate) memory: usize,
    /// How wide windows are at first.
    pub(crate) deviations: f64,
}

/// A query that cannot take all it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Contest {
    pub(crate) query: u32,
    /// Pairs that it has.
    pub(crate) count: u64,
    /// Pairs that it takes: at least one, and fewer than it has.
    pub(crate) quota: u64,
}

/// The place of the last pair that each query takes; a query that is absent takes all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Borders(Vec<u128>);

impl Borders {
    fn set(&mut self, query: u32, border: u128) {
        let query = query as usize;
        if self.0.len() <= query {
            self.0.resize(query + 1, u128::MAX);
        }
        self.0[query] = border;
    }

    /// The place of the last pair that a query takes.
    pub(crate) fn of(&self, query: u32) -> u128 {
        self.0.get(query as usize).copied().unwrap_or(u128::MAX)
    }

    /// Whether a query takes a pair.
    pub(crate) fn takes(&self, draws: Draws, query: u32, id: u128) -> bool {
        let border = self.of(query);
        border == u128::MAX || draws.place(query, id) <= border
    }

    /// The borders of the soft rule: places whose draw, as a share of all, is below t / count.
    pub(crate) fn soft(contests: &[Contest]) -> Self {
        let mut borders = Self::default();
        for c in contests {
            let share = (u128::from(c.quota) << 64) / u128::from(c.count);
            borders.set(c.query, (share << 64) - 1);
        }
        borders
    }
}

impl Pairs {
    /// How many pairs each query has, by its id.
    pub(crate) async fn counts(&self) -> Result<Vec<u64>> {
        let (rows, readers) = (Arc::clone(&self.rows), self.readers.clone());
        let visit = move |counts: &mut Vec<u64>, part: u32, first: u32, batch: &arrow::array::RecordBatch| {
            let mut wanted = Wanted::new(batch.column(0).as_list());
            for (i, row) in (first..).take(batch.num_rows()).enumerate() {
                if rows.contains(part, row) {
                    count(counts, wanted.queries(i)).map_err(|problem| readers.bad(part, problem))?;
                }
            }
            Ok(())
        };
        let states = self.readers.states(Vec::new);
        let counted = self.readers.read(&self.columns[1..], Trust::Ranges, states, visit).await?;
        Ok(counted.into_iter().reduce(add).unwrap_or_default())
    }

    /// Hands the id and the queries of every pair to `visit`, with the state of the thread that read it.
    pub(crate) async fn each<S, V>(&self, states: Vec<S>, visit: V) -> Result<Vec<S>>
    where
        S: Send + 'static,
        V: Fn(&mut S, u128, &[u32]) + Send + Sync + 'static,
    {
        let (rows, readers) = (Arc::clone(&self.rows), self.readers.clone());
        let visit = move |state: &mut S, part: u32, first: u32, batch: &arrow::array::RecordBatch| {
            let ids = batch.column(0).as_string();
            let mut wanted = Wanted::new(batch.column(1).as_list());
            for (i, row) in (first..).take(batch.num_rows()).enumerate() {
                if rows.contains(part, row) {
                    let id = id_at(ids, i).map_err(|problem| readers.bad(part, problem))?;
                    visit(state, id, wanted.queries(i));
                }
            }
            Ok(())
        };
        self.readers.read(&self.columns[..], Trust::Ranges, states, visit).await
    }

    /// The borders of `contests`. `offer` shows each pair to the contests that it takes part in.
    pub(crate) async fn borders<O>(&self, contests: &[Contest], offer: O) -> Result<Borders>
    where
        O: Fn(&mut Windows, u128, &[u32]) + Send + Sync + Clone + 'static,
    {
        let mut borders = Borders::default();
        let mut deviations = self.deviations;
        let mut open: Vec<(Contest, Span)> = contests.iter().map(|c| (*c, Span::expected(c, deviations))).collect();
        while !open.is_empty() {
            let mut missed = Vec::new();
            if deviations.is_infinite() {
                return Err(CoordinatorError::Task("pairs came or went while they were read; run it again".to_owned()));
            }
            for group in self.groups(&open) {
                let windows = Windows::new(group);
                let offer = offer.clone();
                let states = self.readers.states(|| windows.clone());
                let found = self.each(states, move |windows, id, queries| offer(windows, id, queries)).await?;
                let mut found = found.into_iter().reduce(Windows::join).unwrap_or(windows);
                for ((contest, _), window) in group.iter().zip(&mut found.windows) {
                    match window.nth(contest.quota) {
                        Some(border) => borders.set(contest.query, border),
                        None => missed.push(*contest),
                    }
                }
            }
            deviations *= 8.0;
            open = missed.iter().map(|c| (*c, Span::expected(c, deviations))).collect();
        }
        Ok(borders)
    }

    /// The borders of queries, each of which draws among all its pairs.
    pub(crate) async fn query_borders(&self, contests: &[Contest], draws: Draws) -> Result<Borders> {
        let offer = move |windows: &mut Windows, id: u128, queries: &[u32]| {
            queries.iter().for_each(|q| windows.offer(*q, || draws.place(*q, id)));
        };
        self.borders(contests, offer).await
    }

    /// As many contests at a time as memory has room for what their windows are expected to hold.
    fn groups<'a>(&self, open: &'a [(Contest, Span)]) -> Vec<&'a [(Contest, Span)]> {
        // A vector may have grown to twice what it holds.
        let room = self.memory as f64 / (2 * size_of::<u128>()) as f64;
        let (mut groups, mut from, mut held) = (Vec::new(), 0, 0.0);
        for (i, (contest, span)) in open.iter().enumerate() {
            let expects = span.share() * contest.count as f64;
            if held + expects > room && i > from {
                groups.push(&open[from..i]);
                (from, held) = (i, 0.0);
            }
            held += expects;
        }
        groups.push(&open[from..]);
        groups
    }
}

/// Adds a text's queries to a count vector.
pub(crate) fn count(counts: &mut Vec<u64>, queries: &[u32]) -> std::result::Result<(), String> {
    let Some(last) = queries.last() else { return Ok(()) };
    if *last >= MOST_QUERIES {
        return Err(format!("has the query {last}; no list is as long as {MOST_QUERIES}"));
    }
    if counts.len() <= *last as usize {
        counts.resize(*last as usize + 1, 0);
    }
    for q in queries {
        counts[*q as usize] += 1;
    }
    Ok(())
}

/// The sum of two count vectors.
pub(crate) fn add(a: Vec<u64>, b: Vec<u64>) -> Vec<u64> {
    let (mut long, short) = if a.len() < b.len() { (b, a) } else { (a, b) };
    long.iter_mut().zip(short).for_each(|(sum, n)| *sum += n);
    long
}

/// Places from `from` to `to`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    from: u128,
    to: u128,
}

impl Span {
    /// Where the border of a contest lies, give or take some standard deviations.
    ///
    /// The share of all draws below the quota-th smallest of `count` even ones is quota / count, with the deviation of a binomial
    /// share. A few more pairs on each side are for quotas so small that this is not yet a normal distribution.
    fn expected(contest: &Contest, deviations: f64) -> Self {
        let (count, quota) = (contest.count as f64, contest.quota as f64);
        let share = quota / count;
        let slack = (deviations * (count * share * (1.0 - share)).sqrt() + 10.0 * deviations) / count;
        let draws = |share: f64| (share * 2_f64.powi(64)) as u64;
        Self { from: u128::from(draws(share - slack)) << 64, to: u128::from(draws(share + slack)) << 64 | u128::from(u64::MAX) }
    }

    fn share(&self) -> f64 {
        ((self.to - self.from) >> 64) as f64 / 2_f64.powi(64)
    }
}

/// What a pass has found out about the borders of some contests.
#[derive(Clone)]
pub(crate) struct Windows {
    /// By query the place in `windows`, or [`NO_WINDOW`].
    of: Arc<Vec<u32>>,
    windows: Vec<Window>,
}

const NO_WINDOW: u32 = u32::MAX;

#[derive(Clone)]
struct Window {
    span: Span,
    below: u64,
    inside: Vec<u128>,
}

impl Windows {
    fn new(contests: &[(Contest, Span)]) -> Self {
        let longest = contests.iter().map(|(c, _)| c.query as usize + 1).max().unwrap_or(0);
        let mut of = vec![NO_WINDOW; longest];
        for (i, (contest, _)) in (0..).zip(contests) {
            of[contest.query as usize] = i;
        }
        let windows = contests.iter().map(|(_, span)| Window { span: *span, below: 0, inside: Vec::new() }).collect();
        Self { of: Arc::new(of), windows }
    }

    /// Shows a pair to a query's contest, if there is one.
    pub(crate) fn offer(&mut self, query: u32, place: impl FnOnce() -> u128) {
        let Some(&slot) = self.of.get(query as usize).filter(|slot| **slot != NO_WINDOW) else { return };
        let (window, place) = (&mut self.windows[slot as usize], place());
        if place < window.span.from {
            window.below += 1;
        } else if place <= window.span.to {
            window.inside.push(place);
        }
    }

    fn join(mut self, other: Self) -> Self {
        for (a, b) in self.windows.iter_mut().zip(other.windows) {
            a.below += b.below;
            a.inside.extend(b.inside);
        }
        self
    }
}

impl Window {
    /// The n-th smallest place of all that were offered, counted from 1, if it lies in the window.
    fn nth(&mut self, n: u64) -> Option<u128> {
        let place = usize::try_from(n.checked_sub(self.below)?.checked_sub(1)?).ok()?;
        (place < self.inside.len()).then(|| *self.inside.select_nth_unstable(place).1)
    }
}

/// At most `per_query` pairs for a query, of those for which it was asked for more than that.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HardCap {
    /// The most pairs that one query may take.
    pub per_query: u64,
    /// Decides all draws; the same as when the pairs were selected.
    pub seed: u64,
}

impl HardCap {
    /// The rows of `samples` shards that remain when every query takes, of the rows that were selected for it, only its first
    /// `per_query`. The queries draw as they did when they chose what to download: so a query keeps the pairs that it would have
    /// taken if it had known which of them can be had.
    pub(crate) async fn keep(self, readers: &Readers, rows: &Arc<RowSet>, memory: usize) -> Result<RowSet> {
        const COLUMNS: &[&str; 2] = &[column::SAMPLE_ID, column::SELECTED_FOR];
        let pairs = Pairs { readers: readers.clone(), rows: Arc::clone(rows), columns: COLUMNS, memory, deviations: DEVIATIONS };
        let contests = contests(&pairs.counts().await?, self.per_query);
        if contests.is_empty() {
            return Ok((**rows).clone());
        }
        let draws = Draws::new(self.seed);
        let borders = pairs.query_borders(&contests, draws).await?;
        let (wanted, source) = (Arc::clone(rows), readers.clone());
        let visit = move |kept: &mut Vec<(u32, u32)>, part: u32, first: u32, batch: &arrow::array::RecordBatch| {
            let ids = batch.column(0).as_string();
            let mut takers = Wanted::new(batch.column(1).as_list());
            for (i, row) in (first..).take(batch.num_rows()).enumerate() {
                if wanted.contains(part, row) {
                    let id = id_at(ids, i).map_err(|problem| source.bad(part, problem))?;
                    if takers.queries(i).iter().any(|q| borders.takes(draws, *q, id)) {
                        kept.push((part, row));
                    }
                }
            }
            Ok(())
        };
        let found = readers.read(COLUMNS, Trust::Ranges, readers.states(Vec::new), visit).await?;
        Ok(found.into_iter().flatten().collect())
    }
}

/// The queries that have more than `quota` pairs.
pub(crate) fn contests(counts: &[u64], quota: u64) -> Vec<Contest> {
    let of = |(query, count): (u32, &u64)| (*count > quota).then_some(Contest { query, count: *count, quota });
    (0..).zip(counts).filter_map(of).collect()
}

#[cfg(test)]
mod tests;
