//! Matrices cut into tiles: the operands of a [`Kernel`](super::Kernel).
//!
//! A tile is 1 KiB: 512 numbers of bfloat16. Of a left side it is 16 rows of 32 numbers. Of a right side it is 32 rows of 16 columns, two rows
//! interleaved, since the processor multiplies pairs: number `(row, column)` is at `row / 2 · 32 + 2 · column + row % 2`. Numbers of f32 fill
//! two tiles, row by row on either side; how integers lie is said in [`int8`]. Where a matrix ends within a tile, zeros follow.

use bytemuck::{Pod, Zeroable};
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::super::kernel::{unwritten, vectorized};
use super::int8;

/// Rows of a tile of a left side, columns of one of a right side.
pub(super) const EDGE: usize = 16;
/// Columns of a tile of a left side, rows of one of a right side.
pub(super) const DEPTH: usize = 32;

/// Tiles from which on the blocks of a right side are divided among threads.
const MANY_TILES: usize = 64;

/// One tile.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [u16; EDGE * DEPTH]);

/// Tiles of f32: for each step [`EDGE`] by [`DEPTH`] numbers.
#[inline(always)]
pub(super) fn singles(tiles: &[Tile]) -> &[[f32; EDGE * DEPTH]] {
    bytemuck::cast_slice::<_, f32>(tiles).as_chunks().0
}

/// The numbers of a step, which is of f32.
#[inline(always)]
fn singles_mut(step: &mut [Tile]) -> &mut [f32] {
    bytemuck::cast_slice_mut(step)
}

/// How exact products are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Both sides are rounded to integers of 8 bits, 32 numbers with one scale.
    Int8,
    /// Both sides are rounded to bfloat16 (8 bits of mantissa).
    Bf16,
    /// Both sides are the sum of two bfloat16 numbers (16 bits of mantissa), and three of their four products are added: what
    /// `torch.set_float32_matmul_precision("high")` calls bfloat16x3.
    Bf16x3,
    /// Both sides are taken as they are.
    #[default]
    F32,
}

impl Precision {
    /// Tiles that [`EDGE`] by [`DEPTH`] numbers fill: for each number one or two of bfloat16, or one as long as two;
    /// integers leave room for their scales.
    pub(super) const fn pieces(self) -> usize {
        match self {
            Self::Int8 | Self::Bf16 => 1,
            Self::Bf16x3 | Self::F32 => 2,
        }
    }
}

/// A matrix of tiles.
///
/// Tiles lie in the order (block of 16 rows or columns, step of 32 along the depth, piece): what a kernel reads for one block lies in one
/// stretch. The number of blocks is even on the left and a multiple of four on the right.
#[derive(Default)]
pub(super) struct Tiles {
    pub(super) tiles: Vec<Tile>,
    /// Steps along the depth.
    pub(super) steps: usize,
    /// Tiles of a step.
    pub(super) pieces: usize,
    precision: Precision,
}

impl Tiles {
    /// The tiles from a block on.
    #[inline(always)]
    pub(super) fn blocks(&self, first: usize) -> &[Tile] {
        &self.tiles[first * self.steps * self.pieces..]
    }

    /// Room for `blocks` blocks of `depth`. What is in it has no meaning: whoever fills it writes whole tiles of a right side, and whole rows
    /// of a left one, whose other rows are computed with and never read.
    fn reshape(&mut self, blocks: usize, depth: usize, precision: Precision) {
        (self.steps, self.pieces, self.precision) = (depth.div_ceil(DEPTH), precision.pieces(), precision);
        let count = blocks * self.steps * self.pieces;
        if self.tiles.len() < count {
            self.tiles = unwritten(count);
        }
    }

    /// Makes this a left side, `rows` by `depth`, whose rows are then [written](Self::write_row).
    pub(super) fn begin_left(&mut self, (rows, depth): (usize, usize), precision: Precision) {
        self.reshape(rows.div_ceil(2 * EDGE) * 2, depth, precision);
    }

