//! The annotate stage: images with captions that people wrote, in the layout of COCO captions, into `annotated`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringBuilder};
use arrow::datatypes::DataType;
use capfilt_runtime::{RowStream, Stage, StageError, Work, on_rayon};
use capfilt_schemas::{Digest, FetchStatus, StageKind, Table, sample_id};
use futures::{StreamExt, TryStreamExt, stream};
use serde::Deserialize;
use serde_json::Value;

use crate::CrawlError;
use crate::columns::{ImageColumns, Outcome, list_of};
use crate::config::{AnnotateConfig, AnnotatedSource, ImageConfig};
use crate::image::{self, Refused};
use crate::params::AnnotateParams;
use crate::text::clean;

/// Raised whenever the same task would give other rows than before.
pub const ANNOTATE_VERSION: u32 = 2;

/// Longest caption kept, in characters.
const MAX_CAPTION: usize = 1_000;
/// Images decoded at the same time, and rows put together at a time.
const AT_ONCE: usize = 32;

/// Reads annotated sets from local folders.
pub struct Annotate {
    /// By the digests of the JSON file and of its images.
    sets: HashMap<(Digest, Digest), AnnotatedSource>,
}

/// The parts of a COCO captions file that are read.
#[derive(Deserialize)]
struct CocoFile {
    images: Vec<CocoImage>,
    annotations: Vec<CocoAnnotation>,
}

#[derive(Deserialize)]
struct CocoImage {
    /// A number or a text.
    id: Value,
    file_name: String,
}

#[derive(Deserialize)]
struct CocoAnnotation {
    image_id: Value,
    caption: String,
}

/// One image of a set, with its captions in the order of the file.
struct Annotated {
    file_name: String,
    captions: Vec<String>,
}

impl Annotate {
    /// The stage for the sets of `config`, and the parameters of its tasks, one for each set. The JSON files are read to be named by
    /// content; the images are named by their sizes.
    ///
    /// # Errors
    /// [`CrawlError::Read`]; [`CrawlError::Format`] for a file of another kind, and where none of its images is found.
    pub fn new(config: &AnnotateConfig) -> Result<(Self, Vec<AnnotateParams>), CrawlError> {
        let (mut sets, mut tasks) = (HashMap::new(), Vec::new());
        for source in &config.sources {
            let (annotations, coco) = CocoFile::read(&source.annotations)?;
            let images = sizes(&coco, source)?;
            tasks.push(AnnotateParams { name: source.name.clone(), annotations, images, image: config.image.clone() });
            sets.insert((annotations, images), source.clone());
        }
        Ok((Self { sets }, tasks))
    }

    /// The stage for the sets of both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.sets.extend(other.sets);
        self
    }

    fn start(&self, work: &Work) -> Result<RowStream, StageError> {
        let params: AnnotateParams = work.params()?;
        let wanted = params.annotations;
        let set = self.sets.get(&(wanted, params.images)).ok_or_else(|| CrawlError::WrongFile {
            what: "annotations",
            wanted,
            found: self.sets.keys().map(|(annotations, _)| annotations.to_string()).collect::<Vec<_>>().join(", "),
        })?;
        let (path, folder) = (set.annotations.clone(), folder(set));
        let facts = work.facts.clone();
        let (name, config) = (params.name, Arc::new(params.image));
        let read = async move {
            let (images, without) = on_rayon(move || read_coco(&path, wanted)).await??;
            facts.add("images_without_caption", without);
            Ok::<_, StageError>(stream::iter(images.into_iter().map(Ok)))
        };
        let rows = stream::once(read)
            .try_flatten()
            .map_ok(move |annotated: Annotated| {
                let (file, config) = (folder.join(&annotated.file_name), Arc::clone(&config));
                async move {
                    let outcome = on_rayon(move || load(&file, &config)).await?;
                    Ok((annotated, outcome))
                }
            })
            .try_buffered(AT_ONCE)
            .try_chunks(AT_ONCE)
            .map_err(|e| e.1)
            .and_then(move |rows| std::future::ready(batch(&name, &rows)));
        Ok(rows.boxed())
    }
}

impl Stage for Annotate {
    fn kind(&self) -> StageKind {
        StageKind::Annotate
    }

    fn process(&self, work: Work, _input: RowStream) -> RowStream {
        self.start(&work).unwrap_or_else(|e| stream::once(async { Err(e) }).boxed())
    }
}

