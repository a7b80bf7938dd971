//! Products of tiles by `VDPBF16PS` of AVX-512, for processors without AMX (AMD from Zen 4 on, some of Intel's).
#![allow(unsafe_code, reason = "instructions that only some processors have; loads are bounded by the size of a tile")]

use std::arch::x86_64::{
    __cpuid, __m512, __m512bh, __m512i, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::Operands;
use super::layout::{DEPTH, EDGE, Tile};

/// Rows at a time: with two vectors of results each, as many as hide the latency of the instruction.
const ROWS: usize = 8;

/// Steps after which the next rows take their turn: what two right blocks have in so many stays in the first-level cache.
const STEPS: usize = 8;

/// Whether this processor has the instruction.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

/// Whether the instruction makes more of a product than a fused multiply-add of f32 does. Intel's processors begin one of it every other
/// cycle, and two multiply-adds, of half as many products each, in every cycle.
pub(super) fn is_fast() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() != b"GenuineIntel"
}

/// See [`Kernel::multiply`](super::Kernel::multiply): two left and two right blocks. Must only be called where [`available`] has said yes.
pub(super) fn multiply(operands: &Operands<'_>, out: &mut [f32], stride: usize) {
    // SAFETY: the processor has the instructions.
    unsafe { blocks(operands, out, stride) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn blocks(operands: &Operands<'_>, out: &mut [f32], stride: usize) {
    let &Operands { left, right, steps, pieces, right_stride, add: added, .. } = operands;
    for begin in (0..steps).step_by(STEPS) {
        let tiles = begin * pieces..steps.min(begin + STEPS) * pieces;
        let (upper, lower) = (&right[tiles.clone()], &right[right_stride..][tiles.clone()]);
        for (half, left) in left.chunks_exact(steps * pieces).enumerate().take(2) {
            for first in (0..EDGE).step_by(ROWS) {
                let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
                if added || begin > 0 {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let out = &out[(half * EDGE + first + row) * stride..][..2 * EDGE];
                        *sums = [load_sums(&out[..EDGE]), load_sums(&out[EDGE..])];
                    }
                }
                let left = left[tiles.clone()].chunks_exact(pieces);
                for ((left, upper), lower) in left.zip(upper.chunks_exact(pieces)).zip(lower.chunks_exact(pieces)) {
                    match pieces {
                        1 => add(&mut sums, &left[0], first, [&upper[0], &lower[0]]),
                        _ => {
                            add(&mut sums, &left[1], first, [&upper[0], &lower[0]]);
                            add(&mut sums, &left[0], first, [&upper[0], &lower[0]]);
                            add(&mut sums, &left[0], first, [&upper[1], &lower[1]]);
                        }
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    let out = &mut out[(half * EDGE + first + row) * stride..][..2 * EDGE];
                    store(sums[0], &mut out[..EDGE]);
                    store(sums[1], &mut out[EDGE..]);
                }
            }
        }
    }
}

/// Adds the products of `ROWS` rows of a left tile from row `first`, and two right tiles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add(sums: &mut [[__m512; 2]; ROWS], left: &Tile, first: usize, right: [&Tile; 2]) {
    for pair in 0..DEPTH / 2 {
        let columns = right.map(|tile| load(tile, pair));
        for (row, sums) in sums.iter_mut().enumerate() {
            let at = (first + row) * DEPTH + 2 * pair;
            let both = u32::from(left.0[at]) | u32::from(left.0[at + 1]) << 16;
            let both = bf16(_mm512_set1_epi32(both.cast_signed()));
            for (sum, columns) in sums.iter_mut().zip(columns) {
                *sum = _mm512_dpbf16_ps(*sum, both, columns);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(tile: &Tile, pair: usize) -> __m512bh {
    let numbers = &tile.0[pair * DEPTH..][..DEPTH];
    // SAFETY: 32 numbers of 16 bits are 512 bits.
    bf16(unsafe { _mm512_loadu_si512(numbers.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid patterns.
    unsafe { transmute::<__m512, __m512bh>(_mm512_castsi512_ps(bits)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load_sums(sums: &[f32]) -> __m512 {
    assert!(sums.len() >= EDGE);
    // SAFETY: there are 16 numbers.
    unsafe { _mm512_loadu_ps(sums.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(sums: __m512, out: &mut [f32]) {
    assert!(out.len() >= EDGE);
    // SAFETY: there is room for 16 numbers.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
}
