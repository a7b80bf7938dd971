//! Which texts of the images that stay are kept: the policies, and the rows of the dataset.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Float32Array, Float32Builder, ListArray, RecordBatch, StringArray, StringBuilder, UInt32Builder,
};
use arrow::datatypes::{DataType, Field, Float32Type, Int64Type, Schema, SchemaRef, UInt32Type};
use capfilt_schemas::{Origin, Output, Table, column};
use datafusion::common::ScalarValue;
use serde_json::{Value, json};

use super::images::Images;
use super::{BINS, Job, Policy, Score};
use crate::Result;
use crate::scan::{self, Map, Scan, Slice, Source};
use crate::shards::Shards;

/// What became of the texts.
#[derive(Debug, Default)]
pub(super) struct Texts {
    pub(super) shards: Vec<Output>,
    /// Whether a model has judged them.
    judged: bool,
    tallies: BTreeMap<&'static str, Tally>,
    /// Judged texts by origin and ITM bin.
    pub(super) histograms: BTreeMap<&'static str, Vec<u64>>,
}

#[derive(Debug, Default, Clone)]
struct Tally {
    kept: u64,
    rejected: u64,
    unjudged: u64,
}

impl Texts {
    fn tally(&self, origin: Origin) -> Tally {
        self.tallies.get(origin.as_str()).cloned().unwrap_or_default()
    }

    pub(super) fn kept(&self, origin: Origin) -> u64 {
        self.tally(origin).kept
    }

    /// Texts of these origins that were judged.
    pub(super) fn judged(&self, origins: &[Origin]) -> u64 {
        let texts = |origin: &Origin| self.tally(*origin).kept + self.tally(*origin).rejected;
        if self.judged { origins.iter().map(texts).sum() } else { 0 }
    }

    pub(super) fn noise_ratio(&self, origins: &[Origin]) -> Option<f64> {
        let rejected: u64 = origins.iter().map(|o| self.tally(*o).rejected).sum();
        let judged = self.judged(origins);
        (judged > 0).then(|| rejected as f64 / judged as f64)
    }

    pub(super) fn facts(&self, origin: Origin) -> Value {
        let t = self.tally(origin);
        json!({
            "judged": self.judged(&[origin]),
            "kept": t.kept,
            "unjudged": t.unjudged,
            "noise_ratio": self.noise_ratio(&[origin]),
        })
    }
}

/// BLIP's policy. A text without a score is neither kept nor rejected: `kept` is null.
const ITM: &str = "SELECT *, itm >= $least AS kept FROM texts";

/// The same by ITC.
const ITC: &str = "SELECT *, itc >= $least AS kept FROM texts";

/// Where no model has judged yet.
const ALL: &str = "SELECT *, TRUE AS kept FROM texts";

/// BLIP-2's policy, by one of the scores. Of equal scores the web text wins, then the caption written first.
fn rank(score: &str) -> String {
    format!(
        "SELECT *,
                CASE WHEN {score} IS NOT NULL
                     THEN row_number() OVER (PARTITION BY part, row_no ORDER BY {score} DESC NULLS LAST, position) <= $keep
                END AS kept
         FROM texts"
    )
}

/// How many texts of each origin were kept (true), rejected (false) or not judged (null), by ITM bin.
const TALLY: &str = "
    SELECT origin, kept,
           CASE WHEN itm >= 1 THEN 19 WHEN itm < 0 THEN 0 ELSE CAST(itm * 20 AS INT) END AS bin,
           count(*) AS texts
    FROM judged
    GROUP BY 1, 2, 3";

/// The rows of the dataset.
const KEPT: &str = "
    SELECT sample_id, text, origin, itm, itc, url, sha256, part, row_no, clip FROM judged WHERE kept
    UNION ALL
    SELECT sample_id, text, origin, itm, itc, url, sha256, part, row_no, clip FROM human
    ORDER BY sample_id, origin, text, part, row_no";