    /// Makes this the left side of `rows` rows of `depth` numbers, which begin `stride` apart in `from`, each multiplied by `scale`.
    #[inline(always)]
    pub(super) fn fill_left(
        &mut self,
        from: &[f32],
        (rows, depth): (usize, usize),
        stride: usize,
        scale: f32,
        precision: Precision,
    ) {
        self.begin_left((rows, depth), precision);
        for row in 0..rows {
            self.write_row(row, &from[row * stride..][..depth], scale);
        }
    }

    /// Makes this the left side, of f32, of the first `rows` columns of `depth` rows in `from`, which begin `stride` apart.
    #[inline(always)]
    pub(super) fn fill_left_columns(&mut self, from: &[f32], (rows, depth): (usize, usize), stride: usize) {
        self.begin_left((rows, depth), Precision::F32);
        let (steps, count) = (self.steps, self.pieces);
        for step in 0..steps {
            for block in 0..rows.div_ceil(EDGE) {
                let first = (block * steps + step) * count;
                let numbers = singles_mut(&mut self.tiles[first..first + count]);
                let width = (rows - block * EDGE).min(EDGE);
                for place in 0..DEPTH {
                    let at = (step * DEPTH + place) * stride + block * EDGE;
                    let line = if step * DEPTH + place < depth { &from[at..][..width] } else { &[0.0; EDGE][..width] };
                    for (row, number) in line.iter().enumerate() {
                        numbers[row * DEPTH + place] = *number;
                    }
                }
            }
        }
    }

    /// Writes `numbers`, each multiplied by `scale`, into a row of a left side.
    #[inline(always)]
    pub(super) fn write_row(&mut self, row: usize, numbers: &[f32], scale: f32) {
        let (whole, rest) = numbers.as_chunks::<DEPTH>();
        for (step, part) in whole.iter().enumerate() {
            let mut part = *part;
            for x in &mut part {
                *x *= scale;
            }
            self.write_step(row, step, &part);
        }
        if !rest.is_empty() {
            let mut part = [0.0; DEPTH];
            for (part, x) in part.iter_mut().zip(rest) {
                *part = x * scale;
            }
            self.write_step(row, whole.len(), &part);
        }
    }

    /// Writes the 32 numbers of a step into a row of a left side.
    #[inline(always)]
    pub(super) fn write_step(&mut self, row: usize, step: usize, numbers: &[f32; DEPTH]) {
        let first = ((row / EDGE) * self.steps + step) * self.pieces;
        let (step, at) = (&mut self.tiles[first..first + self.pieces], row % EDGE * DEPTH);
        match self.precision {
            Precision::F32 => singles_mut(step)[at..][..DEPTH].copy_from_slice(numbers),
            Precision::Int8 => int8::write_row(&mut step[0], row % EDGE, numbers),
            Precision::Bf16 | Precision::Bf16x3 => pieces(numbers, step, at),
        }
    }

    /// Makes this the right side whose columns are `columns` rows of `depth` numbers in `from`, `stride` apart: the weight of a layer, or keys.
    pub(super) fn fill_columns(&mut self, from: &[f32], (columns, depth): (usize, usize), stride: usize, precision: Precision) {
        let blocks = columns.div_ceil(4 * EDGE) * 4;
        self.reshape(blocks, depth, precision);
        self.each_block(blocks, |(block, tiles)| {
            vectorized(FillColumns { tiles, precision, first: block * EDGE, from, columns, depth, stride });
        });
    }

    /// Makes this the right side whose rows are `depth` rows of `columns` numbers in `from`, `stride` apart: values.
    pub(super) fn fill_rows(&mut self, from: &[f32], (depth, columns): (usize, usize), stride: usize, precision: Precision) {
        let blocks = columns.div_ceil(4 * EDGE) * 4;
        self.reshape(blocks, depth, precision);
        self.each_block(blocks, |(block, tiles)| {
            vectorized(FillRows { tiles, precision, first: block * EDGE, from, depth, columns, stride });
        });
    }

