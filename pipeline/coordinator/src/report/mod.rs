//! The run report: one self-contained HTML page for people, made from what the store says about a run.
//!
//! Nothing on the page comes from a clock or from chance: the same store gives the same bytes, so a run that is repeated and finds
//! nothing to do leaves the same page. The page asks the network for nothing: style and charts are inline, images are `data:` URIs,
//! and a content security policy forbids everything else, scripts included.

mod chart;
mod data;
mod gallery;
mod html;
mod page;
mod rounds;
mod samples;

use std::path::Path;

use capfilt_schemas::RunId;
use capfilt_store::Store;

use crate::{CoordinatorError, Result};

/// What the report is about; all else is read from the store.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportInput {
    /// The run.
    pub run: RunId,
    /// The name of the dataset that the run builds.
    pub dataset: String,
    /// The dataset version that the run's settings lead to now; the newest of the run if that is not known.
    pub version: Option<u64>,
    /// How many samples are shown with their image.
    pub samples: usize,
}

/// Writes the report of a run to `path`, in place of an earlier one; its folder is made if need be.
///
/// A run that has not got far, or does not exist, gives a page that says so.
///
/// # Errors
/// [`CoordinatorError::Store`] or [`CoordinatorError::Rows`] if a record or shard that the page needs cannot be read;
/// [`CoordinatorError::File`] if the page cannot be written.
pub async fn write(store: &Store, input: &ReportInput, path: &Path) -> Result<()> {
    let page = render(store, input).await?;
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        tokio::fs::create_dir_all(folder).await.map_err(|e| file("make", folder, e))?;
    }
    // Written aside and renamed, so that nobody sees half a page; two runs may write the same one.
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}.part", std::process::id()));
    let aside = Path::new(&aside);
    tokio::fs::write(aside, page).await.map_err(|e| file("write", aside, e))?;
    tokio::fs::rename(aside, path).await.map_err(|e| file("write", path, e))
}

/// The report of a run as HTML.
///
/// # Errors
/// As [`write()`], but for the file.
pub async fn render(store: &Store, input: &ReportInput) -> Result<String> {
    let report = data::gather(store, input).await?;
    Ok(page::page(&report))
}

fn file(verb: &'static str, path: &Path, source: std::io::Error) -> CoordinatorError {
    CoordinatorError::File { verb, path: path.to_owned(), source }
}
