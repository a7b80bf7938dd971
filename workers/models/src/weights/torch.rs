//! Files of `torch.save`: an uncompressed zip archive with a pickle that says which tensors there are, and a file of numbers for each
//! storage that they look into. Before version 1.6 it was no archive: five pickles (a magic number, a version, the system, the tensors, the order of
//! the storages), and then the storages, each behind its count of numbers.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::Pickle;
use super::{Cause, Stored};

/// The longest pickle that is read. One names a tensor in some 150 bytes, and a reader that takes it apart needs a small multiple of it.
const MAX_PICKLE_BYTES: u64 = 4 << 20;

/// The pickle of the magic number that a file from before version 1.6 begins with.
const MAGIC: [u8; 15] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// Every tensor of a file, by name.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn tensors(file: &File, number: usize) -> Result<Vec<(String, Stored)>, Cause> {
    let whole = file.metadata()?.len();
    if is_old(file)? {
        return old_tensors(file, number, whole);
    }
    let mut archive = ZipArchive::new(BufReader::new(file))?;
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let mut pickles = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
    let (Some(root), None) = (pickles.next(), pickles.next()) else {
        return Err("is no archive of torch.save: it does not hold one `data.pkl`".into());
    };
    if names.iter().any(|name| name.strip_prefix(root) == Some("constants.pkl")) {
        return Err("is a TorchScript program; save its weights with torch.save(model.state_dict(), …)".into());
    }
    if names.iter().any(|name| name.strip_prefix(root) == Some("byteorder")) {
        let mut order = Vec::new();
        archive.by_name(&format!("{root}byteorder"))?.take(16).read_to_end(&mut order)?;
        if order != b"little" {
            return Err("holds numbers that are not little-endian".into());
        }
    }
    let mut pickle = Vec::new();
    let entry = archive.by_name(&format!("{root}data.pkl"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err("is no whole archive of torch.save: its `data.pkl` is compressed".into());
    }
    entry.take(MAX_PICKLE_BYTES + 1).read_to_end(&mut pickle)?;
    if pickle.len() as u64 > MAX_PICKLE_BYTES {
        return Err(format!("holds a pickle of more than {} MiB", MAX_PICKLE_BYTES >> 20).into());
    }

    let mut places = HashMap::<&str, (u64, u64)>::new();
    located(Pickle::read(&pickle)?, number, |key| match places.get(key) {
        Some(place) => Ok(*place),
        None => {
            let place = place(&mut archive, &format!("{root}data/{key}"), whole)?;
            places.insert(key, place);
            Ok(place)
        }
    })
}

/// The tensors that a pickle names, where `place` says where the numbers of a storage begin and how many bytes they are.
fn located<'a>(
    pickle: Pickle<'a>,
    number: usize,
    mut place: impl FnMut(&'a str) -> Result<(u64, u64), Cause>,
) -> Result<Vec<(String, Stored)>, Cause> {
    let views = pickle.state_dict()?;
    let mut tensors = Vec::with_capacity(views.len());
    for (name, view) in views {
        let Some(dtype) = view.storage.dtype else {
            return Err(format!("holds the tensor {name} in an unknown number format").into());
        };
        let (start, length) =
            place(view.storage.key).map_err(|cause| cause.context(&format!("the numbers of the tensor {name}")))?;
        let bytes = dtype.bitsize() as u64 / 8;
        let from = (view.offset as u64).checked_mul(bytes).filter(|from| *from <= length);
        let stored = from.and_then(|from| {
            let stored = Stored { file: number, start: start + from, dtype, shape: view.shape, stride: view.stride };
            // No number is told twice: then a tensor takes no more memory than the file has.
            let fits = |count: Option<u64>| count.is_some_and(|count| count <= (length - from) / bytes);
            (fits(stored.span()) && fits(stored.count())).then_some(stored)
        });
        let Some(stored) = stored else {
            return Err(format!("is cut off or damaged: the tensor {name} reaches beyond its numbers").into());
        };
        tensors.push((name.to_owned(), stored));
    }
    Ok(tensors)
}

/// The same of a file from before version 1.6.
fn old_tensors(mut file: &File, number: usize, whole: u64) -> Result<Vec<(String, Stored)>, Cause> {
    let mut head = Vec::new();
    file.take(MAX_PICKLE_BYTES).read_to_end(&mut head)?;
    let mut at = MAGIC.len();
    let mut next = || {
        let (pickle, length) = Pickle::read_first(&head[at..])?;
        at += length;
        Ok::<_, String>(pickle)
    };
    let (_version, _system, state, order) = (next()?, next()?, next()?, next()?);
    let dtypes: HashMap<&str, Option<Dtype>> = state.storages().iter().map(|storage| (storage.key, storage.dtype)).collect();
    let mut places = HashMap::<&str, (u64, u64)>::new();
    let mut start = at as u64;
    for key in order.listed_texts() {
        let Some(Some(dtype)) = dtypes.get(key) else { return Err("holds numbers in an unknown format".into()) };
        let mut count = [0; 8];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut count)?;
        start += count.len() as u64;
        let length = u64::from_le_bytes(count).checked_mul(dtype.bitsize() as u64 / 8);
        let end = length.and_then(|length| start.checked_add(length)).filter(|end| *end <= whole);
        let (Some(length), Some(end)) = (length, end) else {
            return Err("is cut off; fetch or save the checkpoint again".into());
        };
        places.insert(key, (start, length));
        start = end;
    }
    located(state, number, |key| places.get(key).copied().ok_or_else(|| "are missing; fetch or save the checkpoint again".into()))
}

/// Whether a file is from before version 1.6.
fn is_old(mut file: &File) -> Result<bool, Cause> {
    let mut head = Vec::new();
    file.take(262).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    if head.starts_with(&MAGIC) {
        return Ok(true);
    }
    if head.get(257..) == Some(b"ustar") {
        return Err("is in the format that torch.save wrote before version 0.1.10; load it with torch and save it again".into());
    }
    if !head.starts_with(b"PK") {
        return Err("was not written by torch.save; fetch or save the checkpoint again".into());
    }
    Ok(false)
}

/// Where an uncompressed file of the archive lies in it, and its length.
fn place(archive: &mut ZipArchive<BufReader<&File>>, name: &str, whole: u64) -> Result<(u64, u64), Cause> {
    let entry = archive.by_name(name).map_err(|source| Cause {
        what: "are missing or damaged; fetch or save the checkpoint again".to_owned(),
        source: Some(source.into()),
    })?;
    if entry.compression() != CompressionMethod::Stored {
        return Err("are compressed, as torch.save never does".into());
    }
    let (start, length) = (entry.data_start().unwrap_or(whole), entry.size());
    if start.checked_add(length).is_none_or(|end| end > whole) {
        return Err("are cut off; fetch or save the checkpoint again".into());
    }
    Ok((start, length))
}
