//! One candidate for each key, the best: candidates are put away by the hash of their key, and looked at one partition at a time.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use capfilt_schemas::{TextSource, column};
use futures::{StreamExt, TryStreamExt, stream};
use siphasher::sip::SipHasher13;
use siphasher::sip128::{Hasher128, SipHasher13 as SipHasher128};

use super::{Dedup, Job};
use crate::draw::{Draws, id_at};
use crate::readers::Readers;
use crate::scan::{RowSet, Trust};
use crate::spill::{Chunks, PARTITIONS, Spill, partition_of};
use crate::{CoordinatorError, Result};

/// What deduplication found.
pub(super) struct Unique {
    /// The candidates that stay.
    pub(super) rows: RowSet,
    /// Rows of the inputs.
    pub(super) candidates: u64,
    /// Of these, those that hold a query.
    pub(super) matched: u64,
    /// Of these, those that stay.
    pub(super) unique: u64,
}

const COLUMNS: &[&str] = &[
    column::SAMPLE_ID,
    column::URL,
    column::TEXT_SOURCE,
    column::PAGE_URL,
    column::SOURCE,
    column::EXPECTED_HASH,
    column::QUERIES,
];

/// One candidate, as far as it matters here.
struct Record {
    /// What it is known by: 128 bits of a hash, of which no two in 10¹⁵ are the same by accident.
    key: u128,
    /// Of equal keys the smallest stays: the rank of its text source (8 bits), its draw (64), and a hash of where it was found (56)
    /// for those that are the same pair.
    order: u128,
    /// Part and row.
    place: u64,
}

const RECORD: usize = 40;

impl Record {
    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(&self.key.to_le_bytes());
        to.extend_from_slice(&self.order.to_le_bytes());
        to.extend_from_slice(&self.place.to_le_bytes());
    }

    fn read(bytes: &[u8; RECORD]) -> Option<Self> {
        let (key, rest) = bytes.split_first_chunk()?;
        let (order, rest) = rest.split_first_chunk()?;
        let (place, _) = rest.split_first_chunk()?;
        Some(Self { key: u128::from_le_bytes(*key), order: u128::from_le_bytes(*order), place: u64::from_le_bytes(*place) })
    }
}

/// Keys are hashes already.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.0 = self.0 << 8 | u64::from(*b));
    }

    fn write_u128(&mut self, n: u128) {
        // The upper half has chosen the partition.
        self.0 = n as u64;
    }
}

type Best = HashMap<u128, (u128, u64), BuildHasherDefault<KeyHasher>>;

/// What one thread has read.
struct Seen {
    chunks: Chunks,
    candidates: u64,
    matched: u64,
}

impl Job<'_> {
    pub(super) async fn unique(&self) -> Result<Unique> {
        let spill = Arc::new(Spill::new(self.sql, self.threads));
        let states = self.readers.states(|| Seen { chunks: Chunks::new(), candidates: 0, matched: 0 });
        let (to, readers) = (Arc::clone(&spill), self.readers.clone());
        let reader = Reader { draws: Draws::new(self.config.seed), seed: self.config.seed, dedup: self.config.dedup };
        let visit = move |seen: &mut Seen, part: u32, first: u32, batch: &RecordBatch| {
            reader.read(seen, &readers, &to, part, first, batch)
        };
        // Every byte is held against its digest here; later passes read only what they need.
        let seen = self.readers.read(COLUMNS, Trust::Digest, states, visit).await?;
        let mut found = Unique { rows: RowSet::default(), candidates: 0, matched: 0, unique: 0 };
        for s in seen {
            found.candidates += s.candidates;
            found.matched += s.matched;
            s.chunks.finish(&spill)?;
        }
        let mut best = stream::iter(0..PARTITIONS)
            .map(|partition| {
                let spill = Arc::clone(&spill);
                async move {
                    let best = tokio::task::spawn_blocking(move || best_of(&spill, partition)).await;
                    best.map_err(|e| CoordinatorError::Task(format!("deduplication failed: {e}")))?
                }
            })
            .buffer_unordered(self.threads);
        while let Some(places) = best.try_next().await? {
            found.unique += places.len() as u64;
            for place in places {
                found.rows.insert((place >> 32) as u32, place as u32);
            }
        }
        Ok(found)
    }
}

