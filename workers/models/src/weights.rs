//! The numbers of a checkpoint: every tensor of its weight files by name, read from disk one by one when it is asked for.

mod pickle;
#[cfg(test)]
mod tests;
mod torch;

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::clip::openclip::{Part, Source as TensorSource};
use crate::error::{ModelError, NO_SAFETENSORS, Result};
use crate::files::{Files, shard_of_tensors};

/// The longest header of a safetensors file that is read: some hundred thousand tensors.
const MAX_HEADER_BYTES: u64 = 32 << 20;

/// The tensors of a checkpoint's weight files.
///
/// safetensors files, `torch.save` archives, and either in shards with an index. Only where each tensor lies is held in memory. A file
/// is never trusted: what is read before a tensor is asked for is bounded, and a tensor takes no more memory than it has in the file.
#[derive(Debug)]
pub struct Weights {
    path: PathBuf,
    files: Vec<Source>,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: Mutex<File>,
}

/// Where a tensor lies: a view of numbers of one file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Which of the files.
    file: usize,
    /// Its first byte there.
    start: u64,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Steps between neighbours in each dimension, in numbers.
    stride: Vec<usize>,
}

impl Stored {
    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number format in the file.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many numbers it has; none if that cannot be counted.
    fn count(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |all, n| all.checked_mul(*n as u64))
    }

    /// How many numbers lie from its first to its last; none if that cannot be counted.
    fn span(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let steps = self.shape.iter().zip(&self.stride);
        steps.map(|(n, step)| (*n as u64 - 1).checked_mul(*step as u64)).try_fold(1_u64, |all, step| all.checked_add(step?))
    }

    /// A part of it; none if it has no such part.
    fn part(&self, part: Part) -> Option<Self> {
        let mut stored = self.clone();
        match part {
            Part::Whole => {}
            Part::Transposed => {
                if self.shape.len() != 2 {
                    return None;
                }
                stored.shape.reverse();
                stored.stride.reverse();
            }
            Part::Third(third) => {
                let rows = self.shape.first().filter(|rows| *rows % 3 == 0)? / 3;
                stored.shape[0] = rows;
                stored.start += (third * rows * self.stride[0] * self.item_bytes()) as u64;
            }
        }
        Some(stored)
    }

    fn is_contiguous(&self) -> bool {
        row_major(&self.shape).iter().zip(&self.stride).zip(&self.shape).all(|((a, b), n)| a == b || *n <= 1)
    }

    fn item_bytes(&self) -> usize {
        self.dtype.bitsize() / 8
    }
}

/// Steps between neighbours where the last dimension lies together.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut steps = vec![1_usize; shape.len()];
    for dimension in (1..shape.len()).rev() {
        steps[dimension - 1] = steps[dimension].saturating_mul(shape[dimension]);
    }
    steps
}

/// Why a weight file cannot be used; the text goes on after the file's name.
#[derive(Debug)]
struct Cause {
    what: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl Cause {
    fn context(mut self, of: &str) -> Self {
        self.what = format!("cannot be used: {of} {}", self.what);
        self
    }
}

impl From<String> for Cause {
    fn from(what: String) -> Self {
        Self { what, source: None }
    }
}

impl From<&str> for Cause {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

impl From<io::Error> for Cause {
    fn from(source: io::Error) -> Self {
        Self { what: "cannot be read".to_owned(), source: Some(source.into()) }
    }
}

impl From<zip::result::ZipError> for Cause {
    fn from(source: zip::result::ZipError) -> Self {
        let what = "is no whole archive of torch.save; fetch or save the checkpoint again";
        Self { what: what.to_owned(), source: Some(source.into()) }
    }
}

impl Weights {
    /// Opens the weights of a checkpoint folder, and looks where each tensor lies. Of several formats one is taken, as [`Files::pick`]
    /// says.
    ///
    /// # Errors
    /// There are none, a file is unreadable, cut off or in a format of old, or shards and index do not fit each other.
    pub fn open(folder: &Path) -> Result<Self> {
        let files = Files::of_folder(folder)?;
        let path = folder.join(&files.weights);
        let mut weights = Self { path: path.clone(), files: Vec::new(), tensors: BTreeMap::new() };
        if !files.is_sharded() {
            weights.add(path)?;
            return Ok(weights);
        }
        let index = shard_of_tensors(&path)?;
        let fail = |what| ModelError::Weights { path: path.clone(), what, source: None };
        let mut shards: Vec<&String> = index.values().collect();
        shards.sort_unstable();
        shards.dedup();
        if let Some(gone) = shards.iter().find(|shard| !folder.join(shard).is_file()) {
            return Err(fail(format!("names the shard `{gone}`, which is not there; fetch it too")));
        }
        for shard in &shards {
            weights.add(folder.join(shard))?;
        }
        for (name, shard) in &index {
            match weights.tensors.get(name) {
                Some(stored) if shards[stored.file] == shard => {}
                Some(stored) => {
                    return Err(fail(format!(
                        "says that the tensor {name} is in `{shard}`, but it is in `{}`",
                        shards[stored.file]
                    )));
                }
                None => return Err(fail(format!("says that the tensor {name} is in `{shard}`, but it is not"))),
            }
        }
        if let Some(name) = weights.tensors.keys().find(|name| !index.contains_key(*name)) {
            return Err(fail(format!("does not name the tensor {name}, which a shard has")));
        }
        Ok(weights)
    }

