//! What a download can be told.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use capfilt_schemas::FetchStatus;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::CrawlError;
use crate::config::{CrawlerWorkerConfig, FetchConfig, ListFormat, StoredFormat};
use crate::digest::HashKind;

/// A download of a list of addresses into files for training, as img2dataset does it: its names, its layouts.
#[derive(Clone, Debug)]
pub struct DownloadConfig {
    /// The list: a file, or a folder of files that end in the format's name.
    pub url_list: PathBuf,
    /// The format of the list.
    pub input_format: ListFormat,
    /// Whether a folder's files end in `.gz`; a file is unpacked if it is packed.
    pub gzipped: bool,
    /// The column of the address.
    pub url_col: String,
    /// The column of the caption; without, no captions are written.
    pub caption_col: Option<String>,
    /// The column of the expected hash of a download, and its kind.
    pub verify_hash: Option<(String, HashKind)>,
    /// Further columns that are copied into the output.
    pub save_additional_columns: Vec<String>,
    /// The folder to write into.
    pub output_folder: PathBuf,
    /// The files to write.
    pub output_format: OutputFormat,
    /// Rows in a shard; 1 or more.
    pub number_sample_per_shard: usize,
    /// Digits of a shard's number.
    pub oom_shard_count: usize,
    /// The hash of the downloaded bytes that is written beside each sample.
    pub compute_hash: Option<HashKind>,
    /// Whether the EXIF of a download is written beside its sample.
    pub extract_exif: bool,
    /// What is done about shards that are there already.
    pub incremental_mode: IncrementalMode,
    /// How often a shard is tried again that could not be written.
    pub max_shard_retry: u32,
    /// Rows with one of these statuses in shards that are there already are downloaded again.
    pub retry_status: Vec<FetchStatus>,
    /// Manners, and what is made of an image.
    pub fetch: FetchConfig,
    /// Speed and route.
    pub crawler: CrawlerWorkerConfig,
}

/// The files that a download writes for each shard, beside `00000_stats.json`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputFormat {
    /// A folder `00000` with a file for each image, caption and description, and `00000.parquet`.
    Files,
    /// `00000.tar`, in which the members of a sample follow each other, and `00000.parquet`.
    Webdataset,
    /// `00000.parquet`, with the images in a column that is named by their format.
    Parquet,
    /// `00000.tfrecord`, an `Example` for each sample, and `00000.parquet`.
    Tfrecord,
    /// Nothing: images are downloaded, decoded, resized and forgotten.
    Dummy,
}

/// What is done about the shards of an earlier run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncrementalMode {
    /// They stay; those that are missing are made.
    Incremental,
    /// They are removed.
    Overwrite,
    /// They stay, and the list makes further ones.
    Extend,
}

/// Columns that a download writes itself.
const RESERVED: [&str; 13] = [
    "key",
    "caption",
    "url",
    "width",
    "height",
    "original_width",
    "original_height",
    "status",
    "error_message",
    "exif",
    "md5",
    "sha256",
    "sha512",
];

