//! What a frozen trunk makes of images that are not augmented: the same in every epoch, for every member of a model, and so worth keeping.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

use crate::error::{ModelError, Result};
use crate::preprocess::Pixels;

/// Raised whenever a trunk would make another map of the same pixels.
const VERSION: u8 = 1;

/// Feature maps by trunk and image, as many as fit into some memory. Shared by all trainers that are given it.
#[derive(Debug, Default)]
pub struct FeatureMaps {
    most_bytes: u64,
    kept: Mutex<Kept>,
    folder: Option<Folder>,
}

/// Maps that outlive the process: a file for each, named by trunk and pixels.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Bytes that may still be written.
    room: AtomicU64,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: u64,
    maps: HashMap<(TrunkId, String), Tensor>,
}

/// A trunk: the digest of its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TrunkId([u8; 32]);

impl TrunkId {
    /// Of its tensors, in the order of their names.
    pub(super) fn of<'a>(tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) -> Result<Self> {
        let mut hash = Sha256::new();
        hash.update([VERSION]);
        for (name, tensor) in tensors {
            hash.update(name);
            for value in tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()? {
                hash.update(value.to_le_bytes());
            }
        }
        Ok(Self(hash.finalize().into()))
    }
}

impl FeatureMaps {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(most_bytes: u64) -> Arc<Self> {
        Arc::new(Self { most_bytes, ..Self::default() })
    }

