//! Training by somebody else's program: given an exported dataset version, it leaves a checkpoint folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use capfilt_schemas::{DatasetVersion, Output, Task};
use capfilt_store::{CHECKPOINT_FILES, Store};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::{ChildStderr, Command};

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
/// model in service, or of the MED to start from; not there at a cold start), `CAPFILT_PARAMS` (the task's parameters as JSON) and `CAPFILT_OUTPUT` (folder
/// in which it must leave `config.json`, `model.safetensors`, `tokenizer.json` and `preprocessor_config.json`; folders and links in it are left alone).
///
/// # Errors
/// [`CoordinatorError::Trainer`] with the end of what the command wrote to its standard error, or what is wrong with the checkpoint.
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
    // An earlier attempt may have used it up.
    let settings = ExportConfig { folder: data.clone(), overwrite: true, ..ExportConfig::default() };
    export(store, &config.sql, version, &settings, |_| {}).await?;
    if let Some(model) = task.model {
        store.write_model(&model, &champion).await?;
    }
    let Some((program, arguments)) = params.command.split_first() else { return Err(fail("it is empty".to_owned())) };
    let mut command = Command::new(program);
    if task.model.is_some() {
        command.env("CAPFILT_CHAMPION", absolute(&champion));
    }
    let mut running = command
        .args(arguments)
        .env("CAPFILT_ROLE", &params.role)
        .env("CAPFILT_EXPORT", absolute(&data))
        .env("CAPFILT_OUTPUT", absolute(&output))
        .env("CAPFILT_PARAMS", task.params.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| fail(format!("it cannot be started: {e}")))?;
    let printed = match &mut running.stderr {
        Some(stderr) => end_of(stderr).await.map_err(|e| fail(format!("what it prints cannot be read: {e}")))?,
        None => String::new(),
    };
    let status = running.wait().await.map_err(|e| fail(format!("nobody knows how it ended: {e}")))?;
    if !status.success() {
        return Err(fail(format!("it ended with {status}; the end of what it printed: {printed}")));
    }
    let files = read_files(&output).map_err(io)?;
    if let Some(missing) = CHECKPOINT_FILES.iter().find(|name| !files.contains_key(**name)) {
        return Err(fail(format!("it left no `{missing}` in CAPFILT_OUTPUT")));
    }
    let (check, role) = (config.check_model, params.role.clone());
    let checked = tokio::task::spawn_blocking(move || check(&output, &role)).await;
    checked.map_err(|e| fail(e.to_string()))?.map_err(|why| fail(format!("it left a checkpoint that cannot be used: {why}")))?;
    Ok(store.put_model(&files).await?)
}

/// The last characters of all that comes; a trainer may print for days.
async fn end_of(stream: &mut ChildStderr) -> std::io::Result<String> {
    const MOST: usize = 2_000;
    let (mut end, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut part).await?;
        if n == 0 {
            return Ok(String::from_utf8_lossy(&end).into_owned());
        }
        end.extend_from_slice(&part[..n]);
        end.drain(..end.len().saturating_sub(MOST));
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The plain files of a folder, by name.
fn read_files(folder: &Path) -> std::io::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?);
        }
    }
    Ok(files)
}
