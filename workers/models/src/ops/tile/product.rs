//! Products with the weight of a layer, which is in tiles already.

use std::ops::Range;

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::kernel::vectorized;
use super::super::layer_norm::normalize;
use super::layout::{DEPTH, EDGE, Precision, Tiles};
use super::math::activate;
use super::{Block, Instructions, Kernel, Scratch};

/// Bytes of the left side that are worked on at a time: they stay in the second-level cache while the weight passes by. In an MLP those
/// of the second product, whose weight passes by as often as that of the first.
const LEFT_BYTES: usize = 512 << 10;
const MLP_BYTES: usize = 1 << 20;

/// Rows in which a left side is cut, columns in which a weight is: whole blocks of a kernel, whatever its shape.
const ROWS: usize = 2 * EDGE;
const COLUMNS: usize = 4 * EDGE;

/// Groups of columns for each thread, where a product has too few rows to be divided by them.
const GROUPS_PER_THREAD: usize = 2;

/// The weight `(outputs, inputs)` and bias of a layer, ready to be multiplied with.
pub(crate) struct Weights {
    right: Tiles,
    /// With zeros up to whole blocks.
    bias: Vec<f32>,
    inputs: usize,
    outputs: usize,
    precision: Precision,
    instructions: Instructions,
}

/// A layer norm that the rows go through before they are multiplied.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

/// What goes into a product.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    /// `(rows, inputs)`.
    pub(crate) x: &'a [f32],
    pub(crate) norm: Option<Norm<'a>>,
    /// Of the shape of the result, to which it is added at the end.
    pub(crate) added: Option<&'a [f32]>,
}

impl<'a> Inputs<'a> {
    /// Some rows.
    fn rows(&self, rows: Range<usize>, inputs: usize, outputs: usize) -> Self {
        Self {
            x: &self.x[rows.start * inputs..rows.end * inputs],
            added: self.added.map(|added| &added[rows.start * outputs..rows.end * outputs]),
            norm: self.norm,
        }
    }

    /// Makes `left` the rows.
    fn fill(&self, left: &mut Tiles, inputs: usize, precision: Precision) {
        struct Fill<'a>(&'a mut Tiles, &'a [f32], Option<Norm<'a>>, usize, Precision);
        impl NullaryFnOnce for Fill<'_> {
            type Output = ();

            #[inline(always)]
            fn call(self) {
                let Self(left, x, norm, inputs, precision) = self;
                let rows = x.len() / inputs;
                let Some(norm) = norm else { return left.fill_left(x, (rows, inputs), inputs, 1.0, precision) };
                left.begin_left((rows, inputs), precision);
                let mut normal = vec![0.0; inputs];
                for (row, x) in x.chunks_exact(inputs).enumerate() {
                    normalize(x, norm.weight, norm.bias, norm.eps, &mut normal);
                    left.write_row(row, &normal, 1.0);
                }
            }
        }
        vectorized(Fill(left, self.x, self.norm, inputs, precision));
    }
}

impl Weights {
    /// From the rows of the weight, one for each output. `None` where the processor has no instructions for it.
    pub(crate) fn new(weight: &[f32], bias: &[f32], precision: Precision) -> Option<Self> {
        Some(Self::with(Instructions::best()?, weight, bias, precision))
    }

