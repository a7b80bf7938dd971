//! Products of tiles of 8-bit integers by `VPDPBUSD` of AVX-512 VNNI, which makes four times as many products as a fused multiply-add of f32.
#![allow(unsafe_code, reason = "instructions that only some processors have; loads are bounded by the size of a tile")]

use std::arch::x86_64::{
    __m512i, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_mul_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
};
use std::hint::black_box;

use super::Operands;
use super::avx512::{load_sums, store};
use super::int8::{CORRECTIONS, SCALES};
use super::layout::{DEPTH, EDGE, Tile};

/// Fours of numbers in a step, which the instruction adds up.
const FOURS: usize = DEPTH / 4;

/// Steps after which the next rows take their turn: what two right blocks have in so many stays in the first-level cache.
const STEPS: usize = 8;

/// Whether this processor has the instruction.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512f")
}

/// See [`Kernel::multiply`](super::Kernel::multiply): two left blocks, of which only `rows` rows need be right, and two right ones. Must
/// only be called where [`available`] has said yes.
pub(super) fn multiply(operands: &Operands<'_>, rows: usize, out: &mut [f32], stride: usize) {
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
            *sums = [load_sums(&out[..EDGE]), load_sums(&out[EDGE..])];
        }
    }
    for (left, (upper, lower)) in left.iter().zip(right[0].iter().zip(right[1])) {
        let starts = [upper, lower].map(|tile| load(tile, CORRECTIONS / EDGE));
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
    // The remainder, here and below, spares a check of bounds.
    let lines: &[[u32; EDGE]; EDGE] = bytemuck::cast_ref(&tile.0);
    // SAFETY: 16 numbers of 32 bits are 512 bits.
    unsafe { _mm512_loadu_si512(lines[number % EDGE].as_ptr().cast()) }
}
