//! Attention of a sequence to itself.
//!
//! The scores of 32 queries and all keys stay in the cache; they never become a tensor.

use pulp::NullaryFnOnce;

use super::super::kernel::vectorized;
use super::layout::{EDGE, Precision, Tiles};
use super::math::soften;
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

/// Makes `k_tiles` and `v_tiles` the keys and values of one head.
fn fill(k_tiles: &mut Tiles, v_tiles: &mut Tiles, keys: usize, (k, v): (Tokens<'_>, Tokens<'_>), heads: Heads, head: usize) {
    let Heads { width, precision, .. } = heads;
    k_tiles.fill_columns(&k.numbers[head * width..], (keys, width), k.stride, precision);
    v_tiles.fill_rows(&v.numbers[head * width..], (keys, width), v.stride, precision);
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
    let kernel = Kernel::start(instructions, tokens);
    Scratch::lend(|Scratch { left, between: weights, keys: k_tiles, values: v_tiles, numbers, more_numbers }| {
        for head in 0..heads.count {
            fill(k_tiles, v_tiles, tokens, (k, v), heads, head);
            let room = Room { left: &mut *left, weights: &mut *weights, scores: &mut *numbers, mixed: &mut *more_numbers };
            vectorized(Attend { keys: tokens, k: k_tiles, v: v_tiles, kernel: &kernel, q, heads, head, room, out: &mut *out });
        }
    });
}

/// What one head is worked on in.
struct Room<'a> {
    left: &'a mut Tiles,
    weights: &'a mut Tiles,
    scores: &'a mut Vec<f32>,
    mixed: &'a mut Vec<f32>,
}

/// All queries of `out` and one head.
struct Attend<'a> {
    keys: usize,
    k: &'a Tiles,
    v: &'a Tiles,
    kernel: &'a Kernel,
    q: Tokens<'a>,
    heads: Heads,
    head: usize,
    room: Room<'a>,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { keys, k, v, kernel, q, heads, head, room: Room { left, weights, scores, mixed }, out } = self;
        let Heads { count, width, scale, precision } = heads;
        let total = count * width;
        let queries = out.len() / total;
        let (height, columns) = kernel.shape();
        // Columns of the scores and of the mixed values, whole blocks; those beyond the keys and the width are never read.
        let (score_row, mixed_row) = (keys.next_multiple_of(columns), width.next_multiple_of(columns));
        let (scores, mixed) = (room(scores, height * score_row), room(mixed, height * mixed_row));
        weights.begin_left((height, keys), precision);
        for first in (0..queries).step_by(height) {
            let rows = (queries - first).min(height);
            left.fill_left(&q.numbers[first * q.stride + head * width..], (rows, width), q.stride, scale, precision);
            for column in 0..score_row / columns {
                kernel.multiply((left, 0), (k, column), &mut scores[column * columns..], score_row);
            }
            let mut inverse = [0.0; 2 * EDGE];
            for (row, (scores, inverse)) in scores.chunks_exact_mut(score_row).zip(&mut inverse).enumerate().take(rows) {
                *inverse = soften(scores, keys, weights, row);
            }
            for column in 0..mixed_row / columns {
                kernel.multiply((weights, 0), (v, column), &mut mixed[column * columns..], mixed_row);
            }
            for (row, (mixed, inverse)) in mixed.chunks_exact(mixed_row).zip(&inverse).enumerate().take(rows) {
                let out = &mut out[(first + row) * total + head * width..][..width];
                for (out, mixed) in out.iter_mut().zip(mixed) {
                    *out = mixed * inverse;
                }
            }
        }
    }
}
