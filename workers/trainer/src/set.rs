//! What a run trains on: the pairs of a dataset version, and where their images are.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{Array, AsArray, BinaryArray, RecordBatch};
use capfilt_models::train::{FeatureMaps, shrink};
use capfilt_schemas::{Digest, Origin, Table, column};
use capfilt_store::Store;
use rayon::prelude::*;
use tokio::runtime::Handle;

use crate::{PairText, TrainPair, TrainerError};

/// Rows of image shards read at a time.
const BATCH: usize = 256;

/// One image with its texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Keys every random choice about the pair.
    pub(crate) sample_id: String,
    /// At least one text.
    pub(crate) texts: Vec<PairText>,
    /// Number of the shard that its image is in.
    pub(crate) shard: usize,
}

impl Entry {
    /// Whether a person annotated the image.
    pub(crate) fn is_human(&self) -> bool {
        self.texts.iter().any(|text| text.origin == Origin::Human)
    }
}

/// What a run trains on.
pub struct TrainSet {
    entries: Vec<Entry>,
    images: Images,
    /// What a frozen trunk made of the images.
    pub(crate) feature_maps: Arc<FeatureMaps>,
}

/// Memory for feature maps where nothing is said.
const FEATURE_MAP_BYTES: u64 = 1 << 30;

enum Images {
    /// RGB8 of the model's size, one for each entry.
    InMemory(Vec<Arc<[u8]>>),
    /// In the shards of a store.
    Stored(Box<StoredImages>),
}

/// Images of shards, decoded when they are asked for. As many as fit are kept as the model sees them; beyond that, shards are kept while
/// their images are being drawn.
pub(crate) struct StoredImages {
    pub(crate) store: Store,
    /// Waits for reads.
    pub(crate) runtime: Handle,
    /// The shards that entries name by their numbers.
    pub(crate) shards: Vec<(Table, Digest)>,
    /// The row of each entry in its shard.
    pub(crate) rows: Vec<u32>,
    /// Side of the model's images in pixels.
    pub(crate) side: usize,
    /// Bytes of pixels that are kept.
    pub(crate) memory: u64,
    /// Shards that are kept.
    pub(crate) window: usize,
    pub(crate) kept: Mutex<Kept>,
}

/// What [`StoredImages`] keeps.
#[derive(Default)]
pub(crate) struct Kept {
    pixels: HashMap<usize, Arc<[u8]>>,
    bytes: u64,
    /// Each with the count of requests when it was last used.
    shards: BTreeMap<usize, (u64, Shard)>,
    requests: u64,
}

/// The encoded images of a shard, in its batches.
#[derive(Clone)]
struct Shard(Arc<[BinaryArray]>);

impl TrainSet {
    /// A set whose pixels are all at hand.
    #[must_use]
    pub fn in_memory(pairs: Vec<TrainPair>) -> Self {
        let (entries, pixels) =
            pairs.into_iter().map(|pair| (Entry { sample_id: pair.sample_id, texts: pair.texts, shard: 0 }, pair.pixels)).unzip();
        Self { entries, images: Images::InMemory(pixels), feature_maps: FeatureMaps::new(FEATURE_MAP_BYTES) }
    }

    pub(crate) fn stored(entries: Vec<Entry>, images: StoredImages, feature_maps: Arc<FeatureMaps>) -> Self {
        Self { entries, images: Images::Stored(Box::new(images)), feature_maps }
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    #[cfg(test)]
    pub(crate) fn entries_mut(&mut self) -> &mut Vec<Entry> {
        &mut self.entries
    }

    /// Pixels of the entries with these numbers: RGB8 of the model's size, row by row.
    pub(crate) fn pixels(&self, wanted: &[usize]) -> Result<Vec<Arc<[u8]>>, TrainerError> {
        match &self.images {
            Images::InMemory(pixels) => Ok(wanted.iter().map(|&entry| Arc::clone(&pixels[entry])).collect()),
            Images::Stored(stored) => stored.pixels(&self.entries, wanted),
        }
    }
}

impl StoredImages {
    fn pixels(&self, entries: &[Entry], wanted: &[usize]) -> Result<Vec<Arc<[u8]>>, TrainerError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<usize> = wanted.iter().copied().filter(|entry| !kept.pixels.contains_key(entry)).collect();
        let mut shards = HashMap::new();
        for &entry in &missing {
            let number = entries[entry].shard;
            if let std::collections::hash_map::Entry::Vacant(place) = shards.entry(number) {
                place.insert(self.shard(number, &mut kept)?);
            }
        }
        let decoded: Vec<(usize, Arc<[u8]>)> = missing
            .into_par_iter()
            .map(|entry| {
                let encoded = &shards[&entries[entry].shard];
                Ok((entry, self.decode(encoded, self.rows[entry], &entries[entry].sample_id)?))
            })
            .collect::<Result<_, TrainerError>>()?;
        let mut fresh = HashMap::new();
        for (entry, pixels) in decoded {
            let bytes = pixels.len() as u64;
            if kept.bytes + bytes <= self.memory && kept.pixels.insert(entry, Arc::clone(&pixels)).is_none() {
                kept.bytes += bytes;
            }
            fresh.insert(entry, pixels);
        }
        if kept.pixels.len() == entries.len() {
            kept.shards.clear();
        }
        Ok(wanted
            .iter()
            .map(|entry| fresh.get(entry).or_else(|| kept.pixels.get(entry)).map_or_else(|| [].into(), Arc::clone))
            .collect())
    }

    /// A shard, read unless it is at hand. The one that was used longest ago makes room.
    #[expect(clippy::disallowed_methods, reason = "called on the loader's own thread, where no async code runs")]
    fn shard(&self, number: usize, kept: &mut Kept) -> Result<Shard, TrainerError> {
        kept.requests += 1;
        let now = kept.requests;
        if let Some((used, shard)) = kept.shards.get_mut(&number) {
            *used = now;
            return Ok(shard.clone());
        }
        let (table, digest) = self.shards[number];
        let fail = |reason: String| TrainerError::Images { shard: digest, reason };
        let batches = self.runtime.block_on(self.store.read_shard(table, &digest, BATCH)).map_err(|e| fail(e.to_string()))?;
        let images = batches
            .map(|batch| {
                let batch: RecordBatch = batch.map_err(|e| fail(e.to_string()))?;
                let images = batch.column_by_name(column::IMAGE).and_then(|c| c.as_binary_opt::<i32>()).cloned();
                images.ok_or_else(|| fail("it has no images".to_owned()))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let shard = Shard(images.into());
        if kept.shards.len() >= self.window.max(1)
            && let Some(oldest) = kept.shards.iter().min_by_key(|(_, (used, _))| *used).map(|(number, _)| *number)
        {
            kept.shards.remove(&oldest);
        }
        kept.shards.insert(number, (now, shard.clone()));
        Ok(shard)
    }

    fn decode(&self, shard: &Shard, row: u32, sample_id: &str) -> Result<Arc<[u8]>, TrainerError> {
        let fail = |reason: String| TrainerError::Image { sample_id: sample_id.to_owned(), reason };
        let mut row = row as usize;
        for batch in &*shard.0 {
            if row < batch.len() {
                let image = image::load_from_memory(batch.value(row)).map_err(|e| fail(e.to_string()))?;
                return Ok(shrink(&image.into_rgb8(), self.side)?.into());
            }
            row -= batch.len();
        }
        Err(fail("its shard has no such row".to_owned()))
    }
}
