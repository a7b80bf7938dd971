//! Products of tiles of 8-bit integers by `VPDPBUSD` of AVX-512 VNNI, which makes four times as many products as a fused multiply-add of f32.
//!
//! The [`DEPTH`] numbers that a row of a left side has in a step, or a column of a right side, are integers from -127 to 127 times one scale, the
//! largest magnitude among them divided by 127. A number so keeps its own magnitude's share of the step's largest: the groups are small, since
//! a transformer's activations have a few channels that are far larger than the others.
//!
//! In a tile, the numbers come first. On the left, 16 rows of 32, with 128 added, for the instruction takes its left side without sign. On the
//! right, four rows interleaved: number `(row, column)` is at `row / 4 · 64 + 4 · column + row % 4`. Then the 16 scales; on the right also, for
//! each column, what the 128 of the left side add to its sum, negated.
#![allow(unsafe_code, reason = "instructions that only some processors have; loads are bounded by the size of a tile")]

use super::layout::{DEPTH, EDGE, Tile};

/// Where the scales lie in a tile, counted in f32.
const SCALES: usize = EDGE * DEPTH / size_of::<f32>();
/// Where the sums to begin with lie, counted in i32.
const STARTS: usize = SCALES + EDGE;

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
    for (start, sum) in bytemuck::cast_slice_mut::<_, i32>(&mut tile.0)[STARTS..][..EDGE].iter_mut().zip(sums) {
        *start = -(OFFSET as i32) * sum;
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use kernel::{available, multiply};

#[cfg(target_arch = "x86_64")]
mod kernel {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    use std::hint::black_box;

    use super::super::Operands;
    use super::{DEPTH, EDGE, SCALES, STARTS, Tile};

    /// Fours of numbers in a step, which the instruction adds up.
    const FOURS: usize = DEPTH / 4;

    /// Steps after which the next rows take their turn: what two right blocks have in so many stays in the first-level cache.
    const STEPS: usize = 8;

    /// Whether this processor has the instruction.
    pub(in super::super) fn available() -> bool {
        is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f")
    }

    /// See [`Kernel::multiply`](super::super::Kernel::multiply): two left blocks, of which only `rows` rows need be right, and two right ones. Must
    /// only be called where [`available`] has said yes.
    pub(in super::super) fn multiply(operands: &Operands<'_>, rows: usize, out: &mut [f32], stride: usize) {
        // SAFETY: the processor has the instructions.
        unsafe { blocks(operands, rows, out, stride) }
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn blocks(operands: &Operands<'_>, rows: usize, out: &mut [f32], stride: usize) {
        let &Operands { left, right, steps, right_stride, add, .. } = operands;
        for begin in (0..steps).step_by(STEPS) {
            let range = begin..steps.min(begin + STEPS);
            let right = [&right[range.clone()], &right[right_stride..][range.clone()]];
            for (block, left) in left.chunks_exact(steps).enumerate().take(rows.min(2 * EDGE).div_ceil(EDGE)) {
                let (left, rows) = (&left[range.clone()], rows - block * EDGE);
                let (out, begun) = (&mut out[block * EDGE * stride..], add || begin > 0);
                turn::<0, 6>(left, right, begun, out, stride);
                if rows > 6 {
                    turn::<6, 5>(left, right, begun, out, stride);
                }
                if rows > 11 {
                    turn::<11, 5>(left, right, begun, out, stride);
                }
            }
        }
    }

    /// `H` rows from `FIRST` on times two right blocks, added to `out` if it has begun: so many rows that their sums, as integers and as f32, fill
    /// the registers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    #[allow(clippy::needless_range_loop, reason = "rows and columns run through several arrays at once")]
    fn turn<const FIRST: usize, const H: usize>(left: &[Tile], right: [&[Tile]; 2], begun: bool, out: &mut [f32], stride: usize) {
        // Unrolled, the compiler would order this by rows, and sums would wait for themselves.
        let fours = black_box(FOURS);
        let mut sums = [[_mm512_setzero_ps(); 2]; H];
        if begun {
            for (row, sums) in sums.iter_mut().enumerate() {
                let out = &out[(FIRST + row) * stride..][..2 * EDGE];
                *sums = [load_numbers(&out[..EDGE]), load_numbers(&out[EDGE..])];
            }
        }
        for (left, (upper, lower)) in left.iter().zip(right[0].iter().zip(right[1])) {
            let starts = [upper, lower].map(|tile| load(tile, STARTS / EDGE));
            let mut whole = [starts; H];
            let rows: &[[u32; FOURS]; 2 * EDGE] = bytemuck::cast_ref(&left.0);
            for four in 0..fours {
                let columns = [load(upper, four), load(lower, four)];
                for row in 0..H {
                    let numbers = _mm512_set1_epi32(rows[FIRST + row][four % FOURS].cast_signed());
                    for column in 0..2 {
                        whole[row][column] = _mm512_dpbusd_epi32(whole[row][column], numbers, columns[column]);
                    }
                }
            }
            let scales = [upper, lower].map(|tile| _mm512_castsi512_ps(load(tile, SCALES / EDGE)));
            let row_scales: &[f32; 16 * EDGE] = bytemuck::cast_ref(&left.0);
            for row in 0..H {
                for column in 0..2 {
                    let scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[SCALES + FIRST + row]), scales[column]);
                    sums[row][column] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[row][column]), scale, sums[row][column]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            let out = &mut out[(FIRST + row) * stride..][..2 * EDGE];
            store(sums[0], &mut out[..EDGE]);
            store(sums[1], &mut out[EDGE..]);
        }
    }

    /// The 64 bytes of a tile with this number.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(tile: &Tile, number: usize) -> __m512i {
        let lines: &[[u32; EDGE]; EDGE] = bytemuck::cast_ref(&tile.0);
        // SAFETY: 16 numbers of 32 bits are 512 bits.
        unsafe { _mm512_loadu_si512(lines[number % EDGE].as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load_numbers(numbers: &[f32]) -> __m512 {
        assert!(numbers.len() >= EDGE);
        // SAFETY: there are 16 numbers.
        unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(sums: __m512, out: &mut [f32]) {
        assert!(out.len() >= EDGE);
        // SAFETY: there is room for 16 numbers.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
    }
}
