//! From a downloaded body to the stored image and its hashes. Pure CPU work: never run on a tokio thread.

mod decode;
mod phash;
mod resize;

use std::panic::{AssertUnwindSafe, catch_unwind};

use capfilt_schemas::{Digest, FetchStatus};
use image::metadata::Orientation;
use image::{DynamicImage, ImageEncoder, RgbImage};

use crate::config::{ImageConfig, StoredFormat};

/// An image as it is stored in a row.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct StoredImage {
    /// The file, re-encoded.
    pub(crate) bytes: Vec<u8>,
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

fn store_unguarded(body: &[u8], config: &ImageConfig) -> Result<StoredImage, Refused> {
    let opened = decode::open(body)?;
    let (width, height) = (opened.width, opened.height);
    check_size(width, height, config)?;
    let pixels = opened.decode(config.max_pixels)?;
    let to = resize::stored_size(width, height, config.size, config.side);
    let rgb = if to == (width, height) {
        pixels.rgb
    } else {
        resize::lanczos(&pixels.rgb, (width, height), to)
            .ok_or_else(|| Refused::new(FetchStatus::Decode, "the decoder gave too few pixels"))?
    };
    // Turned only now: there are fewer pixels to turn.
    let (rgb, to) = turn(rgb, to, pixels.orientation)?;
    let (original_width, original_height) = if swaps_sides(pixels.orientation) { (height, width) } else { (width, height) };
    Ok(StoredImage {
        bytes: encode(&rgb, to, config)?,
        width: to.0,
        height: to.1,
        original_width,
        original_height,
        sha256: Digest::of(body),
        phash: phash::hash(&rgb, to.0, to.1),
    })
}

/// Judges the size in the header, before a pixel is decoded.
fn check_size(width: u32, height: u32, config: &ImageConfig) -> Result<(), Refused> {
    let (shorter, longer) = (width.min(height), width.max(height));
    if u64::from(width) * u64::from(height) > config.max_pixels {
        let reason = format!("{width}x{height} has more than {} pixels", config.max_pixels);
        return Err(Refused::new(FetchStatus::TooManyPixels, reason));
    }
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
    let mut out = Vec::new();
    match config.format {
        StoredFormat::Jpeg => {
            let (Ok(w), Ok(h)) = (u16::try_from(width), u16::try_from(height)) else {
                return Err(Refused::new(FetchStatus::TooManyPixels, format!("{width}x{height} is too large for a jpeg")));
            };
            let mut encoder = jpeg_encoder::Encoder::new(&mut out, config.quality);
            encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::R_4_2_0);
            encoder
                .encode(rgb, w, h, jpeg_encoder::ColorType::Rgb)
                .map_err(|e| Refused::new(FetchStatus::Decode, e.to_string()))?;
        }
        StoredFormat::Png => image::codecs::png::PngEncoder::new(&mut out)
            .write_image(rgb, width, height, image::ExtendedColorType::Rgb8)
            .map_err(|e| Refused::new(FetchStatus::Decode, e.to_string()))?,
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
