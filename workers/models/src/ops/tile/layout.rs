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
/// stretch. A right side has an even number of blocks.
#[derive(Clone)]
pub(super) struct Tiles {
    pub(super) tiles: Vec<Tile>,
    /// Steps along the depth.
    pub(super) steps: usize,
    pub(super) pieces: usize,
}

impl Tiles {
    pub(super) fn empty() -> Self {
        Self { tiles: Vec::new(), steps: 0, pieces: 1 }
    }

    /// The tiles of a block, all its steps and pieces.
    #[inline(always)]
    pub(super) fn block(&self, block: usize) -> &[Tile] {
        let size = self.steps * self.pieces;
        &self.tiles[block * size..][..size]
    }

    /// Room for `blocks` blocks of `depth`; what was there is of no meaning any more.
    fn reshape(&mut self, blocks: usize, depth: usize, precision: Precision) {
        (self.steps, self.pieces) = (depth.div_ceil(DEPTH), precision.pieces());
        self.tiles.resize(blocks * self.steps * self.pieces, Tile::ZERO);
    }

    /// Makes this the left side of `rows` rows of `depth` numbers, which begin `stride` apart in `from`, each multiplied by `scale`. An even
    /// number of blocks.
    pub(super) fn fill_left(
        &mut self,
        from: &[f32],
        (rows, depth): (usize, usize),
        stride: usize,
        scale: f32,
        precision: Precision,
    ) {
        self.reshape(rows.div_ceil(2 * EDGE) * 2, depth, precision);
        vectorized(FillLeft { tiles: self, from, rows, depth, stride, scale });
    }

    /// The right side whose columns are `columns` rows of `depth` numbers in `from`, `stride` apart: the weight of a layer, or keys.
    pub(super) fn of_columns(from: &[f32], (columns, depth): (usize, usize), stride: usize, precision: Precision) -> Self {
        let mut tiles = Self::empty();
        tiles.reshape(columns.div_ceil(2 * EDGE) * 2, depth, precision);
        vectorized(FillColumns { tiles: &mut tiles, from, columns, depth, stride });
        tiles
    }

    /// The right side whose rows are `depth` rows of `columns` numbers in `from`, `stride` apart: values.
    pub(super) fn of_rows(from: &[f32], (depth, columns): (usize, usize), stride: usize, precision: Precision) -> Self {
        let mut tiles = Self::empty();
        tiles.reshape(columns.div_ceil(2 * EDGE) * 2, depth, precision);
        vectorized(FillRows { tiles: &mut tiles, from, depth, columns, stride });
        tiles
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

struct FillLeft<'a> {
    tiles: &'a mut Tiles,
    from: &'a [f32],
    rows: usize,
    depth: usize,
    stride: usize,
    scale: f32,
}

impl NullaryFnOnce for FillLeft<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, from, rows, depth, stride, scale } = self;
        let (steps, count) = (tiles.steps, tiles.pieces);
        for (block, tiles) in tiles.tiles.chunks_exact_mut(steps * count).enumerate() {
            for row in 0..EDGE {
                let number = block * EDGE + row;
                let from = if number < rows { &from[number * stride..][..depth] } else { &[] };
                for (step, tiles) in tiles.chunks_exact_mut(count).enumerate() {
                    let mut numbers = [0.0; DEPTH];
                    let part = from.get(step * DEPTH..).unwrap_or(&[]);
                    if let Some(whole) = part.first_chunk::<DEPTH>() {
                        for (number, x) in numbers.iter_mut().zip(whole) {
                            *number = x * scale;
                        }
                    } else {
                        for (number, x) in numbers.iter_mut().zip(part) {
                            *number = x * scale;
                        }
                    }
                    pieces(&numbers, tiles, row * DEPTH);
                }
            }
        }
    }
}

struct FillColumns<'a> {
    tiles: &'a mut Tiles,
    from: &'a [f32],
    columns: usize,
    depth: usize,
    stride: usize,
}

impl NullaryFnOnce for FillColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, from, columns, depth, stride } = self;
        let (steps, count) = (tiles.steps, tiles.pieces);
        // One column's numbers as they would lie in a left side; their pairs then go to every 16th pair of the tile.
        let mut row = [Tile::ZERO; 2];
        for (block, tiles) in tiles.tiles.chunks_exact_mut(steps * count).enumerate() {
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
    from: &'a [f32],
    depth: usize,
    columns: usize,
    stride: usize,
}

impl NullaryFnOnce for FillRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tiles, from, depth, columns, stride } = self;
        let (steps, count) = (tiles.steps, tiles.pieces);
        for (block, tiles) in tiles.tiles.chunks_exact_mut(steps * count).enumerate() {
            let first = block * EDGE;
            let width = columns.saturating_sub(first).min(EDGE);
            for (step, tiles) in tiles.chunks_exact_mut(count).enumerate() {
                for pair in 0..DEPTH / 2 {
                    let row = |number: usize| {
                        let mut numbers = [0.0; EDGE];
                        if number < depth {
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
