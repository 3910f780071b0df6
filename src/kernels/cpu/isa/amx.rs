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
//! operands of it. So either a whole loop over `k` is one block, from loading its sums to storing them, or a
//! [`Square`] borrows the registers from its first block of instructions to its last.
//!
//! 2 x 2 tiles of sums use all eight registers: per 32 `k` four tile loads (4 KiB) feed four
//! products, 64 cycles of the unit at 16 each. The right tiles are loaded as what is used once (`tileloaddt1`), so that L1
//! keeps the left ones for the next columns. Up to 16 rows 1 x 2 tiles do the same with three loads for two. (A product waits
//! 52 cycles for zeros or for what is stored, but no longer than 16 for sums of the one before.) Where the right operand has 16
//! columns at most, the left ones are read from rows in memory as they lie there, one at a time, which is faster than memory.

#![allow(unsafe_code)]
#![cfg_attr(not(target_arch = "x86_64"), allow(unreachable_code, unused))]

#[cfg(target_arch = "x86_64")]
use std::arch::{asm, x86_64::__cpuid_count};
use std::{cell::Cell, marker::PhantomData, ops::Range, sync::OnceLock};

use bytemuck::{Pod, Zeroable};

use super::{Avx512, SimdOp};

/// Other CPUs have no token, so none of it is ever reached.
#[cfg(not(target_arch = "x86_64"))]
macro_rules! asm {
    ($($_:tt)*) => {
        unreachable!("a token of AMX on a CPU that is not x86-64")
    };
}

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

/// The token of AMX with bf16, on a CPU that has AVX-512 with bf16 too, in a process that may use tiles.
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
            let avx512 = Avx512::detect()?.with_bf16()?;
            (has_instructions() && request_permission()).then_some(())?;
            let amx = Self { avx512 };
            amx.product_is_right().then_some(amx)
        })
    }

    /// The token.
    ///
    /// # Safety
    /// The instructions of AVX-512, AVX512-BF16 and AMX are executed, if not by the CPU.
    pub(super) unsafe fn assume() -> Self {
        // SAFETY: the caller's promise.
        Self { avx512: unsafe { Avx512::assume(true) } }
    }

    /// Runs `op` compiled for AVX-512, where some of it uses AVX512-BF16.
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
            let rows = [a];
            let rows = LeftRows::of_tiles(&rows);
            tiles.multiply_1x2(rows, [&[b]; 2], Corner { sums: &mut sums, row: 0, col: 0 }, true);
        });
        (0..TILE_ROWS).all(|i| {
            (0..2 * TILE_COLS).all(|n| {
                let want: f32 =
                    (0..TILE_K).map(|k| value(i, k) * value(k, n % TILE_COLS + 5)).sum();
                sums.0[i][n] == want
            })
        })
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_instructions() -> bool {
    false
}

/// Whether CPUID has the instructions and the kernel saves the registers.
#[cfg(target_arch = "x86_64")]
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
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
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
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
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

/// Up to 16 rows of a left operand of bf16; 32 `k` are 64 bytes of each.
#[derive(Clone, Copy)]
pub(crate) struct LeftRows<'a> {
    /// From the first row's first `k` on. All rows have all their steps in it: (`rows` - 1) `stride` +
    /// (`steps` - 1) `step` + 64 bytes at least, where there are any.
    bytes: &'a [u8],
    rows: usize,
    /// Bytes from a row to the next.
    stride: usize,
    /// Steps of `k`.
    steps: usize,
    /// Bytes from a step to the next.
    step: usize,
}

/// Bytes of a tile's row.
const LINE: usize = size_of::<[u16; TILE_K]>();

impl<'a> LeftRows<'a> {
    /// The rows of tiles, one a step.
    #[inline(always)]
    pub(crate) fn of_tiles(tiles: &'a [Tile]) -> Self {
        let (bytes, step) = (bytemuck::cast_slice(tiles), size_of::<Tile>());
        Self { bytes, rows: TILE_ROWS, stride: LINE, steps: tiles.len(), step }
    }

    /// Rows as they lie in memory, of which the first one begins with `bytes`.
    ///
    /// # Panics
    /// If the last of them does not have as many steps, or there are more than 16.
    #[inline(always)]
    pub(crate) fn in_memory(bytes: &'a [u8], rows: usize, stride: usize, steps: usize) -> Self {
        assert!(rows <= TILE_ROWS && steps * LINE <= bytes.len());
        assert!(rows <= 1 || stride <= (bytes.len() - steps * LINE) / (rows - 1));
        Self { bytes, rows, stride, steps, step: LINE }
    }

    /// Some of them.
    ///
    /// # Panics
    /// If they are not there.
    #[inline(always)]
    pub(crate) fn part(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        let bytes = self.bytes.get(rows.start * self.stride..).unwrap_or_default();
        Self { bytes, rows: rows.len(), ..self }
    }
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

impl Corner<'_> {
    /// The first of its sums, 32 rows of 32.
    ///
    /// # Panics
    /// If they are not inside the block.
    #[inline(always)]
    fn square(&mut self) -> *mut f32 {
        assert!(self.row == 0 && self.col + 2 * TILE_COLS <= BLOCK_COLS);
        self.sums.0.as_mut_ptr().cast::<f32>().wrapping_add(self.col)
    }
}

