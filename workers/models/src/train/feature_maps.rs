//! What a frozen trunk makes of images that are not augmented: the same in every epoch, for every member of a model, and so worth keeping.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};
use sha2::{Digest, Sha256};

use crate::error::Result;

/// Feature maps by trunk and image, as many as fit into some memory. Shared by all trainers that are given it.
#[derive(Debug, Default)]
pub struct FeatureMaps {
    most_bytes: u64,
    kept: Mutex<Kept>,
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
        Arc::new(Self { most_bytes, kept: Mutex::default() })
    }

    /// The maps `(b, places, channels)` of images with these names. `make` is told the places of those in the list that are not known, and makes theirs
    /// `(missing, places, channels)`.
    pub(super) fn of(&self, trunk: TrunkId, images: &[String], make: impl FnOnce(&[usize]) -> Result<Tensor>) -> Result<Tensor> {
        let keys: Vec<(TrunkId, String)> = images.iter().map(|image| (trunk, image.clone())).collect();
        let mut maps: Vec<Option<Tensor>> = {
            let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            keys.iter().map(|key| kept.maps.get(key).cloned()).collect()
        };
        let missing: Vec<usize> = (0..maps.len()).filter(|place| maps[*place].is_none()).collect();
        if !missing.is_empty() {
            let made = make(&missing)?;
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            for (row, &place) in missing.iter().enumerate() {
                // Of its own: `copy` and `contiguous` would keep the others of its batch.
                let map = made.narrow(0, row, 1)?.force_contiguous()?;
                let bytes = (map.elem_count() * map.dtype().size_in_bytes()) as u64;
                if kept.bytes + bytes <= self.most_bytes && kept.maps.insert(keys[place].clone(), map.clone()).is_none() {
                    kept.bytes += bytes;
                }
                maps[place] = Some(map);
            }
        }
        Ok(Tensor::cat(&maps.into_iter().flatten().collect::<Vec<_>>(), 0)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeMap;

    use candle_core::{Device, Storage};

    use super::*;

    #[test]
    fn each_map_is_made_once_as_long_as_there_is_room() {
        let trunk = |value: f32| {
            let tensor = Tensor::new(&[value], &Device::Cpu).unwrap();
            TrunkId::of(&BTreeMap::from([("weight".to_owned(), tensor)])).unwrap()
        };
        let maps = FeatureMaps::new(3 * 2 * 4);
        let ask = |trunk: TrunkId, images: &str| {
            let images: Vec<String> = images.chars().map(String::from).collect();
            let mut asked = String::new();
            let found = maps.of(trunk, &images, |missing| {
                asked.extend(missing.iter().map(|place| images[*place].as_str()));
                let values: Vec<f32> = missing.iter().flat_map(|place| [f32::from(images[*place].as_bytes()[0]); 2]).collect();
                Ok(Tensor::from_vec(values, (missing.len(), 1, 2), &Device::Cpu)?)
            });
            let rows = found.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let named: String = rows.chunks(2).map(|row| char::from(row[0] as u8)).collect();
            assert_eq!(named, images.concat());
            asked
        };
        let one = trunk(1.0);
        assert_eq!(ask(one, "ab"), "ab");
        assert_eq!(ask(one, "bca"), "c");
        // There is no room for a fourth.
        assert_eq!(ask(one, "cd"), "d");
        assert_eq!(ask(one, "dbca"), "d");
        assert_eq!(ask(trunk(2.0), "a"), "a", "another trunk sees something else");
        let kept = maps.kept.lock().unwrap();
        for map in kept.maps.values() {
            let (storage, _) = map.storage_and_layout();
            assert!(
                matches!(&*storage, Storage::Cpu(storage) if storage.as_slice::<f32>().unwrap().len() == 2),
                "more than the map is kept"
            );
        }
    }
}
