//! AVX-512 F, BW, DQ and VL: 16 lanes in one register.

#![allow(unsafe_code)]

use std::arch::{asm, x86_64::*};

use half::bf16;

use super::{LANES, Simd, SimdOp};

/// The token of AVX-512.
#[derive(Clone, Copy, Debug)]
pub struct Avx512 {
    /// Whether there is AVX512-BF16, too.
    bf16: bool,
}

impl Avx512 {
    /// The token, if this CPU has what [`Avx512::run`] enables.
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self { bf16: false })
    }

    /// The same with AVX512-BF16 for [`Simd::store_bf16_flushed`], if this CPU has it.
    pub(super) fn with_bf16(self) -> Option<Self> {
        is_x86_feature_detected!("avx512bf16").then_some(Self { bf16: true })
    }

    /// The token.
    ///
    /// # Safety
    /// The instructions that [`Avx512::run`] enables are executed, if not by the CPU, and those of AVX512-BF16 if
    /// `bf16`.
    pub(super) unsafe fn assume(bf16: bool) -> Self {
        Self { bf16 }
    }

    /// Runs `op` compiled for AVX-512.
    #[inline]
    pub fn run<O: SimdOp>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enter<O: SimdOp>(simd: Avx512, op: O) -> O::Output {
            op.eval(simd)
        }
        // SAFETY: `self` came from `detect`, which saw every one of these features on this CPU, or from
        // `assume`, whose caller promised them.
        unsafe { enter(self, op) }
    }
}

/// Evaluates intrinsics; the caller's `self` is the proof that the CPU has them.
macro_rules! intrinsics {
    ($body:expr) => {{
        // SAFETY: a token exists only where `detect` saw these features; pointers come from array
        // references of at least the bytes that the instruction touches, and the loads and stores
        // used are the unaligned ones.
        #[allow(unused_unsafe)]
        unsafe {
            $body
        }
    }};
}

/// Bytes ahead in its row that [`transpose_rows`] asks for.
const AHEAD: usize = 512;

/// [`Simd::transpose_rows`], by quarters: four numbers of rows `i`, `i + 4`, `i + 8` and `i + 12` stand side by side
/// as they are loaded, which spares half of the shuffles. (Loads under a mask, because the compiler
/// makes a shuffle of every insertion; and the rows' next lines asked for, because they lie in as many pages.)
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose_rows(bytes: &[u8], stride: usize, to: &mut [[f32; LANES]; LANES]) {
    assert!(bytes.len() >= size_of::<[f32; LANES]>(), "a first row");
    assert!(stride <= (bytes.len() - size_of::<[f32; LANES]>()) / (LANES - 1), "a last row");
    for i in 0..LANES {
        // A prefetch may be of any address.
        let line = bytes.as_ptr().wrapping_add(i * stride + AHEAD);
        intrinsics!(_mm_prefetch::<_MM_HINT_T0>(line.cast()));
    }
    for (quarter, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut rows = [_mm512_setzero_ps(); 4];
        for (i, row) in rows.iter_mut().enumerate() {
            // SAFETY: each of the four loads is of 16 bytes of a row from byte `16 quarter` on; the
            // rows have 64 bytes, and by the assertions the last of the 16 is inside the slice.
            #[allow(unused_unsafe)]
            unsafe {
                let first = bytes.as_ptr().add(i * stride + 16 * quarter);
                asm!(
                    "vmovups {v:x}, [{p}]",
                    "vbroadcastf32x4 {v}{{{second}}}, [{p} + {s}]",
                    "vbroadcastf32x4 {v}{{{third}}}, [{p} + 2*{s}]",
                    "vbroadcastf32x4 {v}{{{fourth}}}, [{p12}]",
                    v = out(zmm_reg) *row,
                    p = in(reg) first,
                    p12 = in(reg) first.add(12 * stride),
                    s = in(reg) 4 * stride,
                    second = in(kreg) 0x00F0_u16,
                    third = in(kreg) 0x0F00_u16,
                    fourth = in(kreg) 0xF000_u16,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
        }
        let low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
        let high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
        let more_low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
        let more_high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
        let columns = [
            _mm512_unpacklo_pd(low, more_low),
            _mm512_unpackhi_pd(low, more_low),
            _mm512_unpacklo_pd(high, more_high),
            _mm512_unpackhi_pd(high, more_high),
        ];
        for (to, column) in to.iter_mut().zip(columns) {
            intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), _mm512_castpd_ps(column)));
        }
    }
}