/// Bytes from a row of sums to the next.
const SUMS_STRIDE: usize = size_of::<[f32; BLOCK_COLS]>();

impl Amx {
    /// Floating point operations of a round of [`Tiles::spin`].
    pub(crate) const SPIN_FLOPS: usize = 4 * 2 * TILE_ROWS * TILE_COLS * TILE_K;
}

/// From label 3 on, the products of one left and two right tiles a step, added to two tiles of sums.
macro_rules! multiply_one_by_two {
    ($left:literal, $right:literal) => {
        concat!(
            "3:
            tileloadd tmm4, [{a} + {a_stride}*1]
            tileloadd tmm6, [{b0} + {stride}*1]
            tdpbf16ps ",
            $left,
            ", tmm4, tmm6
            tileloadd tmm7, [{b1} + {stride}*1]
            tdpbf16ps ",
            $right,
            ", tmm4, tmm7
            add {a}, {step}
            add {b0}, 1024
            add {b1}, 1024
            dec {n}
            jnz 3b"
        )
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

    /// Four tiles of sums: those at a corner, or zeros where there is none.
    ///
    /// # Panics
    /// If the sums do not begin in row 0, or are not there.
    #[inline(always)]
    pub(crate) fn square(&mut self, from: Option<&mut Corner<'_>>) -> Square<'_> {
        self.configure(TILE_ROWS);
        match from {
            // SAFETY: the configuration above is what the instructions want; no memory is touched.
            None => unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nomem, nostack),
                );
            },
            Some(corner) => {
                let sums = corner.square();
                // SAFETY: the configuration above is what the instructions want; the sums' 32 rows from their first
                // column on are inside the block, as `Corner::square` has made sure.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{c} + {stride}*1]",
                        "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                        "tileloadd tmm2, [{c2} + {stride}*1]",
                        "tileloadd tmm3, [{c2} + {stride}*1 + 64]",
                        c = in(reg) sums,
                        c2 = in(reg) sums.add(TILE_ROWS * BLOCK_COLS),
                        stride = in(reg) SUMS_STRIDE,
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        options(readonly, nostack),
                    );
                }
            }
        }
        Square(self)
    }

    /// Adds the product of 32 rows and 32 columns, or writes it where `overwrite`.
    ///
    /// # Panics
    /// If the operands differ in `k`, have none, or the sums do not begin in row 0.
    #[inline]
    pub(crate) fn multiply_2x2(
        &mut self,
        lhs: [LeftRows<'_>; 2],
        rhs: [&[Tile]; 2],
        mut to: Corner<'_>,
        overwrite: bool,
    ) {
        let mut square = self.square((!overwrite).then_some(&mut to));
        square.add(lhs, rhs);
        square.store(to);
    }

    /// Adds the product of up to 16 rows and 32 columns, or writes it where `overwrite`.
    ///
    /// # Panics
    /// If the operands differ in `k`, have none, or rows or columns are not there.
    #[inline]
    pub(crate) fn multiply_1x2(
        &mut self,
        lhs: LeftRows<'_>,
        rhs: [&[Tile]; 2],
        to: Corner<'_>,
        overwrite: bool,
    ) {
        let n = lhs.steps;
        assert!(n > 0 && rhs.iter().all(|tiles| tiles.len() == n));
        assert!(to.row + lhs.rows <= BLOCK_ROWS && to.col + 2 * TILE_COLS <= BLOCK_COLS);
        self.configure(lhs.rows);
        let sums = to.sums.0.as_mut_ptr().cast::<f32>();
        // SAFETY: the configuration above, of one row at least and 16 at most, is what the instructions want; each operand
        // has `n` steps, which the loop reads one after the other: 16 rows of 64 bytes of the right ones, the rows that
        // `LeftRows` has of the left one; as many rows of sums are inside the block by the assertions.
        unsafe {
            asm!(
                "test {overwrite:e}, {overwrite:e}",
                "jz 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {c_stride}*1]",
                "tileloadd tmm1, [{c} + {c_stride}*1 + 64]",
                multiply_one_by_two!("tmm0", "tmm1"),
                "tilestored [{c} + {c_stride}*1], tmm0",
                "tilestored [{c} + {c_stride}*1 + 64], tmm1",
                overwrite = in(reg) u32::from(overwrite),
                c = in(reg) sums.add(to.row * BLOCK_COLS + to.col),
                c_stride = in(reg) SUMS_STRIDE,
                a = inout(reg) lhs.bytes.as_ptr() => _,
                a_stride = in(reg) lhs.stride,
                step = in(reg) lhs.step,
                b0 = inout(reg) rhs[0].as_ptr() => _,
                b1 = inout(reg) rhs[1].as_ptr() => _,
                stride = in(reg) LINE,
                n = inout(reg) n => _,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
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
        rows: LeftRows<'_>,
        right: &[Tile],
        sums: &mut [[f32; TILE_COLS]],
        overwrite: bool,
    ) {
        assert_eq!(sums.len(), rows.rows);
        assert!(!right.is_empty() && right.len() == rows.steps);
        self.configure(rows.rows);
        // SAFETY: the configuration above, of one row at least and 16 at most, is what the instructions want; the rows have
        // their steps, as many as there are right tiles, and there is a row of 64 bytes of sums for each.
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
                "add {a}, {step}",
                "add {b}, 1024",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {line}*1], tmm0",
                overwrite = in(reg) u32::from(overwrite),
                c = in(reg) sums.as_mut_ptr(),
                line = in(reg) LINE,
                a = inout(reg) rows.bytes.as_ptr() => _,
                stride = in(reg) rows.stride,
                step = in(reg) rows.step,
                b = inout(reg) right.as_ptr() => _,
                n = inout(reg) right.len() => _,
                out("tmm0") _, out("tmm4") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// The sums of 32 rows and 32 columns in tile registers, until they are stored. What runs meanwhile knows no tiles:
/// compilers have no use for them, and [`Tiles`] are borrowed.
pub(crate) struct Square<'a>(#[allow(dead_code)] &'a mut Tiles);

/// Adds a product to half of the rows of a [`Square`], by its two registers.
macro_rules! add_half {
    ($lhs:expr, $rhs:expr, $left:tt, $right:tt) => {
        let (lhs, rhs): (LeftRows<'_>, [&[Tile]; 2]) = ($lhs, $rhs);
        let n = lhs.steps;
        assert!(n > 0 && lhs.rows == TILE_ROWS && rhs.iter().all(|tiles| tiles.len() == n));
        // SAFETY: as in `Square::add`, of three operands.
        unsafe {
            asm!(
                multiply_one_by_two!($left, $right),
                a = inout(reg) lhs.bytes.as_ptr() => _,
                a_stride = in(reg) lhs.stride,
                step = in(reg) lhs.step,
                b0 = inout(reg) rhs[0].as_ptr() => _,
                b1 = inout(reg) rhs[1].as_ptr() => _,
                stride = in(reg) LINE,
                n = inout(reg) n => _,
                out($left) _, out($right) _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    };
}

impl Square<'_> {
    /// Adds a product.
    ///
    /// # Panics
    /// If the operands differ in `k`, or have none.
    #[inline(always)]
    pub(crate) fn add(&mut self, lhs: [LeftRows<'_>; 2], rhs: [&[Tile]; 2]) {
        let LeftRows { rows, stride, steps: n, step, .. } = lhs[0];
        let one = lhs[1];
        assert!((rows, one.rows) == (TILE_ROWS, TILE_ROWS) && n > 0);
        assert!((one.stride, one.steps, one.step) == (stride, n, step));
        assert!(rhs.iter().all(|tiles| tiles.len() == n));
        // SAFETY: `Tiles::square` has configured what the instructions want; each of the four operands has `n` steps of 16
        // rows of 64 bytes, which the loop reads one after the other.
        unsafe {
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {a_stride}*1]",
                "tileloaddt1 tmm6, [{b0} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloaddt1 tmm7, [{b1} + {stride}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {a_stride}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                a0 = inout(reg) lhs[0].bytes.as_ptr() => _,
                a1 = inout(reg) lhs[1].bytes.as_ptr() => _,
                a_stride = in(reg) stride,
                step = in(reg) step,
                b0 = inout(reg) rhs[0].as_ptr() => _,
                b1 = inout(reg) rhs[1].as_ptr() => _,
                stride = in(reg) LINE,
                n = inout(reg) n => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Adds a product to the upper 16 rows.
    ///
    /// # Panics
    /// If the operands differ in `k`, or have none.
    #[inline(always)]
    pub(crate) fn add_upper(&mut self, lhs: LeftRows<'_>, rhs: [&[Tile]; 2]) {
        add_half!(lhs, rhs, "tmm0", "tmm1");
    }

    /// [`Square::add_upper`], of the lower ones.
    #[inline(always)]
    pub(crate) fn add_lower(&mut self, lhs: LeftRows<'_>, rhs: [&[Tile]; 2]) {
        add_half!(lhs, rhs, "tmm2", "tmm3");
    }

    /// Writes the sums.
    ///
    /// # Panics
    /// If they would not begin in row 0, or the corner is not there.
    #[inline(always)]
    pub(crate) fn store(self, mut to: Corner<'_>) {
        let sums = to.square();
        // SAFETY: as in `add`; the sums' 32 rows from their first column on are inside the block, as `Corner::square` has
        // made sure, and `to` has it alone.
        unsafe {
            asm!(
                "tilestored [{c} + {stride}*1], tmm0",
                "tilestored [{c} + {stride}*1 + 64], tmm1",
                "tilestored [{c2} + {stride}*1], tmm2",
                "tilestored [{c2} + {stride}*1 + 64], tmm3",
                c = in(reg) sums,
                c2 = in(reg) sums.add(TILE_ROWS * BLOCK_COLS),
                stride = in(reg) SUMS_STRIDE,
                options(nostack),
            );
        }
    }
}