    pub(super) fn with(instructions: Instructions, weight: &[f32], bias: &[f32], precision: Precision) -> Self {
        let inputs = weight.len() / bias.len().max(1);
        let mut right = Tiles::default();
        right.fill_columns(weight, (bias.len(), inputs), inputs, precision);
        let outputs = bias.len();
        let mut bias = bias.to_vec();
        bias.resize(outputs.next_multiple_of(COLUMNS), 0.0);
        Self { right, bias, inputs, outputs, precision, instructions }
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// `(rows, inputs)` to `(rows, outputs)`: norm, product, bias, activation, addition.
    pub(crate) fn product(&self, inputs: Inputs<'_>, activation: Option<Activation>) -> Vec<f32> {
        let outputs = self.outputs();
        let rows = inputs.x.len() / self.inputs.max(1);
        let mut out = vec![0.0; rows * outputs];
        let size = chunk_rows(rows, self.inputs, self.precision, LEFT_BYTES);
        if rows > size || outputs < COLUMNS * rayon::current_num_threads() {
            out.par_chunks_mut((size * outputs).max(1)).enumerate().for_each(|(number, out)| {
                let first = number * size;
                let inputs = inputs.rows(first..first + out.len() / outputs, self.inputs, outputs);
                Scratch::lend(|Scratch { left, .. }| {
                    inputs.fill(left, self.inputs, self.precision);
                    self.columns(left, 0..outputs, activation, inputs.added, out);
                });
            });
            return out;
        }
        // Too few rows for all threads: each takes some of the columns.
        let mut left = Tiles::default();
        inputs.fill(&mut left, self.inputs, self.precision);
        let group = outputs.div_ceil(rayon::current_num_threads() * GROUPS_PER_THREAD).next_multiple_of(COLUMNS);
        let part = |number: usize| {
            let columns = number * group..outputs.min((number + 1) * group);
            let mut part = vec![0.0; rows * columns.len()];
            self.columns(&left, columns, activation, inputs.added, &mut part);
            part
        };
        let parts: Vec<Vec<f32>> = (0..outputs.div_ceil(group)).into_par_iter().map(part).collect();
        for (number, part) in parts.iter().enumerate() {
            let width = part.len() / rows.max(1);
            for (out, part) in out.chunks_exact_mut(outputs).zip(part.chunks_exact(width.max(1))) {
                out[number * group..][..width].copy_from_slice(part);
            }
        }
        out
    }

    /// Two layers with an activation in between; what is between them never leaves the cache.
    pub(crate) fn mlp(&self, second: &Self, inputs: Inputs<'_>, activation: Activation) -> Vec<f32> {
        let outputs = second.outputs();
        let rows = inputs.x.len() / self.inputs.max(1);
        let mut out = vec![0.0; rows * outputs];
        let size = chunk_rows(rows, self.outputs, self.precision, MLP_BYTES);
        out.par_chunks_mut((size * outputs).max(1)).enumerate().for_each(|(number, out)| {
            let first = number * size;
            let inputs = inputs.rows(first..first + out.len() / outputs, self.inputs, outputs);
            let rows = out.len() / outputs;
            Scratch::lend(|Scratch { left, between: hidden, .. }| {
                inputs.fill(left, self.inputs, self.precision);
                hidden.begin_left((rows, self.outputs()), self.precision);
                let kernel = Kernel::start(self.instructions, rows);
                vectorized(Hidden { weights: self, kernel: &kernel, left, rows, activation, hidden });
                drop(kernel);
                second.columns(hidden, 0..outputs, None, inputs.added, out);
            });
        });
        out
    }

    /// Some columns, of all rows, into `out`, which has only these.
    fn columns(
        &self,
        left: &Tiles,
        columns: Range<usize>,
        activation: Option<Activation>,
        added: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let kernel = Kernel::start(self.instructions, out.len() / columns.len().max(1));
        vectorized(Columns { weights: self, kernel: &kernel, left, columns, activation, added, out });
    }

    /// Makes the results of `rows` rows and some columns, block by block, and hands them on in parts of a row: the number of the row, that of
    /// the first column, the numbers. Those of columns behind the last one are what the activation makes of 0.
    #[inline(always)]
    fn each(
        &self,
        kernel: &Kernel,
        (left, rows): (&Tiles, usize),
        columns: Range<usize>,
        activation: Option<Activation>,
        mut then: impl FnMut(usize, usize, &[f32; DEPTH]),
    ) {
        let (height, width) = kernel.shape();
        let mut block = Block::ZERO;
        for column in columns.clone().step_by(width) {
            let biases = self.bias[column..(column + width).min(columns.end.next_multiple_of(DEPTH))].as_chunks::<DEPTH>().0;
            for first in (0..rows).step_by(height) {
                kernel.multiply((left, first / height), (&self.right, column / width), &mut block.0, width);
                for (row, numbers) in block.0.chunks_exact_mut(width).enumerate().take(rows - first) {
                    for (part, (numbers, bias)) in numbers.as_chunks_mut::<DEPTH>().0.iter_mut().zip(biases).enumerate() {
                        for (number, bias) in numbers.iter_mut().zip(bias) {
                            *number += bias;
                        }
                        if let Some(activation) = activation {
                            activate(activation, numbers);
                        }
                        then(first + row, column + part * DEPTH, numbers);
                    }
                }
            }
        }
    }
}

/// Rows of a chunk whose left side of this depth stays in the cache; chunks are about equal.
fn chunk_rows(rows: usize, depth: usize, precision: Precision, bytes: usize) -> usize {
    let most = (bytes / (depth * 2 * precision.pieces()).max(1)).max(ROWS);
    rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(ROWS)
}

struct Columns<'a> {
    weights: &'a Weights,
    kernel: &'a Kernel,
    left: &'a Tiles,
    columns: Range<usize>,
    activation: Option<Activation>,
    added: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { weights, kernel, left, columns, activation, added, out } = self;
        let (outputs, width, start) = (weights.outputs, columns.len(), columns.start);
        weights.each(kernel, (left, out.len() / width), columns, activation, |row, column, numbers| {
            let out = &mut out[row * width..][..width][column - start..];
            let added = added.map(|added| &added[row * outputs + column..]);
            // Most are whole: loops of a fixed length are worth it.
            match (out.first_chunk_mut::<DEPTH>(), added.and_then(|added| added.first_chunk::<DEPTH>())) {
                (Some(out), Some(added)) => {
                    for ((out, number), added) in out.iter_mut().zip(numbers).zip(added) {
                        *out = number + added;
                    }
                }
                (Some(out), None) if added.is_none() => *out = *numbers,
                _ => {
                    for (index, (out, number)) in out.iter_mut().zip(numbers).enumerate() {
                        *out = number + added.map_or(0.0, |added| added[index]);
                    }
                }
            }
        });
    }
}

struct Hidden<'a> {
    weights: &'a Weights,
    kernel: &'a Kernel,
    left: &'a Tiles,
    rows: usize,
    activation: Activation,
    hidden: &'a mut Tiles,
}

impl NullaryFnOnce for Hidden<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { weights, kernel, left, rows, activation, hidden } = self;
        weights.each(kernel, (left, rows), 0..weights.outputs, Some(activation), |row, column, numbers| {
            hidden.write_step(row, column / DEPTH, numbers);
        });
    }
}