impl DownloadConfig {
    /// Checks what its types cannot.
    ///
    /// # Errors
    /// [`CrawlError::Config`] with the first setting that cannot be.
    pub fn check(&self) -> Result<(), CrawlError> {
        let bad = |setting: &str, reason: String| Err(CrawlError::Config { setting: setting.to_owned(), reason });
        if self.number_sample_per_shard == 0 {
            return bad("number_sample_per_shard", "it is 0; use 1 or more (10000 is usual)".to_owned());
        }
        if !(1..=18).contains(&(self.oom_shard_count + digits_below(self.number_sample_per_shard))) {
            return bad("oom_shard_count", "keys would have more than 18 digits; use fewer".to_owned());
        }
        if let Some((_, kind)) = &self.verify_hash
            && self.compute_hash != Some(*kind)
        {
            return bad("compute_hash", format!("`verify_hash` verifies a {0}; compute {0} as well", kind.name()));
        }
        let mut names = HashSet::new();
        for name in self.columns() {
            if !names.insert(name.as_str()) {
                return bad("save_additional_columns", format!("the column `{name}` is wanted twice; name each column once"));
            }
        }
        // Formats have their own column for the image.
        let image = self.extension();
        if let Some(name) = self.save_additional_columns.iter().find(|n| RESERVED.contains(&n.as_str()) || *n == image) {
            return bad("save_additional_columns", format!("the output has a column `{name}` of its own; rename yours"));
        }
        if self.input_format == ListFormat::Txt
            && let Some(other) = ListFormat::of_name(&self.url_list).filter(|format| *format != ListFormat::Txt)
        {
            let reason =
                format!("`{}` looks like {other:?}, not like a txt list of addresses; say which it is", self.url_list.display());
            return bad("input_format", reason);
        }
        if self.input_format == ListFormat::Txt && names.len() > 1 {
            let reason = "a txt list has addresses only: leave out caption_col, verify_hash and save_additional_columns, or set \
                          input_format";
            return bad("input_format", reason.to_owned());
        }
        if !self.retry_status.is_empty() {
            let without = match (self.incremental_mode, self.output_format, &self.verify_hash) {
                (IncrementalMode::Overwrite | IncrementalMode::Extend, ..) => Some("incremental_mode must be incremental"),
                (_, OutputFormat::Tfrecord | OutputFormat::Dummy, _) => {
                    Some("finished shards are only read again as files, webdataset or parquet")
                }
                (.., Some(_)) => Some("finished shards do not hold the expected hashes that verify_hash needs"),
                _ => None,
            };
            if let Some(reason) = without {
                return bad("retry_status", reason.to_owned());
            }
        }
        self.fetch.check()?;
        self.crawler.check()
    }

    /// What a shard's files depend on beside its rows; they are kept in its stats, so that no folder comes to hold shards of two kinds.
    pub(super) fn settings(&self) -> BTreeMap<String, Value> {
        let image = serde_json::to_value(&self.fetch.image).unwrap_or_default();
        let image = image.as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
        let others = json!({
            "output_format": self.output_format,
            "url_col": self.url_col,
            "caption_col": self.caption_col,
            "verify_hash": self.verify_hash,
            "save_additional_columns": self.save_additional_columns,
            "number_sample_per_shard": self.number_sample_per_shard,
            "oom_shard_count": self.oom_shard_count,
            "compute_hash": self.compute_hash.map(HashKind::name),
            "extract_exif": self.extract_exif,
        });
        let others = others.as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
        image.chain(others).collect()
    }

    /// The columns of the list that are wanted, in the order of the output.
    pub(super) fn columns(&self) -> Vec<&String> {
        let hash = self.verify_hash.as_ref().map(|(column, _)| column);
        self.save_additional_columns.iter().chain(&self.caption_col).chain(hash).chain([&self.url_col]).collect()
    }

    /// The extension of image files, and the name of their column in Parquet.
    pub(super) const fn extension(&self) -> &'static str {
        match self.fetch.image.format {
            StoredFormat::Jpeg => "jpg",
            StoredFormat::Png => "png",
            StoredFormat::WebP => "webp",
        }
    }

    /// The name of a shard.
    pub(super) fn shard_name(&self, shard: u64) -> String {
        format!("{shard:0width$}", width = self.oom_shard_count)
    }

    /// The key of a row of a shard: the shard's number and the row's, in a fixed number of digits.
    pub(super) fn key(&self, shard: u64, row: usize) -> String {
        let digits = digits_below(self.number_sample_per_shard);
        let number = u128::from(shard) * 10_u128.pow(u32::try_from(digits).unwrap_or(u32::MAX)) + row as u128;
        format!("{number:0width$}", width = digits + self.oom_shard_count)
    }
}

/// The digits that the numbers below `n` need at most: the logarithm, rounded up.
const fn digits_below(n: usize) -> usize {
    let (mut digits, mut power) = (0, 1_usize);
    while power < n {
        power = power.saturating_mul(10);
        digits += 1;
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_the_logarithm_rounded_up() {
        let of = [(1, 0), (2, 1), (9, 1), (10, 1), (11, 2), (1000, 3), (1001, 4), (10_000, 4), (usize::MAX, 20)];
        assert!(of.iter().all(|(n, digits)| digits_below(*n) == *digits));
    }
}
