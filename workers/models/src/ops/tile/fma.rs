//! Products of tiles of f32 by fused multiply-adds, in vectors of whatever length the processor has.
//!
//! Every sum takes its terms one after the other, so it is the same to the last bit on all processors.

use pulp::{Simd, WithSimd};

use super::super::kernel::vectorized;
use super::Operands;
use super::layout::{DEPTH, EDGE, Precision, singles};

/// Steps after which the next rows take their turn: 16 columns of so many stay in the first-level cache.
const STEPS: usize = 8;

/// Rows of a right tile that are written out in the loop, whose end so comes too rarely to be mistaken.
const UNROLLED: usize = 4;

/// Whether this processor has vectors and fuses multiplication and addition; elsewhere each such operation would be a call.
pub(super) fn available() -> bool {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) && vectorized(Lanes) >= 4
}

/// See [`Kernel::multiply`](super::Kernel::multiply): two left blocks, of which only `rows` rows need be right, and two right ones.
#[inline(always)]
pub(super) fn multiply(operands: &Operands<'_>, rows: usize, out: &mut [f32], stride: usize) {
    vectorized(Blocks { operands, rows: rows.min(2 * EDGE), out, stride });
}

struct Blocks<'a> {
    operands: &'a Operands<'a>,
    rows: usize,
    out: &'a mut [f32],
    stride: usize,
}

impl WithSimd for Blocks<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // The sums of a turn, and what they are made of, fill the registers: 32 of 16 numbers, 16 of 8, or 32 of 4.
        match S::F32_LANES {
            16 => self.turns::<S, 2, 2>(simd, [8, 8]),
            8 => self.turns::<S, 2, 1>(simd, [6, 5, 5]),
            4 => self.turns::<S, 4, 1>(simd, [6, 5, 5]),
            lanes => unreachable!("no such vectors are available: {lanes} numbers"),
        }
    }
}

impl Blocks<'_> {
    /// In turns of `V` vectors, which are the columns of `B` right blocks, and of so many rows.
    #[inline(always)]
    fn turns<S: Simd, const V: usize, const B: usize>(self, simd: S, turns: impl IntoIterator<Item = usize> + Copy) {
        let Self { operands: &Operands { left, rows: whole, right, steps, right_stride, add, .. }, rows, out, stride } = self;
        let (left, right) = (singles(left), singles(right));
        let depth = steps * DEPTH;
        let right_stride = right_stride / Precision::F32.pieces();
        for begin in (0..steps).step_by(STEPS) {
            let range = begin..steps.min(begin + STEPS);
            for column in (0..2).step_by(B) {
                for block in 0..rows.div_ceil(EDGE) {
                    let left = match whole.is_empty() {
                        true => Rows::Tiles(&left[block * steps..][range.clone()]),
                        false => Rows::Whole(&whole[block * EDGE * depth..], depth, begin * DEPTH),
                    };
                    let mut first = 0;
                    for height in turns {
                        if block * EDGE + first >= rows {
                            break;
                        }
                        let right: [&[_]; B] =
                            std::array::from_fn(|next| &right[(column + next) * right_stride..][range.clone()]);
                        let out = &mut out[(block * EDGE + first) * stride + column * EDGE..];
                        match height {
                            8 => turn::<S, 8, V, B>(simd, (left, first), right, add || begin > 0, out, stride),
                            6 => turn::<S, 6, V, B>(simd, (left, first), right, add || begin > 0, out, stride),
                            _ => turn::<S, 5, V, B>(simd, (left, first), right, add || begin > 0, out, stride),
                        }
                        first += height;
                    }
                }
            }
        }
    }
}

type Step = [f32; EDGE * DEPTH];

/// Rows of a left side, from a step on.
#[derive(Clone, Copy)]
enum Rows<'a> {
    /// A block of them in tiles.
    Tiles(&'a [Step]),
    /// As they lie: the numbers of each, and the one that the step begins with.
    Whole(&'a [f32], usize, usize),
}

impl<'a> Rows<'a> {
    /// What `H` rows have in a step; in place of rows behind the last one, that one.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "a closure of an iterator would not be compiled for wide vectors")]
    fn step<const H: usize>(&self, first: usize, step: usize) -> [&'a [f32; DEPTH]; H] {
        let mut rows = [&[0.0; DEPTH]; H];
        match *self {
            Self::Tiles(tiles) => {
                let tile = tiles[step].as_chunks::<DEPTH>().0;
                for h in 0..H {
                    rows[h] = &tile[first + h];
                }
            }
            Self::Whole(whole, depth, begin) => {
                let last = whole.len() / depth - 1;
                for h in 0..H {
                    let numbers = &whole[(first + h).min(last) * depth + begin + step * DEPTH..];
                    rows[h] = numbers.first_chunk().unwrap_or(rows[h]);
                }
            }
        }
        rows
    }
}

/// `H` rows from `first` on times `B` right blocks, added to `out` if it has begun.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "a closure of an iterator would not be compiled for wide vectors")]
fn turn<S: Simd, const H: usize, const V: usize, const B: usize>(
    simd: S,
    (left, first): (Rows<'_>, usize),
    right: [&[Step]; B],
    begun: bool,
    out: &mut [f32],
    stride: usize,
) {
    let lanes = S::F32_LANES;
    let mut sums = [[simd.splat_f32s(0.0); V]; H];
    if begun {
        for h in 0..H {
            for v in 0..V {
                sums[h][v] = S::as_simd_f32s(&out[h * stride + v * lanes..][..lanes]).0[0];
            }
        }
    }
    for step in 0..right[0].len() {
        let rows = left.step::<H>(first, step);
        for part in 0..DEPTH / UNROLLED {
            for k in part * UNROLLED..(part + 1) * UNROLLED {
                let mut columns = [simd.splat_f32s(0.0); V];
                for v in 0..V {
                    let (block, at) = (v * lanes / EDGE, v * lanes % EDGE);
                    columns[v] = S::as_simd_f32s(&right[block][step][k * EDGE + at..][..lanes]).0[0];
                }
                for h in 0..H {
                    let factor = simd.splat_f32s(rows[h][k]);
                    for v in 0..V {
                        sums[h][v] = simd.mul_add_f32s(factor, columns[v], sums[h][v]);
                    }
                }
            }
        }
    }
    for h in 0..H {
        for v in 0..V {
            S::as_mut_simd_f32s(&mut out[h * stride + v * lanes..][..lanes]).0[0] = sums[h][v];
        }
    }
}
