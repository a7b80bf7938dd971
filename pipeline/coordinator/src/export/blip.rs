//! The list that BLIP's loader reads (`data/pretrain_dataset.py` and `data/coco_karpathy_dataset.py` of salesforce/BLIP): a JSON
//! array of an image's path and a caption.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{ExportedFile, Pair, Sink, file_error, listed};
use crate::Result;

const LIST: &str = "blip.json";

/// `blip.json`, and the images that it names.
pub(super) struct BlipList {
    root: PathBuf,
    images: bool,
    list: BufWriter<File>,
    started: bool,
}

impl BlipList {
    pub(super) fn new(root: &Path, images: bool) -> Result<Self> {
        let path = root.join(LIST);
        let file = File::create(&path).map_err(|e| file_error("write", &path, e))?;
        Ok(Self { root: root.to_owned(), images, list: BufWriter::new(file), started: false })
    }

    /// Writes the pair's image, unless it is there, and gives its path. An image is named by its SHA-256, in one of 256 folders.
    fn image(&self, pair: &Pair) -> Result<String> {
        let name = super::safe(&pair.sha256);
        let folder = format!("images/{}", &name[..2.min(name.len())]);
        let path = format!("{folder}/{name}.{}", pair.picture.extension);
        let full = self.root.join(&path);
        if !full.exists() {
            let folder = self.root.join(folder);
            std::fs::create_dir_all(&folder).map_err(|e| file_error("make", &folder, e))?;
            super::write_file(&full, &pair.picture.bytes)?;
        }
        Ok(path)
    }

    fn append(&mut self, text: &str) -> Result<()> {
        self.list.write_all(text.as_bytes()).map_err(|e| file_error("write", &self.root.join(LIST), e))
    }
}

impl Sink for BlipList {
    fn write(&mut self, pair: &Pair) -> Result<()> {
        let entry = if self.images {
            json!({"image": self.image(pair)?, "caption": pair.text})
        } else {
            json!({"url": pair.url, "caption": pair.text})
        };
        let before = if self.started { ",\n" } else { "[\n" };
        self.started = true;
        self.append(&format!("{before}{entry}"))
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<ExportedFile>> {
        let end = if self.started { "\n]\n" } else { "[]\n" };
        self.append(end)?;
        self.list.flush().map_err(|e| file_error("write", &self.root.join(LIST), e))?;
        Ok(vec![listed(&self.root, LIST.to_owned())?])
    }
}