impl CocoFile {
    fn read(path: &Path) -> Result<(Digest, Self), CrawlError> {
        let bytes = std::fs::read(path).map_err(|e| CrawlError::read(path, e))?;
        let coco = serde_json::from_slice(&bytes).map_err(|e| {
            CrawlError::format(path, format!("it is not a COCO captions file with `images` and `annotations` ({e})"))
        })?;
        Ok((Digest::of(&bytes), coco))
    }
}

/// The folder of a set's images.
fn folder(set: &AnnotatedSource) -> PathBuf {
    set.images.clone().unwrap_or_else(|| set.annotations.parent().map(Path::to_path_buf).unwrap_or_default())
}

/// A digest of the names and sizes of a set's images. To read them all for their content would take as long as the task itself.
fn sizes(coco: &CocoFile, set: &AnnotatedSource) -> Result<Digest, CrawlError> {
    let folder = folder(set);
    let mut list = String::new();
    let mut found = 0;
    for image in &coco.images {
        let size = std::fs::metadata(folder.join(&image.file_name)).map(|file| file.len()).ok();
        found += usize::from(size.is_some());
        list.extend([image.file_name.as_str(), " ", &size.map_or_else(|| "missing".to_owned(), |n| n.to_string()), "\n"]);
    }
    if found == 0 && !coco.images.is_empty() {
        let what =
            format!("none of its {} images is in `{}`; say in `images` where they are", coco.images.len(), folder.display());
        return Err(CrawlError::format(&set.annotations, what));
    }
    Ok(Digest::of(list.as_bytes()))
}

/// The images that have a caption, in the order of the file, and how many have none.
fn read_coco(path: &Path, wanted: Digest) -> Result<(Vec<Annotated>, u64), CrawlError> {
    let (found, coco) = CocoFile::read(path)?;
    if found != wanted {
        return Err(CrawlError::WrongFile { what: "annotations", wanted, found: found.to_string() });
    }
    let mut captions: HashMap<String, Vec<String>> = HashMap::new();
    for annotation in coco.annotations {
        let caption = clean(&annotation.caption, MAX_CAPTION);
        if !caption.is_empty() {
            captions.entry(annotation.image_id.to_string()).or_default().push(caption);
        }
    }
    let of_image =
        |image: CocoImage| Some(Annotated { captions: captions.remove(&image.id.to_string())?, file_name: image.file_name });
    let all = coco.images.len() as u64;
    let images: Vec<Annotated> = coco.images.into_iter().filter_map(of_image).collect();
    let without = all - images.len() as u64;
    Ok((images, without))
}

/// Reads, decodes and re-encodes one file.
fn load(file: &Path, config: &ImageConfig) -> Outcome {
    match std::fs::read(file) {
        Err(e) => Outcome::refused(Refused::new(FetchStatus::BadUrl, format!("the file cannot be read ({})", e.kind())), None),
        Ok(body) => match image::store(&body, config) {
            Err(refused) => Outcome::refused(refused, None),
            Ok(image) => Outcome {
                status: FetchStatus::Ok,
                error: None,
                http_status: None,
                bytes_downloaded: Some(body.len() as u64),
                image: Some(image),
            },
        },
    }
}

/// Rows of `annotated`. The address of an image is `annotated:<set>/<file>`: it has none on the web.
fn batch(name: &str, rows: &[(Annotated, Outcome)]) -> Result<RecordBatch, StageError> {
    let mut texts: [StringBuilder; 3] = Default::default();
    let mut captions = list_of(StringBuilder::new(), DataType::Utf8);
    let mut images = ImageColumns::default();
    for (annotated, outcome) in rows {
        let [sample, url, source] = &mut texts;
        let address = format!("annotated:{name}/{}", annotated.file_name);
        sample.append_value(sample_id(&address, &annotated.captions[0]));
        url.append_value(&address);
        source.append_value(name);
        annotated.captions.iter().for_each(|c| captions.values().append_value(c));
        captions.append(true);
        images.push(outcome);
    }
    let mut columns: Vec<ArrayRef> = texts.iter_mut().map(|b| Arc::new(b.finish()) as ArrayRef).collect();
    columns.push(Arc::new(captions.finish()));
    columns.extend(images.finish());
    Ok(RecordBatch::try_new(Table::Annotated.schema(), columns)?)
}
