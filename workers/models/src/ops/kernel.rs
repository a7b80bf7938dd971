//! Loops that the compiler can vectorise, and the fixed order of their sums.
//!
//! Plain multiplications and additions only, in an order written here: the result is the same on every CPU and for every number of
//! threads. Functions are inlined into [`vectorized`] closures, which run with the widest vectors that the CPU has.

use rayon::prelude::*;

/// Rows of a block: the unit of parallel work, fixed so that sums over blocks do not depend on the number of threads.
pub(super) const BLOCK_ROWS: usize = 64;

/// Accumulators of a sum. Independent lanes let it vectorise without changing its order between CPUs.
const LANES: usize = 16;

/// Runs `work` compiled for the widest vector instructions of this CPU.
#[inline(always)]
pub(super) fn vectorized<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
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

/// Applies `work` to every block of rows of `out` in parallel; `work` gets the first row's number.
pub(super) fn for_row_blocks(out: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    out.par_chunks_mut(BLOCK_ROWS * width.max(1))
        .enumerate()
        .for_each(|(block, rows)| vectorized(|| work(block * BLOCK_ROWS, rows)));
}

/// Sums over the rows `0..rows` of what `add(row, sums)` adds into `sums`, a vector of `width`: block sums in parallel, then in order.
pub(super) fn sum_over_rows(rows: usize, width: usize, add: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let blocks: Vec<Vec<f32>> = (0..rows.div_ceil(BLOCK_ROWS))
        .into_par_iter()
        .map(|block| {
            let mut sums = vec![0.0; width];
            vectorized(|| {
                for row in block * BLOCK_ROWS..rows.min((block + 1) * BLOCK_ROWS) {
                    add(row, &mut sums);
                }
            });
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

/// A matrix inside a slice: element `(i, j)` is at `i * row + j * column`.
#[derive(Clone, Copy)]
pub(super) struct Strided<'a> {
    /// The elements, starting at `(0, 0)`.
    pub(super) elements: &'a [f32],
    /// Distance between rows.
    pub(super) row: usize,
    /// Distance between columns.
    pub(super) column: usize,
}

/// `c = a · b` for small matrices on one thread: `a` is `m × k` of any strides, `b` is `k × n` with rows of stride `b_row`, and `c` is
/// `m × n` with rows of stride `c_row`.
#[inline(always)]
pub(super) fn small_matmul(
    (m, n, k): (usize, usize, usize),
    a: Strided<'_>,
    (b, b_row): (&[f32], usize),
    (c, c_row): (&mut [f32], usize),
) {
    const ROWS: usize = 4;
    const COLUMNS: usize = 16;
    for i in (0..m).step_by(ROWS) {
        let height = ROWS.min(m - i);
        for j in (0..n).step_by(COLUMNS) {
            let width = COLUMNS.min(n - j);
            let mut tile = [[0.0f32; COLUMNS]; ROWS];
            if height == ROWS && width == COLUMNS {
                for l in 0..k {
                    let b_part: &[f32; COLUMNS] = match b[l * b_row + j..][..COLUMNS].try_into() {
                        Ok(part) => part,
                        Err(_) => return,
                    };
                    for (r, line) in tile.iter_mut().enumerate() {
                        let factor = a.elements[(i + r) * a.row + l * a.column];
                        for (acc, value) in line.iter_mut().zip(b_part) {
                            *acc += factor * value;
                        }
                    }
                }
            } else {
                for l in 0..k {
                    let b_part = &b[l * b_row + j..][..width];
                    for (r, line) in tile.iter_mut().enumerate().take(height) {
                        let factor = a.elements[(i + r) * a.row + l * a.column];
                        for (acc, value) in line.iter_mut().zip(b_part) {
                            *acc += factor * value;
                        }
                    }
                }
            }
            for (r, line) in tile.iter().enumerate().take(height) {
                c[(i + r) * c_row + j..][..width].copy_from_slice(&line[..width]);
            }
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
        let got = sum_over_rows(150, 3, |row, sums| sums[row % 3] += 1.0);
        assert_eq!(got, [50.0, 50.0, 50.0]);
    }

    #[test]
    fn small_matmul_equals_the_definition_for_ragged_sizes() {
        for (m, n, k) in [(1, 1, 1), (4, 16, 8), (5, 17, 3), (7, 33, 9), (3, 15, 0)] {
            // a is stored transposed: element (i, l) at l * m + i.
            let a: Vec<f32> = (0..m * k).map(|x| (x % 7) as f32 - 3.0).collect();
            let b: Vec<f32> = (0..k * n).map(|x| (x % 5) as f32 - 2.0).collect();
            let mut c = vec![f32::NAN; m * n];
            let view = Strided { elements: &a, row: 1, column: m };
            small_matmul((m, n, k), view, (&b, n), (&mut c, n));
            for i in 0..m {
                for j in 0..n {
                    let expected: f32 = (0..k).map(|l| a[l * m + i] * b[l * n + j]).sum();
                    assert_eq!(c[i * n + j], expected, "({m},{n},{k}) at ({i},{j})");
                }
            }
        }
    }
}
