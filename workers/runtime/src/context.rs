//! What a stage is given beside its rows.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use capfilt_schemas::{Digest, RunId, Task, TaskId};
use capfilt_store::Store;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use crate::{StageError, Telemetry};

/// Facts about a task that end in its commit, for the report; no stage reads another's.
#[derive(Clone, Debug, Default)]
pub struct Facts(Arc<Mutex<Map<String, Value>>>);

impl Facts {
    /// Sets a fact.
    pub fn set(&self, name: &str, value: impl Into<Value>) {
        self.lock().insert(name.to_owned(), value.into());
    }

    /// Adds to a count that starts at zero.
    pub fn add(&self, name: &str, n: u64) {
        let mut facts = self.lock();
        let before = facts.get(name).and_then(Value::as_u64).unwrap_or(0);
        facts.insert(name.to_owned(), Value::from(before + n));
    }

    /// All facts as a JSON object.
    #[must_use]
    pub fn to_value(&self) -> Value {
        Value::Object(self.lock().clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Map<String, Value>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One task at work. Cheap to clone.
#[derive(Clone)]
pub struct Work {
    /// The task.
    pub task: Arc<Task>,
    /// Its name.
    pub id: TaskId,
    /// The run that asked for it. Must not change what comes out.
    pub run: RunId,
    /// The store, for stages that need more than their rows.
    pub store: Store,
    /// Takes facts for the commit.
    pub facts: Facts,
    /// Ends early when the program is stopped.
    pub cancel: CancellationToken,
    pub(crate) telemetry: Telemetry,
    pub(crate) work_dir: Arc<Path>,
}

impl Work {
    /// A task outside of any worker: for tests and tools.
    #[must_use]
    pub fn new(task: Task, store: Store, run: RunId, work_dir: &Path) -> Self {
        Self {
            id: task.id(),
            task: Arc::new(task),
            run,
            store,
            facts: Facts::default(),
            cancel: CancellationToken::new(),
            telemetry: Telemetry::default(),
            work_dir: work_dir.into(),
        }
    }

    /// The task's parameters as the stage's own type.
    ///
    /// # Errors
    /// [`StageError::Params`].
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, StageError> {
        Ok(T::deserialize(&self.task.params)?)
    }

    /// The digest of the model that the task names.
    ///
    /// # Errors
    /// [`StageError::Input`] if it names none.
    pub fn model(&self) -> Result<Digest, StageError> {
        self.task.model.ok_or_else(|| StageError::Input(format!("the {} task {} names no model", self.task.stage, self.id)))
    }

    /// Tells how far the task is, `done` of `of`, for the progress display; the worker counts written rows by itself, so this is for
    /// stages whose rows come late or not at all (training steps, crawled pages).
    pub fn progress(&self, done: u64, of: u64, unit: &'static str) {
        self.telemetry.detail(self.task.stage, done, of, unit);
    }

    /// A folder of this task alone, made if need be. It survives a crash, so that a long task can go on from it, and is removed after
    /// the commit.
    ///
    /// # Errors
    /// [`StageError::Failed`] if it cannot be made.
    pub fn scratch(&self) -> Result<PathBuf, StageError> {
        let folder = self.scratch_path();
        std::fs::create_dir_all(&folder).map_err(|e| not_writable(&folder, e))?;
        Ok(folder)
    }

    /// Where the tasks of this machine share what can be made again.
    #[must_use]
    pub fn shared(&self, name: &str) -> PathBuf {
        self.work_dir.join(name)
    }

    pub(crate) fn scratch_path(&self) -> PathBuf {
        self.work_dir.join("tasks").join(self.id.to_string())
    }

    /// The folder with the files of a model of the store; copied there when it is first asked for.
    ///
    /// # Errors
    /// [`StageError::Store`], or [`StageError::Failed`] if the folder cannot be written.
    pub async fn model_folder(&self, digest: &Digest) -> Result<PathBuf, StageError> {
        let folder = self.work_dir.join("models").join(digest.to_string());
        if folder.is_dir() {
            return Ok(folder);
        }
        // Written aside and renamed, so that a killed copy is never taken for the model.
        let models = self.work_dir.join("models");
        std::fs::create_dir_all(&models).map_err(|e| not_writable(&models, e))?;
        let aside = models.join(format!("{digest}.{}.{}", self.id.0.short(), std::process::id()));
        self.store.write_model(digest, &aside).await?;
        match std::fs::rename(&aside, &folder) {
            Ok(()) => {}
            Err(_) if folder.is_dir() => std::fs::remove_dir_all(&aside).map_err(|e| not_writable(&aside, e))?,
            Err(e) => return Err(not_writable(&folder, e)),
        }
        Ok(folder)
    }
}

fn not_writable(folder: &Path, source: std::io::Error) -> StageError {
    StageError::Failed {
        message: format!("the working folder `{}` cannot be written; set `work_dir` to one that can", folder.display()),
        retryable: true,
        source: Some(Box::new(source)),
    }
}
