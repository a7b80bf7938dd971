//! The pairs that were taken, in the order of their ids: put away by the first bits of the id, sorted one partition at a time.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, ListArray, ListBuilder, RecordBatch, StringArray, StringBuilder, UInt32Builder};
use arrow::datatypes::{DataType, Field};
use capfilt_schemas::{Output, Table, column};
use futures::{StreamExt, TryStreamExt, stream};

use super::Job;
use crate::cap::Borders;
use crate::draw::{Draws, Wanted, id_at};
use crate::scan::{self, RowSet, Trust};
use crate::shards::Shards;
use crate::spill::{Chunks, PARTITIONS, Spill, partition_of};
use crate::{CoordinatorError, Result};

const COLUMNS: &[&str] = &[
    column::SAMPLE_ID,
    column::URL,
    column::TEXT,
    column::TEXT_SOURCE,
    column::PAGE_URL,
    column::SOURCE,
    column::EXPECTED_HASH,
    column::QUERIES,
];

/// Texts of a row beside its id.
const TEXTS: usize = 6;

/// Rows of a batch that is written.
const BATCH_ROWS: usize = 8192;

impl Job<'_> {
    /// Writes what some query takes, of `rows`, and what is not beyond `last_of_all`.
    pub(super) async fn select(&self, rows: &Arc<RowSet>, borders: &Arc<Borders>, last_of_all: u128) -> Result<Vec<Output>> {
        let spill = Arc::new(Spill::new(self.sql, self.threads));
        let (rows, borders, to, readers) = (Arc::clone(rows), Arc::clone(borders), Arc::clone(&spill), self.readers.clone());
        let draws = Draws::new(self.config.seed);
        let visit = move |(chunks, takers): &mut (Chunks, Vec<u32>), part: u32, first: u32, batch: &RecordBatch| {
            let columns = Columns::of(batch).ok_or_else(|| readers.bad(part, "lacks columns"))?;
            let mut wanted = Wanted::new(columns.queries);
            for (i, row) in (first..).take(batch.num_rows()).enumerate() {
                if !rows.contains(part, row) {
                    continue;
                }
                let id = id_at(columns.ids, i).map_err(|problem| readers.bad(part, problem))?;
                let queries = wanted.queries(i);
                takers.clear();
                takers.extend(queries.iter().filter(|q| borders.takes(draws, **q, id)));
                if !takers.is_empty() && (last_of_all == u128::MAX || draws.place_of_all(id) <= last_of_all) {
                    chunks.push(&to, partition_of(id), |chunk| columns.write(i, id, queries, takers, chunk))?;
                }
            }
            Ok(())
        };
        let states = self.readers.states(|| (Chunks::new(), Vec::new()));
        for (chunks, _) in self.readers.read(COLUMNS, Trust::Ranges, states, visit).await? {
            chunks.finish(&spill)?;
        }
        tracing::debug!(spilled = spill.spilled(), "selected pairs put away");
        let mut shards = Shards::new(self.store, Table::Selected, self.config.shard_rows).at_once(self.threads);
        let mut sorted = stream::iter(0..PARTITIONS)
            .map(|partition| {
                let spill = Arc::clone(&spill);
                async move {
                    let sorted = tokio::task::spawn_blocking(move || sorted(&spill, partition)).await;
                    sorted.map_err(|e| CoordinatorError::Task(format!("sorting failed: {e}")))?
                }
            })
            .buffered(self.threads);
        while let Some(batches) = sorted.try_next().await? {
            for batch in batches {
                shards.write(&batch).await?;
            }
        }
        shards.finish().await
    }
}

struct Columns<'a> {
    ids: &'a StringArray,
    texts: [&'a StringArray; TEXTS],
    queries: &'a ListArray,
}

impl<'a> Columns<'a> {
    fn of(batch: &'a RecordBatch) -> Option<Self> {
        let [ids, texts @ .., queries] = batch.columns() else { return None };
        let texts: &[ArrayRef; TEXTS] = texts.try_into().ok()?;
        Some(Self { ids: ids.as_string(), texts: texts.each_ref().map(|t| t.as_string()), queries: queries.as_list() })
    }