/// The places of the best candidates of a partition.
fn best_of(spill: &Spill, partition: usize) -> Result<Vec<u64>> {
    let mut best = Best::default();
    for chunk in spill.take(partition) {
        for bytes in chunk?.as_chunks::<RECORD>().0 {
            let Some(Record { key, order, place }) = Record::read(bytes) else { continue };
            let there = best.entry(key).or_insert((order, place));
            *there = (order, place).min(*there);
        }
    }
    Ok(best.into_values().map(|(_, place)| place).collect())
}

/// The text in row `i`, if there is one.
fn known(texts: &StringArray, i: usize) -> Option<&str> {
    texts.is_valid(i).then(|| texts.value(i))
}

/// Makes records of rows.
#[derive(Clone, Copy)]
struct Reader {
    draws: Draws,
    seed: u64,
    dedup: Dedup,
}

impl Reader {
    fn read(self, seen: &mut Seen, readers: &Readers, to: &Spill, part: u32, first: u32, batch: &RecordBatch) -> Result<()> {
        let [ids, urls, text_sources, pages, sources, hashes, queries] = batch.columns() else {
            return Err(readers.bad(part, "lacks columns"));
        };
        let (ids, urls, text_sources) = (ids.as_string::<i32>(), urls.as_string::<i32>(), text_sources.as_string::<i32>());
        let (pages, sources, hashes) = (pages.as_string::<i32>(), sources.as_string::<i32>(), hashes.as_string::<i32>());
        let queries = queries.as_list::<i32>();
        seen.candidates += batch.num_rows() as u64;
        for (i, row) in (first..).take(batch.num_rows()).enumerate() {
            let rank = rank_of(text_sources.value(i)).map_err(|problem| readers.bad(part, problem))?;
            if queries.value_length(i) == 0 {
                continue;
            }
            seen.matched += 1;
            let id = id_at(ids, i).map_err(|problem| readers.bad(part, problem))?;
            let key = match self.dedup {
                Dedup::Url => self.hash(urls.value(i)),
                Dedup::UrlText => id,
            };
            let draw = self.draws.place_of_all(id) >> 64;
            let found_at = self.found_at(known(pages, i), sources.value(i), known(hashes, i));
            // Of the same pair the one with a hash counts: what it leads to can be verified.
            let unverified = u128::from(hashes.is_null(i));
            let order = u128::from(rank) << 120 | draw << 56 | unverified << 55 | u128::from(found_at >> 9);
            let record = Record { key, order, place: u64::from(part) << 32 | u64::from(row) };
            seen.chunks.push(to, partition_of(key), |chunk| record.write(chunk))?;
        }
        Ok(())
    }

    /// A hash of an address. It is keyed: nobody can make addresses that collide with those of others without knowing the seed.
    fn hash(self, url: &str) -> u128 {
        let mut hasher = SipHasher128::new_with_keys(self.seed, 0);
        hasher.write(url.as_bytes());
        hasher.finish128().as_u128()
    }

    fn found_at(self, page: Option<&str>, source: &str, expected_hash: Option<&str>) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(self.seed, 1);
        hasher.write(source.as_bytes());
        if let Some(page) = page {
            hasher.write(&[0]);
            hasher.write(page.as_bytes());
        }
        if let Some(expected_hash) = expected_hash {
            hasher.write(&[1]);
            hasher.write(expected_hash.as_bytes());
        }
        hasher.finish()
    }
}

fn rank_of(name: &str) -> std::result::Result<u8, String> {
    let source = TextSource::parse(name).and_then(|s| TextSource::ALL.iter().position(|t| *t == s));
    source.and_then(|place| u8::try_from(place).ok()).ok_or_else(|| format!("has the unknown text source `{name}`"))
}
