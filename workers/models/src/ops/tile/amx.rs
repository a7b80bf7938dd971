//! Products of tiles by Intel's AMX (`TDPBF16PS`).
//!
//! The intrinsics are not stable, so the loop is in assembler; that it is one block also keeps the state of the tile registers out of the
//! compiler's sight.
#![allow(unsafe_code, reason = "tile registers can be reached in no other way; lengths are checked before every block")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

use super::layout::{DEPTH, Tile};
use super::{Block, Operands};

/// `ARCH_REQ_XCOMP_PERM` of `arch_prctl`, and the state component that holds tiles.
const REQUEST_PERMISSION: libc::c_int = 0x1023;
const TILE_DATA: libc::c_ulong = 18;

/// Whether this processor has AMX for bfloat16 and the kernel lets this process use it; asks it to.
pub(super) fn available() -> bool {
    let features = __cpuid_count(7, 0).edx;
    let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
    // SAFETY: the call changes nothing but what this process may use.
    bf16 == 1 && tile == 1 && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
}

/// The memory operand of `LDTILECFG`: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// A time during which this thread's tile registers are set up.
pub(super) struct Session(PhantomData<*const ()>);

impl Session {
    /// Must only be called where [`available`] has said yes.
    pub(super) fn start() -> Self {
        const TILES: usize = 8;
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..TILES].fill(64);
        config.rows[..TILES].fill(16);
        // SAFETY: `config` is valid for palette 1; the processor has AMX.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(PhantomData)
    }

    /// See [`Kernel::multiply`](super::Kernel::multiply).
    #[inline(always)]
    pub(super) fn multiply(&self, operands: Operands<'_>, block: &mut Block) {
        let Operands { left, right, steps, pieces } = operands;
        assert!(steps > 0 && [left[0], left[1], right[0], right[1]].iter().all(|tiles| tiles.len() >= steps * pieces));
        let [a0, a1, b0, b1] = [left[0], left[1], right[0], right[1]].map(<[Tile]>::as_ptr);
        match pieces {
            // SAFETY: the pointers are good for `steps · pieces` tiles, the block for 32 rows of 32 numbers.
            1 => unsafe { single(a0, a1, b0, b1, steps, block.0.as_mut_ptr()) },
            // SAFETY: the same.
            _ => unsafe { double(a0, a1, b0, b1, steps, block.0.as_mut_ptr()) },
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: only gives the registers back; threads without tiles are switched faster.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// The four products of two left and two right tiles, added up over the steps: `tmm0` to `tmm3` are the quarters of the block.
macro_rules! kernel {
    ($name:ident, $bytes:literal, $($step:literal),+) => {
        #[inline(always)]
        unsafe fn $name(a0: *const Tile, a1: *const Tile, b0: *const Tile, b1: *const Tile, steps: usize, block: *mut f32) {
            // SAFETY: as the caller promises.
            unsafe {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "2:",
                    $($step,)+
                    concat!("add {a0}, ", $bytes), concat!("add {a1}, ", $bytes),
                    concat!("add {b0}, ", $bytes), concat!("add {b1}, ", $bytes),
                    "dec {steps}", "jnz 2b",
                    "tilestored [{c} + {s}*2], tmm0", "tilestored [{c} + {s}*2 + 64], tmm1",
                    "tilestored [{c} + {s}*2 + 2048], tmm2", "tilestored [{c} + {s}*2 + 2112], tmm3",
                    a0 = inout(reg) a0 => _, a1 = inout(reg) a1 => _, b0 = inout(reg) b0 => _, b1 = inout(reg) b1 => _,
                    steps = inout(reg) steps => _, c = in(reg) block, s = in(reg) DEPTH * size_of::<u16>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(
    single,
    "1024",
    "tileloadd tmm4, [{a0} + {s}*1]",
    "tileloadd tmm6, [{b0} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm7, [{b1} + {s}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{a1} + {s}*1]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7"
);

// Small products first: low · high, high · high, high · low.
kernel!(
    double,
    "2048",
    "tileloadd tmm4, [{a0} + {s}*1 + 1024]",
    "tileloadd tmm6, [{b0} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm7, [{b1} + {s}*1]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{a1} + {s}*1 + 1024]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm4, [{a0} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tileloadd tmm5, [{a1} + {s}*1]",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7",
    "tileloadd tmm6, [{b0} + {s}*1 + 1024]",
    "tdpbf16ps tmm0, tmm4, tmm6",
    "tileloadd tmm7, [{b1} + {s}*1 + 1024]",
    "tdpbf16ps tmm1, tmm4, tmm7",
    "tdpbf16ps tmm2, tmm5, tmm6",
    "tdpbf16ps tmm3, tmm5, tmm7"
);
