//! AMX: eight tile registers of 16 rows by 64 bytes, and the product of two bf16 tiles in f32.
//!
//! `tdpbf16ps` gives `c[m, n] += Σ_k a[m, k] b[k, n]` for 16 x 32 and 32 x 16 values. An element is
//! two chains of 16 fused multiply-adds from zero, one over the even and one over the odd `k`,
//! which are added to each other and then to `c`. Every step rounds to nearest even; denormal
//! inputs count as zero and denormal results become zero; MXCSR plays no part. So a row of `c`
//! depends on its own row of `a` and on `b`, and on nothing else.
//!
//! ```text
//! left operand    Tile  row m:  a[m, 0..32]
//! right operand   Tile  row p:  b[2p, 0] b[2p+1, 0]  b[2p, 1] b[2p+1, 1]  ..  b[2p, 15] b[2p+1, 15]
//! ```
//!
//! The instructions come through inline assembly: the intrinsics are not stable, and tiles cannot be
//! operands of it, so a whole loop over `k` is one block, from loading its sums to storing them.
//!
//! 2 x 2 tiles of sums use all eight registers: per 32 `k` four tile loads (4 KiB) feed four
//! products, 64 cycles of the unit at 16 each, and four chains of sums cover a product's latency of
//! about 52 cycles. The right tiles are loaded as what is used once (`tileloaddt1`), so that L1 keeps the left
//! ones for the next columns. Up to 16 rows 1 x 4 tiles do the same with five loads. Where the right operand has 16
//! columns at most, the left ones are read from rows in memory as they lie there, one at a time, which is faster than memory.

#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::__cpuid_count},
    cell::Cell,
    marker::PhantomData,
    sync::OnceLock,
};

use bytemuck::{Pod, Zeroable};

use super::{Avx512, SimdOp};

/// Rows of a tile register.
pub(crate) const TILE_ROWS: usize = 16;
/// Values of `k` in a tile.
pub(crate) const TILE_K: usize = 32;
/// Columns of the sums that a right tile has.
pub(crate) const TILE_COLS: usize = 16;

/// A tile of bf16 bits in memory.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [[u16; TILE_K]; TILE_ROWS]);

/// Rows of a [`Block`].
pub(crate) const BLOCK_ROWS: usize = 2 * TILE_ROWS;
/// Columns of a [`Block`].
pub(crate) const BLOCK_COLS: usize = 128;

/// Sums of products.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Block(pub(crate) [[f32; BLOCK_COLS]; BLOCK_ROWS]);

/// The token of AMX with bf16, on a CPU that has AVX-512 too, in a process that may use tiles.
#[derive(Clone, Copy, Debug)]
pub struct Amx {
    avx512: Avx512,
}

