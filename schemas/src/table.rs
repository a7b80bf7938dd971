//! The Arrow tables in which the stages meet.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};

/// Names of columns that several crates use.
pub mod column {
    #![allow(missing_docs)]
    pub const SAMPLE_ID: &str = "sample_id";
    pub const URL: &str = "url";
    pub const PAGE_URL: &str = "page_url";
    pub const TEXT: &str = "text";
    pub const TEXT_SOURCE: &str = "text_source";
    pub const SOURCE: &str = "source";
    pub const EXPECTED_HASH: &str = "expected_hash";
    pub const QUERIES: &str = "queries";
    pub const SELECTED_FOR: &str = "selected_for";
    pub const STATUS: &str = "status";
    pub const ERROR: &str = "error";
    pub const HTTP_STATUS: &str = "http_status";
    pub const IMAGE: &str = "image";
    pub const FORMAT: &str = "format";
    pub const WIDTH: &str = "width";
    pub const HEIGHT: &str = "height";
    pub const ORIGINAL_WIDTH: &str = "original_width";
    pub const ORIGINAL_HEIGHT: &str = "original_height";
    pub const BYTES_DOWNLOADED: &str = "bytes_downloaded";
    pub const SHA256: &str = "sha256";
    pub const PHASH: &str = "phash";
    pub const CAPTIONS: &str = "captions";
    pub const WEB_ITM: &str = "web_itm";
    pub const WEB_ITC: &str = "web_itc";
    pub const SYNTHETIC_ITM: &str = "synthetic_itm";
    pub const SYNTHETIC_ITC: &str = "synthetic_itc";
    pub const WEB_CLIP: &str = "web_clip";
    pub const SYNTHETIC_CLIP: &str = "synthetic_clip";
    pub const ORIGIN: &str = "origin";
    pub const ITM: &str = "itm";
    pub const ITC: &str = "itc";
    pub const CLIP: &str = "clip";
    pub const SHARD: &str = "shard";
    pub const ROW: &str = "row";
    pub const FILE: &str = "file";
    pub const PART: &str = "part";
    pub const BYTES: &str = "bytes";
    pub const METRIC: &str = "metric";
    pub const VALUE: &str = "value";
    pub const RESAMPLED: &str = "resampled";
}

/// Stands in the column `url` of a row whose pair was taken down and swept.
pub const REMOVED_URL: &str = "about:taken-down";

/// A table of the house. Its name is a folder of the store, its schema a contract between two stages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Table {
    /// Pairs found: image address, text, matched queries. One row a (url, text).
    Candidates,
    /// Pairs to fetch: deduplicated, at most `per_query` for a query. One row a pair.
    Selected,
    /// Selected pairs after the download: image bytes or the reason why there are none. Row i answers row i of a `selected` shard.
    Samples,
    /// Clean pairs that people wrote: image and all its captions. One row an image.
    Annotated,
    /// The captioner's texts. Row i answers row i of a `samples` shard.
    Captions,
    /// The judgement of the web text and of every synthetic text: of the filter, and of a CLIP model if the run has one. Row i answers
    /// row i of a `samples` shard.
    Scores,
    /// A dataset version: kept texts and where their image is. A list, no image bytes. Sorted by (`sample_id`, `origin`, `text`).
    Dataset,
    /// The files of one model, in parts of at most 64 MiB, in the order of (file, part).
    Models,
    /// Metrics of a model on held-out pairs, and their values for those pairs drawn again.
    Evaluations,
}

