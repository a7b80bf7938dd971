//! Tasks and their names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Digest, Table, TaskId};

/// A stage: one verb, one output table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageKind {
    /// Reads a source and matches texts against the query list → `candidates`.
    Discover,
    /// Deduplicates and caps per query → `selected`.
    Balance,
    /// Downloads → `samples`.
    Fetch,
    /// Reads human-annotated pairs → `annotated`.
    Annotate,
    /// Writes synthetic captions → `captions`.
    Caption,
    /// Judges texts → `scores`.
    Score,
    /// Joins, deduplicates, filters and mixes → `dataset`.
    Build,
    /// Trains → `models`.
    Train,
    /// Measures a model on held-out pairs → `evaluations`.
    Evaluate,
}

impl StageKind {
    /// Every stage, in the order of a round.
    pub const ALL: &'static [Self] = &[
        Self::Discover,
        Self::Balance,
        Self::Annotate,
        Self::Fetch,
        Self::Caption,
        Self::Score,
        Self::Build,
        Self::Train,
        Self::Evaluate,
    ];

    /// The verb.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Discover => "discover",
            Self::Balance => "balance",
            Self::Fetch => "fetch",
            Self::Annotate => "annotate",
            Self::Caption => "caption",
            Self::Score => "score",
            Self::Build => "build",
            Self::Train => "train",
            Self::Evaluate => "evaluate",
        }
    }

    /// The table that the stage writes.
    #[must_use]
    pub const fn output(self) -> Table {
        match self {
            Self::Discover => Table::Candidates,
            Self::Balance => Table::Selected,
            Self::Fetch => Table::Samples,
            Self::Annotate => Table::Annotated,
            Self::Caption => Table::Captions,
            Self::Score => Table::Scores,
            Self::Build => Table::Dataset,
            Self::Train => Table::Models,
            Self::Evaluate => Table::Evaluations,
        }
    }
}

impl std::fmt::Display for StageKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One object that a task reads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Input {
    /// The object's table.
    pub table: Table,
    /// The object's digest.
    pub digest: Digest,
}

/// A piece of work. It holds everything that can change its output, and nothing that only changes its speed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Task {
    /// What to do.
    pub stage: StageKind,
    /// Raised by the stage's crate whenever the same input would give other bytes than before.
    pub stage_version: u32,
    /// The stage's own settings. Only its crate reads them.
    pub params: Value,
    /// The model used, for the stages that use one: the digest of its `models` object.
    pub model: Option<Digest>,
    /// The objects read, in the order in which the stage wants them.
    pub inputs: Vec<Input>,
}

impl Task {
    /// The task's name: SHA-256 of its canonical JSON (keys sorted at every depth, no white space).
    #[must_use]
    pub fn id(&self) -> TaskId {
        let inputs: Vec<Value> = self.inputs.iter().map(|i| Value::from(format!("{}/{}", i.table, i.digest))).collect();
        let name = BTreeMap::from([
            ("stage", Value::from(self.stage.name())),
            ("stage_version", Value::from(self.stage_version)),
            ("params", sorted(&self.params)),
            ("model", self.model.map_or(Value::Null, |m| Value::from(m.to_string()))),
            ("inputs", Value::from(inputs)),
        ]);
        let json = serde_json::to_vec(&name).unwrap_or_default();
        TaskId(Digest::of(&json))
    }

    /// The digests of the inputs that are of `table`, in order.
    pub fn inputs_of(&self, table: Table) -> impl Iterator<Item = Digest> + '_ {
        self.inputs.iter().filter(move |i| i.table == table).map(|i| i.digest)
    }
}

/// `value` with the keys of every object in order, whatever map `serde_json` was built with.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let ordered: BTreeMap<_, _> = map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            Value::Object(ordered.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn task() -> Task {
        Task {
            stage: StageKind::Caption,
            stage_version: 1,
            params: json!({"top_p": 0.9, "min_length": 5}),
            model: Some(Digest::of(b"model")),
            inputs: vec![Input { table: Table::Samples, digest: Digest::of(b"shard") }],
        }
    }

    #[test]
    fn name_depends_on_everything_but_key_order() {
        let base = task().id();
        let mut same = task();
        same.params = json!({"min_length": 5, "top_p": 0.9});
        assert_eq!(same.id(), base);
        let changes: [fn(&mut Task); 6] = [
            |t| t.stage = StageKind::Score,
            |t| t.stage_version = 2,
            |t| t.params["top_p"] = json!(0.8),
            |t| t.model = None,
            |t| t.inputs[0].table = Table::Selected,
            |t| t.inputs[0].digest = Digest::of(b"other"),
        ];
        for change in changes {
            let mut other = task();
            change(&mut other);
            assert_ne!(other.id(), base, "{other:?}");
        }
    }

    #[test]
    fn name_is_stable_over_releases() {
        insta::assert_snapshot!(task().id().to_string());
    }
}
