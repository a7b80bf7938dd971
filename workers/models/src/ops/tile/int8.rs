//! Tiles of 8-bit integers: symmetric absmax quantization in groups of [`DEPTH`] along the depth, since a transformer's activations have a few
//! channels that are far larger than the others.
//!
//! The numbers that a row of a left side has in a step, or a column of a right side, are integers from -127 to 127 times one scale, the largest
//! magnitude among them divided by 127. In a tile, the integers come first. On the left, 16 rows of 32, with 128 added, for the instruction takes its
//! left side without sign. On the right, four rows interleaved: number `(row, column)` is at `row / 4 · 64 + 4 · column + row % 4`. Then the 16
//! scales; on the right also a correction of each column, what the 128 of the left side add to its sum, negated.

use super::layout::{DEPTH, EDGE, Tile};

/// Where the scales lie in a tile, counted in f32.
pub(super) const SCALES: usize = EDGE * DEPTH / size_of::<f32>();
/// Where the corrections lie, counted in i32.
pub(super) const CORRECTIONS: usize = SCALES + EDGE;

/// What is added to the numbers of a left side.
const OFFSET: u32 = 128;

/// Magnitudes below this are taken as zeros: their inverse would be none.
const SMALLEST: f32 = 1e-30;

/// 1.5 · 2^23: adding it rounds to an integer, which the lower bits then hold.
const ROUND: f32 = 12_582_912.0;

/// The factor that makes numbers up to `largest` integers, and the scale that takes it back.
#[inline(always)]
fn scales(largest: f32) -> (f32, f32) {
    // What is not a number makes its scale none, and so all products.
    if largest < SMALLEST { (0.0, 0.0) } else { (127.0 / largest, largest * (1.0 / 127.0)) }
}

/// Bits that are ordered as magnitudes are, what is not a number above all.
#[inline(always)]
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Writes a row of a left side, of one step.
#[inline(always)]
pub(super) fn write_row(tile: &mut Tile, row: usize, numbers: &[f32; DEPTH]) {
    let mut largest = 0;
    for x in numbers {
        largest = largest.max(magnitude(*x));
    }
    let (factor, scale) = scales(f32::from_bits(largest));
    let out: &mut [u8] = bytemuck::cast_slice_mut(&mut tile.0);
    for (out, x) in out[row * DEPTH..][..DEPTH].iter_mut().zip(numbers) {
        *out = (x.mul_add(factor, ROUND).to_bits() ^ OFFSET) as u8;
    }
    bytemuck::cast_slice_mut::<_, f32>(&mut tile.0)[SCALES + row] = scale;
}

/// Writes a tile of a right side.
#[inline(always)]
pub(super) fn write_columns(tile: &mut Tile, rows: &[[f32; EDGE]; DEPTH]) {
    let mut largest = [0; EDGE];
    for row in rows {
        for (largest, x) in largest.iter_mut().zip(row) {
            *largest = magnitude(*x).max(*largest);
        }
    }
    let (mut factors, mut column_scales, mut sums) = ([0.0; EDGE], [0.0; EDGE], [0i32; EDGE]);
    for column in 0..EDGE {
        (factors[column], column_scales[column]) = scales(f32::from_bits(largest[column]));
    }
    let out: &mut [u32] = bytemuck::cast_slice_mut(&mut tile.0);
    for (rows, out) in rows.as_chunks::<4>().0.iter().zip(out.as_chunks_mut::<EDGE>().0) {
        for column in 0..EDGE {
            let mut four = 0;
            for (place, row) in rows.iter().enumerate() {
                let bits = row[column].mul_add(factors[column], ROUND).to_bits();
                four |= (bits & 0xff) << (8 * place);
                sums[column] += ((bits << 24) as i32) >> 24;
            }
            out[column] = four;
        }
    }
    bytemuck::cast_slice_mut::<_, f32>(&mut tile.0)[SCALES..][..EDGE].copy_from_slice(&column_scales);
    for (correction, sum) in bytemuck::cast_slice_mut::<_, i32>(&mut tile.0)[CORRECTIONS..][..EDGE].iter_mut().zip(sums) {
        *correction = -(OFFSET as i32) * sum;
    }
}
