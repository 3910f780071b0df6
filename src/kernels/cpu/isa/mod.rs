//! Instruction sets: one vector type of 16 f32 lanes, whatever the hardware's width.
//!
//! A kernel is a [`SimdOp`], written once over [`Simd`], without unsafe. The logical vector has 16
//! lanes everywhere (two registers on AVX2, an array on the scalar path), so every instruction set
//! adds up in the same order: AVX2 and AVX-512 give the same bits, and the scalar path differs only
//! in that it rounds products before adding them.
//!
//! A token ([`Avx2`], [`Avx512`], [`Amx`]) exists only on a CPU that has its instructions; holding one is the
//! proof that its intrinsics may run.

mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(not(target_arch = "x86_64"))]
mod elsewhere;
mod scalar;

pub use amx::Amx;
pub(super) use amx::{
    BLOCK_COLS, BLOCK_ROWS, Block, Corner, LeftRows, Square, TILE_COLS, TILE_K, TILE_ROWS, Tile,
    Tiles,
};
#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
#[cfg(not(target_arch = "x86_64"))]
pub use elsewhere::{Avx2, Avx512};
pub use scalar::Scalar;

use half::bf16;

use crate::error::{Error, Result};

/// Lanes of the logical vector.
pub const LANES: usize = 16;

/// A kernel, generic over the instruction set.
pub trait SimdOp {
    /// What it gives.
    type Output;
    /// Runs it. Mark the implementation `#[inline(always)]`, or it is compiled for the baseline
    /// instead of the token's features.
    fn eval<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on a vector of 16 f32 lanes. Every method is lane by lane unless it says otherwise.
pub trait Simd: Copy + Send + Sync + 'static {
    /// 16 lanes.
    type V: Copy;
    /// Rows of the register tile of attention's products.
    const MR: usize;
    /// Vectors in a row of it.
    const NV: usize;
    /// Rows and columns of the register tile of [`Simd::add_tile`].
    const TILE: (usize, usize);

    /// All lanes the same.
    fn splat(self, x: f32) -> Self::V;
    /// From memory.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// To memory.
    fn store(self, v: Self::V, to: &mut [f32; LANES]);
    /// From bf16, exactly.
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V;
    /// To bf16, rounded to nearest even; NaN stays NaN.
    fn store_bf16(self, v: Self::V, to: &mut [bf16; LANES]);
    /// [`Simd::store_bf16`], where denormals may become zero if that is faster.
    #[inline(always)]
    fn store_bf16_flushed(self, v: Self::V, to: &mut [bf16; LANES]) {
        self.store_bf16(v, to);
    }
    /// [`Simd::store_bf16_flushed`] of two vectors; with `past`, past the caches if they are a line of memory and the
    /// instruction set has a way. Then other threads see it after [`Simd::fence`].
    #[inline(always)]
    fn store_pair_bf16(self, v: [Self::V; 2], to: &mut [bf16; 2 * LANES], past: bool) {
        let _ = past;
        for (v, to) in v.into_iter().zip(to.as_chunks_mut().0) {
            self.store_bf16_flushed(v, to);
        }
    }
    /// [`Simd::store`], past the caches as [`Simd::store_pair_bf16`].
    #[inline(always)]
    fn store_past(self, v: Self::V, to: &mut [f32; LANES]) {
        self.store(v, to);
    }
    /// What has gone past the caches is in memory before anything that is written later.
    #[inline(always)]
    fn fence(self) {}
    /// From 16 little-endian f32 at any alignment.
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> Self::V;
    /// From 16 little-endian bf16 at any alignment.
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V;
    /// From 16 little-endian f16 at any alignment.
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V;

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once (twice on the scalar path).
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integral `n` in `-126..=127`.
    fn exp2_integral(self, n: Self::V) -> Self::V;
    /// `a 2^n` for integral `n` in `-126..=128`, in the order that keeps what is an f32 one.
    #[inline(always)]
    fn times_exp2(self, a: Self::V, n: Self::V) -> Self::V {
        // 2^128 is no f32, but a 2^127 * 2 may be one.
        let top = self.splat(127.0);
        let value = self.mul(a, self.exp2_integral(self.min(top, n)));
        self.select_lt(top, n, self.add(value, value), value)
    }
    /// `yes` where `a < b`, else `no`.
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;

