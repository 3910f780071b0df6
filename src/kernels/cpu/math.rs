//! Elementary functions on vectors.
//!
//! Each is a few arithmetic operations without branches, so every lane is computed the same way
//! whatever its neighbours hold.

use super::isa::Simd;

/// `e^x` within about one unit in the last place; 0 below -87.33 (where the result would be
/// subnormal), infinity above 88.72; NaN stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // e^x = 2^n e^r with |r| <= ln(2) / 2. The clamps keep `n` in -126..=128 and let NaN through.
    let clamped = s.max(s.splat(-87.4), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    // ln(2) in two parts, the first so short that its product with `n` is exact.
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0));
    // 2^128 is no f32, but p 2^127 * 2 may be one.
    let top = s.splat(127.0);
    let value = s.mul(p, s.exp2_integral(s.min(top, n)));
    let value = s.select_lt(top, n, s.add(value, value), value);
    s.select_lt(x, s.splat(-87.336_54), s.splat(0.0), value)
}
