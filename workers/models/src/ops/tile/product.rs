//! Products with the weight of a layer, which is in tiles already.

use std::ops::Range;
use std::sync::OnceLock;

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::activation::Activation;
use super::super::kernel::{unwritten, vectorized};
use super::super::layer_norm::normalize;
use super::layout::{DEPTH, EDGE, Precision, Tiles};
use super::math::activate;
use super::{Block, Instructions, Kernel, Left, Scratch, room};

/// Up to so many rows, threads divide the columns: the weight is what takes the time, and is read once.
const FEW_ROWS: usize = 4 * ROWS;

/// Rows in which a left side is cut, columns in which a weight is: whole blocks of a kernel, whatever its shape.
const ROWS: usize = 2 * EDGE;
const COLUMNS: usize = 4 * EDGE;

/// Depth of the parts in which a product is made that is much deeper than wide.
const PART_DEPTH: usize = 32 * DEPTH;

/// Chunks of rows for each thread, where the weight is small.
const CHUNKS_PER_THREAD: usize = 4;

/// Groups of columns for each thread, where a product has too few rows to be divided by them.
const GROUPS_PER_THREAD: usize = 2;

/// The weight `(outputs, inputs)` and bias of a layer, ready to be multiplied with.
pub(crate) struct Weights {
    right: Tiles,
    /// With zeros up to whole blocks.
    bias: Vec<f32>,
    /// Whether it is not zero.
    biased: bool,
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
        Some(Self::with(Instructions::best(precision)?, weight, bias, precision))
    }

    /// From a matrix `(inputs, outputs)` as it lies, in f32 and without a bias. `None` as above.
    pub(crate) fn from_rows(matrix: &[f32], outputs: usize) -> Option<Self> {
        let precision = Precision::F32;
        let instructions = Instructions::best(precision)?;
        let inputs = matrix.len() / outputs.max(1);
        let mut right = Tiles::default();
        right.fill_rows(matrix, (inputs, outputs), outputs, precision);
        let bias = vec![0.0; outputs.next_multiple_of(COLUMNS)];
        Some(Self { right, bias, biased: false, inputs, outputs, precision, instructions })
    }

    pub(super) fn with(instructions: Instructions, weight: &[f32], bias: &[f32], precision: Precision) -> Self {
        let inputs = weight.len() / bias.len().max(1);
        let mut right = Tiles::default();
        right.fill_columns(weight, (bias.len(), inputs), inputs, precision);
        let outputs = bias.len();
        let mut bias = bias.to_vec();
        bias.resize(outputs.next_multiple_of(COLUMNS), 0.0);
        Self { right, bias, biased: true, inputs, outputs, precision, instructions }
    }

    /// Whether the left side may lie row by row.
    fn reads_rows(&self) -> bool {
        self.instructions == Instructions::Fma && self.inputs > 0 && self.inputs.is_multiple_of(DEPTH)
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
        let mut out = unwritten(rows * outputs);
        if rows > FEW_ROWS || outputs < COLUMNS * rayon::current_num_threads() {
            let size = chunk_rows(rows, (self.inputs, self.outputs), self.precision);
            out.par_chunks_mut((size * outputs).max(1)).enumerate().for_each(|(number, out)| {
                let first = number * size;
                let inputs = inputs.rows(first..first + out.len() / outputs, self.inputs, outputs);
                if self.reads_rows() && inputs.norm.is_none() {
                    return self.columns(Left::Rows(inputs.x), 0..outputs, None, activation, inputs.added, out);
                }
                Scratch::lend(|Scratch { left, .. }| {
                    inputs.fill(left, self.inputs, self.precision);
                    self.columns(Left::Tiles(left), 0..outputs, None, activation, inputs.added, out);
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
            let mut part = unwritten(rows * columns.len());
            self.columns(Left::Tiles(&left), columns, None, activation, inputs.added, &mut part);
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

    /// The product of the columns of `x`, `(inputs, rows)`, to `(rows, outputs)`, in f32.
    pub(crate) fn product_of_columns(&self, x: &[f32]) -> Vec<f32> {
        struct Part<'a> {
            weights: &'a Weights,
            left: &'a mut Tiles,
            x: &'a [f32],
            stride: usize,
            first_step: usize,
            out: &'a mut [f32],
        }
        impl NullaryFnOnce for Part<'_> {
            type Output = ();

            #[inline(always)]
            fn call(self) {
                let Self { weights, left, x, stride, first_step, out } = self;
                let depth = (weights.inputs - first_step * DEPTH).min(PART_DEPTH);
                left.fill_left_columns(&x[first_step * DEPTH * stride..], (out.len() / weights.outputs, depth), stride);
                weights.write(Left::Tiles(left), 0..weights.outputs, first_step, out);
            }
        }
        debug_assert_eq!(self.precision, Precision::F32);
        let (rows, outputs) = (x.len() / self.inputs.max(1), self.outputs);
        let mut out = unwritten(rows * outputs);
        // A part of the right side stays in the cache while the rows of a thread pass by, some at a time.
        let size = rows.div_ceil(rayon::current_num_threads()).next_multiple_of(FEW_ROWS);
        out.par_chunks_mut((size * outputs).max(1)).enumerate().for_each(|(number, out)| {
            Scratch::lend(|Scratch { left, .. }| {
                for first_step in (0..self.inputs.div_ceil(DEPTH)).step_by(PART_DEPTH / DEPTH) {
                    for (place, out) in out.chunks_mut((FEW_ROWS * outputs).max(1)).enumerate() {
                        let x = &x[number * size + place * FEW_ROWS..];
                        vectorized(Part { weights: self, left, x, stride: rows, first_step, out });
                    }
                }
            });
        });
        out
    }

    /// Two layers with an activation in between. What is between them never leaves the cache: it is made, and used up, some columns at a time.
    pub(crate) fn mlp(&self, second: &Self, inputs: Inputs<'_>, activation: Activation) -> Vec<f32> {
        let outputs = second.outputs();
        let rows = inputs.x.len() / self.inputs.max(1);
        if rows <= FEW_ROWS {
            let hidden = self.product(Inputs { added: None, ..inputs }, Some(activation));
            return second.product(Inputs { x: &hidden, norm: None, added: inputs.added }, None);
        }
        let mut out = unwritten(rows * outputs);
        let size = chunk_rows(rows, (self.inputs, self.outputs), self.precision);
        out.par_chunks_mut((size * outputs).max(1)).enumerate().for_each(|(number, out)| {
            let first = number * size;
            let inputs = inputs.rows(first..first + out.len() / outputs, self.inputs, outputs);
            Scratch::lend(|Scratch { left, between: hidden, numbers, .. }| {
                inputs.fill(left, self.inputs, self.precision);
                let rows = out.len() / outputs;
                let sums = room(numbers, rows.next_multiple_of(ROWS) * outputs.next_multiple_of(COLUMNS));
                let group = self.inputs.next_multiple_of(COLUMNS);
                for begin in (0..self.outputs()).step_by(group) {
                    let columns = begin..self.outputs().min(begin + group);
                    hidden.begin_left((rows, columns.len()), self.precision);
                    let part = Part { first: begin / DEPTH, last: columns.end == self.outputs(), sums: &mut *sums };
                    vectorized(Hidden { weights: self, left, rows, columns, activation, hidden: &mut *hidden });
                    second.columns(Left::Tiles(hidden), 0..outputs, Some(part), None, inputs.added, out);
                }
            });
        });
        out
    }

    /// Some columns, of all rows, into `out`, which has only these.
    fn columns(
        &self,
        left: Left<'_>,
        columns: Range<usize>,
        part: Option<Part<'_>>,
        activation: Option<Activation>,
        added: Option<&[f32]>,
        out: &mut [f32],
    ) {
        vectorized(Columns { weights: self, left, columns, part, activation, added, out });
    }

    /// Writes the bare product of the left side and some columns: blocks that lie within it at once where they belong. Of a part of the depth that
    /// begins at a later step, it is added.
    #[inline(always)]
    fn write(&self, left: Left<'_>, columns: Range<usize>, first_step: usize, out: &mut [f32]) {
        let stride = columns.len();
        let rows = out.len() / stride.max(1);
        let kernel = Kernel::start(self.instructions, rows);
        let (height, width) = kernel.shape();
        let mut block = Block::ZERO;
        for column in columns.clone().step_by(width) {
            let count = width.min(columns.end - column);
            for first in (0..rows).step_by(height) {
                let (left, right) = ((left, first / height), (&self.right, column / width));
                let out = &mut out[first * stride + column - columns.start..];
                let inside = rows - first;
                if count == width && inside >= height {
                    kernel.multiply_part(left, right, first_step, out, stride);
                    continue;
                }
                if first_step > 0 {
                    for (row, numbers) in block.0.chunks_exact_mut(width).enumerate().take(inside) {
                        numbers[..count].copy_from_slice(&out[row * stride..][..count]);
                    }
                }
                kernel.multiply_part(left, right, first_step, &mut block.0, width);
                for (row, numbers) in block.0.chunks_exact(width).enumerate().take(inside) {
                    out[row * stride..][..count].copy_from_slice(&numbers[..count]);
                }
            }
        }
    }

    /// Makes the results of `rows` rows and some columns, block by block, and hands them on in parts of a row: the number of the row, that of
    /// the first column, the numbers. Those of columns behind the last one are what the activation makes of 0. Of a part of the depth, only
    /// the last one is handed on.
    #[inline(always)]
    fn each(
        &self,
        (left, rows): (Left<'_>, usize),
        columns: Range<usize>,
        part: Option<Part<'_>>,
        activation: Option<Activation>,
        mut into: impl Take,
    ) {
        let kernel = Kernel::start(self.instructions, rows);
        let (height, width) = kernel.shape();
        let mut block = Block::ZERO;
        let (first_step, last, sums) = match part {
            Some(Part { first, last, sums }) => (first, last, sums),
            None => (0, true, &mut [][..]),
        };
        let mut sums = sums.chunks_exact_mut(height * width);
        for column in columns.clone().step_by(width) {
            let biases = self.bias[column..(column + width).min(columns.end.next_multiple_of(DEPTH))].as_chunks::<DEPTH>().0;
            for first in (0..rows).step_by(height) {
                let block = sums.next().unwrap_or(&mut block.0);
                kernel.multiply_part((left, first / height), (&self.right, column / width), first_step, block, width);
                if !last {
                    continue;
                }
                for (row, numbers) in block.chunks_exact(width).enumerate().take(rows - first) {
                    for (part, (numbers, bias)) in numbers.as_chunks::<DEPTH>().0.iter().zip(biases).enumerate() {
                        // Copies, which the compiler knows to lie apart, and so adds as vectors.
                        let (mut numbers, bias) = (*numbers, *bias);
                        for (number, bias) in numbers.iter_mut().zip(bias) {
                            *number += bias;
                        }
                        if let Some(activation) = activation {
                            activate(activation, &mut numbers);
                        }
                        into.take(first + row, column + part * DEPTH, &numbers);
                    }
                }
            }
        }
    }
}

/// A left side that is a part of the depth.
struct Part<'a> {
    /// The step at which it begins.
    first: usize,
    /// Whether it is the last one.
    last: bool,
    /// What is kept from part to part, block by block.
    sums: &'a mut [f32],
}

/// Bytes of the left side that are worked on at a time: they stay in the second-level cache of a core while the weight passes by.
fn left_bytes() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").ok();
        let kib = size.and_then(|size| size.trim().strip_suffix('K')?.parse().ok()).unwrap_or(1024usize);
        // The rest is for the weight and for results.
        (kib << 10) / 4 * 3
    })
}