    /// Fills the first `count` blocks, on several threads where they are large.
    fn each_block(&mut self, count: usize, fill: impl Fn((usize, &mut [Tile])) + Send + Sync) {
        let size = (self.steps * self.pieces).max(1);
        let tiles = &mut self.tiles[..count * size];
        if tiles.len() < MANY_TILES {
            tiles.chunks_exact_mut(size).enumerate().for_each(fill);
        } else {
            tiles.par_chunks_exact_mut(size).enumerate().for_each(fill);
        }
    }
}

/// The nearest bfloat16; not a number stays so.
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if x.is_nan() { 0x7fc0 } else { rounded as u16 }
}

/// The number that a bfloat16 stands for.
#[inline(always)]
pub(super) fn widen(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// Writes the pieces of 32 numbers, the first of which is rounded to the nearest, the second what is then left.
#[inline(always)]
fn pieces(numbers: &[f32; DEPTH], tiles: &mut [Tile], at: usize) {
    let Some((first, rest)) = tiles.split_first_mut() else { return };
    let first = &mut first.0[at..][..DEPTH];
    for (out, number) in first.iter_mut().zip(numbers) {
        *out = round(*number);
    }
    if let Some(second) = rest.first_mut() {
        for ((out, number), first) in second.0[at..][..DEPTH].iter_mut().zip(numbers).zip(first) {
            *out = round(number - widen(*first));
        }
    }
}

/// Writes the tiles of a step of a right side.
#[inline(always)]
fn write_right(tiles: &mut [Tile], rows: &[[f32; EDGE]; DEPTH], precision: Precision) {
    match precision {
        Precision::F32 => singles_mut(tiles).copy_from_slice(rows.as_flattened()),
        Precision::Int8 => int8::write_columns(&mut tiles[0], rows),
        Precision::Bf16 | Precision::Bf16x3 => {
            for (pair, [upper, lower]) in rows.as_chunks().0.iter().enumerate() {
                let mut numbers = [0.0; DEPTH];
                for column in 0..EDGE {
                    numbers[2 * column] = upper[column];
                    numbers[2 * column + 1] = lower[column];
                }
                pieces(&numbers, tiles, pair * DEPTH);
            }
        }
    }
}

struct FillColumns<'a> {
    /// Of a block.
    tiles: &'a mut [Tile],
    precision: Precision,
    /// Its first column.
    first: usize,
    from: &'a [f32],
    columns: usize,
    depth: usize,
    stride: usize,
}

impl NullaryFnOnce for FillColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, precision, first, from, columns, depth, stride } = self;
        let width = columns.saturating_sub(first).min(EDGE);
        for (step, tiles) in tiles.chunks_exact_mut(precision.pieces()).enumerate() {
            let mut rows = [[0.0; EDGE]; DEPTH];
            for column in 0..width {
                let part = &from[(first + column) * stride..][step * DEPTH..depth.min((step + 1) * DEPTH)];
                for (row, number) in rows.iter_mut().zip(part) {
                    row[column] = *number;
                }
            }
            write_right(tiles, &rows, precision);
        }
    }
}

struct FillRows<'a> {
    /// Of a block.
    tiles: &'a mut [Tile],
    precision: Precision,
    /// Its first column.
    first: usize,
    from: &'a [f32],
    depth: usize,
    columns: usize,
    stride: usize,
}

impl NullaryFnOnce for FillRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, precision, first, from, depth, columns, stride } = self;
        let width = columns.saturating_sub(first).min(EDGE);
        for (step, tiles) in tiles.chunks_exact_mut(precision.pieces()).enumerate() {
            let mut rows = [[0.0; EDGE]; DEPTH];
            if width > 0 {
                for (row, number) in rows.iter_mut().zip(step * DEPTH..depth) {
                    row[..width].copy_from_slice(&from[number * stride + first..][..width]);
                }
            }
            write_right(tiles, &rows, precision);
        }
    }
}
