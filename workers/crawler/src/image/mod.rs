//! From a downloaded body to the stored image and its hashes. Pure CPU work: never run on a tokio thread.

mod colour;
mod decode;
mod jpeg;
mod phash;
mod resize;

use std::panic::{AssertUnwindSafe, catch_unwind};

use capfilt_schemas::{Digest, FetchStatus};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::metadata::Orientation;
use image::{DynamicImage, ImageEncoder, RgbImage};
use resize::Plan;

use crate::config::{ImageConfig, Reencode, ResizeMode, StoredFormat};
use crate::digest::HashKind;

/// Shorter side of the pixels that are only hashed, since the file is kept as it is.
const HASHED_SIDE: u32 = 128;

/// An image as it is stored in a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StoredImage {
    /// The file.
    pub(crate) bytes: Vec<u8>,
    /// `jpeg`, `png` or `webp`; what the server sent is kept as it is only if the settings say so, and may be `gif` or `bmp`, too.
    pub(crate) format: &'static str,
    /// Of the stored image, in pixels.
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Of the downloaded image, turned as its EXIF asks, in pixels.
    pub(crate) original_width: u32,
    pub(crate) original_height: u32,
    /// SHA-256 of the body.
    pub(crate) sha256: Digest,
    /// See `phash.rs`.
    pub(crate) phash: u64,
}

/// Why there is no image.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Refused {
    pub(crate) status: FetchStatus,
    pub(crate) reason: String,
}