    /// Row `i` as bytes: length of what follows the id (4 bytes), id (16), texts, queries, and the queries that took it. Texts and
    /// lists begin with their length, one more where it could be none.
    fn write(&self, i: usize, id: u128, queries: &[u32], takers: &[u32], to: &mut Vec<u8>) {
        let begin = to.len();
        to.extend_from_slice(&[0; 4]);
        to.extend_from_slice(&id.to_le_bytes());
        for text in self.texts {
            if text.is_null(i) {
                write_number(0, to);
            } else {
                let text = text.value(i);
                write_number(text.len() + 1, to);
                to.extend_from_slice(text.as_bytes());
            }
        }
        for list in [queries, takers] {
            write_number(list.len(), to);
            list.iter().for_each(|q| write_number(*q as usize, to));
        }
        let length = u32::try_from(to.len() - begin - HEAD).unwrap_or(u32::MAX);
        to[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
    }
}

/// Bytes of a row's length and id.
const HEAD: usize = 20;

/// Seven bits a byte, the lowest first; the eighth says that more follow (LEB128).
fn write_number(mut n: usize, to: &mut Vec<u8>) {
    while n > 0x7F {
        to.push(n as u8 | 0x80);
        n >>= 7;
    }
    to.push(n as u8);
}

/// Bytes that are read from the front.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self) -> Option<usize> {
        let (mut n, mut shift) = (0, 0);
        loop {
            let byte = self.take(1)?[0];
            n |= usize::from(byte & 0x7F).checked_shl(shift)?;
            if byte < 0x80 {
                return Some(n);
            }
            shift += 7;
        }
    }

    /// The id and the rest of the next row.
    fn row(&mut self) -> Option<(u128, &'a [u8])> {
        let length = u32::from_le_bytes(*self.take(4)?.first_chunk()?);
        let id = u128::from_le_bytes(*self.take(16)?.first_chunk()?);
        Some((id, self.take(length as usize)?))
    }
}

/// The rows of a partition, sorted by id.
fn sorted(spill: &Spill, partition: usize) -> Result<Vec<RecordBatch>> {
    let chunks = spill.take(partition).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for chunk in &chunks {
        let mut cursor = Cursor(chunk);
        while !cursor.0.is_empty() {
            rows.push(cursor.row().ok_or_else(|| spill.damaged())?);
        }
    }
    // A pair has one row only, so nothing is left to decide among equal ids.
    rows.sort_unstable_by_key(|(id, _)| *id);
    rows.chunks(BATCH_ROWS).map(|rows| batch(rows)?.ok_or_else(|| spill.damaged())).collect()
}

/// Rows as Arrow has them; `None` if they are not what was written.
fn batch(rows: &[(u128, &[u8])]) -> Result<Option<RecordBatch>> {
    let bytes: usize = rows.iter().map(|(_, row)| row.len()).sum();
    let mut ids = StringBuilder::with_capacity(rows.len(), rows.len() * 32);
    let mut texts: [StringBuilder; TEXTS] = std::array::from_fn(|_| StringBuilder::with_capacity(rows.len(), bytes / TEXTS));
    let item = Arc::new(Field::new("item", DataType::UInt32, false));
    let mut lists: [_; 2] = std::array::from_fn(|_| ListBuilder::new(UInt32Builder::new()).with_field(Arc::clone(&item)));
    for (id, row) in rows {
        let mut hex = [0; 32];
        if hex::encode_to_slice(id.to_be_bytes(), &mut hex).is_err() || read(row, &mut texts, &mut lists).is_none() {
            return Ok(None);
        }
        ids.append_value(std::str::from_utf8(&hex).unwrap_or_default());
    }
    let mut columns: Vec<ArrayRef> = vec![Arc::new(ids.finish())];
    columns.extend(texts.iter_mut().map(|t| Arc::new(t.finish()) as ArrayRef));
    columns.extend(lists.iter_mut().map(|l| Arc::new(l.finish()) as ArrayRef));
    scan::batch("selected pairs", &Table::Selected.schema(), columns).map(Some)
}

fn read(row: &[u8], texts: &mut [StringBuilder; TEXTS], lists: &mut [ListBuilder<UInt32Builder>; 2]) -> Option<()> {
    let mut cursor = Cursor(row);
    for text in texts {
        match cursor.number()?.checked_sub(1) {
            None => text.append_null(),
            Some(length) => text.append_value(std::str::from_utf8(cursor.take(length)?).ok()?),
        }
    }
    for list in lists {
        for _ in 0..cursor.number()? {
            list.values().append_value(u32::try_from(cursor.number()?).ok()?);
        }
        list.append(true);
    }
    cursor.0.is_empty().then_some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_come_back() {
        let numbers = [0, 1, 127, 128, 300, 500_000, u32::MAX as usize, usize::MAX];
        let mut bytes = Vec::new();
        numbers.iter().for_each(|n| write_number(*n, &mut bytes));
        let mut cursor = Cursor(&bytes);
        assert_eq!(numbers.map(|_| cursor.number().unwrap()), numbers);
        assert_eq!(cursor.number(), None);
        assert_eq!(Cursor(&[0xFF; 12]).number(), None, "no number is that long");
    }
}