impl Table {
    /// Every table.
    pub const ALL: &'static [Self] = &[
        Self::Candidates,
        Self::Selected,
        Self::Samples,
        Self::Annotated,
        Self::Captions,
        Self::Scores,
        Self::Dataset,
        Self::Models,
        Self::Evaluations,
    ];

    /// The table's name: its folder under `objects/`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Candidates => "candidates",
            Self::Selected => "selected",
            Self::Samples => "samples",
            Self::Annotated => "annotated",
            Self::Captions => "captions",
            Self::Scores => "scores",
            Self::Dataset => "dataset",
            Self::Models => "models",
            Self::Evaluations => "evaluations",
        }
    }

    /// Columns that not every run fills. A shard in which one holds nothing is stored without it, and read as if it held nulls.
    #[must_use]
    pub const fn optional(self) -> &'static [&'static str] {
        match self {
            Self::Scores => &[column::WEB_CLIP, column::SYNTHETIC_CLIP],
            Self::Dataset => &[column::CLIP],
            Self::Evaluations => &[column::RESAMPLED],
            _ => &[],
        }
    }

    /// The table's columns, in order.
    #[must_use]
    pub fn schema(self) -> SchemaRef {
        use column as c;
        let fields = match self {
            Self::Candidates => pair_columns(),
            Self::Selected => {
                let mut f = pair_columns();
                f.push(list(c::SELECTED_FOR, DataType::UInt32, false));
                f
            }
            Self::Samples => {
                let mut f = pair_columns();
                f.push(list(c::SELECTED_FOR, DataType::UInt32, false));
                f.extend(image_columns());
                f
            }
            Self::Annotated => {
                let mut f = vec![text(c::SAMPLE_ID), text(c::URL), text(c::SOURCE), list(c::CAPTIONS, DataType::Utf8, false)];
                f.extend(image_columns());
                f
            }
            Self::Captions => vec![
                text(c::SAMPLE_ID),
                text(c::STATUS),
                maybe(c::ERROR, DataType::Utf8),
                list(c::CAPTIONS, DataType::Utf8, false),
            ],
            Self::Scores => vec![
                text(c::SAMPLE_ID),
                text(c::STATUS),
                maybe(c::ERROR, DataType::Utf8),
                maybe(c::WEB_ITM, DataType::Float32),
                maybe(c::WEB_ITC, DataType::Float32),
                list(c::SYNTHETIC_ITM, DataType::Float32, false),
                list(c::SYNTHETIC_ITC, DataType::Float32, false),
                maybe(c::WEB_CLIP, DataType::Float32),
                list(c::SYNTHETIC_CLIP, DataType::Float32, true),
            ],
            Self::Dataset => vec![
                text(c::SAMPLE_ID),
                text(c::TEXT),
                text(c::ORIGIN),
                maybe(c::ITM, DataType::Float32),
                maybe(c::ITC, DataType::Float32),
                text(c::URL),
                text(c::SHA256),
                text(c::SHARD),
                Field::new(c::ROW, DataType::UInt32, false),
                maybe(c::CLIP, DataType::Float32),
            ],
            Self::Models => {
                vec![text(c::FILE), Field::new(c::PART, DataType::UInt32, false), Field::new(c::BYTES, DataType::Binary, false)]
            }
            Self::Evaluations => {
                vec![text(c::METRIC), Field::new(c::VALUE, DataType::Float64, false), list(c::RESAMPLED, DataType::Float64, true)]
            }
        };
        Arc::new(Schema::new(fields))
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn text(name: &str) -> Field {
    Field::new(name, DataType::Utf8, false)
}

fn maybe(name: &str, kind: DataType) -> Field {
    Field::new(name, kind, true)
}

/// A list column; its items are named `item` and, like the list, never null unless `nullable`.
fn list(name: &str, item: DataType, nullable: bool) -> Field {
    Field::new(name, DataType::List(Arc::new(Field::new("item", item, false))), nullable)
}

/// What is known of a pair before the download. `expected_hash`: that of the image's bytes, if the source knows it, as `sha256:` (or
/// `md5:`, `sha512:`) and hexadecimal. `queries`: positions in the query list, ascending, of every query that the text holds.
fn pair_columns() -> Vec<Field> {
    use column as c;
    vec![
        text(c::SAMPLE_ID),
        text(c::URL),
        text(c::TEXT),
        text(c::TEXT_SOURCE),
        maybe(c::PAGE_URL, DataType::Utf8),
        text(c::SOURCE),
        maybe(c::EXPECTED_HASH, DataType::Utf8),
        list(c::QUERIES, DataType::UInt32, false),
    ]
}

/// What the download adds. `image` holds the re-encoded bytes, `sha256` (hexadecimal) names the bytes as the server sent them,
/// `phash` is a 64-bit perceptual hash of the decoded image. All but `status` are null when there is no image.
fn image_columns() -> Vec<Field> {
    use column as c;
    vec![
        text(c::STATUS),
        maybe(c::ERROR, DataType::Utf8),
        maybe(c::HTTP_STATUS, DataType::UInt16),
        maybe(c::IMAGE, DataType::Binary),
        maybe(c::FORMAT, DataType::Utf8),
        maybe(c::WIDTH, DataType::UInt32),
        maybe(c::HEIGHT, DataType::UInt32),
        maybe(c::ORIGINAL_WIDTH, DataType::UInt32),
        maybe(c::ORIGINAL_HEIGHT, DataType::UInt32),
        maybe(c::BYTES_DOWNLOADED, DataType::UInt64),
        maybe(c::SHA256, DataType::Utf8),
        maybe(c::PHASH, DataType::UInt64),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_the_agreed_ones() {
        let mut page = String::new();
        for table in Table::ALL {
            page.push_str(&format!("{table}\n"));
            for f in table.schema().fields() {
                let null = if f.is_nullable() { "?" } else { "" };
                let kind = match f.data_type() {
                    DataType::List(item) => format!("[{}]", item.data_type()),
                    other => other.to_string(),
                };
                page.push_str(&format!("  {}: {kind}{null}\n", f.name()));
            }
        }
        insta::assert_snapshot!(page);
    }
}
