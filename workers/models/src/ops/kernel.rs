//! Loops that the compiler can vectorise, and the fixed order of their sums.
//!
//! Every sum runs in an order written here, so the result does not depend on the number of threads. What a kernel calls is marked
//! `#[inline(always)]`, for only code inlined into the dispatch is compiled for the widest vectors that the CPU has.

use bytemuck::Pod;
use pulp::{Arch, NullaryFnOnce, Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a block: the unit of parallel work, fixed so that sums over blocks do not depend on the number of threads.
pub(super) const BLOCK_ROWS: usize = 64;

/// Accumulators of a sum. Independent lanes let it vectorise without changing its order between CPUs.
const LANES: usize = 16;

/// Room for numbers that are all about to be written; until then they have no meaning. Zeros would be a pass over memory by a single thread.
#[allow(unsafe_code, clippy::uninit_vec, reason = "any bits are such a number, and none is read before it is written")]
pub(super) fn unwritten<T: Pod>(count: usize) -> Vec<T> {
    let mut numbers = Vec::with_capacity(count);
    // SAFETY: there is room for `count` numbers.
    unsafe { numbers.set_len(count) };
    numbers
}

/// Runs `kernel` compiled for the widest vector instructions of this CPU.
pub(super) fn vectorized<K: WithSimd>(kernel: K) -> K::Output {
    Arch::new().dispatch(kernel)
}

/// Work on blocks of rows. `#[inline(always)]` belongs on the implementation's function.
pub(super) trait RowKernel: Sync {
    /// Writes the rows `out`, of which the first is row `first` of the whole.
    fn rows(&self, first: usize, out: &mut [f32]);
}

/// A sum over rows. `#[inline(always)]` belongs on the implementation's function.
pub(super) trait RowSum: Sync {
    /// Adds what row `row` has to `sums`.
    fn add(&self, row: usize, sums: &mut [f32]);
}

/// `e^x`, to about one unit in the last place; 0 below -87 and the largest finite scale above 88.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Range reduction x = n ln 2 + r with |r| ≤ ½ ln 2; ln 2 is split so that the subtraction is exact.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    // Taylor series to r^7: its remainder is below 1e-8 relative for |r| ≤ 0.347.
    let tail = 1.0 / 5040.0 * r + 1.0 / 720.0;
    let series = ((((tail * r + 1.0 / 120.0) * r + 1.0 / 24.0) * r + 1.0 / 6.0) * r + 0.5) * r * r + r + 1.0;
    // 2^n through the exponent bits: the low bits of `shifted` hold n.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.0 { 0.0 } else { series * scale }
}

/// Sum of `term(i)` for `i` in `0..n`, in lanes.
#[inline(always)]
pub(super) fn sum(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, acc) in lanes.iter_mut().enumerate() {
            *acc += term(start + lane);
        }
    }
    for (lane, acc) in lanes.iter_mut().enumerate().take(n % LANES) {
        *acc += term(whole + lane);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest of some numbers, passing over what is not a number; negative infinity of none.
#[inline(always)]
pub(super) fn max(numbers: &[f32]) -> f32 {
    // Lanes for the same reason as in `sum`.
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = numbers.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, |max, x| if x > max { x } else { max })
}

/// Applies a kernel to every block of rows of `out` in parallel.
pub(super) fn for_row_blocks<K: RowKernel>(out: &mut [f32], width: usize, kernel: &K) {
    struct Block<'a, K>(&'a K, usize, &'a mut [f32]);
    impl<K: RowKernel> NullaryFnOnce for Block<'_, K> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            self.0.rows(self.1, self.2);
        }
    }
    out.par_chunks_mut(BLOCK_ROWS * width.max(1))
        .enumerate()
        .for_each(|(block, rows)| vectorized(Block(kernel, block * BLOCK_ROWS, rows)));
}

/// The sum of a kernel over the rows `0..rows`, a vector of `width`: blocks in parallel, then their sums in order.
pub(super) fn sum_over_rows<K: RowSum>(rows: usize, width: usize, kernel: &K) -> Vec<f32> {
    struct Block<'a, K>(&'a K, std::ops::Range<usize>, &'a mut [f32]);
    impl<K: RowSum> NullaryFnOnce for Block<'_, K> {
        type Output = ();

        #[inline(always)]
        fn call(self) {
            for row in self.1 {
                self.0.add(row, self.2);
            }
        }
    }
    let blocks: Vec<Vec<f32>> = (0..rows.div_ceil(BLOCK_ROWS))
        .into_par_iter()
        .map(|block| {
            let mut sums = vec![0.0; width];
            let range = block * BLOCK_ROWS..rows.min((block + 1) * BLOCK_ROWS);
            vectorized(Block(kernel, range, &mut sums));
            sums
        })
        .collect();
    let mut total = vec![0.0; width];
    for sums in &blocks {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += sum;
        }
    }
    total
}

