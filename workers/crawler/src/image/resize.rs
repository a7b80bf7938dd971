//! Making images smaller.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::config::Side;

/// The size in which an image of `width`×`height` is stored: scaled down so that the side is at most `size` pixels; 0 is no limit.
pub(super) fn stored_size(width: u32, height: u32, size: u32, side: Side) -> (u32, u32) {
    let reference = match side {
        Side::Shorter => width.min(height),
        Side::Longer => width.max(height),
    };
    if size == 0 || reference <= size {
        return (width, height);
    }
    let scaled = |length: u32| {
        let rounded = (u64::from(length) * u64::from(size) + u64::from(reference) / 2) / u64::from(reference);
        u32::try_from(rounded).unwrap_or(u32::MAX).max(1)
    };
    (scaled(width), scaled(height))
}

/// RGB pixels in another size, by Lanczos3 convolution; `None` if the sizes do not fit the pixels.
pub(super) fn lanczos(rgb: &[u8], from: (u32, u32), to: (u32, u32)) -> Option<Vec<u8>> {
    convolve(rgb, from, to, FilterType::Lanczos3)
}

/// The image as `side`×`side` RGB pixels, each the average of its area; empty if the size does not fit the pixels.
pub(super) fn box_average(rgb: &[u8], width: u32, height: u32, side: u32) -> Vec<u8> {
    convolve(rgb, (width, height), (side, side), FilterType::Box).unwrap_or_default()
}

fn convolve(rgb: &[u8], from: (u32, u32), to: (u32, u32), filter: FilterType) -> Option<Vec<u8>> {
    let source = ImageRef::new(from.0, from.1, rgb, PixelType::U8x3).ok()?;
    let mut target = Image::new(to.0, to.1, PixelType::U8x3);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new().resize(&source, &mut target, Some(&options)).ok()?;
    Some(target.into_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_asked_side_is_scaled_down_and_nothing_up() {
        assert_eq!(stored_size(1000, 500, 250, Side::Shorter), (500, 250));
        assert_eq!(stored_size(1000, 500, 250, Side::Longer), (250, 125));
        assert_eq!(stored_size(300, 200, 250, Side::Shorter), (300, 200));
        assert_eq!(stored_size(1000, 500, 0, Side::Longer), (1000, 500));
        assert_eq!(stored_size(10_000, 1, 100, Side::Longer), (100, 1));
    }

    proptest! {
        #[test]
        fn the_side_ends_at_the_size_or_stays(w in 1_u32..20_000, h in 1_u32..20_000, size in 1_u32..3000) {
            let (sw, sh) = stored_size(w, h, size, Side::Shorter);
            prop_assert_eq!(sw.min(sh), w.min(h).min(size));
            let (lw, lh) = stored_size(w, h, size, Side::Longer);
            prop_assert_eq!(lw.max(lh), w.max(h).min(size));
            prop_assert!(sw >= lw && sh >= lh && sw <= w && sh <= h);
        }
    }
}
