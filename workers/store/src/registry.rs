//! The model registry: models are objects of the `models` table; roles point to them by numbered events.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BinaryArray, RecordBatch, StringArray, UInt32Array};
use capfilt_schemas::{AliasEvent, Digest, Output, Table};

use crate::{Result, ShardWriter, Store, StoreError, layout, now_ms};

/// The roles that a model can play.
pub const ROLES: &[&str] = &["captioner", "filter"];

/// In place of a role: the list of models that were imported without one.
pub const IMPORTED: &str = "imported";

/// The files that every model has; it may have more, such as its training log.
pub const CHECKPOINT_FILES: &[&str] = &["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"];

/// The largest part of a model's file in one row of `models`.
const MODEL_PART_BYTES: usize = 64 << 20;

impl Store {
    /// Puts a model's files (name → bytes) as one `models` object. The same files give the same digest. Nothing points to it yet.
    ///
    /// # Errors
    /// [`StoreError::Parquet`] or [`StoreError::Io`].
    pub async fn put_model(&self, files: &BTreeMap<String, Vec<u8>>) -> Result<Output> {
        let mut shard = ShardWriter::new(Table::Models)?;
        for batch in model_rows(files) {
            shard.write(&batch?)?;
        }
        shard.finish(self).await
    }

    /// As [`put_model`](Self::put_model), for files of a folder. They are read a part at a time.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] if a file cannot be read, and as [`put_model`](Self::put_model).
    pub async fn put_files(&self, folder: &Path, names: &[&str]) -> Result<Output> {
        let mut shard = ShardWriter::new(Table::Models)?;
        for name in BTreeSet::from_iter(names) {
            let path = folder.join(name);
            let fail = |e: std::io::Error| StoreError::Unknown(format!("cannot read `{}`: {e}", path.display()));
            let mut file = std::fs::File::open(&path).map_err(fail)?;
            for number in 0.. {
                let mut part = Vec::new();
                file.by_ref().take(MODEL_PART_BYTES as u64).read_to_end(&mut part).map_err(fail)?;
                if part.is_empty() && number > 0 {
                    break;
                }
                shard.write(&model_row(name, number, &part)?)?;
            }
        }
        shard.finish(self).await
    }

    /// A model's files, name → bytes.
    ///
    /// # Errors
    /// As [`read_shard`](Self::read_shard).
    pub async fn get_model(&self, digest: &Digest) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut files = BTreeMap::<String, Vec<u8>>::new();
        for batch in self.read_shard(Table::Models, digest, 1).await? {
            let batch = batch?;
            let (names, bytes) = (batch.column(0).as_string::<i32>(), batch.column(2).as_binary::<i32>());
            for (name, part) in names.iter().zip(bytes) {
                files.entry(name.unwrap_or_default().to_owned()).or_default().extend_from_slice(part.unwrap_or_default());
            }
        }
        Ok(files)
    }

    /// Writes a model's files into `folder`, which is made if need be; a file's name may hold `/`.
    ///
    /// # Errors
    /// As [`get_model`](Self::get_model), and [`StoreError::Open`] if the folder cannot be written.
    pub async fn write_model(&self, digest: &Digest, folder: &Path) -> Result<()> {
        let fail = |e: std::io::Error| StoreError::Open {
            url: folder.display().to_string(),
            reason: format!("the model's files cannot be written there ({e})"),
        };
        std::fs::create_dir_all(folder).map_err(fail)?;
        for (name, bytes) in self.get_model(digest).await? {
            let relative = Path::new(&name);
            if relative.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
                return Err(StoreError::Unknown(format!("model {digest} holds a file `{name}` that would leave its folder")));
            }
            let path = folder.join(relative);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(fail)?;
            }
            std::fs::write(path, bytes).map_err(fail)?;
        }
        Ok(())
    }

    /// Lets `model` play `role` from now on, or notes it under [`IMPORTED`]. With a `key` that an event of the role has already, nothing happens and that event is
    /// returned: an act of a run happens once however often the run is repeated.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] for an unknown role or a model that is not in the store; [`StoreError::Io`].
    pub async fn set_alias(
        &self,
        role: &str,
        model: Digest,
        action: &str,
        reason: &str,
        key: &str,
        metrics: BTreeMap<String, f64>,
    ) -> Result<AliasEvent> {
        if !ROLES.contains(&role) && role != IMPORTED {
            return Err(StoreError::Unknown(format!("no role `{role}`; the roles are {}", ROLES.join(" and "))));
        }
        if self.get(&layout::object(Table::Models, &model)).await?.is_none() {
            return Err(StoreError::Unknown(format!("no model {model} in the store; import it first")));
        }
        let same = |event: &AliasEvent| !key.is_empty() && event.key == key;
        self.append_json_once(&layout::model_role(role), same, |number| AliasEvent {
            role: role.to_owned(),
            number,
            model,
            action: action.to_owned(),
            reason: reason.to_owned(),
            key: key.to_owned(),
            metrics: metrics.clone(),
            created_at_ms: now_ms(),
        })
        .await
    }

    /// The history of a role, oldest first.
    ///
    /// # Errors
    /// [`StoreError::Io`] or [`StoreError::Record`].
    pub async fn alias_events(&self, role: &str) -> Result<Vec<AliasEvent>> {
        self.list_json(&layout::model_role(role)).await
    }

    /// The model that plays `role` now.
    ///
    /// # Errors
    /// As [`alias_events`](Self::alias_events).
    pub async fn model_in_role(&self, role: &str) -> Result<Option<AliasEvent>> {
        Ok(self.alias_events(role).await?.pop())
    }
}

/// A model's files as rows of `models`, a batch a part.
///
/// # Errors
/// [`StoreError::Parquet`] if a row cannot be put together.
pub fn model_rows(files: &BTreeMap<String, Vec<u8>>) -> impl Iterator<Item = Result<RecordBatch>> + '_ {
    files.iter().flat_map(|(name, bytes)| {
        let parts: Vec<&[u8]> = if bytes.is_empty() { vec![&[]] } else { bytes.chunks(MODEL_PART_BYTES).collect() };
        parts.into_iter().zip(0_u32..).map(move |(part, number)| model_row(name, number, part))
    })
}

fn model_row(name: &str, number: u32, part: &[u8]) -> Result<RecordBatch> {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values([name])),
        Arc::new(UInt32Array::from_iter_values([number])),
        Arc::new(BinaryArray::from_iter_values([part])),
    ];
    let fail =
        |e: arrow::error::ArrowError| StoreError::Parquet { table: Table::Models, what: name.to_owned(), source: e.into() };
    RecordBatch::try_new(Table::Models.schema(), columns).map_err(fail)
}
