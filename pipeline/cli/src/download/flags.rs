//! The flags of `capfilt download`, which are img2dataset's, and the settings that they come to.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use capfilt_crawler::{
    CrawlerWorkerConfig, DownloadConfig, FetchConfig, HashKind, ImageConfig, IncrementalMode, Interpolation, ListFormat,
    OutputFormat, Reencode, ResizeMode, StoredFormat, WebConfig, parse_size,
};
use capfilt_schemas::FetchStatus;
use clap::{ArgAction, Args};
use serde::de::DeserializeOwned;
use serde::de::value::{Error as NoName, StrDeserializer};
use serde::{Deserialize, Serialize};

use crate::output::Failure;
use crate::{config, retry};

/// What img2dataset obeys unless told otherwise, and what capfilt obeys.
const DIRECTIVES: [&str; 4] = ["noai", "noimageai", "noindex", "noimageindex"];

// Flags have img2dataset's names and, where nothing else is said, its defaults. Truth values are written as it takes them: `True`,
// `False`, or nothing for true.
#[expect(clippy::doc_markdown, reason = "the comments are help texts")]
#[derive(Args, Debug)]
#[command(
    rename_all = "snake_case",
    after_help = "Flags may be written with `-` for `_`. What differs from img2dataset: the agent says who asks, robots.txt is obeyed \
                  (--robots False), a host gets a few requests a second (--requests_per_second, --per_host), failed requests are \
                  repeated twice (--retries), a file of more than 20 MiB is refused unless --max_body allows it, an image of more \
                  than 50 million pixels unless --max_image_area does, images stand upright (what their EXIF says of it is done), TIFF and \
                  AVIF are refused, the list is a local file, and all cores are used whatever --processes_count says."
)]
pub(crate) struct DownloadArgs {
    /// The list of addresses: a file, or a folder of files that end in the input format
    #[arg(long, value_name = "PATH", required_unless_present = "list", conflicts_with = "list")]
    url_list: Option<PathBuf>,
    /// The same as --url_list
    #[arg(value_name = "URL_LIST")]
    list: Option<PathBuf>,
    /// Where to write
    #[arg(long, default_value = "images")]
    output_folder: PathBuf,
    /// The format of the list: txt, csv, tsv, json, jsonl, each also with .gz; parquet
    #[arg(long, default_value = "txt", value_parser = InputFormat::from_str)]
    input_format: InputFormat,
    /// What to write: files, webdataset, parquet, tfrecord, dummy
    #[arg(long, default_value = "files", value_parser = named::<OutputFormat>)]
    output_format: OutputFormat,
    /// The column of the address
    #[arg(long, default_value = "url")]
    url_col: String,
    /// The column of the caption; without, no captions are written
    #[arg(long)]
    caption_col: Option<String>,
    /// Further columns that are copied into the output: `["a","b"]` or `a,b`
    #[arg(long, value_name = "COLUMNS")]
    save_additional_columns: Option<Names>,
    /// The side of the images, in pixels
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_535), help_heading = "Images")]
    image_size: u32,
    /// What becomes image_size long: no, border, keep_ratio, keep_ratio_largest, center_crop
    #[arg(long, default_value = "border", value_parser = named::<ResizeMode>, help_heading = "Images")]
    resize_mode: ResizeMode,
    /// Leave smaller images as they are
    #[arg(long, default_value = "False", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Images")]
    resize_only_if_bigger: bool,
    /// How images are made larger: nearest, bilinear, bicubic, area, lanczos
    #[arg(long, default_value = "lanczos", value_parser = named::<Interpolation>, help_heading = "Images")]
    upscale_interpolation: Interpolation,
    /// How images are made smaller
    #[arg(long, default_value = "area", value_parser = named::<Interpolation>, help_heading = "Images")]
    downscale_interpolation: Interpolation,
    /// jpg, png or webp
    #[arg(long, default_value = "jpg", value_parser = named::<StoredFormat>, help_heading = "Images")]
    encode_format: StoredFormat,
    /// jpg and webp: quality, 1 to 100 (95 if not given); png: effort, 0 to 9 (6)
    #[arg(long, help_heading = "Images")]
    encode_quality: Option<u8>,
    /// Keep the downloaded file where it has the wanted format and size
    #[arg(long, default_value = "False", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Images")]
    skip_reencode: bool,
    /// Keep every downloaded file as it is, if it decodes
    #[arg(long, default_value = "False", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Images")]
    disable_all_reencoding: bool,
    /// Refuse images with a shorter side
    #[arg(long, default_value_t = 0, help_heading = "Images")]
    min_image_size: u32,
    /// Refuse images with more pixels [default: 50000000]
    #[arg(long, value_name = "PIXELS", help_heading = "Images")]
    max_image_area: Option<f64>,
    /// Refuse images that are more elongated
    #[arg(long, value_name = "RATIO", default_value_t = f64::INFINITY, help_heading = "Images")]
    max_aspect_ratio: f64,
    /// Write the EXIF of each image beside it
    #[arg(long, default_value = "True", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Images")]
    extract_exif: bool,
    /// The hash of each download that is written beside it: md5, sha256, sha512, None
    #[arg(long, default_value = "sha256", help_heading = "Images")]
    compute_hash: String,
    /// The column of the expected hash and its kind: `["md5_col","md5"]`; another hash is a failed row
    #[arg(long, value_name = "[COLUMN,KIND]", help_heading = "Images")]
    verify_hash: Option<Names>,
    /// Not supported: faces are not blurred
    #[arg(long, hide = true)]
    bbox_col: Option<String>,
    /// Rows in a shard
    #[arg(long, default_value_t = 10_000, help_heading = "Shards")]
    number_sample_per_shard: usize,
    /// Digits of a shard's number
    #[arg(long, default_value_t = 5, help_heading = "Shards")]
    oom_shard_count: usize,
    /// What is done about finished shards: incremental keeps them, overwrite removes them, extend adds the list to them
    #[arg(long, default_value = "incremental", value_parser = named::<IncrementalMode>, help_heading = "Shards")]
    incremental_mode: IncrementalMode,
    /// How often a shard that cannot be written is tried again
    #[arg(long, default_value_t = 1, help_heading = "Shards")]
    max_shard_retry: u32,
    /// Download rows of finished shards again that failed like this: `timeout,dns`, `all` (statuses as in error_message)
    #[arg(long, value_name = "STATUSES", help_heading = "Shards")]
    retry_status: Option<Names>,
    /// Most time for one request, in seconds
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS", help_heading = "Web")]
    timeout: f64,
    /// Refuse larger files: `50 MiB`, `2GB`. As many as there are requests at work may be in memory at once
    #[arg(long, default_value = "20 MiB", value_name = "SIZE", value_parser = parse_size, help_heading = "Web")]
    max_body: usize,
    /// Further attempts after one that failed in a way that may pass
    #[arg(long, default_value_t = 2, help_heading = "Web")]
    retries: u32,
    /// Requests at work at once, for each of processes_count
    #[arg(long, default_value_t = 256, help_heading = "Web")]
    thread_count: usize,
    /// Multiplies thread_count
    #[arg(long, default_value_t = 1, help_heading = "Web")]
    processes_count: usize,
    /// Requests at work at once at one host
    #[arg(long, default_value_t = CrawlerWorkerConfig::default().per_host, help_heading = "Web")]
    per_host: usize,
    /// Requests a second to one host
    #[arg(long, value_name = "RATE", default_value_t = CrawlerWorkerConfig::default().requests_per_second, help_heading = "Web")]
    requests_per_second: f64,
    /// Obey robots.txt
    #[arg(long, default_value = "True", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, help_heading = "Web")]
    robots: bool,
    /// The name that the agent goes by, in robots.txt and X-Robots-Tag as well [default: capfilt]
    #[arg(long, value_name = "TOKEN", help_heading = "Web")]
    user_agent_token: Option<String>,
    /// X-Robots-Tag directives that forbid the use of an image: all of noai, noimageai, noindex, noimageindex, or `[]` for none
    #[arg(long, value_name = "DIRECTIVES", help_heading = "Web")]
    disallowed_header_directives: Option<Names>,
    /// Change any other setting of the crawler: `crawler.proxy=http://127.0.0.1:3128`, `web.max_redirects=3`; may be given many times
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Web")]
    set: Vec<String>,
    /// Serve metrics for Prometheus at this address: `127.0.0.1:9100`
    #[arg(long, value_name = "ADDRESS")]
    pub(super) metrics: Option<SocketAddr>,
    /// What an hour of this machine costs; the cost per million images is shown
    #[arg(long, value_name = "PRICE")]
    pub(super) hourly_price: Option<f64>,
    /// Write the result as JSON to standard output; progress goes to standard error
    #[arg(long)]
    pub(super) json: bool,
    /// Only multiprocessing: this program is the one process
    #[arg(long, default_value = "multiprocessing", hide = true)]
    distributor: String,
    /// Nothing depends on it
    #[arg(long, default_value_t = 1000, hide = true)]
    subjob_size: usize,
    /// Not supported: nothing is sent anywhere
    #[arg(long, default_value = "False", value_parser = truth, num_args = 0..=1, default_missing_value = "True", action = ArgAction::Set, hide = true)]
    pub(super) enable_wandb: bool,
    /// Not supported
    #[arg(long, hide = true)]
    wandb_project: Option<String>,
}