impl Refused {
    pub(crate) fn new(status: FetchStatus, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into() }
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

/// Decodes, checks, scales and re-encodes a body.
///
/// # Errors
/// [`Refused`] with the row's status.
pub(crate) fn store(body: &[u8], config: &ImageConfig) -> Result<StoredImage, Refused> {
    if body.is_empty() {
        return Err(Refused::new(FetchStatus::Empty, "the body is empty"));
    }
    // Decoders of foreign bytes have panicked before; one image must not end the task.
    catch_unwind(AssertUnwindSafe(|| store_unguarded(body, config)))
        .unwrap_or_else(|_| Err(Refused::new(FetchStatus::Decode, "the decoder panicked")))
}

/// The most bytes of the image that [`store`] makes of a body: those of the file where it may be kept, two (PNG: three) a stored pixel
/// where not. 0 if the header is enough to refuse it.
pub(crate) fn largest(body: &[u8], config: &ImageConfig) -> usize {
    let size = || decode::open(body).ok().map(|opened| (opened.width, opened.height));
    let size = catch_unwind(AssertUnwindSafe(size)).ok().flatten();
    let Some((width, height)) = size.filter(|(width, height)| check_source(*width, *height, config).is_ok()) else { return 0 };
    let (width, height) = Plan::of(width, height, config).stored;
    let pixels = (u64::from(width) * u64::from(height)).min(config.max_stored_pixels());
    let bytes_a_pixel = if config.format == StoredFormat::Png { 3 } else { 2 };
    let encoded = usize::try_from(pixels).unwrap_or(usize::MAX).saturating_mul(bytes_a_pixel);
    match config.reencode {
        Reencode::Always => encoded,
        Reencode::IfNeeded => encoded.max(body.len()),
        Reencode::Never => body.len(),
    }
}

/// The TIFF structure of a JPEG's EXIF segment or of another format's EXIF chunk.
pub(crate) fn exif(body: &[u8]) -> Option<Vec<u8>> {
    catch_unwind(|| decode::exif(body)).ok().flatten()
}

fn store_unguarded(body: &[u8], config: &ImageConfig) -> Result<StoredImage, Refused> {
    let opened = decode::open(body)?;
    let (width, height, orientation) = (opened.width, opened.height, opened.orientation);
    check_source(width, height, config)?;
    let profile = opened.profile.clone().filter(|profile| colour::is_other(profile));
    let mut plan = Plan::of(width, height, config);
    let kept = match config.reencode {
        Reencode::Always => None,
        Reencode::IfNeeded => {
            let is_plain = opened.is_plain && orientation == Orientation::NoTransforms && profile.is_none();
            let as_it_is = is_plain && plan.stored == (width, height) && opened.format.name() == config.format.name();
            as_it_is.then_some(opened.format)
        }
        Reencode::Never => Some(opened.format),
    };
    if kept.is_some() {
        // The pixels are only hashed.
        let hashed = ImageConfig { size: HASHED_SIDE, resize: ResizeMode::KeepRatio, only_if_bigger: true, ..config.clone() };
        plan = Plan::of(width, height, &hashed);
    }
    for (width, height) in [plan.scaled, plan.stored] {
        check_pixels(width, height, config.max_stored_pixels())?;
    }
    let pixels = opened.decode(config.max_pixels, plan.scaled)?;
    let few = || Refused::new(FetchStatus::Decode, "the decoder gave too few pixels");
    let mut rgb = pixels.rgb;
    if pixels.size != plan.scaled {
        rgb = resize::scale(&rgb, pixels.size, plan.scaled, plan.interpolation).ok_or_else(few)?;
    }
    if let Some(profile) = profile {
        rgb = colour::to_srgb(rgb, &profile);
    }
    if plan.scaled != plan.stored {
        rgb = resize::fit(&rgb, plan.scaled, plan.stored).ok_or_else(few)?;
    }
    // Turned only now: there are fewer pixels to turn.
    let (rgb, size) = turn(rgb, plan.stored, orientation)?;
    let (original_width, original_height) = if swaps_sides(orientation) { (height, width) } else { (width, height) };
    let phash = phash::hash(&rgb, size.0, size.1);
    let (bytes, format, (width, height)) = match kept {
        Some(format) => (body.to_vec(), format.name(), (original_width, original_height)),
        None => (encode(&rgb, size, config)?, config.format.name(), size),
    };
    Ok(StoredImage { bytes, format, width, height, original_width, original_height, sha256: Digest::of(body), phash })
}

/// Judges the size in the header, before a pixel is decoded.
fn check_source(width: u32, height: u32, config: &ImageConfig) -> Result<(), Refused> {
    let (shorter, longer) = (width.min(height), width.max(height));
    check_pixels(width, height, config.max_pixels)?;
    if shorter < config.min_side {
        let reason = format!("the shorter side of {width}x{height} is below {}", config.min_side);
        return Err(Refused::new(FetchStatus::TooSmall, reason));
    }
    if f64::from(longer) > f64::from(shorter) * config.max_aspect {
        let reason = format!("{width}x{height} is more elongated than {}", config.max_aspect);
        return Err(Refused::new(FetchStatus::Aspect, reason));
    }
    Ok(())
}

fn check_pixels(width: u32, height: u32, max: u64) -> Result<(), Refused> {
    if u64::from(width) * u64::from(height) <= max {
        return Ok(());
    }
    let reason = format!("{width}x{height} has more than {max} pixels");
    Err(Refused::new(FetchStatus::TooManyPixels, reason))
}

fn turn(rgb: Vec<u8>, size: (u32, u32), orientation: Orientation) -> Result<(Vec<u8>, (u32, u32)), Refused> {
    if orientation == Orientation::NoTransforms {
        return Ok((rgb, size));
    }
    let image = RgbImage::from_raw(size.0, size.1, rgb);
    let mut image: DynamicImage =
        image.ok_or_else(|| Refused::new(FetchStatus::Decode, "the decoder gave too few pixels"))?.into();
    image.apply_orientation(orientation);
    let size = (image.width(), image.height());
    Ok((image.into_rgb8().into_raw(), size))
}

const fn swaps_sides(orientation: Orientation) -> bool {
    matches!(
        orientation,
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
    )
}

fn encode(rgb: &[u8], (width, height): (u32, u32), config: &ImageConfig) -> Result<Vec<u8>, Refused> {
    let longest = match config.format {
        StoredFormat::Jpeg => 65_500,
        StoredFormat::WebP => 16_383,
        StoredFormat::Png => u32::MAX,
    };
    if width.max(height) > longest {
        let reason = format!("{width}x{height} is too large for a {}", config.format.name());
        return Err(Refused::new(FetchStatus::TooManyPixels, reason));
    }
    let fail = |reason: String| Refused::new(FetchStatus::Decode, reason);
    match config.format {
        StoredFormat::Jpeg => jpeg::encode(rgb, (width, height), config.quality()),
        StoredFormat::Png => {
            let mut out = Vec::new();
            let effort = match config.quality() {
                0 => CompressionType::Uncompressed,
                effort => CompressionType::Level(effort),
            };
            PngEncoder::new_with_quality(&mut out, effort, FilterType::Adaptive)
                .write_image(rgb, width, height, image::ExtendedColorType::Rgb8)
                .map_err(|e| fail(e.to_string()))?;
            Ok(out)
        }
        StoredFormat::WebP => webp::Encoder::from_rgb(rgb, width, height)
            .encode_simple(false, config.quality().into())
            .map(|file| file.to_vec())
            .map_err(|e| fail(format!("webp: {e:?}"))),
    }
}

#[cfg(test)]
mod tests;