/// Rows of a chunk whose left side of this depth stays in the cache: so many that threads end together.
fn chunk_rows(rows: usize, (depth, columns): (usize, usize), precision: Precision) -> usize {
    let threads = rayon::current_num_threads();
    let blocks = rows.div_ceil(ROWS);
    let bytes = |count: usize| (count * depth * 2 * precision.pieces()).max(1);
    let mut most = (left_bytes() / bytes(ROWS)).max(1);
    // A small right side stays in the cache too, and then smaller chunks let a thread that began late be helped.
    if bytes(columns) < left_bytes() / 2 {
        most = most.min((blocks / (threads * CHUNKS_PER_THREAD)).max(FEW_ROWS / ROWS));
    }
    // Blocks of the thread that has most of them.
    let longest = |size: usize| match (blocks / size, blocks % size) {
        (whole, rest) if whole.is_multiple_of(threads) => whole / threads * size + rest,
        (whole, _) => (whole / threads + 1) * size,
    };
    (1..=most).rev().min_by_key(|&size| longest(size)).unwrap_or(1) * ROWS
}

struct Columns<'a> {
    weights: &'a Weights,
    left: Left<'a>,
    columns: Range<usize>,
    part: Option<Part<'a>>,
    activation: Option<Activation>,
    added: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl NullaryFnOnce for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { weights, left, columns, part, activation, added, out } = self;
        let (outputs, width, start) = (weights.outputs, columns.len(), columns.start);
        if !weights.biased && part.is_none() && activation.is_none() && added.is_none() {
            return weights.write(left, columns, 0, out);
        }
        let rows = out.len() / width;
        weights.each((left, rows), columns, part, activation, IntoRows { out, width, start, added, outputs });
    }
}

