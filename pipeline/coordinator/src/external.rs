//! Training by somebody else's program: given an exported dataset version, it leaves a checkpoint folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use capfilt_schemas::{DatasetVersion, Output, Task};
use capfilt_store::{CHECKPOINT_FILES, Store};
use serde::Deserialize;
use tokio::process::Command;

use crate::CoordinatorError;
use crate::export::{ExportConfig, export};
use crate::plan::PlanConfig;

/// The part of a train task's parameters that an external trainer needs; the rest is handed to it as JSON.
#[derive(Deserialize)]
struct ExternalParams {
    command: Vec<String>,
    role: String,
}

/// Exports `version`, whose shards are the task's inputs, runs the command, and puts the checkpoint that it leaves.
///
/// The command finds in its environment: `CAPFILT_ROLE`, `CAPFILT_EXPORT` (folder of the export), `CAPFILT_CHAMPION` (folder of the
/// model in service, or of the MED to start from; not there at a cold start), `CAPFILT_PARAMS` (the task's parameters as JSON) and `CAPFILT_OUTPUT` (folder in which it must leave
/// `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`).
///
/// # Errors
/// [`CoordinatorError::Trainer`] with the end of what the command printed.
pub(crate) async fn train(
    store: &Store,
    config: &PlanConfig,
    task: &Task,
    version: &DatasetVersion,
) -> Result<Output, CoordinatorError> {
    let params: ExternalParams = serde_json::from_value(task.params.clone())?;
    let fail = |what: String| CoordinatorError::Trainer { command: params.command.join(" "), what };
    let folder = config.work_dir.join("external").join(task.id().to_string());
    let io = |e: std::io::Error| fail(format!("the folder `{}` cannot be used: {e}", folder.display()));
    let (data, champion, output) = (folder.join("export"), folder.join("champion"), folder.join("output"));
    if output.exists() {
        std::fs::remove_dir_all(&output).map_err(io)?;
    }
    std::fs::create_dir_all(&output).map_err(io)?;
    let settings = ExportConfig { folder: data.clone(), ..ExportConfig::default() };
    export(store, &config.sql, version, &settings, |_| {}).await?;
    if let Some(model) = task.model {
        store.write_model(&model, &champion).await?;
    }
    let Some((program, arguments)) = params.command.split_first() else { return Err(fail("it is empty".to_owned())) };
    let mut command = Command::new(program);
    if task.model.is_some() {
        command.env("CAPFILT_CHAMPION", absolute(&champion));
    }
    let ran = command
        .args(arguments)
        .env("CAPFILT_ROLE", &params.role)
        .env("CAPFILT_EXPORT", absolute(&data))
        .env("CAPFILT_OUTPUT", absolute(&output))
        .env("CAPFILT_PARAMS", task.params.to_string())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| fail(format!("it cannot be started: {e}")))?;
    if !ran.status.success() {
        let printed = String::from_utf8_lossy(&ran.stderr);
        let end: String = printed.chars().rev().take(500).collect::<Vec<_>>().into_iter().rev().collect();
        return Err(fail(format!("it ended with {}; the end of what it printed: {end}", ran.status)));
    }
    let mut files = BTreeMap::new();
    read_files(&output, &output, &mut files).map_err(io)?;
    if let Some(missing) = CHECKPOINT_FILES.iter().find(|name| !files.contains_key(**name)) {
        return Err(fail(format!("it left no `{missing}` in CAPFILT_OUTPUT")));
    }
    Ok(store.put_model(&files).await?)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn read_files(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            read_files(root, &path, files)?;
        } else if let Ok(name) = path.strip_prefix(root) {
            files.insert(name.to_string_lossy().into_owned(), std::fs::read(&path)?);
        }
    }
    Ok(())
}
