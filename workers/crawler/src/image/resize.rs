//! Sizes of stored images, and pixels in another size.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::config::{ImageConfig, Interpolation, ResizeMode};

/// How an image is brought to its stored size. All sizes are width and height, in pixels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// The whole image is scaled to this.
    pub(super) scaled: (u32, u32),
    /// Then cut, or widened with white, around its middle.
    pub(super) stored: (u32, u32),
    /// How the pixels of `scaled` are worked out.
    pub(super) interpolation: Interpolation,
}

impl Plan {
    /// What becomes of an image of `width`×`height`, neither of them 0: img2dataset 1.47 comes to the same sizes.
    pub(super) fn of(width: u32, height: u32, config: &ImageConfig) -> Self {
        let size = config.size;
        let reference = match config.resize {
            ResizeMode::KeepRatio | ResizeMode::CenterCrop => width.min(height),
            ResizeMode::KeepRatioLargest | ResizeMode::Border => width.max(height),
            ResizeMode::No => size,
        };
        let smaller = reference > size;
        let interpolation = if smaller { config.downscale } else { config.upscale };
        if config.resize == ResizeMode::No || (config.only_if_bigger && !smaller) {
            return Self { scaled: (width, height), stored: (width, height), interpolation };
        }
        let scale = f64::from(size) / f64::from(reference);
        // Python's `round`. What would not fit into 32 bits is far beyond any limit on pixels.
        let scaled = |length: u32| ((f64::from(length) * scale).round_ties_even() as u32).max(1);
        let scaled = (scaled(width), scaled(height));
        let stored = match config.resize {
            ResizeMode::CenterCrop | ResizeMode::Border => (size, size),
            _ => scaled,
        };
        Self { scaled, stored, interpolation }
    }
}

/// RGB pixels in another size; `None` if the sizes do not fit the pixels.
pub(super) fn scale(rgb: &[u8], from: (u32, u32), to: (u32, u32), by: Interpolation) -> Option<Vec<u8>> {
    if by == Interpolation::Area && to.0 <= from.0 && to.1 <= from.1 {
        return area(rgb, from, to);
    }
    let alg = match by {
        Interpolation::Nearest => ResizeAlg::Nearest,
        Interpolation::Bilinear => ResizeAlg::Convolution(FilterType::Bilinear),
        Interpolation::Bicubic => ResizeAlg::Convolution(FilterType::CatmullRom),
        Interpolation::Area => ResizeAlg::Convolution(FilterType::Box),
        Interpolation::Lanczos => ResizeAlg::Convolution(FilterType::Lanczos3),
    };
    let source = ImageRef::new(from.0, from.1, rgb, PixelType::U8x3).ok()?;
    let mut target = Image::new(to.0, to.1, PixelType::U8x3);
    Resizer::new().resize(&source, &mut target, Some(&ResizeOptions::new().resize_alg(alg))).ok()?;
    Some(target.into_vec())
}

/// RGB pixels in a smaller size, each the mean of the surface that it covers: a pixel at its edge counts by the share that lies in it, as in
/// `OpenCV`'s `INTER_AREA`.
fn area(rgb: &[u8], from: (u32, u32), to: (u32, u32)) -> Option<Vec<u8>> {
    let (width, columns, rows) = (from.0 as usize, shares(from.0, to.0), shares(from.1, to.1));
    let row = |y: usize| rgb.get(y * width * 3..(y + 1) * width * 3);
    let mut out = Vec::with_capacity(columns.len() * rows.len() * 3);
    let mut mean = vec![0.0_f32; width * 3];
    for (top, weights) in &rows {
        mean.fill(0.0);
        for (y, weight) in (*top..).zip(weights) {
            mean.iter_mut().zip(row(y)?).for_each(|(sum, value)| *sum += weight * f32::from(*value));
        }
        let (pixels, _) = mean.as_chunks::<3>();
        for (left, weights) in &columns {
            let mut sum = [0.5_f32; 3];
            for (pixel, weight) in pixels.get(*left..)?.iter().zip(weights) {
                (0..3).for_each(|channel| sum[channel] += weight * pixel[channel]);
            }
            out.extend(sum.map(|value| value as u8));
        }
    }
    Some(out)
}

/// For each of `to` equal stretches of `from` pixels: the first pixel in it, and the shares that it and those after it have.
fn shares(from: u32, to: u32) -> Vec<(usize, Vec<f32>)> {
    let (from, to) = (u64::from(from), u64::from(to));
    let stretch = |i: u64| {
        // In units of a pixel divided by `to`, so that all is whole.
        let (begin, end) = (i * from, (i + 1) * from);
        let pixels = begin / to..end.div_ceil(to);
        let share = |pixel: u64| (end.min((pixel + 1) * to) - begin.max(pixel * to)) as f32 / from as f32;
        ((begin / to) as usize, pixels.map(share).collect())
    };
    (0..to).map(stretch).collect()
}