/// Takes the numbers of a row that a product has made.
trait Take {
    /// Numbers of row `row` from column `column` on. `#[inline(always)]` belongs on it.
    fn take(&mut self, row: usize, column: usize, numbers: &[f32; DEPTH]);
}

/// Writes rows of `width` numbers, which begin with column `start`, with those of `added`, in rows of `outputs`, added.
struct IntoRows<'a> {
    out: &'a mut [f32],
    width: usize,
    start: usize,
    added: Option<&'a [f32]>,
    outputs: usize,
}

impl Take for IntoRows<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, numbers: &[f32; DEPTH]) {
        let out = &mut self.out[row * self.width..][..self.width][column - self.start..];
        let added = self.added.map(|added| &added[row * self.outputs + column..]);
        // Most are whole: loops of a fixed length are worth it.
        match (out.first_chunk_mut::<DEPTH>(), added.and_then(|added| added.first_chunk::<DEPTH>())) {
            (Some(out), Some(added)) => {
                let (mut numbers, added) = (*numbers, *added);
                for (number, added) in numbers.iter_mut().zip(added) {
                    *number += added;
                }
                *out = numbers;
            }
            (Some(out), None) if added.is_none() => *out = *numbers,
            _ => {
                for (index, (out, number)) in out.iter_mut().zip(numbers).enumerate() {
                    *out = number + added.map_or(0.0, |added| added[index]);
                }
            }
        }
    }
}

/// Writes a left side, whose first column is `begin`.
struct IntoTiles<'a> {
    tiles: &'a mut Tiles,
    begin: usize,
}

impl Take for IntoTiles<'_> {
    #[inline(always)]
    fn take(&mut self, row: usize, column: usize, numbers: &[f32; DEPTH]) {
        self.tiles.write_step(row, (column - self.begin) / DEPTH, numbers);
    }
}

struct Hidden<'a> {
    weights: &'a Weights,
    left: &'a Tiles,
    rows: usize,
    columns: Range<usize>,
    activation: Activation,
    hidden: &'a mut Tiles,
}

impl NullaryFnOnce for Hidden<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { weights, left, rows, columns, activation, hidden } = self;
        let into = IntoTiles { tiles: hidden, begin: columns.start };
        weights.each((Left::Tiles(left), rows), columns, None, Some(activation), into);
    }
}
