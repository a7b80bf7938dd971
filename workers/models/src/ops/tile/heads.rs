//! Attention over keys and values that are in tiles already.
//!
//! The scores of 32 queries and all keys stay in the cache; they never become a tensor.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::kernel::{exp, max, sum, vectorized};
use super::layout::{EDGE, Precision, Tiles};
use super::{Block, Instructions, Kernel, Operands};

/// Queries of a block.
const SIDE: usize = 2 * EDGE;

/// Queries that pass by the keys of a head while these are in the near cache.
const QUERIES: usize = 8 * SIDE;

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

/// Keys and values of one sequence, head by head.
pub(crate) struct SequenceHeads {
    heads: Vec<(Tiles, Tiles)>,
    keys: usize,
    instructions: Instructions,
}

/// Rows of a sequence: all heads of a token side by side, tokens `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub(crate) numbers: &'a [f32],
    pub(crate) stride: usize,
}

impl SequenceHeads {
    /// Of `keys` tokens. `None` where the processor has no instructions for it.
    pub(crate) fn new(keys: usize, k: Tokens<'_>, v: Tokens<'_>, heads: Heads) -> Option<Self> {
        let instructions = Instructions::best()?;
        let head = |number: usize| {
            let (k_part, v_part) = (&k.numbers[number * heads.width..], &v.numbers[number * heads.width..]);
            (
                Tiles::of_columns(k_part, (keys, heads.width), k.stride, heads.precision),
                Tiles::of_rows(v_part, (keys, heads.width), v.stride, heads.precision),
            )
        };
        Some(Self { heads: (0..heads.count).into_par_iter().map(head).collect(), keys, instructions })
    }

    /// `softmax(q · kᵀ · scale) · v` for every head, of the queries `(queries, count · width)`, into `out` of that shape.
    pub(crate) fn attend(&self, q: Tokens<'_>, heads: Heads, out: &mut [f32]) {
        let total = heads.count * heads.width;
        out.par_chunks_mut(QUERIES * total).enumerate().for_each(|(chunk, out)| {
            let q = Tokens { numbers: &q.numbers[chunk * QUERIES * q.stride..], stride: q.stride };
            let kernel = Kernel::start(self.instructions);
            vectorized(Attend { sequence: self, kernel: &kernel, q, heads, out });
        });
    }
}

struct Attend<'a> {
    sequence: &'a SequenceHeads,
    kernel: &'a Kernel,
    q: Tokens<'a>,
    heads: Heads,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { sequence, kernel, q, heads, out } = self;
        let Heads { count, width, scale, precision } = heads;
        let (total, keys) = (count * width, sequence.keys);
        let queries = out.len() / total;
        // Columns of the scores, whole panels; those beyond the keys are never read.
        let padded = keys.next_multiple_of(SIDE);
        let (mut left, mut weights) = (Tiles::empty(), Tiles::empty());
        let mut scores = vec![0.0; SIDE * padded];
        let mut block = Block::ZERO;
        for (head, (k, v)) in sequence.heads.iter().enumerate() {
            for first in (0..queries).step_by(SIDE) {
                let rows = (queries - first).min(SIDE);
                let from = &q.numbers[first * q.stride + head * width..];
                left.fill_left(from, (rows, width), q.stride, scale, precision);
                for panel in 0..padded / SIDE {
                    kernel.multiply(operands(&left, k, panel), &mut block);
                    for (scores, sums) in scores.chunks_exact_mut(padded).zip(block.0.chunks_exact(SIDE)).take(rows) {
                        scores[panel * SIDE..][..SIDE].copy_from_slice(sums);
                    }
                }
                let mut inverse = [0.0; SIDE];
                for (scores, inverse) in scores.chunks_exact_mut(padded).zip(&mut inverse).take(rows) {
                    let scores = &mut scores[..keys];
                    let largest = max(scores);
                    for score in scores.iter_mut() {
                        *score = exp(*score - largest);
                    }
                    *inverse = 1.0 / sum(keys, |i| scores[i]);
                }
                weights.fill_left(&scores, (rows, keys), padded, 1.0, precision);
                for panel in 0..width.div_ceil(SIDE) {
                    kernel.multiply(operands(&weights, v, panel), &mut block);
                    let columns = (width - panel * SIDE).min(SIDE);
                    for (row, (sums, inverse)) in block.0.chunks_exact(SIDE).zip(&inverse).enumerate().take(rows) {
                        let out = &mut out[(first + row) * total + head * width + panel * SIDE..][..columns];
                        for (out, sum) in out.iter_mut().zip(sums) {
                            *out = sum * inverse;
                        }
                    }
                }
            }
        }
    }
}

/// One pair of blocks of `left` and a panel of `right`.
#[inline(always)]
fn operands<'a>(left: &'a Tiles, right: &'a Tiles, panel: usize) -> Operands<'a> {
    debug_assert_eq!(left.steps, right.steps);
    Operands {
        left: [left.block(0), left.block(1)],
        right: [right.block(2 * panel), right.block(2 * panel + 1)],
        steps: left.steps,
        pieces: left.pieces,
    }
}