impl Amx {
    /// The token, if CPU, kernel and a first product say so. Asks the kernel for its permission to
    /// use tiles, once for the process and all its threads.
    pub fn detect() -> Option<Self> {
        static FOUND: OnceLock<Option<Amx>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let avx512 = Avx512::detect()?;
            (has_instructions() && request_permission()).then_some(())?;
            let amx = Self { avx512 };
            amx.product_is_right().then_some(amx)
        })
    }

    /// The token.
    ///
    /// # Safety
    /// The instructions of AVX-512 and AMX are executed, if not by the CPU.
    pub(super) unsafe fn assume() -> Self {
        // SAFETY: the caller's promise.
        Self { avx512: unsafe { Avx512::assume() } }
    }

    /// Runs `op` compiled for AVX-512.
    #[inline]
    pub fn run<O: SimdOp>(self, op: O) -> O::Output {
        self.avx512.run(op)
    }

    /// Runs `work` with tile registers, which are given back at its end: a thread that sleeps with
    /// tiles in use keeps its core from deep sleep, and each switch of threads saves 8 KiB more.
    ///
    /// # Panics
    /// If the calling thread is within one already.
    pub(crate) fn with_tiles<R>(self, work: impl FnOnce(&mut Tiles) -> R) -> R {
        IN_USE.with(|in_use| assert!(!in_use.replace(true), "tiles are in use on this thread"));
        let mut tiles = Tiles { rows: 0, not_send: PhantomData };
        tiles.configure(TILE_ROWS);
        work(&mut tiles)
    }

    /// Whether a product of small integers comes out right: a hypervisor may promise what it does
    /// not keep.
    fn product_is_right(self) -> bool {
        let value = |i: usize, j: usize| ((7 * i + 3 * j) % 9) as f32 - 4.0;
        let bits = |x: f32| (x.to_bits() >> 16) as u16; // Small integers are exact.
        let (mut a, mut b) = (Tile::zeroed(), Tile::zeroed());
        for i in 0..TILE_ROWS {
            for j in 0..TILE_K {
                a.0[i][j] = bits(value(i, j));
                b.0[i][j] = bits(value(2 * i + j % 2, j / 2 + 5));
            }
        }
        let mut sums = Block::zeroed();
        self.with_tiles(|tiles| {
            let rows = LeftRows { tiles: &[a], first: 0, n: TILE_ROWS };
            tiles.multiply_1x4(rows, [&[b]; 4], Corner { sums: &mut sums, row: 0, col: 0 }, true);
        });
        (0..TILE_ROWS).all(|i| {
            (0..4 * TILE_COLS).all(|n| {
                let want: f32 =
                    (0..TILE_K).map(|k| value(i, k) * value(k, n % TILE_COLS + 5)).sum();
                sums.0[i][n] == want
            })
        })
    }
}

/// Whether CPUID has the instructions and the kernel saves the registers.
fn has_instructions() -> bool {
    // SAFETY: every x86-64 CPU has CPUID; leaf 7 is there where AVX-512 is.
    #[allow(unused_unsafe)]
    let (leaf1, leaf7) = unsafe { (__cpuid_count(1, 0), __cpuid_count(7, 0)) };
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_CONFIG_AND_DATA: u32 = 1 << 17 | 1 << 18;
    if leaf1.ecx & OSXSAVE == 0 || leaf7.edx & AMX_BF16_AND_TILE != AMX_BF16_AND_TILE {
        return false;
    }
    let xcr0: u32;
    // SAFETY: OSXSAVE says that XGETBV may be used; register 0 is always there.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nomem, nostack));
    }
    xcr0 & TILE_CONFIG_AND_DATA == TILE_CONFIG_AND_DATA
}

/// Asks Linux (5.16 or later) for the tile data, which it otherwise keeps from a process: its 8 KiB
/// would overflow the signal stacks of old programs.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the system call reads its two integers, writes no memory of ours, and clobbers what
    // is named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems would have to be asked in their own way.
#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

thread_local! {
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread's tile registers, configured.
pub(crate) struct Tiles {
    /// Rows of the sums and of the left operand; a right operand always has all.
    rows: usize,
    not_send: PhantomData<*const ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `Tiles` come from `Amx::with_tiles`, so the instruction is there.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
        IN_USE.with(|in_use| in_use.set(false));
    }
}

/// Some rows of a left operand within one row of tiles.
#[derive(Clone, Copy)]
pub(crate) struct LeftRows<'a> {
    /// One tile a step of `k`.
    pub(crate) tiles: &'a [Tile],
    /// The first row in each tile.
    pub(crate) first: usize,
    /// The number of rows.
    pub(crate) n: usize,
}

/// Where in a block of sums a product is added.
pub(crate) struct Corner<'a> {
    /// The sums.
    pub(crate) sums: &'a mut Block,
    /// The product's first row.
    pub(crate) row: usize,
    /// The product's first column.
    pub(crate) col: usize,
}

/// Rows of bf16 in memory, as a left operand.
#[derive(Clone, Copy)]
pub(crate) struct MemoryRows<'a> {
    /// From the first element of the first row on.
    pub(crate) bytes: &'a [u8],
    /// Bytes from a row to the next.
    pub(crate) stride: usize,
    /// The number of rows, [`TILE_ROWS`] at most.
    pub(crate) n: usize,
}

/// Bytes from a row of sums to the next.
const SUMS_STRIDE: usize = size_of::<[f32; BLOCK_COLS]>();

