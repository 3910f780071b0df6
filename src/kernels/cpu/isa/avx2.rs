//! AVX2 with FMA and F16C: 16 lanes in two registers.

#![allow(unsafe_code)]

use std::arch::{asm, x86_64::*};

use half::bf16;

use super::{LANES, Simd, SimdOp};

/// The token of AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, if this CPU has what [`Avx2::run`] enables.
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }

    /// Runs `op` compiled for AVX2.
    #[inline]
    pub fn run<O: SimdOp>(self, op: O) -> O::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn enter<O: SimdOp>(simd: Avx2, op: O) -> O::Output {
            op.eval(simd)
        }
        // SAFETY: `self` came from `detect`, which saw all three features on this CPU.
        unsafe { enter(self, op) }
    }
}

/// Evaluates intrinsics; the caller's `self` is the proof that the CPU has them.
macro_rules! intrinsics {
    ($body:expr) => {{
        // SAFETY: a token exists only where `detect` saw AVX2, FMA and F16C; pointers come from
        // array references of at least the bytes that the instruction touches, and the loads and
        // stores used are the unaligned ones.
        #[allow(unused_unsafe)]
        unsafe {
            $body
        }
    }};
}

/// Both registers, by one instruction.
macro_rules! both {
    ($op:ident, $($v:ident),+) => {
        intrinsics!([$op($($v[0]),+), $op($($v[1]),+)])
    };
}

/// [`Simd::add_tile`] of 4 x 24: per `k` seven loads feed twelve multiply-adds, where 6 x 16 takes
/// eight. It needs all sixteen registers (twelve sums, three right operands, a broadcast), which the
/// compiler does not manage without a spill: hence assembly.
///
/// The core issues little more than these nineteen instructions in the time of twelve multiply-adds,
/// so the loop's own are shared by eight `k`. (Multiply-adds that read memory would be fewer, but
/// their loads more than there is room for.)
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_tile(lhs: &[f32], rhs: &[f32], sums: &mut [f32], first: bool, next_lhs: &[f32]) {
    const UNROLLED: usize = 8;
    let (lhs, rhs) = (lhs.as_chunks::<4>().0, rhs.as_chunks::<24>().0);
    let sums: &mut [[f32; 24]; 4] = sums.as_chunks_mut().0.first_chunk_mut().expect("a whole tile");
    assert_eq!(lhs.len(), rhs.len(), "operands agree in K");
    // SAFETY: the loops read `lhs.len()` times 16 and 96 bytes, which the two slices have; the sums
    // are read and written within their array. Prefetches may be of any address.
    #[allow(unused_unsafe)]
    unsafe {
        let zero = _mm256_setzero_ps();
        let [mut c0, mut c1, mut c2, mut c3, mut c4, mut c5] = [zero; 6];
        let [mut c6, mut c7, mut c8, mut c9, mut c10, mut c11] = [zero; 6];
        asm!(
            ".macro multiply k",
            "vmovups {b0}, [{r} + 96 * \\k]",
            "vmovups {b1}, [{r} + 96 * \\k + 32]",
            "vmovups {b2}, [{r} + 96 * \\k + 64]",
            "vbroadcastss {a}, dword ptr [{l} + 16 * \\k]",
            "vfmadd231ps {c0}, {a}, {b0}",
            "vfmadd231ps {c1}, {a}, {b1}",
            "vfmadd231ps {c2}, {a}, {b2}",
            "vbroadcastss {a}, dword ptr [{l} + 16 * \\k + 4]",
            "vfmadd231ps {c3}, {a}, {b0}",
            "vfmadd231ps {c4}, {a}, {b1}",
            "vfmadd231ps {c5}, {a}, {b2}",
            "vbroadcastss {a}, dword ptr [{l} + 16 * \\k + 8]",
            "vfmadd231ps {c6}, {a}, {b0}",
            "vfmadd231ps {c7}, {a}, {b1}",
            "vfmadd231ps {c8}, {a}, {b2}",
            "vbroadcastss {a}, dword ptr [{l} + 16 * \\k + 12]",
            "vfmadd231ps {c9}, {a}, {b0}",
            "vfmadd231ps {c10}, {a}, {b1}",
            "vfmadd231ps {c11}, {a}, {b2}",
            ".endm",
            // The sums are wanted at the end, when the loop has pushed them out of the L1 cache.
            "prefetcht0 [{s}]",
            "prefetcht0 [{s} + 64]",
            "prefetcht0 [{s} + 128]",
            "prefetcht0 [{s} + 192]",
            "prefetcht0 [{s} + 256]",
            "prefetcht0 [{s} + 320]",
            "test {n}, {n}",
            "jz 3f",
            ".p2align 5",
            "2:",
            "prefetcht0 [{next}]",
            "prefetcht0 [{next} + 64]",
            ".irp k, 0, 1, 2, 3, 4, 5, 6, 7",
            "multiply \\k",
            ".endr",
            "add {next}, 128",
            "add {l}, 128",
            "add {r}, 768",
            "dec {n}",
            "jnz 2b",
            "3:",
            "test {rest}, {rest}",
            "jz 5f",
            "4:",
            "multiply 0",
            "add {l}, 16",
            "add {r}, 96",
            "dec {rest}",
            "jnz 4b",
            "5:",
            ".purgem multiply",
            l = inout(reg) lhs.as_ptr() => _,
            r = inout(reg) rhs.as_ptr() => _,
            n = inout(reg) lhs.len() / UNROLLED => _,
            rest = inout(reg) lhs.len() % UNROLLED => _,
            next = inout(reg) next_lhs.as_ptr() => _,
            s = in(reg) sums.as_ptr(),
            a = out(ymm_reg) _, b0 = out(ymm_reg) _, b1 = out(ymm_reg) _, b2 = out(ymm_reg) _,
            c0 = inout(ymm_reg) c0, c1 = inout(ymm_reg) c1, c2 = inout(ymm_reg) c2,
            c3 = inout(ymm_reg) c3, c4 = inout(ymm_reg) c4, c5 = inout(ymm_reg) c5,
            c6 = inout(ymm_reg) c6, c7 = inout(ymm_reg) c7, c8 = inout(ymm_reg) c8,
            c9 = inout(ymm_reg) c9, c10 = inout(ymm_reg) c10, c11 = inout(ymm_reg) c11,
            options(readonly, nostack),
        );
        let tile = [[c0, c1, c2], [c3, c4, c5], [c6, c7, c8], [c9, c10, c11]];
        for (sums, tile) in sums.iter_mut().zip(tile) {
            for (sum, products) in sums.as_chunks_mut::<8>().0.iter_mut().zip(tile) {
                let sum = sum.as_mut_ptr();
                let before = if first { zero } else { _mm256_loadu_ps(sum) };
                _mm256_storeu_ps(sum, _mm256_add_ps(before, products));
            }
        }
    }
}

