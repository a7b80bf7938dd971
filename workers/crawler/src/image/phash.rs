//! A 64-bit perceptual hash that knows colour.
//!
//! Hashes of brightness alone take two flags of one layout for the same picture. Here 44 bits say which of the lowest frequencies of
//! brightness (a 32×32 DCT-II, without the constant one) lie above their median, 16 bits how blue and how red each quarter is, and
//! 4 bits how bright the whole is. Frequencies too weak to survive JPEG count as zero, so that flat drawings do not hash their noise.
//! Copies in another size, format or quality are mostly 0 to 2 bits apart, different drawings hardly ever are.

use std::f64::consts::PI;

use super::resize;
use crate::config::Interpolation;

const SIDE: usize = 32;
/// Frequencies (i, j) with 0 < i + j <= 8: 44 of them.
const ORDER: usize = 8;
/// A wave with less than half a grey level of amplitude, in the units of the plain sum over 32×32 cosines.
const WEAK: f64 = 128.0;
/// Distance from grey at which a quarter counts as coloured.
const COLOURED: f64 = 6.0;
const BRIGHTNESS: [f64; 4] = [64.0, 128.0, 192.0, 230.0];

/// The hash of an image of `width`×`height` RGB pixels.
pub(super) fn hash(rgb: &[u8], width: u32, height: u32) -> u64 {
    let side = SIDE as u32;
    let small = resize::scale(rgb, (width, height), (side, side), Interpolation::Area).unwrap_or_default();
    let pixels: Vec<[f64; 3]> = small.chunks_exact(3).map(ycbcr).collect();
    if pixels.len() != SIDE * SIDE {
        return 0;
    }
    let frequencies = low_frequencies(&pixels);
    let mut sorted = frequencies.clone();
    sorted.sort_by(f64::total_cmp);
    let median = (sorted[sorted.len() / 2 - 1] + sorted[sorted.len() / 2]) / 2.0;
    let mut bits: Vec<bool> = frequencies.iter().map(|f| *f > median).collect();
    for channel in [1, 2] {
        for (top, left) in [(0, 0), (0, SIDE / 2), (SIDE / 2, 0), (SIDE / 2, SIDE / 2)] {
            let rows = (top..top + SIDE / 2).flat_map(|y| &pixels[y * SIDE + left..][..SIDE / 2]);
            let mean = rows.map(|p| p[channel]).sum::<f64>() / (SIDE * SIDE / 4) as f64;
            bits.extend([mean > -COLOURED, mean > COLOURED]);
        }
    }
    let brightness = pixels.iter().map(|p| p[0]).sum::<f64>() / (SIDE * SIDE) as f64;
    bits.extend(BRIGHTNESS.map(|b| brightness > b));
    bits.into_iter().fold(0, |hash, bit| hash << 1 | u64::from(bit))
}

/// Brightness 0..255 and two colour differences -128..127 (JFIF).
fn ycbcr(pixel: &[u8]) -> [f64; 3] {
    let [r, g, b] = [0, 1, 2].map(|i| f64::from(pixel[i]));
    [0.299 * r + 0.587 * g + 0.114 * b, -0.168_736 * r - 0.331_264 * g + 0.5 * b, 0.5 * r - 0.418_688 * g - 0.081_312 * b]
}

fn low_frequencies(pixels: &[[f64; 3]]) -> Vec<f64> {
    let wave = |k: usize, x: usize| (PI * ((2 * x + 1) * k) as f64 / (2 * SIDE) as f64).cos();
    let waves: Vec<Vec<f64>> = (0..=ORDER).map(|k| (0..SIDE).map(|x| wave(k, x)).collect()).collect();
    // Along the rows first: along[y][j].
    let along: Vec<Vec<f64>> = pixels
        .chunks_exact(SIDE)
        .map(|row| waves.iter().map(|w| row.iter().zip(w).map(|(p, c)| p[0] * c).sum()).collect())
        .collect();
    let mut found = Vec::new();
    for order in 1..=ORDER {
        for i in 0..=order {
            let value: f64 = along.iter().zip(&waves[i]).map(|(row, c)| row[order - i] * c).sum();
            found.push(if value.abs() < WEAK { 0.0 } else { value });
        }
    }
    found
}