impl Job<'_> {
    pub(super) async fn texts(&self, images: &Images) -> Result<Texts> {
        self.register_texts(images)?;
        self.register_human(images)?;
        let keep = ("keep", ScalarValue::UInt64(Some(self.config.keep)));
        // Scores are single precision, and so must be what they are held against.
        let least = |score: f64| ("least", ScalarValue::Float32(Some(score as f32)));
        let judged = self.unjudged.is_empty();
        let (policy, parameter) = match (self.config.policy, self.config.rank_by) {
            _ if !judged => (ALL.to_owned(), None),
            (Policy::Itm, _) => (ITM.to_owned(), Some(least(self.config.min_itm))),
            (Policy::Itc, _) => (ITC.to_owned(), Some(least(self.config.min_itc))),
            (Policy::Rank, Score::Itc) => (rank(column::ITC), Some(keep)),
            (Policy::Rank, Score::Itm) => (rank(column::ITM), Some(keep)),
            (Policy::Rank, Score::Clip) => (rank(column::CLIP), Some(keep)),
        };
        self.sql.define("judged", &policy, parameter.as_slice()).await?;
        let mut texts = Texts { judged, ..Texts::default() };
        self.tally(&mut texts).await?;
        self.write(&mut texts).await?;
        Ok(texts)
    }

    fn register_texts(&self, images: &Images) -> Result<()> {
        let source = |table, shard: fn(&super::Triplet) -> _, columns| Source {
            table,
            shards: self.triplets.iter().map(shard).collect(),
            columns,
        };
        const SAMPLES: &[&str] = &[column::SAMPLE_ID, column::URL, column::TEXT, column::SHA256];
        let samples = Source { table: Table::Samples, shards: self.samples(), columns: SAMPLES };
        let sources = match self.unjudged.is_empty() {
            false => vec![samples],
            true => vec![
                samples,
                source(Table::Captions, |t| t.captions, &[column::SAMPLE_ID, column::CAPTIONS]),
                source(
                    Table::Scores,
                    |t| t.scores,
                    &[
                        column::SAMPLE_ID,
                        column::WEB_ITM,
                        column::WEB_ITC,
                        column::WEB_CLIP,
                        column::SYNTHETIC_ITM,
                        column::SYNTHETIC_ITC,
                        column::SYNTHETIC_CLIP,
                    ],
                ),
            ],
        };
        let scan = Scan { store: self.store.clone(), sources, only: Some(Arc::clone(&images.web)) };
        let map: Map = Arc::new(web_texts);
        scan.register(&self.sql, "texts", &text_schema(), &map)
    }

    fn register_human(&self, images: &Images) -> Result<()> {
        const COLUMNS: &[&str] = &[column::SAMPLE_ID, column::URL, column::CAPTIONS, column::SHA256];
        let all = Scan::of(self.store, Table::Annotated, &self.annotated, COLUMNS);
        let scan = Scan { only: Some(Arc::clone(&images.annotated)), ..all };
        let map: Map = Arc::new(human_texts);
        scan.register(&self.sql, "human", &text_schema(), &map)
    }

    async fn tally(&self, texts: &mut Texts) -> Result<()> {
        for origin in [Origin::Web, Origin::Synthetic] {
            texts.histograms.insert(origin.as_str(), vec![0; BINS]);
        }
        let mut found = self.sql.query("tally of texts", TALLY, &[]).await?;
        while let Some(batch) = found.next().await? {
            let (origin, kept) = (batch.column(0).as_string::<i32>(), batch.column(1).as_boolean());
            let bin = arrow::compute::cast(batch.column(2), &DataType::UInt32).map_err(|e| scan::encode("tally", e))?;
            let (bin, count) = (bin.as_primitive::<UInt32Type>(), batch.column(3).as_primitive::<Int64Type>());
            for i in 0..batch.num_rows() {
                let Some(origin) = Origin::parse(origin.value(i)).map(Origin::as_str) else { continue };
                let n = count.value(i).unsigned_abs();
                let tally = texts.tallies.entry(origin).or_default();
                match kept.is_valid(i).then(|| kept.value(i)) {
                    None => tally.unjudged += n,
                    Some(true) => tally.kept += n,
                    Some(false) => tally.rejected += n,
                }
                let histogram = texts.histograms.get_mut(origin).filter(|_| kept.is_valid(i) && bin.is_valid(i));
                if let Some(slot) = histogram.and_then(|h| h.get_mut(bin.value(i) as usize)) {
                    *slot += n;
                }
            }
        }
        Ok(())
    }

    async fn write(&self, texts: &mut Texts) -> Result<()> {
        let samples: Vec<String> = self.samples().iter().map(ToString::to_string).collect();
        let annotated: Vec<String> = self.annotated.iter().map(ToString::to_string).collect();
        let mut shards = Shards::new(self.store, Table::Dataset, self.config.shard_rows);
        let mut humans = 0;
        let mut found = self.sql.query("kept texts", KEPT, &[]).await?;
        while let Some(batch) = found.next().await? {
            let origin = batch.column(2).as_string::<i32>();
            let part = batch.column(7).as_primitive::<UInt32Type>();
            let human = |i: usize| origin.value(i) == Origin::Human.as_str();
            let shard = |i: usize| if human(i) { &annotated } else { &samples }[part.value(i) as usize].as_str();
            humans += (0..batch.num_rows()).filter(|i| human(*i)).count() as u64;
            let shard: StringArray = (0..batch.num_rows()).map(|i| Some(shard(i))).collect();
            let mut columns = batch.columns()[..7].to_vec();
            columns.push(Arc::new(shard));
            columns.extend_from_slice(&batch.columns()[8..]);
            shards.write(&scan::batch("dataset rows", &Table::Dataset.schema(), columns)?).await?;
        }
        texts.tallies.insert(Origin::Human.as_str(), Tally { kept: humans, ..Tally::default() });
        texts.shards = shards.finish().await?;
        Ok(())
    }
}

