//! From an image file's bytes to RGB pixels, whatever the file claims to be.

use std::io::Cursor;

use capfilt_schemas::FetchStatus;
use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageResult, Limits};

use super::Refused;
use crate::html::clean;

/// Longest text of a decoder that goes into a row, in characters.
const MAX_REASON: usize = 200;

/// A format that can be decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Format {
    Jpeg,
    Png,
    Gif,
    WebP,
    Bmp,
}

/// A decoded image: opaque, 8 bits a channel, not yet turned as its EXIF asks.
pub(super) struct Pixels {
    pub(super) rgb: Vec<u8>,
    pub(super) orientation: Orientation,
}

/// What is known of an image before its pixels are decoded.
pub(super) struct Opened<'a> {
    pub(super) width: u32,
    pub(super) height: u32,
    decoder: Box<dyn ImageDecoder + 'a>,
    orientation: Orientation,
}

/// Reads the header. The format is told by the first bytes, never by a name or a `Content-Type`.
pub(super) fn open(body: &[u8]) -> Result<Opened<'_>, Refused> {
    let format = sniff(body).map_err(|found| Refused::new(FetchStatus::NotImage, format!("the body is {found}")))?;
    if format == Format::Jpeg && !jpeg_has_end(body) {
        return Err(Refused::new(FetchStatus::Decode, "the jpeg ends early"));
    }
    let mut decoder = decoder(format, body).map_err(|e| refusal(&e))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(Refused::new(FetchStatus::Decode, "the image has no pixels"));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    Ok(Opened { width, height, decoder, orientation })
}

impl Opened<'_> {
    /// Decodes the pixels. `max_pixels` bounds the decoder's own memory, too.
    pub(super) fn decode(mut self, max_pixels: u64) -> Result<Pixels, Refused> {
        // Up to 16 bits for each of four channels, and as much again for the decoder's work.
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(max_pixels.saturating_mul(16));
        self.decoder.set_limits(limits).map_err(|e| refusal(&e))?;
        let image = DynamicImage::from_decoder(self.decoder).map_err(|e| refusal(&e))?;
        let rgb = if image.color().has_alpha() { on_white(&image) } else { image.into_rgb8().into_raw() };
        Ok(Pixels { rgb, orientation: self.orientation })
    }
}

fn decoder(format: Format, body: &[u8]) -> ImageResult<Box<dyn ImageDecoder + '_>> {
    let body = Cursor::new(body);
    Ok(match format {
        Format::Jpeg => Box::new(JpegDecoder::new(body)?),
        Format::Png => Box::new(PngDecoder::new(body)?),
        Format::Gif => Box::new(GifDecoder::new(body)?),
        Format::WebP => Box::new(WebPDecoder::new(body)?),
        Format::Bmp => Box::new(BmpDecoder::new(body)?),
    })
}

fn refusal(error: &ImageError) -> Refused {
    let status = if matches!(error, ImageError::Limits(_)) { FetchStatus::TooManyPixels } else { FetchStatus::Decode };
    Refused::new(status, clean(&error.to_string(), MAX_REASON))
}

/// The format by its first bytes, or what the body is instead.
fn sniff(body: &[u8]) -> Result<Format, &'static str> {
    let at = |offset: usize, magic: &[u8]| body.get(offset..).is_some_and(|b| b.starts_with(magic));
    if at(0, b"\xff\xd8\xff") {
        Ok(Format::Jpeg)
    } else if at(0, b"\x89PNG\r\n\x1a\n") {
        Ok(Format::Png)
    } else if at(0, b"GIF87a") || at(0, b"GIF89a") {
        Ok(Format::Gif)
    } else if at(0, b"RIFF") && at(8, b"WEBP") {
        Ok(Format::WebP)
    } else if at(0, b"BM") && at(6, b"\0\0\0\0") {
        Ok(Format::Bmp)
    } else if at(4, b"ftypavif") || at(4, b"ftypavis") {
        Err("an avif image, which is not supported")
    } else if at(4, b"ftyphei") || at(4, b"ftypmif1") {
        Err("a heif image, which is not supported")
    } else if at(0, b"II*\0") || at(0, b"MM\0*") {
        Err("a tiff image, which is not supported")
    } else if at(0, b"\0\0\x01\0") {
        Err("an icon, which is not supported")
    } else {
        Err(sniff_text(body))
    }
}

fn sniff_text(body: &[u8]) -> &'static str {
    let head = body[..body.len().min(512)].trim_ascii_start().to_ascii_lowercase();
    let holds = |tag: &[u8]| head.windows(tag.len()).any(|w| w == tag);
    if holds(b"<svg") {
        "an svg drawing, which is not supported"
    } else if holds(b"<html") || holds(b"<!doctype") || holds(b"<head") || holds(b"<body") {
        "an html page"
    } else {
        "no known image format"
    }
}

/// Whether the end marker follows the first scan. Decoders fill what is missing with grey; half a picture is no sample.
fn jpeg_has_end(body: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = body.get(at..at + 4) {
        match marker {
            // Fill bytes may stand before a marker.
            0xff => at += 1,
            0xda => return body[at..].windows(2).rev().any(|w| w == [0xff, 0xd9]),
            0x01 | 0xd0..=0xd8 => at += 2,
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    // No scan where one should be: the decoder says what is wrong.
    true
}

/// The image laid on white.
fn on_white(image: &DynamicImage) -> Vec<u8> {
    let rgba = image.to_rgba8();
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    rgba.as_raw().chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect()
}
