//! Columns of the tables that this crate writes.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryBuilder, ListBuilder, StringBuilder, UInt16Builder, UInt32Builder, UInt64Builder};
use arrow::datatypes::{DataType, Field};
use capfilt_schemas::FetchStatus;

use crate::image::{Refused, StoredImage};

/// What became of one image.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) status: FetchStatus,
    pub(crate) error: Option<String>,
    pub(crate) http_status: Option<u16>,
    pub(crate) bytes_downloaded: Option<u64>,
    pub(crate) image: Option<StoredImage>,
}

impl Outcome {
    /// No image, and why.
    pub(crate) fn refused(refused: Refused, http_status: Option<u16>) -> Self {
        Self { status: refused.status, error: Some(refused.reason), http_status, bytes_downloaded: None, image: None }
    }
}

/// The columns `status` to `phash` of `samples` and `annotated`.
#[derive(Default)]
pub(crate) struct ImageColumns {
    status: StringBuilder,
    error: StringBuilder,
    http_status: UInt16Builder,
    image: BinaryBuilder,
    format: StringBuilder,
    sizes: [UInt32Builder; 4],
    bytes_downloaded: UInt64Builder,
    sha256: StringBuilder,
    phash: UInt64Builder,
}

impl ImageColumns {
    pub(crate) fn push(&mut self, outcome: &Outcome) {
        let image = outcome.image.as_ref();
        self.status.append_value(outcome.status.as_str());
        self.error.append_option(outcome.error.as_ref());
        self.http_status.append_option(outcome.http_status);
        self.image.append_option(image.map(|i| &i.bytes));
        self.format.append_option(image.map(|i| i.format));
        let sizes = image.map(|i| [i.width, i.height, i.original_width, i.original_height]);
        for (i, column) in self.sizes.iter_mut().enumerate() {
            column.append_option(sizes.map(|s| s[i]));
        }
        self.bytes_downloaded.append_option(outcome.bytes_downloaded);
        self.sha256.append_option(image.map(|i| i.sha256.to_string()));
        self.phash.append_option(image.map(|i| i.phash));
    }

    pub(crate) fn finish(mut self) -> Vec<ArrayRef> {
        let [width, height, original_width, original_height] = self.sizes.each_mut().map(|c| Arc::new(c.finish()) as ArrayRef);
        vec![
            Arc::new(self.status.finish()),
            Arc::new(self.error.finish()),
            Arc::new(self.http_status.finish()),
            Arc::new(self.image.finish()),
            Arc::new(self.format.finish()),
            width,
            height,
            original_width,
            original_height,
            Arc::new(self.bytes_downloaded.finish()),
            Arc::new(self.sha256.finish()),
            Arc::new(self.phash.finish()),
        ]
    }
}

/// A list column as the schemas have it: items are named `item` and never null.
pub(crate) fn list_of<B: arrow::array::ArrayBuilder>(items: B, kind: DataType) -> ListBuilder<B> {
    ListBuilder::new(items).with_field(Field::new("item", kind, false))
}