/// One row a text. `position` is 0 for the web text and counts the captions from 1.
fn text_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("part", DataType::UInt32, false),
        Field::new("row_no", DataType::UInt32, false),
        Field::new(column::SAMPLE_ID, DataType::Utf8, false),
        Field::new(column::URL, DataType::Utf8, false),
        Field::new(column::SHA256, DataType::Utf8, false),
        Field::new(column::ORIGIN, DataType::Utf8, false),
        Field::new("position", DataType::UInt32, false),
        Field::new(column::TEXT, DataType::Utf8, false),
        Field::new(column::ITM, DataType::Float32, true),
        Field::new(column::ITC, DataType::Float32, true),
        Field::new(column::CLIP, DataType::Float32, true),
    ]))
}

/// What stands in front of every text of an image.
struct Image<'a> {
    part: u32,
    row: u32,
    id: &'a str,
    url: &'a str,
    sha256: &'a str,
}

/// What the models say of a text.
#[derive(Clone, Copy, Default)]
struct Scores {
    itm: Option<f32>,
    itc: Option<f32>,
    clip: Option<f32>,
}

#[derive(Default)]
struct TextRows {
    part: UInt32Builder,
    row: UInt32Builder,
    id: StringBuilder,
    url: StringBuilder,
    sha256: StringBuilder,
    origin: StringBuilder,
    position: UInt32Builder,
    text: StringBuilder,
    itm: Float32Builder,
    itc: Float32Builder,
    clip: Float32Builder,
}

impl TextRows {
    fn push(&mut self, image: &Image<'_>, origin: Origin, position: u32, text: &str, scores: Scores) {
        self.part.append_value(image.part);
        self.row.append_value(image.row);
        self.id.append_value(image.id);
        self.url.append_value(image.url);
        self.sha256.append_value(image.sha256);
        self.origin.append_value(origin.as_str());
        self.position.append_value(position);
        self.text.append_value(text);
        self.itm.append_option(scores.itm);
        self.itc.append_option(scores.itc);
        self.clip.append_option(scores.clip);
    }

    fn finish(mut self) -> Result<RecordBatch> {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.part.finish()),
            Arc::new(self.row.finish()),
            Arc::new(self.id.finish()),
            Arc::new(self.url.finish()),
            Arc::new(self.sha256.finish()),
            Arc::new(self.origin.finish()),
            Arc::new(self.position.finish()),
            Arc::new(self.text.finish()),
            Arc::new(self.itm.finish()),
            Arc::new(self.itc.finish()),
            Arc::new(self.clip.finish()),
        ];
        scan::batch("texts", &text_schema(), columns)
    }
}

