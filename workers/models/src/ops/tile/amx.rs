//! Products of tiles by Intel's AMX (`TDPBF16PS`).
//!
//! The intrinsics are not stable, so the loop is in assembler; that it is one block also keeps the state of the tile registers out of the
//! compiler's sight.
#![allow(unsafe_code, reason = "tile registers can be reached in no other way; lengths are checked before every block")]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;

use super::Operands;
use super::layout::{DEPTH, EDGE, Tile};

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
pub(super) struct Session {
    narrow: bool,
    /// Registers belong to one thread.
    _thread: PhantomData<*const ()>,
}

impl Session {
    /// For left sides of `rows` rows in all. Must only be called where [`available`] has said yes.
    pub(super) fn start(rows: usize) -> Self {
        let narrow = rows <= EDGE;
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(EDGE as u8);
        if narrow {
            // Results and the left side: the time of a product goes with its rows.
            config.rows[..5].fill(rows.max(1) as u8);
        }
        // SAFETY: `config` is valid for palette 1; the processor has AMX.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self { narrow, _thread: PhantomData }
    }

    /// Rows and columns of a result.
    #[inline(always)]
    pub(super) fn shape(&self) -> (usize, usize) {
        if self.narrow { (EDGE, 4 * EDGE) } else { (2 * EDGE, 2 * EDGE) }
    }