/// A truth value as Python and people write it.
fn truth(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err("write True or False".to_owned()),
    }
}

/// One of a few names.
fn named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(StrDeserializer::<NoName>::new(text)).map_err(|e| e.to_string())
}

/// A format of a list, perhaps packed.
#[derive(Clone, Copy, Debug)]
struct InputFormat {
    format: ListFormat,
    gzipped: bool,
}

impl FromStr for InputFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gzipped = text.strip_suffix(".gz");
        let format = named(gzipped.unwrap_or(text))?;
        if gzipped.is_some() && format == ListFormat::Parquet {
            return Err("parquet files are packed inside; write parquet".to_owned());
        }
        Ok(Self { format, gzipped: gzipped.is_some() })
    }
}

/// Names as Python writes a list or a tuple of them, or with commas between them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Names(Vec<String>);

impl FromStr for Names {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let inner = text.trim();
        let bracketed = [('[', ']'), ('(', ')')].iter().find_map(|(a, b)| inner.strip_prefix(*a)?.strip_suffix(*b));
        let names = bracketed.unwrap_or(inner).split(',').map(|name| {
            let name = name.trim();
            let quoted = ['"', '\''].iter().find_map(|q| name.strip_prefix(*q)?.strip_suffix(*q));
            quoted.unwrap_or(name).to_owned()
        });
        Ok(Self(names.filter(|name| !name.is_empty() && name != "None").collect()))
    }
}

