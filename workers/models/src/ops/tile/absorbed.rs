//! Cross-attention to image states with the weights of keys and values taken over to the side of the queries.
//!
//! All layers of a text transformer read the same image states `X`. A head's scores are `(x Wq) (X Wk)ᵀ = ((x Wq) Wkᵀ) Xᵀ`, and what it sees is
//! `(P X) Wv`; the bias of the keys adds the same to all scores of a query and so drops out, that of the values is added at the end since the
//! rows of `P` sum to 1. So no keys and values are made and kept, 24 times the states in BLIP-base: a short text costs less, and a decoding
//! step reads the states alone.

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::kernel::vectorized;
use super::heads::{Heads, attend_rows};
use super::layout::Tiles;
use super::{Block, Instructions, Kernel, Scratch};

/// The states of one image, as the right side of scores and of what is seen.
pub(crate) struct States {
    /// A column for each state.
    columns: Tiles,
    /// A row for each state.
    rows: Tiles,
    count: usize,
}

impl States {
    /// From `(count, depth)`.
    pub(super) fn new(states: &[f32], depth: usize, heads: Heads) -> Self {
        let count = states.len() / depth.max(1);
        let (mut columns, mut rows) = (Tiles::default(), Tiles::default());
        columns.fill_columns(states, (count, depth), depth, heads.precision);
        rows.fill_rows(states, (count, depth), depth, heads.precision);
        Self { columns, rows, count }
    }
}

/// The weights of keys and values of one layer.
pub(crate) struct Absorbed {
    /// For each head: from a query to the depth of the states, and back to the head's width.
    weights: Vec<(Tiles, Tiles)>,
    value_bias: Vec<f32>,
    heads: Heads,
    depth: usize,
    instructions: Instructions,
}

impl Absorbed {
    /// From the weights `(count · width, depth)` of keys and values, and the bias of the values.
    pub(super) fn new(instructions: Instructions, key: &[f32], value: &[f32], value_bias: &[f32], heads: Heads) -> Self {
        let (width, precision) = (heads.width, heads.precision);
        let depth = key.len() / value_bias.len().max(1);
        let head = |head: usize| {
            let part = |weight: &'_ [f32]| weight[head * width * depth..][..width * depth].to_vec();
            let (mut there, mut back) = (Tiles::default(), Tiles::default());
            there.fill_rows(&part(key), (width, depth), depth, precision);
            back.fill_columns(&part(value), (width, depth), depth, precision);
            (there, back)
        };
        let weights = (0..heads.count).into_par_iter().map(head).collect();
        Self { weights, value_bias: value_bias.to_vec(), heads, depth, instructions }
    }

    pub(super) fn heads(&self) -> Heads {
        self.heads
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// Queries `(rows, count · width)`, equally many of each image and side by side, to what they see, of that shape.
    pub(super) fn attend(&self, q: &[f32], images: &[&States]) -> Vec<f32> {
        let (Heads { count, width, scale, precision }, depth) = (self.heads, self.depth);
        let total = count * width;
        let rows = q.len() / total.max(1);
        let mut out = vec![0.0; q.len()];
        if rows == 0 || images.is_empty() {
            return out;
        }
        // (head, row, depth)
        let mut queries = vec![0.0; count * rows * depth];
        queries.par_chunks_mut(rows * depth).zip(&self.weights).enumerate().for_each(|(head, (queries, (there, _)))| {
            Scratch::lend(|Scratch { left, .. }| {
                left.fill_left(&q[head * width..], (rows, width), total, scale, precision);
                self.product(left, rows, there, depth, queries);
            });
        });
        // (row, head, depth)
        let per_image = rows / images.len();
        let mut seen = vec![0.0; rows * count * depth];
        seen.par_chunks_mut(per_image * count * depth).zip(images).enumerate().for_each(|(image, (seen, states))| {
            Scratch::lend(|scratch| {
                let kernel = Kernel::start(self.instructions, per_image * count);
                let first = image * per_image;
                vectorized(See { absorbed: self, kernel: &kernel, queries: &queries, rows, first, states, scratch, seen });
            });
        });
        let back = |head: usize| {
            let mut part = vec![0.0; rows * width];
            Scratch::lend(|Scratch { left, .. }| {
                left.fill_left(&seen[head * depth..], (rows, depth), count * depth, 1.0, precision);
                self.product(left, rows, &self.weights[head].1, width, &mut part);
            });
            part
        };
        let parts: Vec<Vec<f32>> = (0..count).into_par_iter().map(back).collect();
        for (row, out) in out.chunks_exact_mut(total).enumerate() {
            for ((out, part), bias) in out.chunks_exact_mut(width).zip(&parts).zip(self.value_bias.chunks_exact(width)) {
                for ((out, number), bias) in out.iter_mut().zip(&part[row * width..]).zip(bias) {
                    *out = number + bias;
                }
            }
        }
        out
    }

    /// `rows` rows of `left` times `right`, of `columns` columns.
    fn product(&self, left: &Tiles, rows: usize, right: &Tiles, columns: usize, out: &mut [f32]) {
        let kernel = Kernel::start(self.instructions, rows);
        vectorized(Product { kernel: &kernel, left, rows, right, columns, out });
    }
}

struct Product<'a> {
    kernel: &'a Kernel,
    left: &'a Tiles,
    rows: usize,
    right: &'a Tiles,
    columns: usize,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { kernel, left, rows, right, columns, out } = self;
        let (height, width) = kernel.shape();
        let mut block = Block::ZERO;
        for column in (0..columns).step_by(width) {
            let count = (columns - column).min(width);
            for first in (0..rows).step_by(height) {
                kernel.multiply((left, first / height), (right, column / width), &mut block.0, width);
                for (row, numbers) in block.0.chunks_exact(width).enumerate().take(rows - first) {
                    let out = &mut out[(first + row) * columns + column..][..count];
                    for (out, number) in out.iter_mut().zip(numbers) {
                        *out = *number;
                    }
                }
            }
        }
    }
}

/// What all heads of some rows see of one image. Heads are rows here: they share the states.
struct See<'a> {
    absorbed: &'a Absorbed,
    kernel: &'a Kernel,
    queries: &'a [f32],
    /// Of all images.
    rows: usize,
    /// The first of this image.
    first: usize,
    states: &'a States,
    scratch: &'a mut Scratch,
    seen: &'a mut [f32],
}

impl NullaryFnOnce for See<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { absorbed, kernel, queries, rows, first, states, scratch, seen } = self;
        let Scratch { left, between, numbers, more_numbers, .. } = scratch;
        let (Heads { count, precision, .. }, depth) = (absorbed.heads, absorbed.depth);
        let (height, _) = kernel.shape();
        left.begin_left((height, depth), precision);
        for (block, seen) in seen.chunks_mut(height * depth).enumerate() {
            let block_rows = seen.len() / depth;
            for row in 0..block_rows {
                let (text_row, head) = ((block * height + row) / count, (block * height + row) % count);
                left.write_row(row, &queries[(head * rows + first + text_row) * depth..][..depth], 1.0);
            }
            let (keys, values) = ((&states.columns, states.count), (&states.rows, depth));
            let room = (&mut *between, &mut *numbers, &mut *more_numbers);
            attend_rows(kernel, (left, block_rows), keys, values, precision, room, |row, sums, inverse| {
                for (seen, sum) in seen[row * depth..][..depth].iter_mut().zip(sums) {
                    *seen = sum * inverse;
                }
            });
        }
    }
}
