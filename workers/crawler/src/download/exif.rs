//! The EXIF of a download as a JSON object: `{"Image Make": "Canon", "EXIF ExposureTime": "1/60", …}`. Keys and the form of values are
//! those of the exifread package, which img2dataset asks; of values that stand for something, only the ones that say how the picture
//! is to be shown are spelt out.

use std::collections::BTreeMap;

use exif::{Context, Exif, Field, In, Reader, Tag, Value};

use crate::image;

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
pub(super) fn read(body: &[u8]) -> String {
    let fields = image::exif(body).and_then(parse).map(|exif| describe(&exif)).unwrap_or_default();
    serde_json::to_string(&fields).unwrap_or_default()
}

fn parse(raw: Vec<u8>) -> Option<Exif> {
    let mut reader = Reader::new();
    reader.continue_on_error(true).read_raw(raw).or_else(|e| e.distill_partial_result(|_| ())).ok()
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

    #[test]
    fn a_jpeg_tells_its_maker_and_how_it_lies() {
        // II, one directory: Make = "capfilt", Orientation = 6.
        let mut tiff = b"II*\0\x08\0\0\0\x02\0".to_vec();
        tiff.extend(b"\x0f\x01\x02\0\x08\0\0\0\x26\0\0\0");
        tiff.extend(b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0");
        tiff.extend(b"\0\0\0\0capfilt\0");
        let mut jpeg = b"\xff\xd8\xff\xe1".to_vec();
        jpeg.extend(u16::try_from(tiff.len() + 8).unwrap().to_be_bytes());
        jpeg.extend(b"Exif\0\0");
        jpeg.extend(&tiff);
        let mut pixels = Vec::new();
        let gray = ::image::GrayImage::new(8, 8);
        gray.write_to(&mut std::io::Cursor::new(&mut pixels), ::image::ImageFormat::Jpeg).unwrap();
        jpeg.extend(&pixels[2..]);
        assert_eq!(read(&jpeg), r#"{"Image Make":"capfilt","Image Orientation":"Rotated 90 CW"}"#);
        assert_eq!(read(&pixels), "{}");
        assert_eq!(read(b"nothing"), "{}");
    }
}
