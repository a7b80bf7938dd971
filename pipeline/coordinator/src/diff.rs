//! What moved between two versions of a dataset.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Float32Type;
use capfilt_schemas::{DatasetVersion, Digest, Origin, Table};
use capfilt_store::{Store, TakenDown};
use serde::Serialize;
use serde_json::Value;

use crate::Result;
use crate::takedown::left_out;

/// A text that is in one version only.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Example {
    /// The pair.
    pub sample_id: String,
    /// The image's address.
    pub url: String,
    /// The text.
    pub text: String,
    /// The probability of a match, as the version that has the text knows it.
    pub itm: Option<f32>,
}

/// The texts of one origin that are in one version only.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Moved {
    /// How many.
    pub texts: u64,
    /// The first few by sample id, which is as good as drawn at random.
    pub examples: Vec<Example>,
}

/// A setting, or a model of the lineage, that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SettingChange {
    /// Its name; settings within settings are joined by dots.
    pub name: String,
    /// The value in the first version, if it has it.
    pub before: Option<Value>,
    /// The value in the second version, if it has it.
    pub after: Option<Value>,
}

/// What moved from one version to another. A text is known by sample id, origin and wording.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DatasetDiff {
    /// Dataset and version compared from: `demo@1`.
    pub from: String,
    /// Dataset and version compared to.
    pub to: String,
    /// Whether both hold the same rows in the same shards.
    pub same: bool,
    /// Texts in both.
    pub kept: u64,
    /// Of those, texts whose scores differ.
    pub rescored: u64,
    /// Texts only in the second version, by origin; all origins are there.
    pub added: BTreeMap<String, Moved>,
    /// Texts only in the first version, by origin; all origins are there.
    pub removed: BTreeMap<String, Moved>,
    /// Texts of either version that are not compared, because they were taken down.
    pub taken_down: u64,
    /// Settings of `[build]`, the captioner and the filter, where they differ.
    pub settings: Vec<SettingChange>,
}

/// Compares two versions, with up to `examples` texts for each origin and direction. Both are read side by side in their order, so
/// memory does not grow with them.
///
/// # Errors
/// [`CoordinatorError::Store`](crate::CoordinatorError::Store) for a shard that is missing or damaged.
pub async fn diff(store: &Store, from: &DatasetVersion, to: &DatasetVersion, examples: usize) -> Result<DatasetDiff> {
    let all = || Origin::ALL.iter().map(|o| (o.as_str().to_owned(), Moved::default())).collect::<BTreeMap<_, _>>();
    let name = |v: &DatasetVersion| format!("{}@{}", v.name, v.version);
    let mut diff = DatasetDiff {
        from: name(from),
        to: name(to),
        same: from.digest == to.digest,
        kept: 0,
        rescored: 0,
        added: all(),
        removed: all(),
        taken_down: 0,
        settings: changes(from, to),
    };
    let taken_down = store.taken_down().await?;
    diff.taken_down = left_out(store, from, &taken_down).await? + left_out(store, to, &taken_down).await?;
    let (mut a, mut b) = (Cursor::new(store, &taken_down, from), Cursor::new(store, &taken_down, to));
    let (mut has_a, mut has_b) = (a.advance().await?, b.advance().await?);
    while has_a || has_b {
        let order = match (has_a, has_b) {
            (true, false) => Ordering::Less,
            (false, _) => Ordering::Greater,
            _ => a.key().cmp(&b.key()),
        };
        match order {
            Ordering::Less => a.note(&mut diff.removed, examples),
            Ordering::Greater => b.note(&mut diff.added, examples),
            Ordering::Equal => {
                diff.kept += 1;
                diff.rescored += u64::from(a.scores() != b.scores());
            }
        }
        if order != Ordering::Greater {
            has_a = a.advance().await?;
        }
        if order != Ordering::Less {
            has_b = b.advance().await?;
        }
    }
    Ok(diff)
}

/// The rows of a version, one after the other.
struct Cursor<'a> {
    store: &'a Store,
    taken_down: &'a TakenDown,
    shards: std::vec::IntoIter<Digest>,
    batches: Box<dyn Iterator<Item = capfilt_store::Result<RecordBatch>> + Send>,
    batch: RecordBatch,
    row: usize,
}

impl<'a> Cursor<'a> {
    fn new(store: &'a Store, taken_down: &'a TakenDown, version: &DatasetVersion) -> Self {
        let shards: Vec<Digest> = version.shards.iter().map(|s| s.digest).collect();
        let batch = RecordBatch::new_empty(Table::Dataset.schema());
        Self { store, taken_down, shards: shards.into_iter(), batches: Box::new(std::iter::empty()), batch, row: 0 }
    }

    /// Goes to the next row that was not taken down; `false` behind the last.
    async fn advance(&mut self) -> Result<bool> {
        loop {
            self.row += 1;
            while self.row >= self.batch.num_rows() {
                match self.batches.next() {
                    Some(batch) => (self.batch, self.row) = (batch?, 0),
                    None => match self.shards.next() {
                        Some(shard) => self.batches = Box::new(self.store.read_shard(Table::Dataset, &shard, 1024).await?),
                        None => return Ok(false),
                    },
                }
            }
            if !self.taken_down.covers(self.text(5), Some(self.text(6))) {
                return Ok(true);
            }
        }
    }

    fn text(&self, column: usize) -> &str {
        self.batch.column(column).as_string::<i32>().value(self.row)
    }

    fn score(&self, column: usize) -> Option<f32> {
        let scores = self.batch.column(column).as_primitive::<Float32Type>();
        scores.is_valid(self.row).then(|| scores.value(self.row))
    }

    fn key(&self) -> (&str, &str, &str) {
        (self.text(0), self.text(2), self.text(1))
    }

    fn scores(&self) -> [Option<f32>; 3] {
        [3, 4, 9].map(|column| self.score(column))
    }

    fn note(&self, into: &mut BTreeMap<String, Moved>, examples: usize) {
        let moved = into.entry(self.text(2).to_owned()).or_default();
        moved.texts += 1;
        if moved.examples.len() < examples {
            moved.examples.push(Example {
                sample_id: self.text(0).to_owned(),
                url: self.text(5).to_owned(),
                text: self.text(1).to_owned(),
                itm: self.score(3),
            });
        }
    }
}

fn changes(from: &DatasetVersion, to: &DatasetVersion) -> Vec<SettingChange> {
    let flat = |v: &DatasetVersion| {
        let mut all = BTreeMap::new();
        flatten("", &v.settings, &mut all);
        for (role, model) in [("captioner", v.lineage.captioner), ("filter", v.lineage.filter)] {
            all.extend(model.map(|model| (role.to_owned(), Value::from(model.to_string()))));
        }
        all
    };
    let (before, after) = (flat(from), flat(to));
    let mut names: Vec<&String> = before.keys().chain(after.keys()).collect();
    names.sort();
    names.dedup();
    let change =
        |name: &String| SettingChange { name: name.clone(), before: before.get(name).cloned(), after: after.get(name).cloned() };
    names.into_iter().map(change).filter(|c| c.before != c.after).collect()
}

fn flatten(prefix: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flatten(&name, inner, into);
            }
        }
        Value::Null if prefix.is_empty() => {}
        other => _ = into.insert(prefix.to_owned(), other.clone()),
    }
}

#[cfg(test)]
mod tests;
