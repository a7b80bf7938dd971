//! Products of matrices that lie in tiles, with sums in f32: of bfloat16 by the instructions that processors have for them, of f32, and
//! of 8-bit integers.
//!
//! candle's CPU backend has no product of bfloat16. On a processor with AMX it is about six times as fast as one of f32. What lies in tiles is
//! laid out once, and what comes before and behind a product is done while its rows are in the cache.

mod absorbed;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod fma;
mod heads;
mod int8;
mod layout;
mod math;
mod ops;
mod product;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

use std::cell::Cell;
use std::sync::OnceLock;

pub use layout::Precision;
pub(crate) use math::activate_with_slope;
pub(crate) use ops::{PackedCrossAttention, PackedLinear, PackedStates, packed_self_attention};
pub(crate) use product::{Inputs, Norm, Weights};

use layout::{DEPTH, EDGE, Tile, Tiles};

/// What is multiplied: some blocks of a left and of a right side, `steps` steps of `pieces` tiles.
struct Operands<'a> {
    left: &'a [Tile],
    /// In place of those, see [`Left::Rows`]; else empty.
    rows: &'a [f32],
    right: &'a [Tile],
    steps: usize,
    pieces: usize,
    /// Tiles from one right block to the next: it may go on in depth. Those on the left do not.
    right_stride: usize,
    /// The product is added to what is there.
    add: bool,
}

/// The left side of a product.
#[derive(Clone, Copy)]
enum Left<'a> {
    Tiles(&'a Tiles),
    /// Rows of f32 as they lie, of whole steps: [`Instructions::Fma`] read them as fast.
    Rows(&'a [f32]),
}

/// Room that a thread works in, kept from one product to the next: fresh memory costs as much as some of the work.
#[derive(Default)]
struct Scratch {
    left: Tiles,
    /// What lies between the two layers of an MLP; the weights of attention.
    between: Tiles,
    keys: Tiles,
    values: Tiles,
    numbers: Vec<f32>,
    more_numbers: Vec<f32>,
}

impl Scratch {
    /// Lends this thread's room. Within `work` there is another one.
    fn lend<R>(work: impl FnOnce(&mut Self) -> R) -> R {
        thread_local!(static ROOM: Cell<Scratch> = Cell::default());
        let mut scratch = ROOM.take();
        let result = work(&mut scratch);
        ROOM.set(scratch);
        result
    }
}

/// The first `count` of some numbers, more of them if need be, in whole lines of the cache; what they are has no meaning.
fn room(numbers: &mut Vec<f32>, count: usize) -> &mut [f32] {
    const LINE: usize = 64;
    let lines = LINE / size_of::<f32>();
    if numbers.len() < count + lines {
        numbers.resize(count + lines, 0.0);
    }
    // Where this is not known, everything works and is slower.
    let skipped = numbers.as_ptr().align_offset(LINE).min(lines);
    &mut numbers[skipped..skipped + count]
}

/// What a kernel makes at once, in whole lines of the cache.
#[repr(C, align(64))]
struct Block([f32; 4 * EDGE * EDGE]);

impl Block {
    const ZERO: Self = Self([0.0; 4 * EDGE * EDGE]);
}

/// Instructions for products in tiles; [`Self::found`] says which this processor has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Instructions {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Vnni,
    Fma,
}

impl Instructions {
    /// All that this processor has, the best first.
    fn found() -> &'static [Self] {
        static FOUND: OnceLock<Vec<Instructions>> = OnceLock::new();
        FOUND.get_or_init(|| {
            [
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                (amx::available as fn() -> bool, Self::Amx),
                #[cfg(target_arch = "x86_64")]
                (avx512::available as fn() -> bool, Self::Avx512),
                #[cfg(target_arch = "x86_64")]
                (vnni::available, Self::Vnni),
                (fma::available, Self::Fma),
            ]
            .into_iter()
            .filter_map(|(available, instructions): (fn() -> bool, Self)| available().then_some(instructions))
            .collect()
        })
    }

    /// Whether they make products of this precision.
    fn makes(self, precision: Precision) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx => matches!(precision, Precision::Bf16 | Precision::Bf16x3),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => matches!(precision, Precision::Bf16 | Precision::Bf16x3),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => precision == Precision::Int8,
            Self::Fma => precision == Precision::F32,
        }
    }

    fn best(precision: Precision) -> Option<Self> {
        Self::found().iter().copied().find(|instructions| instructions.makes(precision))
    }
}

/// Whether this processor has instructions for products of this precision.
#[must_use]
pub fn multiplies(precision: Precision) -> bool {
    Instructions::best(precision).is_some()
}

/// Whether this processor makes products of this precision faster than those of f32.
#[must_use]
pub fn is_fast(precision: Precision) -> bool {
    match Instructions::best(precision) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Some(Instructions::Amx) => true,
        // Three products for one are what two of f32 are.
        #[cfg(target_arch = "x86_64")]
        Some(Instructions::Avx512) => precision == Precision::Bf16 && avx512::is_fast(),
        #[cfg(target_arch = "x86_64")]
        Some(Instructions::Vnni) => true,
        _ => false,
    }
}

/// Multiplies blocks on this thread.
enum Kernel {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Session),
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// This and the next for so many rows.
    #[cfg(target_arch = "x86_64")]
    Vnni(usize),
    Fma(usize),
}

impl Kernel {
    /// For left sides of `rows` rows in all. Where these are few, another shape of blocks makes the same sums faster.
    fn start(instructions: Instructions, rows: usize) -> Self {
        match instructions {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Instructions::Amx => Self::Amx(amx::Session::start(rows)),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Instructions::Vnni => Self::Vnni(rows),
            Instructions::Fma => Self::Fma(rows),
        }
    }

    /// Rows and columns of what [`Self::multiply`] makes.
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        match *self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(ref session) => session.shape(),
            _ => (2 * EDGE, 2 * EDGE),
        }
    }

    /// Writes the product of block `row` of the left side and block `column` of the right side, in blocks of [`Self::shape`], into `out`,
    /// whose rows are `stride` apart. Sums run along the depth, in an order that is the same for every row and shape.
    #[inline(always)]
    fn multiply(&self, (left, row): (&Tiles, usize), right: (&Tiles, usize), out: &mut [f32], stride: usize) {
        self.multiply_part((Left::Tiles(left), row), right, 0, out, stride);
    }

    /// [`Self::multiply`] of a left side that is only a part of the depth, which begins at step `first` of the right side. What does not begin
    /// it is added to `out`, which so becomes the same as in one go.
    #[inline(always)]
    fn multiply_part(
        &self,
        (left, row): (Left<'_>, usize),
        (right, column): (&Tiles, usize),
        first: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let (rows, columns) = self.shape();
        let (left, whole, steps, pieces) = match left {
            Left::Tiles(left) => (left.blocks(row * rows / EDGE), &[][..], left.steps, left.pieces),
            Left::Rows(whole) => (&[][..], &whole[row * rows * right.steps * DEPTH..], right.steps, right.pieces),
        };
        debug_assert!(pieces == right.pieces && first + steps <= right.steps);
        let operands = Operands {
            left,
            rows: whole,
            right: &right.blocks(column * columns / EDGE)[first * right.pieces..],
            steps,
            pieces,
            right_stride: right.steps * right.pieces,
            add: first > 0,
        };
        match *self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(ref session) => session.multiply(&operands, out, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::multiply(&operands, out, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(count) => vnni::multiply(&operands, count - row * rows, out, stride),
            Self::Fma(count) => fma::multiply(&operands, count - row * rows, out, stride),
        }
    }
}