    /// Adds the tensors of a file.
    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let safetensors = path.extension().is_some_and(|extension| extension == "safetensors");
        let read = if safetensors { safetensors_tensors } else { torch::tensors };
        let fail = |cause: Cause| ModelError::Weights { path: path.clone(), what: cause.what, source: cause.source };
        for (name, stored) in read(&file, self.files.len()).map_err(fail)? {
            if let Some(other) = self.tensors.insert(name.clone(), stored) {
                let other = self.files.get(other.file).map_or(&path, |source| &source.path).display();
                return Err(fail(format!("has the tensor {name}, which {other} has too").into()));
            }
        }
        self.files.push(Source { path, file: Mutex::new(file) });
        Ok(())
    }

    /// The weight file, or the index of its shards.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files with the numbers.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|source| source.path.as_path())
    }

    /// The tensors in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Stored)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored))
    }

    /// How many numbers all tensors have.
    pub(crate) fn numbers(&self) -> u64 {
        self.tensors.values().filter_map(Stored::count).fold(0, u64::saturating_add)
    }

    /// Where a tensor lies.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name)
    }

    /// The same weights under other names; those for which `name` says none are left out.
    ///
    /// # Errors
    /// Two tensors get the same name.
    pub fn rename(mut self, name: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut old_names = HashMap::new();
        for (old, stored) in std::mem::take(&mut self.tensors) {
            let Some(new) = name(&old) else { continue };
            if let Some(other) = old_names.insert(new.clone(), old.clone()) {
                let what = format!("has two tensors for {new}: {other} and {old}");
                return Err(ModelError::Weights { path: self.path, what, source: None });
            }
            self.tensors.insert(new, stored);
        }
        Ok(self)
    }

    /// The tensors of `wanted`, each as a part of one that is there, and beside them those that none is a part of.
    #[must_use]
    pub fn rearrange(mut self, wanted: impl IntoIterator<Item = (String, TensorSource)>) -> Self {
        let mut parts = BTreeMap::new();
        let mut used = HashSet::new();
        for (new, TensorSource { name, part }) in wanted {
            if let Some(stored) = self.tensors.get(&name).and_then(|stored| stored.part(part)) {
                parts.insert(new, stored);
                used.insert(name);
            }
        }
        self.tensors.retain(|name, _| !used.contains(name));
        self.tensors.extend(parts);
        self
    }

    /// Leaves a tensor out.
    pub fn remove(&mut self, name: &str) {
        self.tensors.remove(name);
    }

    /// Reads a tensor as it is stored.
    ///
    /// # Errors
    /// There is no such tensor, its number format is unknown here, or the file became unreadable.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let stored = self.get(name).ok_or_else(|| ModelError::Input(format!("{} has no tensor {name}", self.path.display())))?;
        let dtype = DType::try_from(stored.dtype)?;
        Ok(Tensor::from_raw_buffer(&self.bytes(stored)?, dtype, &stored.shape, device)?)
    }

    /// The numbers of a tensor, row by row.
    fn bytes(&self, stored: &Stored) -> Result<Vec<u8>> {
        let source = &self.files[stored.file];
        let io = |source_error| ModelError::Io { path: source.path.clone(), source: source_error };
        let size = stored.item_bytes();
        let mut bytes = vec![0; stored.span().unwrap_or(0) as usize * size];
        let mut file = source.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(stored.start)).and_then(|_| file.read_exact(&mut bytes)).map_err(io)?;
        drop(file);
        if stored.is_contiguous() {
            return Ok(bytes);
        }
        let count = stored.count().unwrap_or(0) as usize;
        let rows = row_major(&stored.shape);
        let mut laid_out = Vec::with_capacity(count * size);
        for number in 0..count {
            let steps = rows.iter().zip(&stored.shape).zip(&stored.stride);
            let at: usize = steps.map(|((row, n), step)| number / row % n * step).sum();
            laid_out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        }
        Ok(laid_out)
    }

    /// A source of tensors to build a model from; each is read when it is asked for.
    #[must_use]
    pub fn builder(self: &Arc<Self>, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Backend(Arc::clone(self))), dtype, device.clone())
    }

    /// Writes all tensors into one safetensors file as they are stored, holding one of them in memory at a time.
    ///
    /// # Errors
    /// A tensor is unreadable, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = RefCell::new(None);
        let views = self.tensors.iter().map(|(name, stored)| (name, Lazy { weights: self, stored, failed: &failed }));
        let written = write_file(path, views);
        failed.into_inner().map_or(written, Err)
    }
}

