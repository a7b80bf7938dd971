//! Products of matrices of bfloat16 with sums in f32, by the instructions that processors have for them.
//!
//! candle's CPU backend has no such product. On a processor with AMX it is about six times as fast as one of f32.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod heads;
mod layout;
mod ops;
mod product;

use std::sync::OnceLock;

pub use layout::Precision;
pub(crate) use ops::{PackedKeysValues, PackedLinear, packed_self_attention};

use layout::Tile;

/// 32 rows of 32 numbers: what one call of a kernel makes.
#[repr(C, align(64))]
struct Block([f32; 32 * 32]);

impl Block {
    const ZERO: Self = Self([0.0; 32 * 32]);
}

/// What a block is the product of: two left and two right blocks of tiles, with `steps` steps of `pieces` tiles each.
#[derive(Clone, Copy)]
struct Operands<'a> {
    left: [&'a [Tile]; 2],
    right: [&'a [Tile]; 2],
    steps: usize,
    pieces: usize,
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

/// Multiplies blocks on this thread.
enum Kernel {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Session),
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    fn start(instructions: Instructions) -> Self {
        match instructions {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Instructions::Amx => Self::Amx(amx::Session::start()),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
        }
    }

    /// `block` becomes the product. Its sums run along the depth, in an order that is the same for every row.
    #[inline(always)]
    fn multiply(&self, operands: Operands<'_>, block: &mut Block) {
        match *self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(ref session) => session.multiply(operands, block),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::multiply(operands, block),
        }
    }
}
