//! Products with the weight of a layer, which is in tiles already.

use std::ops::Range;

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::kernel::vectorized;
use super::layout::{EDGE, Precision, Tiles};
use super::{Block, Instructions, Kernel, Operands};

/// Bytes of the left side that are worked on at a time: they stay in the second-level cache while the weight passes by.
const LEFT_BYTES: usize = 512 << 10;

/// Columns of a panel, rows of a pair of blocks.
const SIDE: usize = 2 * EDGE;

/// Panels of the weight for each thread, where a product has too few rows to be divided by them.
const GROUPS_PER_THREAD: usize = 2;

/// The weight `(outputs, inputs)` and bias of a layer, ready to be multiplied with.
pub(crate) struct Weights {
    right: Tiles,
    bias: Vec<f32>,
    inputs: usize,
    precision: Precision,
    instructions: Instructions,
}

impl Weights {
    /// From the rows of the weight, one for each output. `None` where the processor has no instructions for it.
    pub(crate) fn new(weight: &[f32], bias: &[f32], precision: Precision) -> Option<Self> {
        let instructions = Instructions::best()?;
        let inputs = weight.len() / bias.len().max(1);
        let right = Tiles::of_columns(weight, (bias.len(), inputs), inputs, precision);
        Some(Self { right, bias: bias.to_vec(), inputs, precision, instructions })
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// `(rows, inputs)` to `(rows, outputs)`: product, bias, activation, and `added` of the result's shape.
    pub(crate) fn product(&self, x: &[f32], activation: Option<Activation>, added: Option<&[f32]>) -> Vec<f32> {
        let (inputs, outputs) = (self.inputs, self.outputs());
        let rows = x.len() / inputs.max(1);
        let mut out = vec![0.0; rows * outputs];
        let most = (LEFT_BYTES / (inputs * 2 * self.precision.pieces())).max(SIDE);
        let chunks = rows.div_ceil(most).max(1);
        let size = rows.div_ceil(chunks).next_multiple_of(SIDE);
        let panels = outputs.div_ceil(SIDE);
        let chunk = |number: usize, out: &mut [f32]| {
            let x = &x[number * size * inputs..][..out.len() / outputs * inputs];
            let added = added.map(|added| &added[number * size * outputs..]);
            let mut left = Tiles::empty();
            left.fill_left(x, (x.len() / inputs, inputs), inputs, 1.0, self.precision);
            let threads = rayon::current_num_threads();
            if chunks >= threads || panels < threads {
                self.panels(&left, 0..panels, activation, added, (out, outputs));
                return;
            }
            // Too few rows for all threads: each takes some of the columns.
            let group = panels.div_ceil(threads * GROUPS_PER_THREAD);
            let parts: Vec<(usize, usize, Vec<f32>)> = (0..panels.div_ceil(group))
                .into_par_iter()
                .map(|number| {
                    let panels = number * group..panels.min((number + 1) * group);
                    let first = panels.start * SIDE;
                    let width = outputs.min(panels.end * SIDE) - first;
                    let mut part = vec![0.0; out.len() / outputs * width];
                    self.panels(&left, panels, activation, added, (&mut part, width));
                    (first, width, part)
                })
                .collect();
            for (first, width, part) in parts {
                for (out, part) in out.chunks_exact_mut(outputs).zip(part.chunks_exact(width)) {
                    out[first..][..width].copy_from_slice(part);
                }
            }
        };
        if rows > 0 && outputs > 0 {
            out.par_chunks_mut(size * outputs).enumerate().for_each(|(number, out)| chunk(number, out));
        }
        out
    }

    /// The columns of some panels, of all rows of `left`, into `out`, whose rows are `width` long.
    fn panels(
        &self,
        left: &Tiles,
        panels: Range<usize>,
        activation: Option<Activation>,
        added: Option<&[f32]>,
        (out, width): (&mut [f32], usize),
    ) {
        let kernel = Kernel::start(self.instructions);
        vectorized(Panels { weights: self, kernel: &kernel, left, panels, activation, added, out, width });
    }
}

struct Panels<'a> {
    weights: &'a Weights,
    kernel: &'a Kernel,
    left: &'a Tiles,
    panels: Range<usize>,
    activation: Option<Activation>,
    added: Option<&'a [f32]>,
    out: &'a mut [f32],
    width: usize,
}

impl NullaryFnOnce for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { weights, kernel, left, panels, activation, added, out, width } = self;
        let outputs = weights.bias.len();
        let rows = out.len() / width;
        let first = panels.start * SIDE;
        let mut block = Block::ZERO;
        for panel in panels {
            let column = panel * SIDE;
            let count = (outputs - column).min(SIDE);
            let bias = &weights.bias[column..][..count];
            for pair in 0..rows.div_ceil(SIDE) {
                let operands = Operands {
                    left: [left.block(2 * pair), left.block(2 * pair + 1)],
                    right: [weights.right.block(2 * panel), weights.right.block(2 * panel + 1)],
                    steps: left.steps,
                    pieces: left.pieces,
                };
                kernel.multiply(operands, &mut block);
                for (row, sums) in block.0.chunks_exact(SIDE).enumerate().take(rows - pair * SIDE) {
                    let row = pair * SIDE + row;
                    let out = &mut out[row * width + column - first..][..count];
                    for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                        *out = sum + bias;
                    }
                    if let Some(activation) = activation {
                        activation.apply(out);
                    }
                    if let Some(added) = added {
                        for (out, added) in out.iter_mut().zip(&added[row * outputs + column..]) {
                            *out += added;
                        }
                    }
                }
            }
        }
    }
}