/// Writes tensors by name into one safetensors file. Same tensors, same bytes.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn write_file<N, V>(path: &Path, tensors: impl IntoIterator<Item = (N, V)>) -> Result<()>
where
    N: AsRef<str> + Ord + Display,
    V: safetensors::View,
{
    // transformers opens a file only if it says for which framework it was written.
    let info = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    // The library writes aside, into a file that only its owner may read, and renames it: one made here has the usual permissions.
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let permissions = File::create(path).and_then(|file| file.metadata()).map_err(io)?.permissions();
    safetensors::serialize_to_file(tensors, Some(info), path).map_err(|source| {
        let what = "cannot be written".to_owned();
        ModelError::Weights { path: path.to_owned(), what, source: Some(source.into()) }
    })?;
    std::fs::set_permissions(path, permissions).map_err(io)
}

/// Every tensor of a safetensors file: the length of the header in eight bytes, the header, the numbers.
fn safetensors_tensors(mut file: &File, number: usize) -> std::result::Result<Vec<(String, Stored)>, Cause> {
    let unreadable = |source: Box<dyn Error + Send + Sync>| Cause { what: NO_SAFETENSORS.to_owned(), source: Some(source) };
    let whole = file.metadata()?.len();
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|e| unreadable(e.into()))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > whole {
        return Err(unreadable(format!("a header of {length} bytes in a file of {whole}").into()));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| unreadable(e.into()))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| unreadable(e.into()))?;
    let (expected, start) = (header.data_len() as u64, 8 + length);
    if expected != whole - start {
        let what = format!("its header speaks of {expected} bytes of numbers, it has {}", whole - start);
        return Err(unreadable(what.into()));
    }
    let stored = |info: &safetensors::tensor::TensorInfo| Stored {
        file: number,
        start: start + info.data_offsets.0 as u64,
        dtype: info.dtype,
        shape: info.shape.clone(),
        stride: row_major(&info.shape),
    };
    Ok(header.tensors().into_iter().map(|(name, info)| (name, stored(info))).collect())
}

/// [`Weights`] for candle's builder.
struct Backend(Arc<Weights>);

impl SimpleBackend for Backend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if *tensor.shape() != shape {
            candle_core::bail!("tensor {name} has shape {:?}, the model asks for {shape:?}", tensor.shape());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.0.read(name, device).map_err(candle_core::Error::wrap)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }
}

/// A tensor that is read when it is written elsewhere. What goes wrong then is told by `failed`.
struct Lazy<'a> {
    weights: &'a Weights,
    stored: &'a Stored,
    failed: &'a RefCell<Option<ModelError>>,
}

impl safetensors::View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.stored.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.weights.bytes(self.stored) {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                Cow::Borrowed(&[])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.stored.count().unwrap_or(0) as usize * self.stored.item_bytes()
    }
}
