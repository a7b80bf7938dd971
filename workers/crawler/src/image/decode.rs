//! From an image file's bytes to RGB pixels, whatever the file claims to be.

use std::io::Cursor;

use capfilt_schemas::FetchStatus;
use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, png::PngDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageResult, Limits};

use super::{Refused, jpeg};
use crate::text::clean;

/// Longest text of a decoder that goes into a row, in characters.
const MAX_REASON: usize = 200;

/// Bytes that a PNG may unpack for anything but its pixels, and for a row of these.
const MAX_UNPACKED: u64 = 64 << 20;

/// A format that can be decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Format {
    Jpeg,
    Png,
    Gif,
    WebP,
    Bmp,
}

impl Format {
    /// The text in the `format` column.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::Gif => "gif",
            Self::WebP => "webp",
            Self::Bmp => "bmp",
        }
    }
}

/// A decoded image: opaque RGB, 8 bits a channel, in the file's colours (inks excepted) and not yet turned as its EXIF asks.
pub(super) struct Pixels {
    pub(super) rgb: Vec<u8>,
    /// Width and height.
    pub(super) size: (u32, u32),
}

/// What is known of an image before its pixels are decoded.
pub(super) struct Opened<'a> {
    pub(super) format: Format,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) orientation: Orientation,
    /// The colour profile.
    pub(super) profile: Option<Vec<u8>>,
    /// Whether the file is one opaque picture in grey or RGB.
    pub(super) is_plain: bool,
    source: Source<'a>,
}

enum Source<'a> {
    Jpeg(jpeg::Header, &'a [u8]),
    Other(Box<dyn ImageDecoder + 'a>),
}

/// Reads the header. The format is told by the first bytes, never by a name or a `Content-Type`.
pub(super) fn open(body: &[u8]) -> Result<Opened<'_>, Refused> {
    let format = sniff(body).map_err(|found| Refused::new(FetchStatus::NotImage, format!("the body is {found}")))?;
    let found = match format {
        Format::Jpeg => return open_jpeg(body),
        Format::Png => open_png(body),
        Format::Gif => GifDecoder::new(Cursor::new(body)).map(|decoder| (boxed(decoder), true)),
        Format::WebP => WebPDecoder::new(Cursor::new(body)).map(|decoder| {
            let is_animated = decoder.has_animation();
            (boxed(decoder), is_animated)
        }),
        Format::Bmp => BmpDecoder::new(Cursor::new(body)).map(|decoder| (boxed(decoder), false)),
    };
    let (mut decoder, is_animated) = found.map_err(|e| refusal(&e))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(Refused::new(FetchStatus::Decode, "the image has no pixels"));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let profile = decoder.icc_profile().ok().flatten();
    let is_plain = !is_animated && !decoder.color_type().has_alpha();
    Ok(Opened { format, width, height, orientation, profile, is_plain, source: Source::Other(decoder) })
}

fn open_jpeg(body: &[u8]) -> Result<Opened<'_>, Refused> {
    let mut header = jpeg::Header::read(body)?;
    let orientation = header.exif.as_deref().and_then(Orientation::from_exif_chunk).unwrap_or(Orientation::NoTransforms);
    let (width, height, is_plain) = (header.width, header.height, !header.is_cmyk);
    let profile = header.profile();
    Ok(Opened { format: Format::Jpeg, width, height, orientation, profile, is_plain, source: Source::Jpeg(header, body) })
}

/// The decoder, and whether there is more than one picture for it.
fn open_png(body: &[u8]) -> ImageResult<(Box<dyn ImageDecoder + '_>, bool)> {
    // What is packed beside the pixels, a colour profile, may unpack to a thousand times its size.
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_UNPACKED);
    let decoder = PngDecoder::with_limits(Cursor::new(body), limits)?;
    let is_animated = decoder.is_apng()?;
    Ok((boxed(decoder), is_animated))
}

fn boxed<'a>(decoder: impl ImageDecoder + 'a) -> Box<dyn ImageDecoder + 'a> {
    Box::new(decoder)
}

/// The EXIF data of a file that can be opened.
pub(super) fn exif(body: &[u8]) -> Option<Vec<u8>> {
    match open(body).ok()?.source {
        Source::Jpeg(header, _) => header.exif,
        Source::Other(mut decoder) => decoder.exif_metadata().ok().flatten(),
    }
}

impl Opened<'_> {
    /// Decodes the pixels, perhaps scaled down, but not below `at_least`. `max_pixels` bounds the decoder's own memory, too.
    pub(super) fn decode(self, max_pixels: u64, at_least: (u32, u32)) -> Result<Pixels, Refused> {
        let mut decoder = match self.source {
            Source::Jpeg(header, body) => return header.decode(body, at_least, self.profile.as_deref()),
            Source::Other(decoder) => decoder,
        };
        // Up to 16 bits for each of four channels, and as much again for the decoder's work.
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(max_pixels.saturating_mul(16));
        decoder.set_limits(limits).map_err(|e| refusal(&e))?;
        let image = DynamicImage::from_decoder(decoder).map_err(|e| refusal(&e))?;
        let rgb = if image.color().has_alpha() { on_white(&image) } else { image.into_rgb8().into_raw() };
        Ok(Pixels { rgb, size: (self.width, self.height) })
    }
}

fn refusal(error: &ImageError) -> Refused {
    let status = if matches!(error, ImageError::Limits(_)) { FetchStatus::TooManyPixels } else { FetchStatus::Decode };
    Refused::new(status, reason(error))
}

/// What a decoder says, fit for a row.
pub(super) fn reason(error: &dyn std::fmt::Display) -> String {
    clean(&error.to_string(), MAX_REASON)
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

/// The image laid on white.
fn on_white(image: &DynamicImage) -> Vec<u8> {
    let rgba = image.to_rgba8();
    let blend = |colour: u8, alpha: u8| {
        let (colour, alpha) = (u32::from(colour), u32::from(alpha));
        ((colour * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    rgba.as_raw().chunks_exact(4).flat_map(|p| [blend(p[0], p[3]), blend(p[1], p[3]), blend(p[2], p[3])]).collect()
}
