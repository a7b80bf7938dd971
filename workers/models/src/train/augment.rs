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
    /// Strength of the distortions, in `0..=1`; 0 never distorts. Two are drawn for each image from BLIP's list (RandAugment, arXiv
    /// 1909.13719), and each is made with probability ½: automatic contrast, histogram equalisation, brightness, sharpness, shearing or
    /// moving along an axis, rotation, or none. BLIP: 0.5, at which its brightness and sharpness stay as they are.
    pub distort: f64,
}

impl Default for Augmentation {
    fn default() -> Self {
        Self { min_area: 0.5, flip: false, distort: 0.5 }
    }
}

/// Attempts to fit a crop of a drawn shape, as in torchvision's `RandomResizedCrop`.
const ATTEMPTS: usize = 10;

/// Ratio of width to height of a crop at most; its inverse at least.
const MAX_RATIO: f64 = 4.0 / 3.0;

/// Distortions of an image, as in BLIP.
const DISTORTIONS: usize = 2;

/// Probability that a drawn distortion is made.
const DISTORTED: f64 = 0.5;

/// Full strength: pixels moved sideways per pixel, share of the side that an image is moved by (10 of 224 pixels), degrees; and the factors of
/// brightness and of sharpness, from no strength to full (`transform/randaugment.py` of BLIP).
const MAX_SHEAR: f64 = 0.3;
const MAX_MOVE: f64 = 10.0 / 224.0;
const MAX_DEGREES: f64 = 30.0;
const FACTORS: [f64; 2] = [0.1, 1.9];

