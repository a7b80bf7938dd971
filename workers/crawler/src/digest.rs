//! Digests: of files that tasks are named by, and those that lists bring along for their images.

use std::fs::File;
use std::path::Path;

use capfilt_schemas::Digest;
use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

use crate::CrawlError;

/// A hash function, by img2dataset's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HashKind {
    /// MD5.
    Md5,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl HashKind {
    /// The function called `name`, if it is known.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Md5, Self::Sha256, Self::Sha512].into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// The function's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The kind and the hexadecimal digits of a text like `sha256:9f86d0…`.
    pub(crate) fn parse_digest(text: &str) -> Option<(Self, &str)> {
        let (kind, digest) = text.split_once(':')?;
        Some((Self::parse(kind)?, digest))
    }

    /// The digest of a body, in hexadecimal.
    #[must_use]
    pub fn of(self, body: &[u8]) -> String {
        match self {
            Self::Md5 => hex::encode(Md5::digest(body)),
            Self::Sha256 => hex::encode(Sha256::digest(body)),
            Self::Sha512 => hex::encode(Sha512::digest(body)),
        }
    }
}

/// SHA-256 of a file.
pub(crate) fn file_digest(path: &Path) -> Result<Digest, CrawlError> {
    let read = || -> std::io::Result<Digest> {
        let (mut file, mut hash) = (File::open(path)?, Sha256::new());
        std::io::copy(&mut file, &mut hash)?;
        Ok(Digest::from_bytes(hash.finalize().into()))
    };
    read().map_err(|e| CrawlError::read(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_known_ones() {
        assert_eq!(HashKind::Md5.of(b"abc"), "900150983cd24fb0d6963f7d28e17f72");
        assert_eq!(HashKind::Sha256.of(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(HashKind::Sha512.of(b"abc").starts_with("ddaf35a193617abacc417349ae204131"));
        assert_eq!((HashKind::parse("SHA512"), HashKind::parse("crc32")), (Some(HashKind::Sha512), None));
    }
}
