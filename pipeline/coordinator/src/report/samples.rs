//! Which samples the report shows: a mix over what can happen to a pair, the same for the same dataset version.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Float32Type, UInt32Type};
use capfilt_schemas::{DatasetVersion, Digest, Origin, RowStatus, Table, column};
use capfilt_store::Store;
use futures::TryStreamExt;

use super::ReportInput;
use crate::Result;
use crate::build::{BuildConfig, Policy};
use crate::scan::{RowSet, Scan, Slice, Source, Trust, open};

/// Shards in which samples are looked for, spread evenly over the version's.
const MAX_PARTS: usize = 8;
/// Samples read for one that is shown, because some have a large image or one that is shown already.
const SPARE: usize = 3;
/// Images up to this size are preferred.
const SMALL_IMAGE: usize = 40 << 10;
/// The size of all images together.
const ALL_IMAGES: usize = 6 << 20;

/// What became of a sample.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Verdict {
    BothKept,
    OnlySynthetic,
    OnlyWeb,
    NothingKept,
}

impl Verdict {
    pub(super) const ALL: [Self; 4] = [Self::BothKept, Self::OnlySynthetic, Self::OnlyWeb, Self::NothingKept];

    const fn of(web: bool, synthetic: bool) -> Self {
        match (web, synthetic) {
            (true, true) => Self::BothKept,
            (false, true) => Self::OnlySynthetic,
            (true, false) => Self::OnlyWeb,
            (false, false) => Self::NothingKept,
        }
    }
}

/// One image and its texts.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) id: String,
    pub(super) url: String,
    pub(super) page_url: Option<String>,
    pub(super) image: Vec<u8>,
    /// Width and height in pixels.
    pub(super) size: Option<(u32, u32)>,
    pub(super) verdict: Verdict,
    pub(super) web: Text,
    pub(super) synthetic: Vec<Text>,
    sha256: String,
}

/// A text and its judgement.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) itm: Option<f32>,
    pub(super) itc: Option<f32>,
    pub(super) clip: Option<f32>,
    pub(super) fate: Fate,
}

/// What became of a text, as far as scores and the dataset tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Kept,
    /// By its score or rank, or because it has none.
    Removed,
    /// Its score is good enough; another text of the image that was kept says the same.
    Repeats,
    /// Whatever the texts: the image is a duplicate, too small or held out.
    ImageDropped,
}

/// How texts were chosen.
#[derive(Clone, Copy)]
enum Rule {
    Threshold(f32),
    Rank,
}

/// The ITM probability from which on a version's texts were kept, unless they were chosen by rank.
pub(super) fn threshold(version: &DatasetVersion) -> Option<f32> {
    let settings: BuildConfig = serde_json::from_value(version.settings.clone()).ok()?;
    (settings.policy == Policy::Itm).then_some(settings.min_itm as f32)
}

/// A sample that might be shown, without what is large.
struct Candidate {
    verdict: Verdict,
    /// Whether the scores alone do not explain the verdict: shown only when there is nothing clearer.
    unclear: bool,
    id: String,
    part: u32,
    row: u32,
}

/// Kept texts: sample, whether the text is the web's, text.
type Kept = HashSet<(String, bool, String)>;

/// The samples to show, the verdicts in turn.
pub(super) async fn choose(store: &Store, version: &DatasetVersion, input: &ReportInput) -> Result<Vec<Sample>> {
    if input.samples == 0 {
        return Ok(Vec::new());
    }
    let parts = parts(version);
    let kept = kept(store, version, &parts).await?;
    let taken_down = store.taken_down().await?;
    let rule = threshold(version).map_or(Rule::Rank, Rule::Threshold);
    let mut candidates = Vec::new();
    let scan = Scan { store: store.clone(), sources: sources(&parts, TEXTS), only: None };
    let mut rows = scan.rows();
    while let Some(slice) = rows.try_next().await? {
        candidates.extend(
            samples_of(&slice, &kept, rule)
                .filter(|(_, s)| !taken_down.covers(&s.url, Some(&s.sha256)))
                .map(|(row, s)| candidate(&s, slice.part, row)),
        );
    }
    let wanted = mixed(candidates, input.samples.saturating_mul(SPARE));
    let mut only = RowSet::default();
    wanted.iter().for_each(|c| only.insert(c.part, c.row));
    let scan = Scan { store: store.clone(), sources: sources(&parts, TEXTS_AND_IMAGE), only: Some(Arc::new(only)) };
    let mut found = BTreeMap::new();
    let mut rows = scan.rows();
    while let Some(slice) = rows.try_next().await? {
        found.extend(
            samples_of(&slice, &kept, rule)
                .filter(|(_, s)| !taken_down.covers(&s.url, Some(&s.sha256)))
                .map(|(row, s)| ((slice.part, row), s)),
        );
    }
    let found = wanted.iter().filter_map(|c| found.remove(&(c.part, c.row))).collect();
    Ok(shown(found, input.samples))
}