impl Augmentation {
    /// Whether images stay as they are.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.min_area >= 1.0 && !self.flip && self.distort <= 0.0
    }

    /// A random resized crop of `pixels`, RGB8 of `side × side`, row by row, perhaps mirrored and distorted; the result has the same size.
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
        if self.distort > 0.0 {
            for _ in 0..DISTORTIONS {
                out = distorted(out, side, self.distort, &mut stream);
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

/// One distortion, drawn evenly, at `strength` of its range and, where it has one, in a drawn direction; or none.
fn distorted(mut pixels: Vec<u8>, side: usize, strength: f64, stream: &mut Stream) -> Vec<u8> {
    let kind = (stream.uniform() * 10.0) as usize;
    let factor = FACTORS[0] + (FACTORS[1] - FACTORS[0]) * strength;
    let strength = if stream.uniform() < 0.5 { strength } else { -strength };
    if stream.uniform() >= DISTORTED {
        return pixels;
    }
    let (shear, shift) = (MAX_SHEAR * strength, MAX_MOVE * side as f64 * strength);
    match kind {
        0 => per_channel(&mut pixels, autocontrast),
        1 => per_channel(&mut pixels, equalize),
        2 => pixels.iter_mut().for_each(|value| *value = (f64::from(*value) * factor).round() as u8),
        3 => return sharpened(&pixels, side, factor),
        4 => return affine(&pixels, side, [1.0, shear, 0.0, 1.0], [0.0, 0.0]),
        5 => return affine(&pixels, side, [1.0, 0.0, shear, 1.0], [0.0, 0.0]),
        6 => return affine(&pixels, side, [1.0, 0.0, 0.0, 1.0], [shift, 0.0]),
        7 => return affine(&pixels, side, [1.0, 0.0, 0.0, 1.0], [0.0, shift]),
        8 => {
            let (sin, cos) = (MAX_DEGREES * strength).to_radians().sin_cos();
            return affine(&pixels, side, [cos, -sin, sin, cos], [0.0, 0.0]);
        }
        _ => {}
    }
    pixels
}

/// `factor · image + (1 − factor) · smoothed`, where a smoothed pixel is the mean of it and its eight neighbours, itself weighted by 5.
/// The outermost pixels stay.
fn sharpened(pixels: &[u8], side: usize, factor: f64) -> Vec<u8> {
    let mut out = pixels.to_vec();
    for row in 1..side.saturating_sub(1) {
        for place in 3 * (row * side + 1)..3 * (row * side + side - 1) {
            let sum: u32 = [place - 3 * side, place, place + 3 * side]
                .iter()
                .flat_map(|middle| [middle - 3, *middle, middle + 3])
                .map(|place| u32::from(pixels[place]))
                .sum();
            let own = f64::from(pixels[place]);
            let smoothed = (f64::from(sum) + 4.0 * own) / 13.0;
            out[place] = (factor * own + (1.0 - factor) * smoothed).round() as u8;
        }
    }
    out
}

/// Replaces the values of each colour by a table made from their histogram.
fn per_channel(pixels: &mut [u8], table: impl Fn(&[usize; 256]) -> [u8; 256]) {
    for channel in 0..3 {
        let mut histogram = [0; 256];
        pixels.iter().skip(channel).step_by(3).for_each(|value| histogram[usize::from(*value)] += 1);
        let table = table(&histogram);
        pixels.iter_mut().skip(channel).step_by(3).for_each(|value| *value = table[usize::from(*value)]);
    }
}

/// Stretches the values so that the smallest becomes 0 and the largest 255.
fn autocontrast(histogram: &[usize; 256]) -> [u8; 256] {
    let low = histogram.iter().position(|&count| count > 0).unwrap_or(0);
    let high = histogram.iter().rposition(|&count| count > 0).unwrap_or(255);
    let scale = 255.0 / high.saturating_sub(low).max(1) as f64;
    std::array::from_fn(|value| match high > low {
        true => (value.saturating_sub(low) as f64 * scale).round().min(255.0) as u8,
        false => value as u8,
    })
}

/// Spreads the values so that each range of them is as frequent as any other.
fn equalize(histogram: &[usize; 256]) -> [u8; 256] {
    let last = histogram.iter().rev().find(|&&count| count > 0).copied().unwrap_or(0);
    let step = (histogram.iter().sum::<usize>() - last) / 255;
    let mut below = step / 2;
    std::array::from_fn(|value| {
        if step == 0 {
            return value as u8;
        }
        let new = (below / step).min(255) as u8;
        below += histogram[value];
        new
    })
}

/// The image seen through a linear map `[xx, xy, yx, yy]` about its centre and a shift `[x, y]` in pixels, from places in the result to places
/// in the source, with bilinear interpolation. Beyond its edge the image goes on in the colour of the edge.
fn affine(pixels: &[u8], side: usize, [xx, xy, yx, yy]: [f64; 4], shift: [f64; 2]) -> Vec<u8> {
    let centre = (side as f64 - 1.0) / 2.0;
    let mut out = Vec::with_capacity(pixels.len());
    for row in 0..side {
        for column in 0..side {
            let (x, y) = (column as f64 - centre, row as f64 - centre);
            let place = |value: f64| (value + centre).clamp(0.0, side as f64 - 1.0);
            let (x, y) = (place(xx * x + xy * y + shift[0]), place(yx * x + yy * y + shift[1]));
            let (left, top) = (x as usize, y as usize);
            let (right, bottom) = ((left + 1).min(side - 1), (top + 1).min(side - 1));
            let (dx, dy) = (x - left as f64, y - top as f64);
            for channel in 0..3 {
                let at = |x: usize, y: usize| f64::from(pixels[3 * (y * side + x) + channel]);
                let above = at(left, top) * (1.0 - dx) + at(right, top) * dx;
                let below = at(left, bottom) * (1.0 - dx) + at(right, bottom) * dx;
                out.push((above * (1.0 - dy) + below * dy).round() as u8);
            }
        }
    }
    out
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
            let out = Augmentation { distort: 0.0, ..Augmentation::default() }.apply(&image, SIDE, 7, "a", epoch).unwrap();
            let at = |x: usize, y: usize| (out[3 * (y * SIDE + x)], out[3 * (y * SIDE + x) + 1]);
            assert!(at(0, 8).0 < at(15, 8).0 && at(8, 0).1 < at(8, 15).1, "epoch {epoch}");
            // At least half of the area: no side shorter than √(½ · ¾) = 0.61 of the image.
            assert!(at(15, 8).0 - at(0, 8).0 > 120, "epoch {epoch}");
        }
    }

    #[test]
    fn flip_mirrors_about_half_of_the_images() {
        let image = gradient();
        let augmentation = Augmentation { min_area: 1.0, flip: true, distort: 0.0 };
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
    fn everything_off_leaves_the_image_alone() {
        let image = gradient();
        let augmentation = Augmentation { min_area: 1.0, flip: false, distort: 0.0 };
        assert_eq!(augmentation.apply(&image, SIDE, 7, "a", 3).unwrap(), image);
    }

    #[test]
    fn distortions_are_what_their_names_say() {
        let image = gradient();
        // A quarter turn: what was red to the right is red downwards.
        let turned = affine(&image, SIDE, [0.0, 1.0, -1.0, 0.0], [0.0, 0.0]);
        let at = |image: &[u8], x: usize, y: usize| [image[3 * (y * SIDE + x)], image[3 * (y * SIDE + x) + 1]];
        assert_eq!(at(&turned, 3, 5), at(&image, 5, SIDE - 1 - 3));
        // Sheared along x: the middle stays, rows above and below move against each other, the edge goes on.
        let sheared = affine(&image, SIDE, [1.0, 1.0, 0.0, 1.0], [0.0, 0.0]);
        assert_eq!(at(&sheared, 8, 15), [225, 225]);
        assert_eq!(at(&sheared, 7, 0), [0, 0]);
        // Moved by two pixels: what was there two to the right.
        let moved = affine(&image, SIDE, [1.0, 0.0, 0.0, 1.0], [2.0, 0.0]);
        assert_eq!([at(&moved, 3, 5), at(&moved, 15, 5)], [at(&image, 5, 5), at(&image, 15, 5)]);
        // A dot of 130 on black: 5 of 13 parts stay, 1 of 13 goes to each neighbour; and the other way.
        let mut dot = vec![0; 3 * SIDE * SIDE];
        dot[3 * (5 * SIDE + 5)] = 130;
        let smooth = sharpened(&dot, SIDE, 0.0);
        assert_eq!([at(&smooth, 5, 5)[0], at(&smooth, 4, 6)[0], at(&smooth, 7, 5)[0]], [50, 10, 0]);
        assert_eq!(at(&sharpened(&dot, SIDE, 1.9), 5, 5)[0], 202);
        assert_eq!(sharpened(&dot, SIDE, 1.0), dot);
        let mut histogram = [0; 256];
        (histogram[50], histogram[110], histogram[150]) = (300, 300, 300);
        let stretched = autocontrast(&histogram);
        assert_eq!([stretched[50], stretched[110], stretched[150]], [0, 153, 255]);
        let even = equalize(&histogram);
        assert_eq!([even[50], even[110], even[150]], [0, 150, 255]);
        // A plain image has no contrast to stretch.
        let mut plain = vec![77; 12];
        per_channel(&mut plain, autocontrast);
        per_channel(&mut plain, equalize);
        assert_eq!(plain, [77; 12]);
    }

    #[test]
    fn distorted_images_stay_close_to_what_they_were() {
        let image = gradient();
        let kinds = (0..200).map(|epoch| {
            let augmentation = Augmentation { min_area: 1.0, flip: false, distort: 0.5 };
            augmentation.apply(&image, SIDE, 7, "a", epoch).unwrap()
        });
        let kinds: std::collections::BTreeSet<Vec<u8>> = kinds.collect();
        assert!(kinds.len() > 20, "{} different images", kinds.len());
        for out in &kinds {
            assert!(out[3 * (8 * SIDE)] < out[3 * (8 * SIDE + 15)], "left stays left");
        }
    }

    #[test]
    fn an_image_of_another_size_is_refused() {
        let error = Augmentation::default().apply(&[0; 12], SIDE, 0, "x9", 0).unwrap_err();
        assert!(error.to_string().contains("image x9 has 12 bytes"), "{error}");
    }
}