/// What `--set` can change.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    web: WebConfig,
    crawler: CrawlerWorkerConfig,
}

impl DownloadArgs {
    pub(super) fn config(self) -> Result<DownloadConfig, Failure> {
        let usage = |text: &str| Failure::Usage(text.to_owned());
        if self.bbox_col.as_ref().is_some_and(|c| c != "None") {
            return Err(usage("--bbox_col: faces are not blurred here; leave it out, or blur them with another program"));
        }
        if self.distributor != "multiprocessing" {
            let text = "--distributor: only multiprocessing; for many machines, give each a part of the list and a folder";
            return Err(usage(text));
        }
        let given = |name: Option<String>| name.filter(|n| n != "None" && !n.is_empty());
        let kind = |name: &str| {
            HashKind::parse(name).ok_or_else(|| Failure::Usage(format!("`{name}` is no hash; use md5, sha256 or sha512")))
        };
        let verify_hash = match self.verify_hash.as_ref().map(|names| names.0.as_slice()) {
            None | Some([]) => None,
            Some([column, name]) => Some((column.clone(), kind(name)?)),
            Some(_) => return Err(usage("--verify_hash: write the column and the kind: [\"md5_col\",\"md5\"]")),
        };
        let settings = self.settings()?;
        let image = ImageConfig {
            size: self.image_size,
            resize: self.resize_mode,
            only_if_bigger: self.resize_only_if_bigger,
            downscale: self.downscale_interpolation,
            upscale: self.upscale_interpolation,
            format: self.encode_format,
            quality: self.encode_quality,
            reencode: match (self.disable_all_reencoding, self.skip_reencode) {
                (true, _) => Reencode::Never,
                (false, true) => Reencode::IfNeeded,
                (false, false) => Reencode::Always,
            },
            min_side: self.min_image_size,
            max_aspect: self.max_aspect_ratio,
            max_pixels: area(self.max_image_area)?,
        };
        let config = DownloadConfig {
            url_list: local(self.url_list.or(self.list).unwrap_or_default(), "url_list")?,
            input_format: self.input_format.format,
            gzipped: self.input_format.gzipped,
            url_col: self.url_col,
            caption_col: given(self.caption_col),
            verify_hash,
            save_additional_columns: self.save_additional_columns.map_or_else(Vec::new, |names| names.0),
            output_folder: local(self.output_folder, "output_folder")?,
            output_format: self.output_format,
            number_sample_per_shard: self.number_sample_per_shard,
            oom_shard_count: self.oom_shard_count,
            compute_hash: given(Some(self.compute_hash)).map(|name| kind(&name)).transpose()?,
            extract_exif: self.extract_exif,
            incremental_mode: self.incremental_mode,
            max_shard_retry: self.max_shard_retry,
            retry_status: self.retry_status.map_or_else(|| Ok(Vec::new()), |names| statuses(&names))?,
            fetch: FetchConfig { web: settings.web, max_body: self.max_body, image },
            crawler: settings.crawler,
        };
        config.check().map_err(|e| Failure::Usage(e.to_string()))?;
        Ok(config)
    }