/// The image cut, or widened with white, to another size around its middle; `None` if the size does not fit the pixels.
pub(super) fn fit(rgb: &[u8], from: (u32, u32), to: (u32, u32)) -> Option<Vec<u8>> {
    let [width, height, to_width, to_height] = [from.0, from.1, to.0, to.1].map(|n| n as usize);
    let (columns, rows) = (width.min(to_width), height.min(to_height));
    let (from_left, from_top) = ((width - columns) / 2, (height - rows) / 2);
    let (to_left, to_top) = ((to_width - columns) / 2, (to_height - rows) / 2);
    let mut out = vec![255; to_width * to_height * 3];
    for row in 0..rows {
        let source = rgb.get(((from_top + row) * width + from_left) * 3..)?.get(..columns * 3)?;
        out.get_mut(((to_top + row) * to_width + to_left) * 3..)?.get_mut(..columns * 3)?.copy_from_slice(source);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// What img2dataset 1.47.0 makes of black images: `size,resize_mode,resize_only_if_bigger,width,height` and the width and height
    /// that its `Resizer` gives.
    const PEER: &str = include_str!("img2dataset_sizes.csv");

    #[test]
    fn sizes_are_those_of_img2dataset() {
        let mut lines = 0;
        for line in PEER.lines() {
            let fields: Vec<&str> = line.split(',').collect();
            let number = |i: usize| fields[i].parse::<u32>().unwrap();
            let resize: ResizeMode = serde_json::from_value(fields[1].into()).unwrap();
            let config = ImageConfig { size: number(0), resize, only_if_bigger: number(2) == 1, ..ImageConfig::default() };
            assert_eq!(Plan::of(number(3), number(4), &config).stored, (number(5), number(6)), "{line}");
            lines += 1;
        }
        assert!(lines > 500);
    }

    #[test]
    fn area_is_that_of_opencv() {
        // cv2.resize(…, interpolation=cv2.INTER_AREA) of the first channel, OpenCV 4.11.
        let value = |x: u32, y: u32| (x * 37 + y * 91 + x * y * 13) as u8;
        let pixels: Vec<u8> =
            (0..5).flat_map(|y| (0..7).flat_map(move |x| [value(x, y), 255 - value(x, y), value(x, y) / 2])).collect();
        let wanted: [((u32, u32), &[u8]); 3] = [
            ((3, 2), &[99, 135, 148, 121, 139, 136]),
            ((5, 4), &[30, 80, 130, 142, 193, 143, 156, 169, 116, 114, 103, 136, 171, 141, 158, 114, 109, 137, 129, 123]),
            ((2, 5), &[48, 174, 155, 107, 153, 150, 115, 156, 113, 125]),
        ];
        for (to, wanted) in wanted {
            let scaled = scale(&pixels, (7, 5), to, Interpolation::Area).unwrap();
            assert_eq!(scaled.iter().step_by(3).copied().collect::<Vec<_>>(), wanted, "{to:?}");
            assert!(scaled.chunks_exact(3).all(|p| p[0].abs_diff(255 - p[1]) <= 1), "every channel");
        }
        assert_eq!(scale(&pixels, (7, 5), (7, 5), Interpolation::Area).unwrap(), pixels);
        assert_eq!(scale(&pixels[3..], (7, 5), (3, 2), Interpolation::Area), None);
    }

    #[test]
    fn images_are_cut_and_widened_around_their_middle() {
        let pixels: Vec<u8> = (1..=6).flat_map(|n| [n; 3]).collect();
        let grey = |of: Option<Vec<u8>>| of.unwrap().chunks_exact(3).map(|p| p[0]).collect::<Vec<_>>();
        assert_eq!(grey(fit(&pixels, (3, 2), (2, 2))), [1, 2, 4, 5]);
        assert_eq!(grey(fit(&pixels, (6, 1), (3, 1))), [2, 3, 4]);
        assert_eq!(grey(fit(&pixels, (3, 2), (4, 4))), [255, 255, 255, 255, 1, 2, 3, 255, 4, 5, 6, 255, 255, 255, 255, 255]);
        assert_eq!(fit(&pixels, (3, 3), (3, 3)), None);
    }

    proptest! {
        #[test]
        fn the_asked_side_ends_at_the_size(w in 1_u32..20_000, h in 1_u32..20_000, size in 1_u32..3000, only_if_bigger: bool) {
            let of = |resize| Plan::of(w, h, &ImageConfig { size, resize, only_if_bigger, ..ImageConfig::default() }).stored;
            let (w1, h1) = of(ResizeMode::KeepRatio);
            prop_assert_eq!(w1.min(h1), if only_if_bigger { w.min(h).min(size) } else { size });
            let (w2, h2) = of(ResizeMode::KeepRatioLargest);
            prop_assert_eq!(w2.max(h2), if only_if_bigger { w.max(h).min(size) } else { size });
            prop_assert_eq!(of(ResizeMode::No), (w, h));
        }
    }
}
