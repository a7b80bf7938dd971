//! The EXIF of a download as a JSON object: `{"Image Make": "Canon", "EXIF ExposureTime": "1/60", …}`. Keys and the form of values are
//! those of the exifread package, which img2dataset asks; of values that stand for something, only the ones that say how the picture
//! is to be shown are spelt out.

use std::collections::{BTreeMap, HashSet};

use exif::{Context, Exif, Field, In, Reader, Tag, Value};

use crate::image;

/// Longer EXIF is not read. The segment of a JPEG holds no more, and other formats have no need to.
const MAX_EXIF: usize = 64 << 10;
/// Bytes of an entry of a directory.
const ENTRY: usize = 12;
/// The tags whose values are the places of further directories: EXIF, GPS, interoperability.
const POINTERS: [usize; 3] = [0x8769, 0x8825, 0xa005];
/// Longer values are cut, in characters: notes of makers can hold anything.
const MAX_VALUE: usize = 1_000;
/// More numbers than this are not listed.
const MAX_NUMBERS: usize = 50;

/// What values stand for, counted from 1.
const ORIENTATION: [&str; 8] = [
    "Horizontal (normal)",
    "Mirrored horizontal",
    "Rotated 180",
    "Mirrored vertical",
    "Mirrored horizontal then rotated 90 CCW",
    "Rotated 90 CW",
    "Mirrored horizontal then rotated 90 CW",
    "Rotated 90 CCW",
];
const RESOLUTION_UNIT: [&str; 3] = ["Not Absolute", "Pixels/Inch", "Pixels/Centimeter"];

/// The EXIF of an image file; an empty object if there is none, or none that can be read.
pub(crate) fn read(body: &[u8]) -> String {
    let fields = image::exif(body).and_then(parse).map(|exif| describe(&exif)).unwrap_or_default();
    serde_json::to_string(&fields).unwrap_or_default()
}

fn parse(raw: Vec<u8>) -> Option<Exif> {
    if raw.len() > MAX_EXIF || !holds_each_once(&raw) {
        return None;
    }
    let mut reader = Reader::new();
    reader.continue_on_error(true).read_raw(raw).or_else(|e| e.distill_partial_result(|_| ())).ok()
}

/// Whether there is room in it for all its entries side by side, and for all their values. The parser copies the value of each entry, and a
/// text in pieces, so that entries that share their bytes could make gigabytes of a few kilobytes.
fn holds_each_once(raw: &[u8]) -> bool {
    let number = |at: usize, size: usize| {
        let bytes = raw.get(at..at.checked_add(size)?)?;
        let join = |number: usize, byte: &u8| number << 8 | usize::from(*byte);
        Some(if raw.starts_with(b"II") { bytes.iter().rev().fold(0, join) } else { bytes.iter().fold(0, join) })
    };
    let (mut directories, mut seen) = (Vec::from_iter(number(4, 4)), HashSet::new());
    let (mut entries, mut values) = (0_usize, 0_usize);
    while let Some(directory) = directories.pop() {
        let Some(count) = number(directory, 2).filter(|_| seen.insert(directory)) else { continue };
        let end = directory + 2 + count * ENTRY;
        for entry in (directory + 2..end).step_by(ENTRY) {
            let fields = (number(entry, 2), number(entry + 2, 2), number(entry + 4, 4), number(entry + 8, 4));
            let (Some(tag), Some(kind), Some(n), Some(place)) = fields else { break };
            let unit = unit(kind);
            let size = n.saturating_mul(unit);
            let at = if size <= 4 { entry + 8 } else { place };
            entries += ENTRY;
            // The parser passes over values that are not there.
            if size > 4 && at.checked_add(size).is_some_and(|end| end <= raw.len()) {
                values += size;
            }
            if entries > raw.len() || values > raw.len() {
                return false;
            }
            if POINTERS.contains(&tag) && matches!(kind, 1 | 3 | 4) {
                directories.extend(number(at, unit));
            }
        }
        directories.extend(number(end, 4).filter(|next| *next != 0));
    }
    true
}