    /// Lane `j` of vector `i` becomes lane `i` of vector `j`.
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES];

    /// [`Simd::transpose`] from 16 rows of 64 bytes in memory, each `stride` bytes after the one before, to memory. What
    /// follows in the rows may be fetched into the cache meanwhile.
    ///
    /// # Panics
    /// If the last row is not there.
    #[inline(always)]
    fn transpose_rows(self, bytes: &[u8], stride: usize, to: &mut [[f32; LANES]; LANES]) {
        let mut rows = [self.splat(0.0); LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = self.load_f32_bytes(bytes[i * stride..].first_chunk().expect("a whole row"));
        }
        for (to, column) in to.iter_mut().zip(self.transpose(rows)) {
            self.store(column, to);
        }
    }

    /// The lanes' sum, as a tree: `i + (i + 8)`, then `+ 4`, `+ 2`, `+ 1`.
    fn sum(self, v: Self::V) -> f32;
    /// [`Simd::sum`] of four vectors.
    #[inline(always)]
    fn sum_4(self, v: [Self::V; 4]) -> [f32; 4] {
        let mut sums = [0.0; 4];
        for (sum, v) in sums.iter_mut().zip(v) {
            *sum = self.sum(v);
        }
        sums
    }
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// `sums[m, n] += Σ_k lhs[k, m] rhs[k, n]`, each a chain of [`Simd::fma`] from zero in the order of
    /// `k`; the tile's rows and columns are [`Simd::TILE`]. Where these are the `first` products, what
    /// was in the sums is ignored. `next_lhs`, the left operand of the next call, may be fetched into the
    /// cache meanwhile.
    fn add_tile(self, lhs: &[f32], rhs: &[f32], sums: &mut [f32], first: bool, next_lhs: &[f32]);

    /// Starts fetching values into the cache, where the instruction set can.
    #[inline(always)]
    fn prefetch<T>(self, _: &[T]) {}
    /// The same into the L2 cache, for what is wanted later.
    #[inline(always)]
    fn prefetch_l2<T>(self, x: &[T]) {
        self.prefetch(x);
    }

    /// From fewer than 16 values; the other lanes are `fill`.
    #[inline(always)]
    fn load_part(self, x: &[f32], fill: f32) -> Self::V {
        let mut lanes = [fill; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// The first lanes to memory.
    #[inline(always)]
    fn store_part(self, v: Self::V, to: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        to.copy_from_slice(&lanes[..to.len()]);
    }
}

/// A register tile with `lhs[m] rhs[n]` added to its sums.
#[inline(always)]
pub(super) fn step<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    lhs: &[f32; MR],
    rhs: &[[f32; LANES]; NV],
    mut tile: [[S::V; NV]; MR],
) -> [[S::V; NV]; MR] {
    let mut vectors = [simd.splat(0.0); NV];
    for j in 0..NV {
        vectors[j] = simd.load(&rhs[j]);
    }
    for m in 0..MR {
        let l = simd.splat(lhs[m]);
        for j in 0..NV {
            tile[m][j] = simd.fma(l, vectors[j], tile[m][j]);
        }
    }
    tile
}

/// [`Simd::add_tile`] of a tile of `MR` rows and `NV` vectors.
#[inline(always)]
fn add_tile<S: Simd, const MR: usize, const NV: usize>(
    simd: S,
    lhs: &[f32],
    rhs: &[f32],
    sums: &mut [f32],
    first: bool,
    next_lhs: &[f32],
) {
    /// Steps of k between prefetches: of as many lines as a tile's rows at most.
    const TOGETHER: usize = 4;
    assert_eq!(lhs.len(), next_lhs.len(), "tiles of one block of k");
    let mut tile = [[simd.splat(0.0); NV]; MR];
    let (lhs, rest) = lhs.as_chunks::<MR>().0.as_chunks::<TOGETHER>();
    let next_lhs = next_lhs.as_chunks::<MR>().0.as_chunks::<TOGETHER>().0;
    let (rhs, _) = rhs.as_chunks::<LANES>().0.as_chunks::<NV>();
    let (rhs, rhs_rest) = rhs.as_chunks::<TOGETHER>();
    for ((lhs, next), rhs) in lhs.iter().zip(next_lhs).zip(rhs) {
        simd.prefetch(next);
        for (l, r) in lhs.iter().zip(rhs) {
            tile = step(simd, l, r, tile);
        }
    }
    for (l, r) in rest.iter().zip(rhs_rest) {
        tile = step(simd, l, r, tile);
    }
    let (sums, _) = sums.as_chunks_mut::<LANES>().0.as_chunks_mut::<NV>();
    for (sums, tile) in sums.iter_mut().zip(tile) {
        for j in 0..NV {
            let before = if first { simd.splat(0.0) } else { simd.load(&sums[j]) };
            simd.store(simd.add(before, tile[j]), &mut sums[j]);
        }
    }
}