    fn settings(&self) -> Result<Settings, Failure> {
        let usage = |text: &str| Failure::Usage(text.to_owned());
        let opt_out = match self.disallowed_header_directives.as_ref().map(|names| &names.0) {
            None => true,
            Some(names) if names.is_empty() => false,
            Some(names) if DIRECTIVES.iter().all(|d| names.iter().any(|n| n.eq_ignore_ascii_case(d))) => true,
            Some(_) => {
                let text = "--disallowed_header_directives: all of noai, noimageai, noindex and noimageindex are obeyed, or with `[]` none";
                return Err(usage(text));
            }
        };
        let default = WebConfig::default();
        let agent = match self.user_agent_token.as_deref().filter(|t| *t != "None") {
            Some(token) => {
                let (_, rest) = default.agent.split_once(' ').unwrap_or(("", ""));
                format!("{} {rest}", token.trim())
            }
            None => default.agent.clone(),
        };
        let timeout = Duration::try_from_secs_f64(self.timeout).map_err(|_| usage("--timeout: write a number of seconds"))?;
        let web = WebConfig { agent, robots: self.robots, opt_out, timeout, retries: self.retries, ..default };
        let crawler = CrawlerWorkerConfig {
            connections: self.thread_count.saturating_mul(self.processes_count),
            per_host: self.per_host,
            requests_per_second: self.requests_per_second,
            ..CrawlerWorkerConfig::default()
        };
        let wrong = |e: &dyn std::fmt::Display| Failure::Usage(format!("--set: {e}"));
        let mut settings = toml::Table::try_from(Settings { web, crawler }).map_err(|e| wrong(&e))?;
        for change in &self.set {
            config::apply(&mut settings, change).map_err(Failure::Usage)?;
        }
        settings.try_into().map_err(|e: toml::de::Error| wrong(&e.message()))
    }
}

/// The most pixels; infinity is what the default guards against.
fn area(pixels: Option<f64>) -> Result<u64, Failure> {
    match pixels {
        None => Ok(ImageConfig::default().max_pixels),
        Some(pixels) if pixels.is_infinite() && pixels > 0.0 => Ok(ImageConfig::default().max_pixels),
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole pixels, held against the range")]
        Some(pixels) if (0.0..1e12).contains(&pixels) => Ok(pixels as u64),
        Some(_) => Err(Failure::Usage("--max_image_area: write a number of pixels".to_owned())),
    }
}

fn local(path: PathBuf, flag: &str) -> Result<PathBuf, Failure> {
    match path.to_str().and_then(|p| p.split_once("://")) {
        Some((scheme, _)) => Err(Failure::Usage(format!("--{flag}: only local paths, not {scheme}; mount it or copy it"))),
        None => Ok(path),
    }
}