/// The left side of a small product, `m × k`.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Element `(i, l)` is at `i · stride + l`.
    ByRow(&'a [f32], usize),
    /// Element `(i, l)` is at `l · stride + i`: a matrix that is stored transposed.
    ByColumn(&'a [f32], usize),
}

/// Rows of a tile. With two vectors a row it makes eight sums that do not wait for each other: what hides the latency of two
/// multiply-add units of four cycles.
const TILE_ROWS: usize = 4;

/// `c = a · b` for small matrices on one thread: `a` is `m × k`, `b` is `k × n` with rows of stride `b_row`, and `c` is `m × n` with
/// rows of stride `c_row`.
#[inline(always)]
pub(super) fn small_matmul<S: Simd>(
    simd: S,
    (m, n, k): (usize, usize, usize),
    a: Left<'_>,
    b: (&[f32], usize),
    (c, c_row): (&mut [f32], usize),
) {
    let whole = m - m % TILE_ROWS;
    let mut j = 0;
    while j < n {
        let width = (2 * S::F32_LANES).min(n - j);
        let two = width > S::F32_LANES;
        for i in (0..whole).step_by(TILE_ROWS) {
            if two {
                tile::<S, TILE_ROWS, 2>(simd, (i, j, k), width, a, b, (c, c_row));
            } else {
                tile::<S, TILE_ROWS, 1>(simd, (i, j, k), width, a, b, (c, c_row));
            }
        }
        for i in whole..m {
            if two {
                tile::<S, 1, 2>(simd, (i, j, k), width, a, b, (c, c_row));
            } else {
                tile::<S, 1, 1>(simd, (i, j, k), width, a, b, (c, c_row));
            }
        }
        j += width;
    }
}

/// `H` rows from `i` and `width` columns (`V` vectors, the last of them perhaps not full) from `j` of a product.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "a closure of an iterator would not be compiled for wide vectors")]
fn tile<S: Simd, const H: usize, const V: usize>(
    simd: S,
    (i, j, k): (usize, usize, usize),
    width: usize,
    a: Left<'_>,
    (b, b_row): (&[f32], usize),
    (c, c_row): (&mut [f32], usize),
) {
    let lanes = S::F32_LANES;
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; V]; H];
    let (a, a_row, a_column) = match a {
        // With `k` = 0 there are no elements, and none is read.
        Left::ByRow(elements, stride) => (elements.get(i * stride..).unwrap_or(&[]), stride, 1),
        Left::ByColumn(elements, stride) => (elements.get(i..).unwrap_or(&[]), 1, stride),
    };
    for l in 0..k {
        let row = &b[l * b_row + j..][..width];
        let mut right = [zero; V];
        if width == V * lanes {
            right.copy_from_slice(S::as_simd_f32s(row).0);
        } else {
            for v in 0..V {
                right[v] = simd.partial_load_f32s(&row[v * lanes..]);
            }
        }
        for r in 0..H {
            let factor = simd.splat_f32s(a[r * a_row + l * a_column]);
            for v in 0..V {
                sums[r][v] = simd.mul_add_f32s(factor, right[v], sums[r][v]);
            }
        }
    }
    for r in 0..H {
        let row = &mut c[(i + r) * c_row + j..][..width];
        for v in 0..V {
            simd.partial_store_f32s(&mut row[v * lanes..], sums[r][v]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_standard_library() {
        let mut worst = 0.0f64;
        for step in -8_600..8_700 {
            let x = step as f32 * 0.01;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_cover_every_element_for_every_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            assert_eq!(sum(n, |i| i as f32), (0..n).sum::<usize>() as f32);
        }
        struct CountByRest;
        impl RowSum for CountByRest {
            fn add(&self, row: usize, sums: &mut [f32]) {
                sums[row % 3] += 1.0;
            }
        }
        assert_eq!(sum_over_rows(150, 3, &CountByRest), [50.0, 50.0, 50.0]);
    }

    #[test]
    fn small_matmul_equals_the_definition_for_ragged_sizes() {
        struct Product<'a>((usize, usize, usize), Left<'a>, &'a [f32], &'a mut [f32]);
        impl WithSimd for Product<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                small_matmul(simd, self.0, self.1, (self.2, self.0.1), (self.3, self.0.1));
            }
        }
        for (m, n, k) in [(1, 1, 1), (4, 16, 8), (5, 17, 3), (7, 33, 9), (3, 15, 0), (9, 8, 4), (2, 24, 5)] {
            let a: Vec<f32> = (0..m * k).map(|x| (x % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * n).map(|x| (x % 5) as f32 - 2.0).collect();
            for transposed in [false, true] {
                let (left, row, column) = match transposed {
                    false => (Left::ByRow(&a, k), k, 1),
                    true => (Left::ByColumn(&a, m), 1, m),
                };
                let mut c = vec![f32::NAN; m * n];
                vectorized(Product((m, n, k), left, &b, &mut c));
                for i in 0..m {
                    for j in 0..n {
                        let expected: f32 = (0..k).map(|l| a[i * row + l * column] * b[l * n + j]).sum();
                        assert_eq!(c[i * n + j], expected, "({m},{n},{k}) at ({i},{j})");
                    }
                }
            }
        }
    }
}