/// The distinct texts of every image of a slice of samples, captions and scores. A caption that says what the web text or an
/// earlier caption says ([`normalise`]) is left out; so is an empty text. Of samples alone, the web texts.
fn web_texts(scan: &Scan, slice: &Slice) -> Result<RecordBatch> {
    let Some((samples, answers)) = slice.batches.split_first() else { return TextRows::default().finish() };
    let answers = if let [captions, scores] = answers { Some((captions, scores)) } else { None };
    let (id, url) = (samples.column(0).as_string::<i32>(), samples.column(1).as_string::<i32>());
    let (text, sha256) = (samples.column(2).as_string::<i32>(), samples.column(3).as_string::<i32>());
    let web =
        |column: usize, i: usize| answers.and_then(|(_, scores)| score(scores.column(column).as_primitive::<Float32Type>(), i));
    let mut rows = TextRows::default();
    for i in 0..samples.num_rows() {
        let row = slice.rows.value(i);
        let sha256 = scan::text_at(sha256, i, || scan.bad(0, slice.part, "has an image without SHA-256"))?;
        let image = Image { part: slice.part, row, id: id.value(i), url: url.value(i), sha256 };
        let mut said = HashSet::new();
        let found = text.value(i).trim();
        if !found.is_empty() {
            said.insert(normalise(found));
            rows.push(&image, Origin::Web, 0, found, Scores { itm: web(1, i), itc: web(2, i), clip: web(3, i) });
        }
        let Some((captions, scores)) = answers else { continue };
        let written = captions.column(1).as_list::<i32>().value(i);
        let [itms, itcs, clips] = [4, 5, 6].map(|column| Judged::of(scores.column(column).as_list(), i));
        for judged in [&itms, &itcs, &clips] {
            if judged.0.len() != written.len() && !judged.0.is_empty() {
                let problem = format!("has {} scores for the {} captions of row {row}", judged.0.len(), written.len());
                return Err(scan.bad(2, slice.part, problem));
            }
        }
        for (n, caption) in written.as_string::<i32>().iter().enumerate() {
            let caption = caption.unwrap_or_default().trim();
            if !caption.is_empty() && said.insert(normalise(caption)) {
                let position = u32::try_from(n + 1).unwrap_or(u32::MAX);
                let scores = Scores { itm: itms.get(n), itc: itcs.get(n), clip: clips.get(n) };
                rows.push(&image, Origin::Synthetic, position, caption, scores);
            }
        }
    }
    rows.finish()
}

/// The captions that people wrote, each distinct one once.
fn human_texts(scan: &Scan, slice: &Slice) -> Result<RecordBatch> {
    let annotated = &slice.batches[0];
    let (id, url) = (annotated.column(0).as_string::<i32>(), annotated.column(1).as_string::<i32>());
    let (captions, sha256) = (annotated.column(2).as_list::<i32>(), annotated.column(3).as_string::<i32>());
    let mut rows = TextRows::default();
    for i in 0..annotated.num_rows() {
        let sha256 = scan::text_at(sha256, i, || scan.bad(0, slice.part, "has an image without SHA-256"))?;
        let image = Image { part: slice.part, row: slice.rows.value(i), id: id.value(i), url: url.value(i), sha256 };
        let written = captions.value(i);
        let mut said = HashSet::new();
        for (position, caption) in (0..).zip(written.as_string::<i32>().iter().flatten().map(str::trim)) {
            if !caption.is_empty() && said.insert(caption) {
                rows.push(&image, Origin::Human, position, caption, Scores::default());
            }
        }
    }
    rows.finish()
}

/// The scores of one image's captions by one model; none if it did not score the image.
struct Judged(Float32Array);

impl Judged {
    fn of(column: &ListArray, i: usize) -> Self {
        Self(column.value(i).as_primitive::<Float32Type>().clone())
    }

    fn get(&self, n: usize) -> Option<f32> {
        if n < self.0.len() { score(&self.0, n) } else { None }
    }
}

/// A score, if there is a number: a model that gave NaN has judged nothing.
fn score(column: &Float32Array, i: usize) -> Option<f32> {
    column.is_valid(i).then(|| column.value(i)).filter(|s| !s.is_nan())
}

/// What two texts have in common that say the same: lower case, words only, one space between them. A text without any word
/// stands for itself.
#[must_use]
pub fn normalise(text: &str) -> String {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    if words.is_empty() { text.trim().to_owned() } else { words.join(" ") }
}
