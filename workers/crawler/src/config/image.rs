//! Which images are taken, and how they are stored.

use serde::{Deserialize, Serialize};

use super::bad;
use crate::CrawlError;

/// Pixels of an image, where nothing else is said.
const MAX_PIXELS: u64 = 50_000_000;

/// What the stored image looks like, and which images are refused. The settings of the size are img2dataset's, and lead to its sizes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// The length in pixels that `resize` speaks of.
    pub size: u32,
    /// What is made `size` pixels long.
    pub resize: ResizeMode,
    /// Whether an image that is smaller than `size` is left as it is; otherwise it is scaled up.
    pub only_if_bigger: bool,
    /// How an image is made smaller.
    pub downscale: Interpolation,
    /// How an image is made larger.
    pub upscale: Interpolation,
    /// How the image is stored.
    pub format: StoredFormat,
    /// JPEG and WebP: quality, 1 to 100, 95 if not given. PNG: effort of compression, 0 to 9, 6 if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<u8>,
    /// Whether the downloaded bytes may be stored as they are.
    pub reencode: Reencode,
    /// An image with a shorter side below this is refused.
    pub min_side: u32,
    /// An image whose longer side is more than this many times the shorter one is refused.
    pub max_aspect: f64,
    /// An image with more pixels than this is refused before it is decoded; so is one that would be scaled up beyond this and beyond
    /// 50 million.
    pub max_pixels: u64,
}

impl Default for ImageConfig {
    fn default() -> Self {
        Self {
            size: 384,
            resize: ResizeMode::KeepRatio,
            only_if_bigger: true,
            downscale: Interpolation::Lanczos,
            upscale: Interpolation::Lanczos,
            format: StoredFormat::Jpeg,
            quality: None,
            reencode: Reencode::Always,
            min_side: 24,
            max_aspect: 8.0,
            max_pixels: MAX_PIXELS,
        }
    }
}

impl ImageConfig {
    /// Quality or effort, as set or as is usual for the format.
    pub(crate) fn quality(&self) -> u8 {
        self.quality.unwrap_or(if self.format == StoredFormat::Png { 6 } else { 95 })
    }

    /// Most pixels of a stored image: a small `max_pixels` chooses among images, it does not forbid to scale them up.
    pub(crate) fn max_stored_pixels(&self) -> u64 {
        self.max_pixels.max(MAX_PIXELS)
    }

    pub(super) fn check(&self, name: &str) -> Result<(), CrawlError> {
        if self.size == 0 {
            return Err(bad(&format!("{name}.size"), "it is zero; set resize = \"no\" to leave every image in its own size"));
        }
        let (allowed, range) = if self.format == StoredFormat::Png { (0..=9, "0 to 9") } else { (1..=100, "1 to 100") };
        if !allowed.contains(&self.quality()) {
            return Err(bad(&format!("{name}.quality"), &format!("for {} it must be {range}", self.format.name())));
        }
        if self.max_aspect.is_nan() || self.max_aspect < 1.0 {
            return Err(bad(&format!("{name}.max_aspect"), "it must be 1 or more"));
        }
        Ok(())
    }
}

/// What is made of an image's size, by img2dataset's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResizeMode {
    /// Nothing.
    No,
    /// The shorter side becomes `size`, the longer one keeps its ratio to it.
    KeepRatio,
    /// The longer side becomes `size`, the shorter one keeps its ratio to it.
    KeepRatioLargest,
    /// As `keep_ratio`; then the `size`×`size` square in the middle is cut out.
    CenterCrop,
    /// As `keep_ratio_largest`; then white is added on both sides until the image is a square.
    Border,
}

/// How pixels of another size are worked out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interpolation {
    /// The nearest pixel.
    Nearest,
    /// A triangle, as wide as what becomes one pixel.
    #[serde(alias = "linear")]
    Bilinear,
    /// Catmull-Rom, as wide as what becomes one pixel.
    #[serde(alias = "cubic")]
    Bicubic,
    /// The average of what becomes one pixel.
    Area,
    /// Lanczos with three lobes.
    #[serde(alias = "lanczos4")]
    Lanczos,
}

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredFormat {
    /// JPEG, colour at half resolution.
    #[serde(alias = "jpg")]
    Jpeg,
    /// PNG, without loss.
    Png,
    /// WebP, with loss.
    #[serde(rename = "webp")]
    WebP,
}

impl StoredFormat {
    /// The text in the `format` column.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::WebP => "webp",
        }
    }
}

/// Whether an image is encoded anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reencode {
    /// Always: nothing but pixels of the downloaded file is kept.
    Always,
    /// Unless the file has the stored format already, and nothing would change it: neither its size nor EXIF, transparency or a colour
    /// profile (img2dataset's `skip_reencode`).
    IfNeeded,
    /// Never: every file is stored as it came, in its own size (img2dataset's `disable_all_reencoding`). It is decoded nevertheless, to
    /// see that it can be.
    Never,
}