/// AVX512-BF16's rounding to bf16, where denormals become zero. In assembly, as [`round_pair_bf16`], because the intrinsics
/// would have every kernel compiled once more, for CPUs with this feature.
///
/// # Safety
/// The CPU has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn round_bf16(v: __m512) -> __m256i {
    let rounded;
    // SAFETY: registers alone take part; the instruction is there by the caller's promise.
    unsafe {
        asm!(
            "vcvtneps2bf16 {to:y}, {v}",
            v = in(zmm_reg) v,
            to = lateout(zmm_reg) rounded,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    rounded
}

/// The same of two vectors, the first of them in the low half.
///
/// # Safety
/// The CPU has AVX512-BF16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn round_pair_bf16([low, high]: [__m512; 2]) -> __m512i {
    let rounded;
    // SAFETY: as in `round_bf16`.
    unsafe {
        asm!(
            "vcvtne2ps2bf16 {to}, {high}, {low}",
            high = in(zmm_reg) high,
            low = in(zmm_reg) low,
            to = lateout(zmm_reg) rounded,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    rounded
}

impl Simd for Avx512 {
    type V = __m512;
    const MR: usize = 12; // 24 accumulators, 2 right operands, broadcasts from memory: 32 registers.
    const NV: usize = 2;
    /// As many accumulators, of wider rows: the fewest loads for each multiply-add.
    const TILE: (usize, usize) = (8, 3 * LANES);

    #[inline(always)]
    fn add_tile(self, lhs: &[f32], rhs: &[f32], sums: &mut [f32], first: bool, next_lhs: &[f32]) {
        super::add_tile::<Self, 8, 3>(self, lhs, rhs, sums, first, next_lhs);
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &[T]) {
        let bytes = size_of_val(x);
        for line in (0..bytes).step_by(64) {
            intrinsics!(_mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().add(line)));
        }
    }
    #[inline(always)]
    fn prefetch_l2<T>(self, x: &[T]) {
        let bytes = size_of_val(x);
        for line in (0..bytes).step_by(64) {
            intrinsics!(_mm_prefetch::<_MM_HINT_T1>(x.as_ptr().cast::<i8>().add(line)));
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        intrinsics!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        intrinsics!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        intrinsics!(_mm512_storeu_ps(to.as_mut_ptr(), v))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V {
        self.load_bf16_bytes(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::V, to: &mut [bf16; LANES]) {
        intrinsics!({
            let bits = _mm512_castps_si512(v);
            let high = _mm512_srli_epi32::<16>(bits);
            let bias = _mm512_add_epi32(
                _mm512_and_si512(high, _mm512_set1_epi32(1)),
                _mm512_set1_epi32(0x7FFF),
            );
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let words = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(words));
        })
    }
    #[inline(always)]
    fn store_bf16_flushed(self, v: Self::V, to: &mut [bf16; LANES]) {
        if !self.bf16 {
            return self.store_bf16(v, to);
        }
        intrinsics!(_mm256_storeu_si256(to.as_mut_ptr().cast(), round_bf16(v)));
    }
    #[inline(always)]
    fn store_pair_bf16(self, v: [Self::V; 2], to: &mut [bf16; 2 * LANES], past: bool) {
        if !self.bf16 {
            for (v, to) in v.into_iter().zip(to.as_chunks_mut().0) {
                self.store_bf16(v, to);
            }
            return;
        }
        let past = past && to.as_ptr().addr().is_multiple_of(64);
        intrinsics!({
            let rounded = round_pair_bf16(v);
            if past {
                _mm512_stream_si512(to.as_mut_ptr().cast(), rounded);
            } else {
                _mm512_storeu_si512(to.as_mut_ptr().cast(), rounded);
            }
        });
    }
    #[inline(always)]
    fn store_past(self, v: Self::V, to: &mut [f32; LANES]) {
        if to.as_ptr().addr().is_multiple_of(64) {
            intrinsics!(_mm512_stream_ps(to.as_mut_ptr(), v));
        } else {
            self.store(v, to);
        }
    }
    #[inline(always)]
    fn fence(self) {
        intrinsics!(_mm_sfence());
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> Self::V {
        intrinsics!(_mm512_loadu_ps(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        intrinsics!({
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        intrinsics!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        intrinsics!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        intrinsics!(_mm512_sqrt_ps(a))
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        intrinsics!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn times_exp2(self, a: Self::V, n: Self::V) -> Self::V {
        intrinsics!(_mm512_scalef_ps(a, n))
    }
    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        intrinsics!({
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        intrinsics!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        intrinsics!({
            // Pairs of rows, then fours: lane `l` of `fours[4 g + j]` (of four numbers each) is
            // column `4 l + j` of rows `4 g ..`.
            let (mut pairs, mut fours, mut columns) = (rows, rows, rows);
            for (pair, row) in pairs.chunks_exact_mut(2).zip(rows.chunks_exact(2)) {
                pair[0] = _mm512_unpacklo_ps(row[0], row[1]);
                pair[1] = _mm512_unpackhi_ps(row[0], row[1]);
            }
            for (four, pair) in fours.chunks_exact_mut(4).zip(pairs.chunks_exact(4)) {
                let (a, b) = (_mm512_castps_pd(pair[0]), _mm512_castps_pd(pair[1]));
                let (c, d) = (_mm512_castps_pd(pair[2]), _mm512_castps_pd(pair[3]));
                four[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                four[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                four[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                four[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            const EVEN: i32 = 0b10_00_10_00; // Lanes 0 and 2 of each.
            const ODD: i32 = 0b11_01_11_01;
            for j in 0..4 {
                let (top, middle) = (fours[j], fours[4 + j]);
                let (low, bottom) = (fours[8 + j], fours[12 + j]);
                let even = _mm512_shuffle_f32x4::<EVEN>(top, middle);
                let odd = _mm512_shuffle_f32x4::<ODD>(top, middle);
                let even_low = _mm512_shuffle_f32x4::<EVEN>(low, bottom);
                let odd_low = _mm512_shuffle_f32x4::<ODD>(low, bottom);
                columns[j] = _mm512_shuffle_f32x4::<EVEN>(even, even_low);
                columns[4 + j] = _mm512_shuffle_f32x4::<EVEN>(odd, odd_low);
                columns[8 + j] = _mm512_shuffle_f32x4::<ODD>(even, even_low);
                columns[12 + j] = _mm512_shuffle_f32x4::<ODD>(odd, odd_low);
            }
            columns
        })
    }
    #[inline(always)]
    fn transpose_rows(self, bytes: &[u8], stride: usize, to: &mut [[f32; LANES]; LANES]) {
        // SAFETY: the token is the proof of these features.
        unsafe { transpose_rows(bytes, stride, to) }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        intrinsics!({
            let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn sum_4(self, [a, b, c, d]: [Self::V; 4]) -> [f32; 4] {
        intrinsics!({
            // The low halves of two vectors beside each other, and the high ones.
            let ab = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(a, b),
                _mm512_shuffle_f32x4::<0xEE>(a, b),
            );
            let cd = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x44>(c, d),
                _mm512_shuffle_f32x4::<0xEE>(c, d),
            );
            // Then the even quarters of all four and the odd ones, and so on within the quarters.
            let four = _mm512_add_ps(
                _mm512_shuffle_f32x4::<0x88>(ab, cd),
                _mm512_shuffle_f32x4::<0xDD>(ab, cd),
            );
            let two = _mm512_add_ps(four, _mm512_permute_ps::<0x4E>(four));
            let one = _mm512_add_ps(two, _mm512_permute_ps::<0xB1>(two));
            let mut sums = [0.0; 4];
            let first_of_quarters = _mm512_maskz_compress_ps(0x1111, one);
            _mm_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps128(first_of_quarters));
            sums
        })
    }
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        intrinsics!({
            let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
}