    /// See [`Kernel::multiply`](super::Kernel::multiply).
    #[inline(always)]
    pub(super) fn multiply(&self, operands: &Operands<'_>, out: &mut [f32], stride: usize) {
        let &Operands { left, right, steps, pieces, right_stride, add, .. } = operands;
        let size = steps * pieces;
        let (left_blocks, right_blocks) = if self.narrow { (1, 4) } else { (2, 2) };
        assert!(steps > 0 && left.len() >= left_blocks * size && right.len() >= (right_blocks - 1) * right_stride + size);
        assert!(stride >= right_blocks * EDGE && out.len() >= (left_blocks * EDGE - 1) * stride + right_blocks * EDGE);
        let (left, right, out) = (left.as_ptr(), right.as_ptr(), out.as_mut_ptr());
        let args = Args { left, right, size, right_stride, steps, add, out, stride };
        // SAFETY: all that the kernels read and write was measured above.
        unsafe {
            match (self.narrow, pieces) {
                (false, 1) => wide_single(args),
                (false, _) => wide_double(args),
                (true, 1) => narrow_single(args),
                (true, _) => narrow_double(args),
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: only gives the registers back; threads without tiles are switched faster.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

struct Args {
    left: *const Tile,
    right: *const Tile,
    /// Tiles of a left block, and from one right block to the next.
    size: usize,
    right_stride: usize,
    steps: usize,
    /// The sums begin with what is there.
    add: bool,
    out: *mut f32,
    stride: usize,
}

/// Two left and two right blocks: `tmm0` to `tmm3` are the quarters of the result.
macro_rules! wide {
    ($name:ident, $bytes:literal, $($line:literal),+) => {
        #[inline(always)]
        unsafe fn $name(args: Args) {
            let Args { left, right, size, right_stride, steps, add, out, stride } = args;
            // SAFETY: as the caller promises.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}", "jnz 3f",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c0} + {stride}*1]", "tileloadd tmm1, [{c0} + {stride}*1 + 64]",
                    "tileloadd tmm2, [{c1} + {stride}*1]", "tileloadd tmm3, [{c1} + {stride}*1 + 64]",
                    "2:",
                    $($line,)+
                    concat!("add {a0}, ", $bytes), concat!("add {a1}, ", $bytes),
                    concat!("add {b0}, ", $bytes), concat!("add {b1}, ", $bytes),
                    "dec {steps}", "jnz 2b",
                    "tilestored [{c0} + {stride}*1], tmm0", "tilestored [{c0} + {stride}*1 + 64], tmm1",
                    "tilestored [{c1} + {stride}*1], tmm2", "tilestored [{c1} + {stride}*1 + 64], tmm3",
                    a0 = inout(reg) left => _, a1 = inout(reg) left.add(size) => _,
                    b0 = inout(reg) right => _, b1 = inout(reg) right.add(right_stride) => _,
                    c0 = in(reg) out, c1 = in(reg) out.add(EDGE * stride),
                    add = in(reg) u32::from(add), steps = inout(reg) steps => _, s = in(reg) DEPTH * size_of::<u16>(), stride = in(reg) stride * size_of::<f32>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

wide!(
    wide_single,
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
wide!(
    wide_double,
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

/// One left and four right blocks, in the same order of sums; `tmm0` to `tmm3` are side by side.
macro_rules! narrow {
    ($name:ident, $bytes:literal, $($line:literal),+) => {
        #[inline(always)]
        unsafe fn $name(args: Args) {
            let Args { left, right, right_stride, steps, add, out, stride, .. } = args;
            // SAFETY: as the caller promises.
            unsafe {
                asm!(
                    "test {add:e}, {add:e}", "jnz 3f",
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "jmp 2f",
                    "3:",
                    "tileloadd tmm0, [{c} + {stride}*1]", "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                    "tileloadd tmm2, [{c} + {stride}*1 + 128]", "tileloadd tmm3, [{c} + {stride}*1 + 192]",
                    "2:",
                    $($line,)+
                    concat!("add {a}, ", $bytes), concat!("add {b0}, ", $bytes), concat!("add {b1}, ", $bytes),
                    concat!("add {b2}, ", $bytes), concat!("add {b3}, ", $bytes),
                    "dec {steps}", "jnz 2b",
                    "tilestored [{c} + {stride}*1], tmm0", "tilestored [{c} + {stride}*1 + 64], tmm1",
                    "tilestored [{c} + {stride}*1 + 128], tmm2", "tilestored [{c} + {stride}*1 + 192], tmm3",
                    a = inout(reg) left => _,
                    b0 = inout(reg) right => _, b1 = inout(reg) right.add(right_stride) => _,
                    b2 = inout(reg) right.add(2 * right_stride) => _, b3 = inout(reg) right.add(3 * right_stride) => _,
                    c = in(reg) out,
                    add = in(reg) u32::from(add), steps = inout(reg) steps => _, s = in(reg) DEPTH * size_of::<u16>(), stride = in(reg) stride * size_of::<f32>(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

narrow!(
    narrow_single,
    "1024",
    "tileloadd tmm4, [{a} + {s}*1]",
    "tileloadd tmm5, [{b0} + {s}*1]",
    "tileloadd tmm6, [{b1} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm5",
    "tileloadd tmm7, [{b2} + {s}*1]",
    "tdpbf16ps tmm1, tmm4, tmm6",
    "tileloadd tmm5, [{b3} + {s}*1]",
    "tdpbf16ps tmm2, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm4, tmm5"
);

narrow!(
    narrow_double,
    "2048",
    "tileloadd tmm4, [{a} + {s}*1 + 1024]",
    "tileloadd tmm5, [{b0} + {s}*1]",
    "tileloadd tmm6, [{b1} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm5",
    "tileloadd tmm7, [{b2} + {s}*1]",
    "tdpbf16ps tmm1, tmm4, tmm6",
    "tileloadd tmm5, [{b3} + {s}*1]",
    "tdpbf16ps tmm2, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm4, tmm5",
    "tileloadd tmm4, [{a} + {s}*1]",
    "tileloadd tmm5, [{b0} + {s}*1]",
    "tdpbf16ps tmm0, tmm4, tmm5",
    "tdpbf16ps tmm1, tmm4, tmm6",
    "tdpbf16ps tmm2, tmm4, tmm7",
    "tileloadd tmm5, [{b3} + {s}*1]",
    "tdpbf16ps tmm3, tmm4, tmm5",
    "tileloadd tmm5, [{b0} + {s}*1 + 1024]",
    "tileloadd tmm6, [{b1} + {s}*1 + 1024]",
    "tdpbf16ps tmm0, tmm4, tmm5",
    "tileloadd tmm7, [{b2} + {s}*1 + 1024]",
    "tdpbf16ps tmm1, tmm4, tmm6",
    "tileloadd tmm5, [{b3} + {s}*1 + 1024]",
    "tdpbf16ps tmm2, tmm4, tmm7",
    "tdpbf16ps tmm3, tmm4, tmm5"
);