    /// The same, with those maps that a folder holds, which gets the new ones. It is emptied when it is found with more bytes than it may have.
    ///
    /// # Errors
    ///
    /// The folder cannot be made or read.
    pub fn in_folder(most_bytes: u64, path: &Path, most_stored: u64) -> Result<Arc<Self>> {
        let fail = |source| ModelError::Io { path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(fail)?;
        let mut stored = 0;
        for file in std::fs::read_dir(path).map_err(fail)? {
            stored += file.and_then(|file| file.metadata()).map_or(0, |file| file.len());
        }
        if stored >= most_stored {
            std::fs::remove_dir_all(path).and_then(|()| std::fs::create_dir_all(path)).map_err(fail)?;
            stored = 0;
        }
        let folder = Folder { path: path.to_owned(), room: AtomicU64::new(most_stored.saturating_sub(stored)) };
        Ok(Arc::new(Self { most_bytes, folder: Some(folder), ..Self::default() }))
    }

    /// The maps `(b, places, channels)` of images with these names. `make` is told the places of those in the list that are not known, and makes theirs
    /// `(missing, places, channels)`.
    pub(super) fn of(
        &self,
        trunk: TrunkId,
        (pixels, images, device): (&[Pixels], &[String], &Device),
        make: impl FnOnce(&[usize]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let keys: Vec<(TrunkId, String)> = images.iter().map(|image| (trunk, image.clone())).collect();
        let mut maps: Vec<Option<Tensor>> = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            keys.iter().map(|key| kept.maps.get(key).cloned()).collect()
        };
        let unknown = |maps: &[Option<Tensor>]| (0..maps.len()).filter(|place| maps[*place].is_none()).collect::<Vec<_>>();
        let here = unknown(&maps);
        let files: HashMap<usize, PathBuf> = match &self.folder {
            Some(folder) => here.iter().map(|&place| (place, folder.file(trunk, &pixels[place]))).collect(),
            None => HashMap::new(),
        };
        for (&place, file) in &files {
            maps[place] = load(file, device);
        }
        let missing = unknown(&maps);
        if !missing.is_empty() {
            let made = make(&missing)?;
            for (row, &place) in missing.iter().enumerate() {
                // Of its own: `copy` and `contiguous` would keep the others of its batch.
                let map = made.narrow(0, row, 1)?.force_contiguous()?;
                if let (Some(folder), Some(file)) = (&self.folder, files.get(&place)) {
                    folder.write(file, &map);
                }
                maps[place] = Some(map);
            }
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for place in here {
            if let Some(map) = &maps[place] {
                kept.keep(keys[place].clone(), map, self.most_bytes);
            }
        }
        Ok(Tensor::cat(&maps.into_iter().flatten().collect::<Vec<_>>(), 0)?)
    }
}

impl Kept {
    fn keep(&mut self, key: (TrunkId, String), map: &Tensor, most_bytes: u64) {
        let bytes = bytes(map);
        if self.bytes + bytes <= most_bytes && self.maps.insert(key, map.clone()).is_none() {
            self.bytes += bytes;
        }
    }
}

fn bytes(map: &Tensor) -> u64 {
    (map.elem_count() * map.dtype().size_in_bytes()) as u64
}

/// The name of a map in its file.
const NAME: &str = "map";

/// The map in a file; `None` if it is not there, or torn.
fn load(file: &Path, device: &Device) -> Option<Tensor> {
    candle_core::safetensors::load(file, device).ok()?.remove(NAME)
}

impl Folder {
    fn file(&self, TrunkId(trunk): TrunkId, pixels: &Pixels) -> PathBuf {
        let mut hash = Sha256::new_with_prefix(trunk);
        let values: Vec<u8> = pixels.values().iter().flat_map(|value| value.to_le_bytes()).collect();
        hash.update(&values);
        self.path.join(format!("{:x}", hash.finalize()))
    }

    /// Writes a map as long as there is room. A map that cannot be written is made again.
    fn write(&self, file: &Path, map: &Tensor) {
        let bytes = bytes(map);
        if self.room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |room| room.checked_sub(bytes)).is_err() {
            return;
        }
        // Written aside and renamed: several processes and members may write the same one.
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let aside = file.with_extension(format!("{}-{}", std::process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed)));
        let map = HashMap::from([(NAME, map.clone())]);
        if candle_core::safetensors::save(&map, &aside).is_err() || std::fs::rename(&aside, file).is_err() {
            let _ = std::fs::remove_file(&aside);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use candle_core::Storage;

    use super::*;

    fn trunk(value: f32) -> TrunkId {
        let tensor = Tensor::new(&[value], &Device::Cpu).unwrap();
        TrunkId::of(&BTreeMap::from([("weight".to_owned(), tensor)])).unwrap()
    }

    /// Asks for maps of images with names of one letter, checks them, and returns the names of those that had to be made.
    fn ask(maps: &FeatureMaps, trunk: TrunkId, images: &str) -> String {
        let value = |letter: &str| f32::from(letter.as_bytes()[0]);
        let images: Vec<String> = images.chars().map(String::from).collect();
        let pixels: Vec<Pixels> = images.iter().map(|image| Pixels::new(1, vec![value(image); 3]).unwrap()).collect();
        let mut asked = String::new();
        let found = maps.of(trunk, (&pixels, &images, &Device::Cpu), |missing| {
            asked.extend(missing.iter().map(|place| images[*place].as_str()));
            let values: Vec<f32> = missing.iter().flat_map(|place| [value(&images[*place]); 2]).collect();
            Ok(Tensor::from_vec(values, (missing.len(), 1, 2), &Device::Cpu)?)
        });
        let rows = found.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let named: String = rows.chunks(2).map(|row| char::from(row[0] as u8)).collect();
        assert_eq!(named, images.concat());
        asked
    }

    #[test]
    fn each_map_is_made_once_as_long_as_there_is_room() {
        let maps = FeatureMaps::new(3 * 2 * 4);
        let one = trunk(1.0);
        assert_eq!(ask(&maps, one, "ab"), "ab");
        assert_eq!(ask(&maps, one, "bca"), "c");
        // There is no room for a fourth.
        assert_eq!(ask(&maps, one, "cd"), "d");
        assert_eq!(ask(&maps, one, "dbca"), "d");
        assert_eq!(ask(&maps, trunk(2.0), "a"), "a", "another trunk sees something else");
        let kept = maps.kept.lock().unwrap();
        for map in kept.maps.values() {
            let (storage, _) = map.storage_and_layout();
            assert!(
                matches!(&*storage, Storage::Cpu(storage) if storage.as_slice::<f32>().unwrap().len() == 2),
                "more than the map is kept"
            );
        }
    }

    #[test]
    fn maps_in_a_folder_outlive_those_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let open = |stored| FeatureMaps::in_folder(0, &folder.path().join("maps"), stored).unwrap();
        let one = trunk(1.0);
        // Room for two.
        assert_eq!(ask(&open(16), one, "abc"), "abc");
        assert_eq!(ask(&open(1 << 20), one, "abc"), "c");
        assert_eq!(ask(&open(1 << 20), one, "abc"), "");
        assert_eq!(ask(&open(1 << 20), trunk(2.0), "a"), "a");
        // A torn file is no map.
        for file in std::fs::read_dir(folder.path().join("maps")).unwrap() {
            std::fs::write(file.unwrap().path(), b"torn").unwrap();
        }
        assert_eq!(ask(&open(1 << 20), one, "abc"), "abc");
        assert_eq!(ask(&open(1), one, "ab"), "ab", "one that is too full is emptied");
    }
}
