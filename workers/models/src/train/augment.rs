//! Image augmentation, a function of (seed, sample id, epoch).

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use image::RgbImage;

use crate::error::{ModelError, Result};
use crate::random::Stream;

/// What may happen to a training image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Augmentation {
    /// Smallest share of the area that a random crop keeps, in `0..=1`; 1 never crops. BLIP: 0.2 for pre-training, 0.5 for fine-tuning.
    pub min_area: f64,
    /// Whether half of the images are mirrored. Off by default: a mirrored image makes "to the left of" wrong.
    pub flip: bool,
}

impl Default for Augmentation {
    fn default() -> Self {
        Self { min_area: 0.5, flip: false }
    }
}

/// Attempts to fit a crop of a drawn shape, as in torchvision's `RandomResizedCrop`.
const ATTEMPTS: usize = 10;

/// Ratio of width to height of a crop at most; its inverse at least.
const MAX_RATIO: f64 = 4.0 / 3.0;

impl Augmentation {
    /// A random resized crop of `pixels`, RGB8 of `side × side`, row by row; the result has the same size.
    ///
    /// The same seed, sample id and epoch give the same image.
    ///
    /// # Errors
    ///
    /// `pixels` is not an image of that size.
    pub fn apply(&self, pixels: &[u8], side: usize, seed: u64, sample_id: &str, epoch: u64) -> Result<Vec<u8>> {
        if side == 0 || pixels.len() != 3 * side * side {
            return Err(ModelError::Input(format!(
                "image {sample_id} has {} bytes, an RGB image of {side}x{side} has {}",
                pixels.len(),
                3 * side * side
            )));
        }
        let mut stream = Stream::new("augmentation", seed, &[sample_id.as_bytes(), &epoch.to_le_bytes()]);
        let crop = self.crop(&mut stream);
        let mirror = self.flip && stream.uniform() < 0.5;

        let mut out = match crop {
            Some(part) => resize(pixels, (side as u32, side as u32), side, part.map(|edge| edge * side as f64))?,
            None => pixels.to_vec(),
        };
        if mirror {
            for row in out.chunks_exact_mut(3 * side) {
                for column in 0..side / 2 {
                    for channel in 0..3 {
                        row.swap(3 * column + channel, 3 * (side - 1 - column) + channel);
                    }
                }
            }
        }
        Ok(out)
    }

    /// Left, top, width and height of the crop as shares of the side; `None` for the whole image.
    fn crop(&self, stream: &mut Stream) -> Option<[f64; 4]> {
        if self.min_area >= 1.0 {
            return None;
        }
        for _ in 0..ATTEMPTS {
            let area = self.min_area + (1.0 - self.min_area) * stream.uniform();
            let ratio = (MAX_RATIO.ln() * (2.0 * stream.uniform() - 1.0)).exp();
            let (width, height) = ((area * ratio).sqrt(), (area / ratio).sqrt());
            if width <= 1.0 && height <= 1.0 {
                return Some([stream.uniform() * (1.0 - width), stream.uniform() * (1.0 - height), width, height]);
            }
        }
        None
    }
}

/// A decoded image resized straight to `side × side`, RGB8 row by row: what [`crate::train::Example`] takes. The same filter as
/// [`crate::preprocess::Preprocessor`], so that a model is trained on what it will see.
///
/// # Errors
///
/// The image has no pixels.
pub fn shrink(image: &RgbImage, side: usize) -> Result<Vec<u8>> {
    let (width, height) = image.dimensions();
    resize(image.as_raw(), (width, height), side, [0.0, 0.0, f64::from(width), f64::from(height)])
}

/// Left, top, width and height of `part` are in pixels of the source.
fn resize(pixels: &[u8], (width, height): (u32, u32), side: usize, part: [f64; 4]) -> Result<Vec<u8>> {
    let fail = |reason: String| ModelError::Image { width, height, reason };
    if width == 0 || height == 0 {
        return Err(fail("it is empty".to_owned()));
    }
    let square = u32::try_from(side).map_err(|error| fail(error.to_string()))?;
    let source = ImageRef::new(width, height, pixels, PixelType::U8x3).map_err(|error| fail(error.to_string()))?;
    let mut target = Image::new(square, square, PixelType::U8x3);
    let [left, top, part_width, part_height] = part;
    let options =
        ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom)).crop(left, top, part_width, part_height);
    Resizer::new().resize(&source, &mut target, &options).map_err(|error| fail(error.to_string()))?;
    Ok(target.into_vec())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SIDE: usize = 16;

    /// Red grows to the right, green downwards.
    fn gradient() -> Vec<u8> {
        (0..SIDE * SIDE).flat_map(|i| [(i % SIDE * 15) as u8, (i / SIDE * 15) as u8, 0]).collect()
    }

    #[test]
    fn the_key_decides_and_nothing_else() {
        let augmentation = Augmentation::default();
        let image = gradient();
        let of = |seed, id, epoch| augmentation.apply(&image, SIDE, seed, id, epoch).unwrap();
        let base = of(1, "a", 0);
        assert_eq!(base, of(1, "a", 0));
        for other in [of(2, "a", 0), of(1, "b", 0), of(1, "a", 1)] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn without_flip_left_stays_left_and_top_stays_top() {
        let image = gradient();
        for epoch in 0..200 {
            let out = Augmentation::default().apply(&image, SIDE, 7, "a", epoch).unwrap();
            let at = |x: usize, y: usize| (out[3 * (y * SIDE + x)], out[3 * (y * SIDE + x) + 1]);
            assert!(at(0, 8).0 < at(15, 8).0 && at(8, 0).1 < at(8, 15).1, "epoch {epoch}");
            // At least half of the area: no side shorter than √(½ · ¾) = 0.61 of the image.
            assert!(at(15, 8).0 - at(0, 8).0 > 120, "epoch {epoch}");
        }
    }

    #[test]
    fn flip_mirrors_about_half_of_the_images() {
        let image = gradient();
        let augmentation = Augmentation { min_area: 1.0, flip: true };
        let mirrored = (0..200)
            .filter(|epoch| {
                let out = augmentation.apply(&image, SIDE, 7, "a", *epoch).unwrap();
                assert!(out == image || out[0] == 225, "only a whole mirror image is allowed");
                out != image
            })
            .count();
        assert!((70..130).contains(&mirrored), "{mirrored} of 200");
    }

    #[test]
    fn min_area_one_leaves_the_image_alone() {
        let image = gradient();
        let augmentation = Augmentation { min_area: 1.0, flip: false };
        assert_eq!(augmentation.apply(&image, SIDE, 7, "a", 3).unwrap(), image);
    }

    #[test]
    fn an_image_of_another_size_is_refused() {
        let error = Augmentation::default().apply(&[0; 12], SIDE, 0, "x9", 0).unwrap_err();
        assert!(error.to_string().contains("image x9 has 12 bytes"), "{error}");
    }
}
