//! The files of samples that stand beside a shard's Parquet file.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use serde_json::Value;

/// A sample on its way into a file.
pub(super) struct Sample<'a> {
    pub(super) key: &'a str,
    pub(super) image: &'a [u8],
    /// The extension of the image's file.
    pub(super) extension: &'a str,
    /// The caption, if captions are written.
    pub(super) caption: Option<&'a str>,
    /// What else is known of it, in order.
    pub(super) about: &'a [(String, Value)],
}

impl Sample<'_> {
    /// The description as people read it.
    fn json(&self) -> io::Result<Vec<u8>> {
        use serde::Serializer as _;
        let mut out = Vec::new();
        let indented = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut json = serde_json::Serializer::with_formatter(&mut out, indented);
        json.collect_map(self.about.iter().map(|(name, value)| (name, value)))?;
        Ok(out)
    }
}

/// A layout being written: one file or folder of samples.
pub(super) trait Layout {
    fn put(&mut self, sample: &Sample<'_>) -> io::Result<()>;
    /// Ends the file.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// `KEY.jpg`, `KEY.json` and `KEY.txt` in a tar file.
pub(super) struct Tar(tar::Builder<BufWriter<File>>);

impl Tar {
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        Ok(Self(tar::Builder::new(BufWriter::with_capacity(1 << 18, File::create(path)?))))
    }
}

impl Layout for Tar {
    fn put(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let json = sample.json()?;
        let members = [(sample.extension, Some(sample.image)), ("json", Some(&json)), ("txt", sample.caption.map(str::as_bytes))];
        for (extension, bytes) in members.into_iter().filter_map(|(e, bytes)| Some((e, bytes?))) {
            // Nothing in the header would differ from one run to the next.
            let mut header = tar::Header::new_ustar();
            header.set_path(format!("{}.{extension}", sample.key))?;
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            self.0.append(&header, bytes)?;
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        self.0.into_inner()?.flush()
    }
}

/// The same in a folder.
pub(super) struct Files(PathBuf);

impl Files {
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Layout for Files {
    fn put(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let path = |extension: &str| self.0.join(format!("{}.{extension}", sample.key));
        fs::write(path(sample.extension), sample.image)?;
        if let Some(caption) = sample.caption {
            fs::write(path("txt"), caption)?;
        }
        fs::write(path("json"), sample.json()?)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// TensorFlow's record file, a `tf.train.Example` for each sample
/// (`tensorflow/core/lib/io/record_writer.h`, `tensorflow/core/example/example.proto`).
pub(super) struct TfRecord(BufWriter<File>);

impl TfRecord {
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        Ok(Self(BufWriter::with_capacity(1 << 18, File::create(path)?)))
    }
}

impl Layout for TfRecord {
    fn put(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let mut features = vec![("key", feature(&Value::from(sample.key))), (sample.extension, bytes_feature([sample.image]))];
        if let Some(caption) = sample.caption {
            features.push(("txt", bytes_feature([caption.as_bytes()])));
        }
        features.extend(sample.about.iter().filter(|(n, _)| n != "key").map(|(name, value)| (name.as_str(), feature(value))));
        // Example { features = 1 { map<string, Feature> feature = 1 } }
        let mut map = Vec::new();
        for (name, value) in features {
            let entry = [field(1, name.as_bytes()), field(2, &value)].concat();
            map.extend(field(1, &entry));
        }
        let example = field(1, &map);
        let length = (example.len() as u64).to_le_bytes();
        self.0.write_all(&length)?;
        self.0.write_all(&masked_crc(&length).to_le_bytes())?;
        self.0.write_all(&example)?;
        self.0.write_all(&masked_crc(&example).to_le_bytes())
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.0.flush()
    }
}

/// A length-delimited field of a protocol buffer.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    varint(&mut out, bytes.len() as u64);
    out.extend_from_slice(bytes);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// `Feature { bytes_list = 1 { value = 1 } }`
fn bytes_feature<'a>(values: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    field(1, &values.into_iter().flat_map(|v| field(1, v)).collect::<Vec<_>>())
}

/// Whole numbers become an `int64_list`, numbers a `float_list`, everything else a `bytes_list`; no value is an empty text.
fn feature(value: &Value) -> Vec<u8> {
    let one = std::slice::from_ref(value);
    let values = if let Value::Array(items) = value { items.as_slice() } else { one };
    let whole = |v: &Value| v.as_i64().or_else(|| v.as_bool().map(i64::from));
    if !values.is_empty() && values.iter().all(|v| whole(v).is_some()) {
        let mut packed = Vec::new();
        values.iter().filter_map(whole).for_each(|n| varint(&mut packed, n.cast_unsigned()));
        return field(3, &field(1, &packed));
    }
    if !values.is_empty() && values.iter().all(Value::is_number) {
        #[expect(clippy::cast_possible_truncation, reason = "a float_list holds single precision")]
        let packed: Vec<u8> = values.iter().filter_map(Value::as_f64).flat_map(|n| (n as f32).to_le_bytes()).collect();
        return field(2, &field(1, &packed));
    }
    let texts: Vec<String> = values
        .iter()
        .map(|v| match v {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
        .collect();
    bytes_feature(texts.iter().map(String::as_bytes))
}

/// The checksum of record files: CRC-32C, turned and shifted, so that a checksum of data that holds checksums is none of them.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_record_is_what_tensorflow_reads() {
        // Worked out by hand from the two definitions.
        assert_eq!(feature(&json!(3)), [0x1a, 3, 0x0a, 1, 3]);
        assert_eq!(feature(&json!(-1))[..4], [0x1a, 12, 0x0a, 10]);
        assert_eq!(feature(&json!(1.5)), [0x12, 6, 0x0a, 4, 0, 0, 0xc0, 0x3f]);
        assert_eq!(feature(&json!("ab")), [0x0a, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(feature(&json!(null)), [0x0a, 2, 0x0a, 0]);
        assert_eq!(feature(&json!([1, 300])), [0x1a, 5, 0x0a, 3, 1, 0xac, 2]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mut records = TfRecord::create(path.clone()).unwrap();
        let about = [("key".to_owned(), json!("7")), ("width".to_owned(), json!(2))];
        records.put(&Sample { key: "7", image: b"i", extension: "jpg", caption: Some("c"), about: &about }).unwrap();
        Box::new(records).finish().unwrap();
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(bytes.len() as u64, length + 16);
        assert_eq!(bytes[8..12], masked_crc(&bytes[..8]).to_le_bytes());
        assert_eq!(bytes[bytes.len() - 4..], masked_crc(&bytes[12..bytes.len() - 4]).to_le_bytes());
        let example = &bytes[12..bytes.len() - 4];
        assert_eq!(example[0], 0x0a);
        for part in [
            &b"\x0a\x03key\x12\x05\x0a\x03\x0a\x017"[..],
            b"\x0a\x03jpg\x12\x05\x0a\x03\x0a\x01i",
            b"\x0a\x05width\x12\x05\x1a\x03\x0a\x01\x02",
        ] {
            assert!(example.windows(part.len()).any(|w| w == part));
        }
    }

    #[test]
    fn the_checksum_is_masked_as_published() {
        // The CRC of these digits is 0xe3069283 (RFC 3720); the mask is that of TensorFlow's `crc32c.h`.
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5);
    }
}