/// The statuses whose rows are downloaded again.
fn statuses(names: &Names) -> Result<Vec<FetchStatus>, Failure> {
    Ok(retry::statuses(&names.0, "--retry_status")?.into_iter().collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DownloadArgs,
    }

    fn config(line: &str) -> Result<DownloadConfig, String> {
        let words = std::iter::once("download").chain(line.split(' '));
        let args = Line::try_parse_from(words).map_err(|e| e.to_string())?.args;
        args.config().map_err(|f| f.text())
    }

    #[test]
    fn flags_are_read_as_img2dataset_reads_them() {
        let line = "--url_list=l.csv --input_format csv.gz --caption_col TEXT --resize_mode keep_ratio --resize_only_if_bigger=True \
                    --skip_reencode --extract_exif False --compute_hash None --save_additional_columns [\"a\",'b'] --timeout 3 \
                    --max_aspect_ratio 3.5 --encode_format webp --disallowed_header_directives [] --user_agent_token mybot \
                    --processes_count 2 --thread_count 8 --incremental_mode extend --max_body 1.5GiB --set web.max_redirects=2";
        let c = config(line).unwrap();
        assert_eq!((c.input_format, c.gzipped, c.caption_col.as_deref()), (ListFormat::Csv, true, Some("TEXT")));
        assert_eq!(
            (c.extract_exif, c.compute_hash, c.save_additional_columns),
            (false, None, vec!["a".to_owned(), "b".to_owned()])
        );
        let image = &c.fetch.image;
        assert_eq!((image.resize, image.only_if_bigger, image.size), (ResizeMode::KeepRatio, true, 256));
        assert_eq!((image.reencode, image.format, image.max_aspect), (Reencode::IfNeeded, StoredFormat::WebP, 3.5));
        let web = &c.fetch.web;
        assert_eq!((web.timeout, web.opt_out, web.token(), web.max_redirects), (Duration::from_secs(3), false, "mybot", 2));
        assert_eq!((c.crawler.connections, c.incremental_mode, c.fetch.max_body), (16, IncrementalMode::Extend, 3 << 29));
        let c = config("urls.txt").unwrap();
        assert_eq!((c.url_list, c.output_folder), ("urls.txt".into(), "images".into()));
        assert_eq!(c.fetch.max_body, FetchConfig::default().max_body);
        assert_eq!((c.output_format, c.number_sample_per_shard, c.oom_shard_count), (OutputFormat::Files, 10_000, 5));
        assert_eq!((c.fetch.image.resize, c.compute_hash, c.extract_exif), (ResizeMode::Border, Some(HashKind::Sha256), true));
        let c = config("l --input_format parquet --verify_hash (\"sum\",\"md5\") --compute_hash md5 --retry_status dns,timeout")
            .unwrap_err();
        assert!(c.contains("verify_hash"), "{c}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        for (line, why) in [
            ("l --bbox_col boxes", "blurred"),
            ("l --distributor pyspark", "multiprocessing"),
            ("l --resize_mode stretch", "keep_ratio"),
            ("l --input_format xml", "unknown variant"),
            ("l --verify_hash a", "column and the kind"),
            ("l --compute_hash crc", "md5"),
            ("l --verify_hash [\"a\",\"md5\"] --input_format csv", "compute md5"),
            ("l --caption_col c", "addresses only"),
            ("l --input_format csv --save_additional_columns width", "width"),
            ("l --input_format csv --save_additional_columns a,a", "twice"),
            ("l --disallowed_header_directives [\"noai\"]", "all of noai"),
            ("l --retry_status ok", "no status"),
            ("l --set web.colour=1", "colour"),
            ("l --encode_format png --encode_quality 95", "0 to 9"),
            ("l --number_sample_per_shard 0", "number_sample_per_shard"),
            ("l --timeout=-1", "timeout"),
            ("l --max_body 20", "write a number and one of B, kB"),
            ("s3://b/l", "local"),
            ("--json", "url_list"),
        ] {
            let error = config(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}
