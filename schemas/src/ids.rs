//! Names that are made from content, so that the same thing has the same name in every run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256, written as 64 lower-case hexadecimal characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Wraps the 32 bytes of a SHA-256 computed elsewhere (a streaming hasher).
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first 12 characters: enough for a person to tell two apart.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// What is wrong with a text that should be a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest: expected 64 hexadecimal characters")]
pub struct DigestError(String);

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(s, &mut bytes).map_err(|_| DigestError(s.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The name of a task: the digest of everything that can change its output (see [`Task::id`](crate::Task::id)).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Debug)]
#[serde(transparent)]
pub struct TaskId(pub Digest);

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for TaskId {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

/// The name of a run, as the config gives it: lower-case letters, digits, `-`, `_` and `.`; it is part of object paths.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Debug)]
#[serde(transparent)]
pub struct RunId(String);

impl RunId {
    /// Checks the name.
    ///
    /// # Errors
    /// A sentence that says what a run's name may hold.
    pub fn new(name: impl Into<String>) -> Result<Self, String> {
        let name = name.into();
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
        if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(legal) {
            return Err(format!("`{name}` cannot name a run: use 1 to 100 of a-z, 0-9, `-`, `_`, `.`, not starting with a dot"));
        }
        Ok(Self(name))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RunId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// The id of a pair: the first 16 bytes of SHA-256(`url` `\0` `text`) in hexadecimal, 32 characters.
///
/// `url` is the image's address, `text` the text as the web has it. It stays with the pair from `candidates` to `dataset`,
/// and keys every random choice that is made about it.
#[must_use]
pub fn sample_id(url: &str, text: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(url.as_bytes());
    hash.update([0]);
    hash.update(text.as_bytes());
    hex::encode(&hash.finalize()[..16])
}

/// The fold that a sample falls into, of `folds` that are about equally large, in split number `repeat`: a function of its id alone.
#[must_use]
pub fn fold(sample_id: &str, folds: usize, repeat: usize) -> usize {
    let digest = match repeat {
        0 => Digest::of(sample_id.as_bytes()),
        _ => Digest::of(format!("{sample_id} {repeat}").as_bytes()),
    };
    let [.., a, b, c, d] = *digest.as_bytes();
    (u32::from_be_bytes([a, b, c, d]) as usize) % folds.max(1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn digest_text_round_trip() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("ba78".parse::<Digest>().is_err());
        assert!(serde_json::from_str::<Digest>("\"xyz\"").is_err());
    }

    #[test]
    fn sample_id_depends_on_both_parts_and_their_border() {
        assert_eq!(sample_id("u", "t").len(), 32);
        assert_ne!(sample_id("ab", "c"), sample_id("a", "bc"));
        assert_ne!(sample_id("a", "b"), sample_id("a", "c"));
    }

    #[test]
    fn run_names_cannot_leave_their_folder() {
        assert!(RunId::new("demo-1.0_x").is_ok());
        for bad in ["", "..", "a/b", "Demo", "a b", ".hidden"] {
            assert!(RunId::new(bad).is_err(), "{bad}");
        }
    }
}