/// The upper halves of eight f32, rounded to nearest even, as eight u32.
#[inline(always)]
fn bf16_bits(v: __m256) -> __m256i {
    intrinsics!({
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
        let quiet = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        _mm256_blendv_epi8(rounded, quiet, nan)
    })
}

/// Eight bf16 as f32.
#[inline(always)]
fn widen_bf16(half: __m128i) -> __m256 {
    intrinsics!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half))))
}

/// `2^n` for eight integral `n`.
#[inline(always)]
fn exp2_integral(n: __m256) -> __m256 {
    intrinsics!({
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
    })
}

/// An 8x8 block, transposed.
#[inline(always)]
fn transpose_8x8(r: [__m256; 8]) -> [__m256; 8] {
    intrinsics!({
        // Pairs of rows, then fours, then the 128-bit halves.
        let t0 = _mm256_unpacklo_ps(r[0], r[1]);
        let t1 = _mm256_unpackhi_ps(r[0], r[1]);
        let t2 = _mm256_unpacklo_ps(r[2], r[3]);
        let t3 = _mm256_unpackhi_ps(r[2], r[3]);
        let t4 = _mm256_unpacklo_ps(r[4], r[5]);
        let t5 = _mm256_unpackhi_ps(r[4], r[5]);
        let t6 = _mm256_unpacklo_ps(r[6], r[7]);
        let t7 = _mm256_unpackhi_ps(r[6], r[7]);
        let s0 = _mm256_shuffle_ps::<0x44>(t0, t2);
        let s1 = _mm256_shuffle_ps::<0xEE>(t0, t2);
        let s2 = _mm256_shuffle_ps::<0x44>(t1, t3);
        let s3 = _mm256_shuffle_ps::<0xEE>(t1, t3);
        let s4 = _mm256_shuffle_ps::<0x44>(t4, t6);
        let s5 = _mm256_shuffle_ps::<0xEE>(t4, t6);
        let s6 = _mm256_shuffle_ps::<0x44>(t5, t7);
        let s7 = _mm256_shuffle_ps::<0xEE>(t5, t7);
        [
            _mm256_permute2f128_ps::<0x20>(s0, s4),
            _mm256_permute2f128_ps::<0x20>(s1, s5),
            _mm256_permute2f128_ps::<0x20>(s2, s6),
            _mm256_permute2f128_ps::<0x20>(s3, s7),
            _mm256_permute2f128_ps::<0x31>(s0, s4),
            _mm256_permute2f128_ps::<0x31>(s1, s5),
            _mm256_permute2f128_ps::<0x31>(s2, s6),
            _mm256_permute2f128_ps::<0x31>(s3, s7),
        ]
    })
}