/// An element type in memory: activations (`f32`, `bf16`) and a mapped file's bytes ([`F32Bytes`],
/// [`Bf16Bytes`], [`F16Bytes`]).
pub trait Element: 'static {
    /// One element as it lies in memory.
    type Item: bytemuck::Pod + Send + Sync;
    /// 16 of them.
    fn load<S: Simd>(simd: S, x: &[Self::Item; LANES]) -> S::V;
    /// One of them.
    fn get(item: Self::Item) -> f32;

    /// From fewer than 16; the other lanes are 0.
    #[inline(always)]
    fn load_part<S: Simd>(simd: S, x: &[Self::Item]) -> S::V {
        let mut lanes = [0.0; LANES];
        for (lane, &item) in lanes.iter_mut().zip(x) {
            *lane = Self::get(item);
        }
        simd.load(&lanes)
    }
}

/// An element type that results can be written in.
pub trait ElementMut: Element {
    /// 16 of them, each rounded once.
    fn store<S: Simd>(simd: S, v: S::V, to: &mut [Self::Item; LANES]);
    /// The same of 32, where denormals may become zero if that is faster; with `past` as [`Simd::store_pair_bf16`].
    fn store_pair<S: Simd>(simd: S, v: [S::V; 2], to: &mut [Self::Item; 2 * LANES], past: bool);
    /// One of them, rounded once.
    fn put(x: f32) -> Self::Item;

    /// The first lanes.
    #[inline(always)]
    fn store_part<S: Simd>(simd: S, v: S::V, to: &mut [Self::Item]) {
        let mut lanes = [0.0; LANES];
        simd.store(v, &mut lanes);
        for (item, &lane) in to.iter_mut().zip(&lanes) {
            *item = Self::put(lane);
        }
    }
}

impl Element for f32 {
    type Item = f32;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[f32; LANES]) -> S::V {
        simd.load(x)
    }
    #[inline(always)]
    fn get(item: f32) -> f32 {
        item
    }
}

impl ElementMut for f32 {
    #[inline(always)]
    fn store<S: Simd>(simd: S, v: S::V, to: &mut [f32; LANES]) {
        simd.store(v, to);
    }
    #[inline(always)]
    fn store_pair<S: Simd>(simd: S, v: [S::V; 2], to: &mut [f32; 2 * LANES], past: bool) {
        for (v, to) in v.into_iter().zip(to.as_chunks_mut().0) {
            if past {
                simd.store_past(v, to);
            } else {
                simd.store(v, to);
            }
        }
    }
    #[inline(always)]
    fn put(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    type Item = bf16;
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[bf16; LANES]) -> S::V {
        simd.load_bf16(x)
    }
    #[inline(always)]
    fn get(item: bf16) -> f32 {
        f32::from_bits(u32::from(item.to_bits()) << 16)
    }
}

impl ElementMut for bf16 {
    #[inline(always)]
    fn store<S: Simd>(simd: S, v: S::V, to: &mut [bf16; LANES]) {
        simd.store_bf16(v, to);
    }
    #[inline(always)]
    fn store_pair<S: Simd>(simd: S, v: [S::V; 2], to: &mut [bf16; 2 * LANES], past: bool) {
        simd.store_pair_bf16(v, to, past);
    }
    #[inline(always)]
    fn put(x: f32) -> bf16 {
        round_bf16(x)
    }
}

