//! Digests that lists bring along for their images.

use capfilt_schemas::FetchStatus;
use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256, Sha512};

use super::Refused;

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

/// Holds a body against the digest that is expected of it, in hexadecimal of either case.
///
/// # Errors
/// [`FetchStatus::HashMismatch`].
pub(crate) fn verify(body: &[u8], kind: HashKind, expected: &str) -> Result<(), Refused> {
    let found = kind.of(body);
    if found.eq_ignore_ascii_case(expected.trim()) {
        return Ok(());
    }
    Err(Refused::new(FetchStatus::HashMismatch, format!("the body's {} is {found}", kind.name())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn digests_are_the_known_ones() {
        assert_eq!(HashKind::Md5.of(b"abc"), "900150983cd24fb0d6963f7d28e17f72");
        assert_eq!(HashKind::Sha256.of(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(HashKind::Sha512.of(b"abc").starts_with("ddaf35a193617abacc417349ae204131"));
        assert_eq!((HashKind::parse("SHA512"), HashKind::parse("crc32")), (Some(HashKind::Sha512), None));
    }

    #[test]
    fn another_body_is_refused() {
        assert_eq!(verify(b"abc", HashKind::Md5, " 900150983CD24FB0D6963F7D28E17F72\n"), Ok(()));
        let refused = verify(b"abd", HashKind::Md5, "900150983cd24fb0d6963f7d28e17f72").unwrap_err();
        assert_eq!(refused.status, FetchStatus::HashMismatch);
        assert_eq!(refused.reason, "the body's md5 is 4911e516e5aa21d327512e0c8b197616");
    }
}
