//! The images of an export, read one shard after the other.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::UInt32Type;
use bytes::Bytes;
use capfilt_schemas::{Digest, Table, column};
use capfilt_store::Store;
use futures::TryStreamExt;
use futures::stream::BoxStream;

use crate::scan::{self, Trust};
use crate::{CoordinatorError, Result};

/// Images in memory at once, besides the bytes of their shard.
const BATCH_ROWS: usize = 32;

/// An image as it is stored.
pub(super) struct Picture {
    pub(super) bytes: Bytes,
    /// By the first bytes: `jpg`, `png`, `webp`, `gif`, `bmp`; else `bin`.
    pub(super) extension: &'static str,
    pub(super) width: Option<u32>,
    pub(super) height: Option<u32>,
}

/// Hands out images in the order of (shard, row); the shard at hand is held whole and verified.
pub(super) struct Pictures<'a> {
    store: &'a Store,
    shard: Option<Shard>,
    last: Option<(u32, Arc<Picture>)>,
}

struct Shard {
    name: String,
    digest: Digest,
    table: Table,
    batches: BoxStream<'static, Result<RecordBatch>>,
    batch: Option<RecordBatch>,
    /// The row with which `batch` begins.
    first: u32,
}

impl<'a> Pictures<'a> {
    pub(super) const fn new(store: &'a Store) -> Self {
        Self { store, shard: None, last: None }
    }

    /// The image of a row, and whether it is another than that of the last call.
    pub(super) async fn get(&mut self, table: Table, shard: &str, row: u32) -> Result<(Arc<Picture>, bool)> {
        let mut open = match self.shard.take() {
            Some(open) if open.name == shard && open.table == table => open,
            _ => {
                self.last = None;
                Shard::open(self.store, table, shard).await?
            }
        };
        let found = match &self.last {
            Some((at, picture)) if *at == row => (Arc::clone(picture), false),
            _ => {
                let picture = Arc::new(open.picture(row).await?);
                self.last = Some((row, Arc::clone(&picture)));
                (picture, true)
            }
        };
        self.shard = Some(open);
        Ok(found)
    }
}

impl Shard {
    async fn open(store: &Store, table: Table, name: &str) -> Result<Self> {
        let digest: Digest = name
            .parse()
            .map_err(|e| CoordinatorError::Encode { what: "a dataset row's shard".to_owned(), source: Box::new(e) })?;
        let columns = [column::IMAGE, column::WIDTH, column::HEIGHT];
        let batches = scan::open(store, table, &digest, &columns, Trust::Digest, BATCH_ROWS).await?;
        Ok(Self { name: name.to_owned(), digest, table, batches, batch: None, first: 0 })
    }

    async fn picture(&mut self, row: u32) -> Result<Picture> {
        let bad = |problem| CoordinatorError::Rows { table: self.table, shard: self.digest, problem };
        loop {
            if let Some(batch) = &self.batch {
                let rows = u32::try_from(batch.num_rows()).unwrap_or(u32::MAX);
                if row < self.first {
                    return Err(bad(format!("was asked for row {row} after row {}", self.first)));
                }
                if row < self.first + rows {
                    let i = (row - self.first) as usize;
                    let image = batch.column(0).as_binary::<i32>();
                    if image.is_null(i) {
                        return Err(bad(format!("has no image in row {row}, which the dataset names")));
                    }
                    let side = |column: usize| {
                        let sizes = batch.column(column).as_primitive::<UInt32Type>();
                        sizes.is_valid(i).then(|| sizes.value(i))
                    };
                    let bytes = Bytes::copy_from_slice(image.value(i));
                    return Ok(Picture { extension: extension(&bytes), bytes, width: side(1), height: side(2) });
                }
                self.first += rows;
            }
            match self.batches.try_next().await? {
                Some(batch) => self.batch = Some(batch),
                None => return Err(bad(format!("has no row {row}, which the dataset names"))),
            }
        }
    }
}

/// The file name extension of an image format, by its signature.
fn extension(bytes: &[u8]) -> &'static str {
    match bytes {
        [0xFF, 0xD8, 0xFF, ..] => "jpg",
        [0x89, b'P', b'N', b'G', ..] => "png",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "webp",
        [b'G', b'I', b'F', b'8', ..] => "gif",
        [b'B', b'M', ..] => "bmp",
        _ => "bin",
    }
}