/// Bytes of one value of a type (TIFF 6.0, section 2).
const fn unit(kind: usize) -> usize {
    match kind {
        1 | 2 | 6 | 7 => 1,
        3 | 8 => 2,
        4 | 9 | 11 => 4,
        5 | 10 | 12 => 8,
        _ => 0,
    }
}

fn describe(exif: &Exif) -> BTreeMap<String, String> {
    let known = exif.fields().filter(|f| f.tag != Tag::MakerNote);
    known.map(|f| (format!("{} {}", group(f), f.tag), value(f))).collect()
}

fn group(field: &Field) -> &'static str {
    match field.tag.context() {
        Context::Exif => "EXIF",
        Context::Gps => "GPS",
        Context::Interop => "Interoperability",
        _ if field.ifd_num == In::THUMBNAIL => "Thumbnail",
        _ => "Image",
    }
}

fn value(field: &Field) -> String {
    let meaning = |names: &[&str]| {
        let index = usize::try_from(field.value.get_uint(0)?.checked_sub(1)?).ok()?;
        names.get(index).map(|name| (*name).to_owned())
    };
    let known = match field.tag {
        Tag::Orientation => meaning(&ORIENTATION),
        Tag::ResolutionUnit | Tag::FocalPlaneResolutionUnit => meaning(&RESOLUTION_UNIT),
        _ => None,
    };
    let text = known.unwrap_or_else(|| plain(&field.value));
    text.trim().chars().take(MAX_VALUE).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::Ascii(texts) => texts.iter().map(|t| String::from_utf8_lossy(t)).collect::<Vec<_>>().join(" "),
        Value::Undefined(bytes, _) if bytes.iter().all(|b| (b' '..=b'~').contains(b)) => {
            String::from_utf8_lossy(bytes).into_owned()
        }
        Value::Undefined(bytes, _) => list(bytes),
        Value::Byte(v) => list(v),
        Value::Short(v) => list(v),
        Value::Long(v) => list(v),
        Value::SByte(v) => list(v),
        Value::SShort(v) => list(v),
        Value::SLong(v) => list(v),
        Value::Float(v) => list(v),
        Value::Double(v) => list(v),
        Value::Rational(v) => list(&v.iter().map(|r| ratio(r.num.into(), r.denom.into())).collect::<Vec<_>>()),
        Value::SRational(v) => list(&v.iter().map(|r| ratio(r.num.into(), r.denom.into())).collect::<Vec<_>>()),
        Value::Unknown(..) => String::new(),
    }
}

/// One value as it is, more in brackets.
fn list<T: ToString>(values: &[T]) -> String {
    match values {
        [one] => one.to_string(),
        many => {
            let shown: Vec<String> = many.iter().take(MAX_NUMBERS).map(T::to_string).collect();
            format!("[{}{}]", shown.join(", "), if many.len() > MAX_NUMBERS { ", ... " } else { "" })
        }
    }
}

