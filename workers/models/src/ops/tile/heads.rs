//! Attention of a sequence to itself.
//!
//! The scores of 32 queries and all keys stay in the cache; they never become a tensor.

use pulp::NullaryFnOnce;

use super::super::kernel::vectorized;
use super::layout::{EDGE, Precision, Tiles};
use super::math::softmax_row;
use super::{Instructions, Kernel, Scratch, room};

/// How a sequence's width is divided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) count: usize,
    /// Numbers of one head.
    pub(crate) width: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
    pub(crate) precision: Precision,
}

/// Rows of a sequence: all heads of a token side by side, tokens `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) numbers: &'a [f32],
    pub(crate) stride: usize,
}

/// Attention of one sequence to itself, `tokens` of them: `softmax(q · kᵀ · scale) · v` for every head, into `out`, which is
/// `(tokens, count · width)`.
pub(super) fn attend_itself(
    instructions: Instructions,
    tokens: usize,
    q: Tokens<'_>,
    (k, v): (Tokens<'_>, Tokens<'_>),
    heads: Heads,
    out: &mut [f32],
) {
    let Heads { count, width, precision, .. } = heads;
    let kernel = Kernel::start(instructions, tokens);
    Scratch::lend(|scratch| {
        for first in (0..count).map(|head| head * width) {
            scratch.keys.fill_columns(&k.numbers[first..], (tokens, width), k.stride, precision);
            scratch.values.fill_rows(&v.numbers[first..], (tokens, width), v.stride, precision);
            vectorized(Attend { tokens, kernel: &kernel, q, heads, first, scratch: &mut *scratch, out: &mut *out });
        }
    });
}

/// All queries and the head that begins at column `first`, whose keys and values are in `scratch`.
struct Attend<'a> {
    tokens: usize,
    kernel: &'a Kernel,
    q: Tokens<'a>,
    heads: Heads,
    first: usize,
    scratch: &'a mut Scratch,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tokens, kernel, q, heads: Heads { count, width, scale, precision }, first, scratch, out } = self;
        let Scratch { left, between, keys, values, numbers, more_numbers } = scratch;
        let (height, _) = kernel.shape();
        for begin in (0..tokens).step_by(height) {
            let rows = (tokens - begin).min(height);
            left.fill_left(&q.numbers[begin * q.stride + first..], (rows, width), q.stride, scale, precision);
            let room = (&mut *between, &mut *numbers, &mut *more_numbers);
            attend_rows(kernel, (left, rows), (keys, tokens), (values, width), precision, room, |row, sums, inverse| {
                let out = &mut out[(begin + row) * count * width + first..][..width];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse;
                }
            });
        }
    }
}

/// Attention of up to a block of rows, the queries of `left`, to `count` keys and as many values of `width`. Each row is handed on as its
/// number, sums of values, and what these are yet to be multiplied with.
#[inline(always)]
pub(super) fn attend_rows(
    kernel: &Kernel,
    (left, rows): (&Tiles, usize),
    (keys, count): (&Tiles, usize),
    (values, width): (&Tiles, usize),
    precision: Precision,
    (probabilities, scores, sums): (&mut Tiles, &mut Vec<f32>, &mut Vec<f32>),
    mut then: impl FnMut(usize, &[f32], f32),
) {
    let (height, columns) = kernel.shape();
    // Whole blocks; what lies beyond the keys and the width is never read.
    let (score_row, sum_row) = (count.next_multiple_of(columns), width.next_multiple_of(columns));
    let (scores, sums) = (room(scores, height * score_row), room(sums, height * sum_row));
    for column in 0..score_row / columns {
        kernel.multiply((left, 0), (keys, column), &mut scores[column * columns..], score_row);
    }
    probabilities.begin_left((height, count), precision);
    let mut inverse = [0.0; 2 * EDGE];
    for (row, (scores, inverse)) in scores.chunks_exact_mut(score_row).zip(&mut inverse).enumerate().take(rows) {
        *inverse = softmax_row(scores, count, probabilities, row);
    }
    for column in 0..sum_row / columns {
        kernel.multiply((probabilities, 0), (values, column), &mut sums[column * columns..], sum_row);
    }
    for (row, (sums, inverse)) in sums.chunks_exact(sum_row).zip(inverse).enumerate().take(rows) {
        then(row, &sums[..width], inverse);
    }
}
