//! WebDataset: tar files in which the members of a sample follow each other and share the name before the first dot.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{ExportedFile, Pair, Sink, file_error, listed};
use crate::{CoordinatorError, Result};

const FOLDER: &str = "webdataset";

/// `webdataset/00000.tar`, `00001.tar`, …
pub(super) struct Tars {
    root: PathBuf,
    per_file: u64,
    open: Option<(tar::Builder<BufWriter<File>>, u64)>,
    names: Vec<String>,
}

/// `KEY.json`.
#[derive(Serialize)]
struct About<'a> {
    sample_id: &'a str,
    origin: &'a str,
    itm: Option<f32>,
    itc: Option<f32>,
    clip: Option<f32>,
    url: &'a str,
    sha256: &'a str,
    width: Option<u32>,
    height: Option<u32>,
}

impl Tars {
    pub(super) fn new(root: &Path, per_file: u64) -> Result<Self> {
        let folder = root.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|e| file_error("make", &folder, e))?;
        Ok(Self { root: root.to_owned(), per_file, open: None, names: Vec::new() })
    }

    fn path(&self) -> PathBuf {
        self.names.last().map_or_else(|| self.root.join(FOLDER), |name| self.root.join(name))
    }

    fn close(&mut self) -> Result<()> {
        let Some((tar, _)) = self.open.take() else { return Ok(()) };
        tar.into_inner().and_then(|mut file| file.flush()).map_err(|e| file_error("write", &self.path(), e))
    }
}

impl Sink for Tars {
    fn write(&mut self, pair: &Pair) -> Result<()> {
        if self.open.as_ref().is_some_and(|(_, samples)| *samples >= self.per_file) {
            self.close()?;
        }
        if self.open.is_none() {
            self.names.push(format!("{FOLDER}/{:05}.tar", self.names.len()));
            let path = self.path();
            let file = File::create(&path).map_err(|e| file_error("write", &path, e))?;
            self.open = Some((tar::Builder::new(BufWriter::with_capacity(1 << 20, file)), 0));
        }
        let about = About {
            sample_id: &pair.sample_id,
            origin: &pair.origin,
            itm: pair.itm,
            itc: pair.itc,
            clip: pair.clip,
            url: &pair.url,
            sha256: &pair.sha256,
            width: pair.picture.width,
            height: pair.picture.height,
        };
        let json = serde_json::to_vec(&about)
            .map_err(|e| CoordinatorError::Encode { what: format!("{}.json", pair.key), source: Box::new(e) })?;
        let path = self.path();
        if let Some((tar, samples)) = &mut self.open {
            *samples += 1;
            for (extension, bytes) in
                [(pair.picture.extension, &pair.picture.bytes[..]), ("txt", pair.text.as_bytes()), ("json", &json)]
            {
                append(tar, &format!("{}.{extension}", pair.key), bytes).map_err(|e| file_error("write", &path, e))?;
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<ExportedFile>> {
        self.close()?;
        self.names.iter().map(|name| listed(&self.root, name.clone())).collect()
    }
}

/// A member with nothing in its header that would differ between two exports.
fn append(tar: &mut tar::Builder<BufWriter<File>>, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    tar.append(&header, bytes)
}