impl Amx {
    /// Floating point operations of a round of [`Tiles::spin`].
    pub(crate) const SPIN_FLOPS: usize = 4 * 2 * TILE_ROWS * TILE_COLS * TILE_K;
}

/// The start of a product with four tiles of sums: zeros where `overwrite`, then to label 3; else what follows, which
/// loads them.
macro_rules! zeros_or_else {
    () => {
        "test {overwrite:e}, {overwrite:e}
        jz 2f
        tilezero tmm0
        tilezero tmm1
        tilezero tmm2
        tilezero tmm3
        jmp 3f
        2:"
    };
}

impl Tiles {
    /// Four independent products of tiles, `n` times, nothing from memory: how fast the unit is.
    pub(crate) fn spin(&mut self, n: usize) {
        assert!(n > 0);
        self.configure(TILE_ROWS);
        // SAFETY: the configuration above is what the instructions want; no memory is touched.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tilezero tmm4",
                "tilezero tmm5",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm5",
                "tdpbf16ps tmm2, tmm4, tmm5",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) n => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _,
                options(nomem, nostack),
            );
        }
    }

    /// Tiles 0 to 4 (sums, and a left operand) of `rows` rows, the others of 16, all 64 bytes wide.
    fn configure(&mut self, rows: usize) {
        assert!((1..=TILE_ROWS).contains(&rows));
        if self.rows == rows {
            return;
        }
        let mut config = [0_u8; 64];
        config[0] = 1; // The only palette.
        for tile in 0..8 {
            config[16 + 2 * tile] = 64; // Bytes of a row, 16 bits.
            config[48 + tile] = if tile <= 4 { rows as u8 } else { TILE_ROWS as u8 };
        }
        // SAFETY: `Tiles` come from `Amx::with_tiles`, so the instruction is there; it reads the
        // 64 bytes. The tiles' values that it clears are never kept from one block to the next.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(readonly, nostack)) };
        self.rows = rows;
    }

    /// Adds the product of 32 rows and 32 columns, or writes it where `overwrite`.
    ///
    /// # Panics
    /// If the operands differ in `k`, have none, or the sums do not begin in row 0.
    #[inline]
    pub(crate) fn multiply_2x2(
        &mut self,
        lhs: [&[Tile]; 2],
        rhs: [&[Tile]; 2],
        to: Corner<'_>,
        overwrite: bool,
    ) {
        let n = lhs[0].len();
        assert!(n > 0 && [lhs[1], rhs[0], rhs[1]].iter().all(|tiles| tiles.len() == n));
        assert!(to.row == 0 && to.col + 2 * TILE_COLS <= BLOCK_COLS);
        self.configure(TILE_ROWS);
        let sums = to.sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: the configuration above is what the instructions want; each of the four operands
        // has `n` tiles, which the loop reads one after the other, 16 rows of 64 bytes each; the
        // sums' 32 rows from `to.col` on are inside the block by the assertions.
        unsafe {
            asm!(
                zeros_or_else!(),
                "tileloadd tmm0, [{c} + {c_stride}*1]",
                "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
                "tileloadd tmm2, [{c2} + {c_stride}*1]",
                "tileloadd tmm3, [{c2} + {c_stride}*1 + 64]",
                "3:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloaddt1 tmm6, [{b0} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm7, [{b1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 1024",
                "add {a1}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                "tilestored [{c2} + {c_stride}*1], tmm2",
                "tilestored [{c2} + {c_stride}*1 + 64], tmm3",
                overwrite = in(reg) u32::from(overwrite),
                c = in(reg) sums.add(to.col),
                c2 = in(reg) sums.add(TILE_ROWS * BLOCK_COLS + to.col),
                c_stride = in(reg) SUMS_STRIDE,
                a0 = inout(reg) lhs[0].as_ptr() => _,
                a1 = inout(reg) lhs[1].as_ptr() => _,
                b0 = inout(reg) rhs[0].as_ptr() => _,
                b1 = inout(reg) rhs[1].as_ptr() => _,
                stride = in(reg) size_of::<[u16; TILE_K]>(),
                n = inout(reg) n => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Adds the product of up to 16 rows and 64 columns, or writes it where `overwrite`.
    ///
    /// # Panics
    /// If the operands differ in `k`, have none, or rows or columns are not there.
    #[inline]
    pub(crate) fn multiply_1x4(
        &mut self,
        lhs: LeftRows<'_>,
        rhs: [&[Tile]; 4],
        to: Corner<'_>,
        overwrite: bool,
    ) {
        let n = lhs.tiles.len();
        assert!(n > 0 && rhs.iter().all(|tiles| tiles.len() == n));
        assert!(lhs.first + lhs.n <= TILE_ROWS);
        assert!(to.row + lhs.n <= BLOCK_ROWS && to.col + 4 * TILE_COLS <= BLOCK_COLS);
        self.configure(lhs.n);
        let sums = to.sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: as above, with `lhs.n` rows from `lhs.first` on of each left tile, which are
        // inside the tile, and as many rows of sums.
        unsafe {
            asm!(
                zeros_or_else!(),
                "tileloadd tmm0, [{c} + {c_stride}*1]",
                "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
                "tileloadd tmm2, [{c} + {c_stride}*1 + 128]",
                "tileloadd tmm3, [{c} + {c_stride}*1 + 192]",
                "3:",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "tileloadd tmm5, [{b0} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{b2} + {stride}*1]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{b3} + {stride}*1]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {a}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "add {b2}, 1024",
                "add {b3}, 1024",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                "tilestored [{c} + {c_stride}*1 + 128], tmm2",
                "tilestored [{c} + {c_stride}*1 + 192], tmm3",
                overwrite = in(reg) u32::from(overwrite),
                c = in(reg) sums.add(to.row * BLOCK_COLS + to.col),
                c_stride = in(reg) SUMS_STRIDE,
                a = inout(reg) lhs.tiles.as_ptr().cast::<[u16; TILE_K]>().add(lhs.first) => _,
                b0 = inout(reg) rhs[0].as_ptr() => _,
                b1 = inout(reg) rhs[1].as_ptr() => _,
                b2 = inout(reg) rhs[2].as_ptr() => _,
                b3 = inout(reg) rhs[3].as_ptr() => _,
                stride = in(reg) size_of::<[u16; TILE_K]>(),
                n = inout(reg) n => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Adds the product of rows that are read from where they lie and up to 16 columns, a right tile for
    /// each 32 `k`, or writes it where `overwrite`. Nothing is prefetched: CPUs follow 16 rows, but not 64.
    ///
    /// # Panics
    /// If the rows or the sums are not there, or there is no `k`.
    #[inline]
    pub(crate) fn multiply_rows(
        &mut self,
        rows: MemoryRows<'_>,
        right: &[Tile],
        sums: &mut [[f32; TILE_COLS]],
        overwrite: bool,
    ) {
        const LINE: usize = size_of::<[u16; TILE_K]>();
        let MemoryRows { bytes, stride, n } = rows;
        assert_eq!(sums.len(), n);
        assert!(!right.is_empty() && right.len() * LINE <= bytes.len());
        assert!(n == 1 || stride <= (bytes.len() - right.len() * LINE) / (n - 1));
        self.configure(n);
        // SAFETY: the configuration above, of one row at least and 16 at most, is what the instructions want; by the
        // assertions the last of the rows has the bytes of `right.len()` steps, and there is a row of 64 bytes of
        // sums for each.
        unsafe {
            asm!(
                "test {overwrite:e}, {overwrite:e}",
                "jz 2f",
                "tilezero tmm0",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {line}*1]",
                "3:",
                "tileloadd tmm7, [{b} + {line}*1]",
                "tileloadd tmm4, [{a} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm7",
                "add {a}, {line}",
                "add {b}, 1024",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {line}*1], tmm0",
                overwrite = in(reg) u32::from(overwrite),
                c = in(reg) sums.as_mut_ptr(),
                line = in(reg) LINE,
                a = inout(reg) bytes.as_ptr() => _,
                stride = in(reg) stride,
                b = inout(reg) right.as_ptr() => _,
                n = inout(reg) right.len() => _,
                out("tmm0") _, out("tmm4") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
