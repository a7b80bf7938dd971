//! Products of matrices of bfloat16 with sums in f32, by the instructions that processors have for them.
//!
//! candle's CPU backend has no such product. On a processor with AMX it is about six times as fast as one of f32.

mod absorbed;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod heads;
mod layout;
mod math;
mod ops;
mod product;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::OnceLock;

pub use layout::Precision;
pub(crate) use ops::{PackedCrossAttention, PackedLinear, PackedStates, packed_self_attention};

use layout::{EDGE, Tile, Tiles};

/// What is multiplied: some blocks of a left and of a right side, each block `steps` steps of `pieces` tiles.
struct Operands<'a> {
    left: &'a [Tile],
    right: &'a [Tile],
    steps: usize,
    pieces: usize,
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

/// The instructions of this processor for such products; where there are none the type has no value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Instructions {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx512,
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
            ]
            .into_iter()
            .filter_map(|(available, instructions): (fn() -> bool, Self)| available().then_some(instructions))
            .collect()
        })
    }

    fn best() -> Option<Self> {
        Self::found().first().copied()
    }
}

/// Whether this processor multiplies bfloat16 faster than f32.
#[must_use]
pub fn has_bf16() -> bool {
    Instructions::best().is_some()
}

/// Whether it does so even where three products stand for one ([`Precision::Bf16x3`]).
#[must_use]
pub fn has_fast_bf16() -> bool {
    match Instructions::best() {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Some(Instructions::Amx) => true,
        _ => false,
    }
}

/// Multiplies blocks on this thread.
enum Kernel {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Session),
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// For left sides of `rows` rows in all. Where these are few, another shape of blocks makes the same sums faster.
    fn start(instructions: Instructions, rows: usize) -> Self {
        match instructions {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Instructions::Amx => Self::Amx(amx::Session::start(rows)),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
        }
    }

    /// Rows and columns of what [`Self::multiply`] makes.
    #[inline(always)]
    fn shape(&self) -> (usize, usize) {
        match *self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(ref session) => session.shape(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => (2 * EDGE, 2 * EDGE),
        }
    }

    /// Writes the product of block `row` of the left side and block `column` of the right side, in blocks of [`Self::shape`], into `out`,
    /// whose rows are `stride` apart. Sums run along the depth, in an order that is the same for every row and shape.
    #[inline(always)]
    fn multiply(&self, (left, row): (&Tiles, usize), (right, column): (&Tiles, usize), out: &mut [f32], stride: usize) {
        debug_assert_eq!((left.steps, left.pieces), (right.steps, right.pieces));
        let (rows, columns) = self.shape();
        let operands = Operands {
            left: left.blocks(row * rows / EDGE),
            right: right.blocks(column * columns / EDGE),
            steps: left.steps,
            pieces: left.pieces,
        };
        match *self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(ref session) => session.multiply(&operands, out, stride),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::multiply(&operands, out, stride),
        }
    }
}
