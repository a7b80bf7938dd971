//! Matrices cut into tiles of bfloat16: the operands of a [`Kernel`](super::Kernel).
//!
//! A tile is 1 KiB. Of a left side it is 16 rows of 32 numbers. Of a right side it is 32 rows of 16 columns, two rows interleaved, since the
//! processor multiplies pairs: number `(row, column)` is at `row / 2 · 32 + 2 · column + row % 2`. Where a matrix ends within a tile, zeros
//! follow.

use pulp::NullaryFnOnce;

use super::super::kernel::vectorized;

/// Rows of a tile of a left side, columns of one of a right side.
pub(super) const EDGE: usize = 16;
/// Columns of a tile of a left side, rows of one of a right side.
pub(super) const DEPTH: usize = 32;

/// One tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub(super) [u16; EDGE * DEPTH]);

impl Tile {
    pub(super) const ZERO: Self = Self([0; EDGE * DEPTH]);
}

/// How exact products are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Both sides are rounded to bfloat16 (8 bits of mantissa).
    Bf16,
    /// Both sides are the sum of two bfloat16 numbers (16 bits of mantissa), and three of their four products are added: what
    /// `torch.set_float32_matmul_precision("high")` calls bfloat16x3.
    Bf16x3,
}

impl Precision {
    /// bfloat16 numbers that stand for one number.
    pub(super) const fn pieces(self) -> usize {
        match self {
            Self::Bf16 => 1,
            Self::Bf16x3 => 2,
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
    pub(super) pieces: usize,
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
        (self.steps, self.pieces) = (depth.div_ceil(DEPTH), precision.pieces());
        let count = blocks * self.steps * self.pieces;
        if self.tiles.len() < count {
            self.tiles.resize(count, Tile::ZERO);
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
        self.reshape(rows.div_ceil(2 * EDGE) * 2, depth, precision);
        for row in 0..rows {
            self.write_row(row, &from[row * stride..][..depth], scale);
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
        pieces(numbers, &mut self.tiles[first..first + self.pieces], row % EDGE * DEPTH);
    }

    /// Makes this the right side whose columns are `columns` rows of `depth` numbers in `from`, `stride` apart: the weight of a layer, or keys.
    pub(super) fn fill_columns(&mut self, from: &[f32], (columns, depth): (usize, usize), stride: usize, precision: Precision) {
        let blocks = columns.div_ceil(4 * EDGE) * 4;
        self.reshape(blocks, depth, precision);
        vectorized(FillColumns { tiles: self, blocks, from, columns, depth, stride });
    }

    /// Makes this the right side whose rows are `depth` rows of `columns` numbers in `from`, `stride` apart: values.
    pub(super) fn fill_rows(&mut self, from: &[f32], (depth, columns): (usize, usize), stride: usize, precision: Precision) {
        let blocks = columns.div_ceil(4 * EDGE) * 4;
        self.reshape(blocks, depth, precision);
        vectorized(FillRows { tiles: self, blocks, from, depth, columns, stride });
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
    let mut rest = *numbers;
    for tile in tiles {
        let out = &mut tile.0[at..][..DEPTH];
        for (out, rest) in out.iter_mut().zip(&mut rest) {
            *out = round(*rest);
            *rest -= widen(*out);
        }
    }
}

struct FillColumns<'a> {
    tiles: &'a mut Tiles,
    blocks: usize,
    from: &'a [f32],
    columns: usize,
    depth: usize,
    stride: usize,
}

impl NullaryFnOnce for FillColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, blocks, from, columns, depth, stride } = self;
        let (steps, count) = (tiles.steps, tiles.pieces);
        // One column's numbers as they would lie in a left side; their pairs then go to every 16th pair of the tile.
        let mut row = [Tile::ZERO; 2];
        for (block, tiles) in tiles.tiles.chunks_exact_mut(steps * count).enumerate().take(blocks) {
            for (step, tiles) in tiles.chunks_exact_mut(count).enumerate() {
                for column in 0..EDGE {
                    let number = block * EDGE + column;
                    let from = if number < columns { &from[number * stride..][..depth] } else { &[] };
                    let part = from.get(step * DEPTH..).unwrap_or(&[]);
                    let mut numbers = [0.0; DEPTH];
                    let length = part.len().min(DEPTH);
                    numbers[..length].copy_from_slice(&part[..length]);
                    pieces(&numbers, &mut row[..count], 0);
                    for (tile, row) in tiles.iter_mut().zip(&row) {
                        for pair in 0..DEPTH / 2 {
                            tile.0[pair * DEPTH + 2 * column] = row.0[2 * pair];
                            tile.0[pair * DEPTH + 2 * column + 1] = row.0[2 * pair + 1];
                        }
                    }
                }
            }
        }
    }
}

struct FillRows<'a> {
    tiles: &'a mut Tiles,
    blocks: usize,
    from: &'a [f32],
    depth: usize,
    columns: usize,
    stride: usize,
}

impl NullaryFnOnce for FillRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, blocks, from, depth, columns, stride } = self;
        let (steps, count) = (tiles.steps, tiles.pieces);
        for (block, tiles) in tiles.tiles.chunks_exact_mut(steps * count).enumerate().take(blocks) {
            let first = block * EDGE;
            let width = columns.saturating_sub(first).min(EDGE);
            for (step, tiles) in tiles.chunks_exact_mut(count).enumerate() {
                for pair in 0..DEPTH / 2 {
                    let row = |number: usize| {
                        let mut numbers = [0.0; EDGE];
                        if number < depth && width > 0 {
                            numbers[..width].copy_from_slice(&from[number * stride + first..][..width]);
                        }
                        numbers
                    };
                    let (upper, lower) = (row(step * DEPTH + 2 * pair), row(step * DEPTH + 2 * pair + 1));
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
}