const TEXTS: &[&str] = &[column::SAMPLE_ID, column::TEXT, column::URL, column::PAGE_URL, column::SHA256];
const TEXTS_AND_IMAGE: &[&str] = &[
    column::SAMPLE_ID,
    column::TEXT,
    column::URL,
    column::PAGE_URL,
    column::SHA256,
    column::WIDTH,
    column::HEIGHT,
    column::IMAGE,
];
const CAPTIONS: &[&str] = &[column::SAMPLE_ID, column::CAPTIONS];
const SCORES: &[&str] = &[
    column::SAMPLE_ID,
    column::STATUS,
    column::WEB_ITM,
    column::WEB_ITC,
    column::WEB_CLIP,
    column::SYNTHETIC_ITM,
    column::SYNTHETIC_ITC,
    column::SYNTHETIC_CLIP,
];

/// The (`samples`, `captions`, `scores`) shards in which to look: a build names them in the same order.
fn parts(version: &DatasetVersion) -> Vec<[Digest; 3]> {
    let of = |table| version.lineage.inputs.iter().filter(move |i| i.table == table).map(|i| i.digest);
    let all: Vec<[Digest; 3]> =
        of(Table::Samples).zip(of(Table::Captions)).zip(of(Table::Scores)).map(|((a, b), c)| [a, b, c]).collect();
    let step = all.len().div_ceil(MAX_PARTS).max(1);
    all.into_iter().step_by(step).collect()
}

fn sources(parts: &[[Digest; 3]], of_samples: &'static [&'static str]) -> Vec<Source> {
    let tables = [(Table::Samples, of_samples), (Table::Captions, CAPTIONS), (Table::Scores, SCORES)];
    let source = |(i, (table, columns))| Source { table, shards: parts.iter().map(|p| p[i]).collect(), columns };
    tables.into_iter().enumerate().map(source).collect()
}

/// The version's texts whose image is in one of the parts.
async fn kept(store: &Store, version: &DatasetVersion, parts: &[[Digest; 3]]) -> Result<Kept> {
    const COLUMNS: &[&str] = &[column::SHARD, column::SAMPLE_ID, column::ORIGIN, column::TEXT];
    let shards: HashSet<String> = parts.iter().map(|p| p[0].to_string()).collect();
    let mut kept = HashSet::new();
    for shard in &version.shards {
        let mut batches = open(store, Table::Dataset, &shard.digest, COLUMNS, Trust::Digest, 8192).await?;
        while let Some(batch) = batches.try_next().await? {
            let of = |i: usize| batch.column(i).as_string::<i32>();
            for row in (0..batch.num_rows()).filter(|r| shards.contains(of(0).value(*r))) {
                let web = of(2).value(row) == Origin::Web.as_str();
                kept.insert((of(1).value(row).to_owned(), web, of(3).value(row).to_owned()));
            }
        }
    }
    Ok(kept)
}

/// The scored samples of a slice, with their row.
fn samples_of<'a>(slice: &'a Slice, kept: &'a Kept, rule: Rule) -> impl Iterator<Item = (u32, Sample)> + 'a {
    let statuses = slice.batches[2].column(1).as_string::<i32>();
    let scored = (0..slice.rows.len()).filter(move |i| statuses.value(*i) == RowStatus::Ok.as_str());
    scored.map(move |i| {
        let mut sample = sample(&slice.batches, i, kept);
        sample.explain(rule);
        (slice.rows.value(i), sample)
    })
}

impl Sample {
    /// Says of the texts that are not in the dataset why they are not.
    fn explain(&mut self, rule: Rule) {
        let good = |t: &Text| match rule {
            Rule::Threshold(least) => t.itm.is_some_and(|itm| itm >= least),
            Rule::Rank => false,
        };
        let texts = || std::iter::once(&self.web).chain(&self.synthetic);
        let any_kept = texts().any(|t| t.fate == Fate::Kept);
        let dropped = !any_kept && (matches!(rule, Rule::Rank) || texts().any(good));
        for text in std::iter::once(&mut self.web).chain(&mut self.synthetic).filter(|t| t.fate != Fate::Kept) {
            text.fate = match dropped {
                true => Fate::ImageDropped,
                false if good(text) => Fate::Repeats,
                false => Fate::Removed,
            };
        }
    }
}