/// A fraction in its lowest terms.
fn ratio(num: i64, denom: i64) -> String {
    let (mut a, mut b) = (num.unsigned_abs(), denom.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let divisor = i64::try_from(a.max(1)).unwrap_or(1);
    match (num / divisor, denom / divisor) {
        (num, 1) => num.to_string(),
        (num, denom) => format!("{num}/{denom}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn values_read_as_in_exifread() {
        let rational = |num, denom| exif::Rational { num, denom };
        assert_eq!(plain(&Value::Rational(vec![rational(10, 600)])), "1/60");
        assert_eq!(plain(&Value::Rational(vec![rational(720_000, 10_000)])), "72");
        assert_eq!(plain(&Value::Rational(vec![rational(1, 0), rational(0, 5)])), "[1/0, 0]");
        assert_eq!(plain(&Value::Short(vec![8, 8, 8])), "[8, 8, 8]");
        assert_eq!(plain(&Value::Ascii(vec![b"Canon".to_vec()])), "Canon");
        assert_eq!(plain(&Value::Undefined(b"0232".to_vec(), 0)), "0232");
    }

    /// A file with this EXIF.
    fn jpeg(tiff: &[u8]) -> Vec<u8> {
        let mut jpeg = b"\xff\xd8\xff\xe1".to_vec();
        jpeg.extend(u16::try_from(tiff.len() + 8).unwrap().to_be_bytes());
        jpeg.extend(b"Exif\0\0");
        jpeg.extend(tiff);
        let mut pixels = Vec::new();
        let gray = ::image::GrayImage::new(8, 8);
        gray.write_to(&mut std::io::Cursor::new(&mut pixels), ::image::ImageFormat::Jpeg).unwrap();
        jpeg.extend(&pixels[2..]);
        jpeg
    }

    fn png(tiff: Vec<u8>) -> Vec<u8> {
        use ::image::ImageEncoder as _;
        let mut png = Vec::new();
        let mut encoder = ::image::codecs::png::PngEncoder::new(&mut png);
        encoder.set_exif_metadata(tiff).unwrap();
        encoder.write_image(&[0; 64], 8, 8, ::image::ExtendedColorType::L8).unwrap();
        png
    }

    /// One directory of entries of tag, type, count and place, and what stands behind it.
    fn tiff(entries: &[(u16, u16, u32, u32)], rest: &[u8]) -> Vec<u8> {
        let mut tiff = b"II*\0\x08\0\0\0".to_vec();
        tiff.extend(u16::try_from(entries.len()).unwrap().to_le_bytes());
        for (tag, kind, count, place) in entries {
            tiff.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
            tiff.extend([count.to_le_bytes(), place.to_le_bytes()].concat());
        }
        tiff.extend(b"\0\0\0\0");
        tiff.extend(rest);
        tiff
    }

    #[test]
    fn a_jpeg_tells_its_maker_and_how_it_lies() {
        let tiff = tiff(&[(0x10f, 2, 8, 38), (0x112, 3, 1, 6)], b"capfilt\0");
        let wanted = r#"{"Image Make":"capfilt","Image Orientation":"Rotated 90 CW"}"#;
        assert_eq!(read(&jpeg(&tiff)), wanted);
        assert_eq!(read(&png(tiff)), wanted);
        assert_eq!(read(&jpeg(b"")), "{}");
        assert_eq!(read(b"nothing"), "{}");
    }

    #[test]
    fn entries_that_share_their_bytes_are_not_unfolded() {
        // 300 texts, all of them the same 10,000 zeros, each of which is a text of its own.
        let entries: Vec<_> = (0..300).map(|tag| (0xc000 + tag, 2, 10_000, 8 + 2 + 300 * 12 + 4)).collect();
        let bomb = tiff(&entries, &[0; 10_000]);
        assert_eq!((read(&jpeg(&bomb)), read(&png(bomb))), ("{}".to_owned(), "{}".to_owned()));
        // Directories that lie across each other: each pointer names a place a byte further on, where another long one begins.
        let pointers: Vec<_> = (0..1_000).map(|n| (0x8769, 4, 1, 8 + 2 + 1_000 * 12 + 4 + n)).collect();
        assert_eq!(read(&jpeg(&tiff(&pointers, &[1; 8_000]))), "{}");
        // A resolution that both sides share is common, and harmless.
        let shared = tiff(&[(0x11a, 5, 1, 38), (0x11b, 5, 1, 38)], &[72, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(read(&jpeg(&shared)), r#"{"Image XResolution":"72","Image YResolution":"72"}"#);
        // A value that is not there costs nothing but itself.
        let cut = tiff(&[(0x10f, 2, 60_000, 38), (0x112, 3, 1, 3)], b"");
        assert_eq!(read(&jpeg(&cut)), r#"{"Image Orientation":"Rotated 180"}"#);
    }

    #[test]
    fn exif_that_fits_into_no_jpeg_is_not_read() {
        let sized = |rest: usize| png(tiff(&[(0x112, 3, 1, 3)], &vec![0; rest]));
        assert_eq!(read(&sized(MAX_EXIF - 26)), r#"{"Image Orientation":"Rotated 180"}"#);
        assert_eq!(read(&sized(MAX_EXIF - 25)), "{}");
    }
}