/// A 16x16 block of half vectors, transposed. For whoever holds a token of AVX2 or more.
#[inline(always)]
fn transpose(rows: [[__m256; 2]; LANES]) -> [[__m256; 2]; LANES] {
    let mut columns = rows;
    for to in 0..2 {
        for from in 0..2 {
            let mut block = [rows[0][0]; 8];
            for i in 0..8 {
                block[i] = rows[8 * to + i][from];
            }
            let block = transpose_8x8(block);
            for i in 0..8 {
                columns[8 * from + i][to] = block[i];
            }
        }
    }
    columns
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    const MR: usize = 6; // 12 accumulators, 2 right operands, 1 broadcast of the 16 registers.
    const NV: usize = 1;
    const TILE: (usize, usize) = (4, 24);

    #[inline(always)]
    fn add_tile(self, lhs: &[f32], rhs: &[f32], sums: &mut [f32], first: bool, next_lhs: &[f32]) {
        // SAFETY: the token is the proof of AVX2 and FMA.
        unsafe { add_tile(lhs, rhs, sums, first, next_lhs) };
    }

    #[inline(always)]
    fn prefetch<T>(self, x: &[T]) {
        let bytes = size_of_val(x);
        for line in (0..bytes).step_by(64) {
            intrinsics!(_mm_prefetch::<_MM_HINT_T0>(x.as_ptr().cast::<i8>().add(line)));
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        intrinsics!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        intrinsics!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))])
    }
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; LANES]) {
        intrinsics!({
            _mm256_storeu_ps(to.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), v[1]);
        })
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16; LANES]) -> Self::V {
        self.load_bf16_bytes(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::V, to: &mut [bf16; LANES]) {
        intrinsics!({
            // The pack works within 128-bit lanes; the permutation puts its quarters in order.
            let packed = _mm256_packus_epi32(bf16_bits(v[0]), bf16_bits(v[1]));
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), ordered);
        })
    }
    #[inline(always)]
    fn load_f32_bytes(self, x: &[u8; 4 * LANES]) -> Self::V {
        intrinsics!({
            let p = x.as_ptr().cast::<f32>();
            [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
        })
    }
    #[inline(always)]
    fn load_bf16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        intrinsics!({
            let p = x.as_ptr().cast::<__m128i>();
            [widen_bf16(_mm_loadu_si128(p)), widen_bf16(_mm_loadu_si128(p.add(1)))]
        })
    }
    #[inline(always)]
    fn load_f16_bytes(self, x: &[u8; 2 * LANES]) -> Self::V {
        intrinsics!({
            let p = x.as_ptr().cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))]
        })
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        both!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        both!(_mm256_sqrt_ps, a)
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        intrinsics!([_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])])
    }
    #[inline(always)]
    fn exp2_integral(self, n: Self::V) -> Self::V {
        [exp2_integral(n[0]), exp2_integral(n[1])]
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V {
        intrinsics!([
            _mm256_blendv_ps(no[0], yes[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(no[1], yes[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])),
        ])
    }
    #[inline(always)]
    fn transpose(self, rows: [Self::V; LANES]) -> [Self::V; LANES] {
        transpose(rows)
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        intrinsics!({
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn sum_4(self, v: [Self::V; 4]) -> [f32; 4] {
        intrinsics!({
            let mut eight = [_mm256_setzero_ps(); 4];
            for i in 0..4 {
                eight[i] = _mm256_add_ps(v[i][0], v[i][1]);
            }
            // The low halves of two vectors beside each other, and the high ones.
            let ac = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(eight[0], eight[2]),
                _mm256_permute2f128_ps::<0x31>(eight[0], eight[2]),
            );
            let bd = _mm256_add_ps(
                _mm256_permute2f128_ps::<0x20>(eight[1], eight[3]),
                _mm256_permute2f128_ps::<0x31>(eight[1], eight[3]),
            );
            // Then the low pairs of all four and the high ones, the even lanes and the odd ones.
            let two =
                _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ac, bd), _mm256_shuffle_ps::<0xEE>(ac, bd));
            let one = _mm256_add_ps(
                _mm256_shuffle_ps::<0x88>(two, two),
                _mm256_shuffle_ps::<0xDD>(two, two),
            );
            let (ab, cd) = (_mm256_castps256_ps128(one), _mm256_extractf128_ps::<1>(one));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_movelh_ps(ab, cd));
            sums
        })
    }
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        intrinsics!({
            let eight = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
}