/// Row `i` of (`samples`, `captions`, `scores`).
fn sample(batches: &[RecordBatch], i: usize, kept: &Kept) -> Sample {
    let (samples, captions, scores) = (&batches[0], &batches[1], &batches[2]);
    let text = |name: &str| {
        let column = samples.column_by_name(name)?.as_string_opt::<i32>()?;
        column.is_valid(i).then(|| column.value(i).to_owned())
    };
    let side = |name: &str| {
        let column = samples.column_by_name(name)?.as_primitive_opt::<UInt32Type>()?;
        column.is_valid(i).then(|| column.value(i))
    };
    let image = samples.column_by_name(column::IMAGE).and_then(|c| c.as_binary_opt::<i32>());
    let id = text(column::SAMPLE_ID).unwrap_or_default();
    let judged = |text: String, [itm, itc, clip]: [Option<f32>; 3], web: bool| {
        let key = (id.clone(), web, text);
        let fate = if kept.contains(&key) { Fate::Kept } else { Fate::Removed };
        Text { text: key.2, itm, itc, clip, fate }
    };
    let one = |n: usize| {
        let column = scores.column(n).as_primitive::<Float32Type>();
        column.is_valid(i).then(|| column.value(i))
    };
    let many = |n: usize| scores.column(n).as_list::<i32>().value(i).as_primitive::<Float32Type>().values().to_vec();
    let web = judged(text(column::TEXT).unwrap_or_default(), [2, 3, 4].map(one), true);
    let of_captions = [5, 6, 7].map(many);
    let texts = captions.column(1).as_list::<i32>().value(i);
    let texts = texts.as_string::<i32>().iter().flatten().enumerate();
    let synthetic: Vec<Text> =
        texts.map(|(n, text)| judged(text.to_owned(), of_captions.each_ref().map(|s| s.get(n).copied()), false)).collect();
    Sample {
        url: text(column::URL).unwrap_or_default(),
        page_url: text(column::PAGE_URL),
        image: image.filter(|c| c.is_valid(i)).map(|c| c.value(i).to_vec()).unwrap_or_default(),
        size: side(column::WIDTH).zip(side(column::HEIGHT)),
        verdict: Verdict::of(web.fate == Fate::Kept, synthetic.iter().any(|t| t.fate == Fate::Kept)),
        sha256: text(column::SHA256).unwrap_or_default(),
        id,
        web,
        synthetic,
    }
}

fn candidate(sample: &Sample, part: u32, row: u32) -> Candidate {
    let odd = |t: &Text| matches!(t.fate, Fate::Repeats | Fate::ImageDropped);
    let unclear = odd(&sample.web) || sample.synthetic.iter().any(odd);
    Candidate { verdict: sample.verdict, unclear, id: sample.id.clone(), part, row }
}

/// `count` candidates, the verdicts in turn as long as they last. A sample id is a hash, so the order by it is as good as chance.
fn mixed(mut candidates: Vec<Candidate>, count: usize) -> Vec<Candidate> {
    candidates.sort_by(|a, b| (a.unclear, &a.id).cmp(&(b.unclear, &b.id)));
    let mut wanted = in_turn(candidates, |c| c.verdict);
    wanted.truncate(count);
    wanted
}

/// The first of each verdict, the second of each, and so on.
fn in_turn<T>(items: Vec<T>, verdict: impl Fn(&T) -> Verdict) -> Vec<T> {
    let mut met = BTreeMap::<Verdict, usize>::new();
    let mut numbered: Vec<(usize, T)> = Vec::with_capacity(items.len());
    for item in items {
        let turn = met.entry(verdict(&item)).or_default();
        *turn += 1;
        numbered.push((*turn, item));
    }
    numbered.sort_by_key(|(turn, item)| (*turn, verdict(item)));
    numbered.into_iter().map(|(_, item)| item).collect()
}

/// The first `count` samples with images of their own, small ones preferred, within the page's limit.
fn shown(samples: Vec<Sample>, count: usize) -> Vec<Sample> {
    let (mut images, mut texts) = (BTreeSet::new(), BTreeSet::new());
    let (small, large): (Vec<_>, Vec<_>) =
        samples.into_iter().filter(|s| !s.image.is_empty()).partition(|s| s.image.len() <= SMALL_IMAGE);
    let mut room = ALL_IMAGES;
    let mut shown = Vec::new();
    for sample in small.into_iter().chain(large) {
        let fresh = !images.contains(&sample.sha256) && !texts.contains(&sample.web.text);
        if shown.len() < count && fresh && sample.image.len() <= room {
            room -= sample.image.len();
            images.insert(sample.sha256.clone());
            texts.insert(sample.web.text.clone());
            shown.push(sample);
        }
    }
    in_turn(shown, |s| s.verdict)
}
