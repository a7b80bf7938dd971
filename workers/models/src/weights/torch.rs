//! Files of `torch.save`: an uncompressed zip archive with a pickle that says which tensors there are, and a file of numbers for each
//! storage that they look into.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use zip::{CompressionMethod, ZipArchive};

use super::pickle::Pickle;
use super::{Cause, Stored};

/// The longest pickle that is read. One names a tensor in some 150 bytes, and a reader that takes it apart needs a small multiple of it.
const MAX_PICKLE_BYTES: u64 = 4 << 20;

/// What the first bytes of a pickle of protocol 2 to 5 are: `torch.save` wrote files without an archive before version 1.6.
const PROTOCOL: u8 = 0x80;

/// Every tensor of a file, by name.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn tensors(file: &File, number: usize) -> Result<Vec<(String, Stored)>, Cause> {
    let whole = file.metadata()?.len();
    known_format(file)?;
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

    let views = Pickle::read(&pickle)?.state_dict()?;
    // Where the numbers of each storage begin and how many bytes they are.
    let mut places = HashMap::<&str, (u64, u64)>::new();
    let mut tensors = Vec::with_capacity(views.len());
    for (name, view) in views {
        let Some(dtype) = view.storage.dtype else {
            return Err(format!("holds the tensor {name} in an unknown number format").into());
        };
        let key = view.storage.key;
        let (start, length) = match places.get(key) {
            Some(place) => *place,
            None => {
                let place = place(&mut archive, &format!("{root}data/{key}"), whole)
                    .map_err(|cause| cause.context(&format!("the numbers of the tensor {name}")))?;
                places.insert(key, place);
                place
            }
        };
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

fn known_format(mut file: &File) -> Result<(), Cause> {
    let mut head = Vec::new();
    file.take(262).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    if head.first() == Some(&PROTOCOL) || head.get(257..) == Some(b"ustar") {
        return Err("is in the format that torch.save wrote before version 1.6; load it with torch and save it again".into());
    }
    if !head.starts_with(b"PK") {
        return Err("was not written by torch.save; fetch or save the checkpoint again".into());
    }
    Ok(())
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