/// Loads some rows of 16 numbers. In a loop: in a closure, as `array::map` has it, intrinsics are compiled without the
/// instruction set, each to a call.
#[inline(always)]
pub(super) fn load_rows<'a, S: Simd>(
    simd: S,
    rows: impl Iterator<Item = &'a [f32; LANES]>,
) -> [S::V; LANES] {
    let mut square = [simd.splat(0.0); LANES];
    for (v, row) in square.iter_mut().zip(rows) {
        *v = simd.load(row);
    }
    square
}

/// f32 in a file.
pub struct F32Bytes;
/// bf16 in a file.
pub struct Bf16Bytes;
/// f16 in a file.
pub struct F16Bytes;

impl Element for F32Bytes {
    type Item = [u8; 4];
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[[u8; 4]; LANES]) -> S::V {
        simd.load_f32_bytes(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn get(item: [u8; 4]) -> f32 {
        f32::from_le_bytes(item)
    }
}

impl Element for Bf16Bytes {
    type Item = [u8; 2];
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[[u8; 2]; LANES]) -> S::V {
        simd.load_bf16_bytes(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn get(item: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(item)) << 16)
    }
}

impl Element for F16Bytes {
    type Item = [u8; 2];
    #[inline(always)]
    fn load<S: Simd>(simd: S, x: &[[u8; 2]; LANES]) -> S::V {
        simd.load_f16_bytes(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn get(item: [u8; 2]) -> f32 {
        half::f16::from_le_bytes(item).to_f32()
    }
}

/// To bf16, rounded to nearest even, branch-free; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug)]
pub enum Isa {
    /// Plain Rust: any machine, and the shape of the others for reading.
    Scalar(Scalar),
    /// AVX2, FMA and F16C.
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL.
    Avx512(Avx512),
    /// AMX with bf16 for the products of bf16 matrices, AVX-512 for all else.
    Amx(Amx),
}

impl Isa {
    /// Every instruction set of this CPU, the slowest first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar(Scalar)];
        all.extend(Avx2::detect().map(Self::Avx2));
        all.extend(Avx512::detect().map(Self::Avx512));
        all.extend(Amx::detect().map(Self::Amx));
        all
    }

    /// Those that this CPU lacks, for tests that emulate them (`tests/x86_emulator`); none without AVX2.
    ///
    /// # Safety
    /// Something in this process executes the instructions that the CPU refuses.
    #[doc(hidden)]
    #[allow(unsafe_code)]
    #[cfg_attr(not(target_arch = "x86_64"), allow(unreachable_code))] // There it ends at once.
    pub unsafe fn lacking() -> Vec<Self> {
        if Avx2::detect().is_none() {
            return vec![];
        }
        // SAFETY: the caller's promise.
        let (avx512, amx) = unsafe { (Avx512::assume(false), Amx::assume()) };
        let avx512 = Avx512::detect().is_none().then_some(Self::Avx512(avx512));
        let amx = Amx::detect().is_none().then_some(Self::Amx(amx));
        avx512.into_iter().chain(amx).collect()
    }

    /// Every instruction set, those that this CPU lacks emulated.
    #[cfg(test)]
    pub(crate) fn testable() -> Vec<Self> {
        let mut all = Self::available();
        all.extend(crate::x86_emulator::lacking());
        all
    }

    /// The fastest one, or the one that the environment variable `POLYTAPE_ISA` forces.
    ///
    /// # Errors
    /// If `POLYTAPE_ISA` names none, or one that this CPU lacks.
    pub fn detect() -> Result<Self> {
        let all = Self::available();
        match std::env::var("POLYTAPE_ISA") {
            Ok(name) if !name.is_empty() => {
                all.iter().copied().find(|isa| isa.name() == name).ok_or_else(|| {
                    let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
                    Error::Device(format!(
                        "POLYTAPE_ISA={name}: this build and CPU can run {}",
                        names.join(", ")
                    ))
                })
            }
            _ => Ok(all[all.len() - 1]),
        }
    }

    /// Its name in `POLYTAPE_ISA`, logs and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar(_) => "scalar",
            Self::Avx2(_) => "avx2",
            Self::Avx512(_) => "avx512",
            Self::Amx(_) => "amx",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    pub fn run<O: SimdOp>(self, op: O) -> O::Output {
        match self {
            Self::Scalar(simd) => op.eval(simd),
            Self::Avx2(simd) => simd.run(op),
            Self::Avx512(simd) => simd.run(op),
            Self::Amx(amx) => amx.run(op),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct All;
    impl SimdOp for All {
        type Output = Vec<Vec<u32>>;
        #[inline(always)]
        fn eval<S: Simd>(self, s: S) -> Vec<Vec<u32>> {
            let x: [f32; LANES] = std::array::from_fn(|i| (i as f32 - 7.3) * 1.7);
            let y: [f32; LANES] = std::array::from_fn(|i| 0.37 * i as f32 + 0.11);
            let (a, b) = (s.load(&x), s.load(&y));
            let bytes = |v: &[f32; LANES]| -> [u8; 64] { bytemuck::cast(v.map(f32::to_le_bytes)) };
            let brain: [bf16; LANES] = x.map(round_bf16);
            let brain_bytes: [u8; 32] = bytemuck::cast(brain.map(bf16::to_le_bytes));
            let half_bytes: [u8; 32] =
                bytemuck::cast(x.map(|v| half::f16::from_f32(v).to_le_bytes()));
            let special: [f32; LANES] = std::array::from_fn(|i| {
                [
                    0.0,
                    -0.0,
                    f32::NAN,
                    f32::INFINITY,
                    f32::NEG_INFINITY,
                    1e-40,
                    -1e-40,
                    3.4e38,
                    1.0039062,
                    1.0117188,
                    -1.0039062,
                    1.0039063,
                    f32::MIN_POSITIVE,
                    65504.0,
                    1e-8,
                    -2.5,
                ][i]
            });
            let mut rounded = [bf16::ZERO; LANES];
            s.store_bf16(s.load(&special), &mut rounded);
            let n: [f32; LANES] = std::array::from_fn(|i| [-126.0, 127.0, 0.0, 1.0][i % 4]);
            let vectors = [
                s.splat(1.5),
                a,
                s.load_bf16(&brain),
                s.load_f32_bytes(&bytes(&x)),
                s.load_bf16_bytes(&brain_bytes),
                s.load_f16_bytes(&half_bytes),
                s.add(a, b),
                s.sub(a, b),
                s.mul(a, b),
                s.div(a, b),
                s.max(a, b),
                s.min(a, b),
                s.sqrt(b),
                s.round(s.mul(a, s.splat(0.5))),
                s.exp2_integral(s.load(&n)),
                s.select_lt(a, b, s.splat(1.0), s.splat(2.0)),
                s.load_part(&x[..5], 9.0),
                s.fma(s.splat(2.0), b, s.splat(1.0)), // Doubling is exact: one rounding everywhere.
            ];
            let mut rows = [s.splat(0.0); LANES];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = s.add(a, s.splat(100.0 * i as f32));
            }
            let vectors = [&vectors[..], &s.transpose(rows)].concat();
            let mut out: Vec<Vec<u32>> = vectors
                .iter()
                .map(|&v| {
                    let mut lanes = [0.0; LANES];
                    s.store(v, &mut lanes);
                    lanes.iter().map(|l| l.to_bits()).collect()
                })
                .collect();
            out.push(vec![s.sum(a).to_bits(), s.max_lane(a).to_bits()]);
            out.push(rounded.iter().map(|b| u32::from(b.to_bits())).collect());
            let mut part = [7.0; 3];
            s.store_part(a, &mut part);
            out.push(part.iter().map(|p| p.to_bits()).collect());
            out
        }
    }

    #[test]
    fn every_instruction_set_gives_the_scalar_bits() {
        let expected = Isa::Scalar(Scalar).run(All);
        for isa in Isa::testable() {
            for (i, (got, want)) in isa.run(All).iter().zip(&expected).enumerate() {
                assert_eq!(got, want, "{isa:?}, result {i}");
            }
        }
    }

    #[test]
    fn bf16_rounding_is_halfs() {
        for i in 0..2_000_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761));
            assert_eq!(round_bf16(x).to_bits(), bf16::from_f32(x).to_bits(), "{x}");
        }
    }
}
