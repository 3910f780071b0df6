//! Elementary functions on vectors.
//!
//! Each is a few arithmetic operations without branches, so every lane is computed the same way
//! whatever its neighbours hold.

use super::isa::{LANES, Simd};

/// `e^x` within about one unit in the last place; 0 below -87.33 (where the result would be
/// subnormal), infinity above 88.72; NaN stays NaN.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    exp_from(s, x, -87.336_54)
}

/// [`exp`], 0 below `least`, which is not below -87.33.
#[inline(always)]
pub(super) fn exp_from<S: Simd>(s: S, x: S::V, least: f32) -> S::V {
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
    let value = s.times_exp2(p, n);
    s.select_lt(x, s.splat(least), s.splat(0.0), value)
}

/// `σ(x) = 1 / (1 + e^-x)` and its derivative `σ(x) (1 - σ(x))`, both without cancellation.
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let zero = s.splat(0.0);
    let minus = s.sub(zero, x);
    let e = exp(s, s.min(minus, x)); // e^-|x|, at most 1.
    let upper = s.div(s.splat(1.0), s.add(s.splat(1.0), e));
    let lower = s.mul(e, upper);
    (s.select_lt(x, zero, lower, upper), s.mul(lower, upper))
}

/// The normal distribution function `Φ(x) = erfc(-x / sqrt(2)) / 2`, within about `2e-7` of itself
/// for negative `x` above -9, and its derivative `φ(x)`.
#[inline(always)]
pub(super) fn normal<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let zero = s.splat(0.0);
    let half = s.splat(0.5);
    let z = s.mul(s.max(s.sub(zero, x), x), s.splat(std::f32::consts::FRAC_1_SQRT_2));
    // A Chebyshev fit of ln(erfc(z) e^(z²) / t) in t = 1 / (1 + z / 2).
    let t = s.div(s.splat(1.0), s.fma(half, z, s.splat(1.0)));
    let mut p = s.splat(0.170_872_77);
    for c in [
        -0.822_152_2,
        1.488_515_9,
        -1.135_204,
        0.278_868_08,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ] {
        p = s.fma(p, t, s.splat(c));
    }
    let minus_z2 = s.mul(s.sub(zero, z), z);
    let gauss = exp(s, minus_z2);
    let tail = s.mul(s.mul(half, t), s.mul(gauss, exp(s, p)));
    let density = s.mul(s.splat(0.398_942_3), gauss);
    (s.select_lt(x, zero, tail, s.sub(s.splat(1.0), tail)), density)
}

/// The sum of all lanes of four accumulators, as a tree.
#[inline(always)]
pub(super) fn total<S: Simd>(s: S, sums: [S::V; 4]) -> f32 {
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// `Σ a[i] b[i]`: 64 lanes in f32 within blocks of 2048, blocks in f64.
#[inline(always)]
pub(super) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut sum = 0.0;
    for (a, b) in a.chunks(2048).zip(b.chunks(2048)) {
        let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let mut sums = [s.splat(0.0); 4];
        for (a, b) in a.chunks(4).zip(b.chunks(4)) {
            for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                *sum = s.fma(s.load(a), s.load(b), *sum);
            }
        }
        sums[3] = s.fma(s.load_part(a_tail, 0.0), s.load_part(b_tail, 0.0), sums[3]);
        sum += f64::from(total(s, sums));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::{
        super::isa::{Isa, SimdOp},
        *,
    };

    struct Each<'a>(&'a [f32]);
    impl SimdOp for Each<'_> {
        type Output = Vec<[f32; 5]>;
        #[inline(always)]
        fn eval<S: Simd>(self, s: S) -> Self::Output {
            let mut out = Vec::new();
            for x in self.0.as_chunks::<LANES>().0 {
                let x = s.load(x);
                let (sigma, slope) = sigmoid(s, x);
                let (cdf, density) = normal(s, x);
                let mut lanes = [[0.0; LANES]; 5];
                for (lanes, v) in lanes.iter_mut().zip([exp(s, x), sigma, slope, cdf, density]) {
                    s.store(v, lanes);
                }
                out.extend((0..LANES).map(|i| lanes.map(|v| v[i])));
            }
            out
        }
    }

    /// `Φ(x)` for `x <= 0` by its continued fraction or its series, in f64.
    fn lower_tail(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() * 0.398_942_280_401_432_7;
        if x < -3.0 {
            density / (1..200).rev().fold(-x, |below, k| -x + f64::from(k) / below)
        } else {
            let (mut term, mut sum) = (x, x);
            for k in 1..100 {
                term *= x * x / f64::from(2 * k + 1);
                sum += term;
            }
            0.5 + density * sum
        }
    }

    #[test]
    fn close_to_f64() {
        let x: Vec<f32> = (0..40_000).map(|i| (i as f32 - 20_000.0) * 0.004_37).collect();
        let worst = |got: f32, want: f64, bound: f64, what: &str, x: f32| {
            let error = (f64::from(got) - want).abs();
            assert!(error <= bound, "{what}({x}): {got}, not {want}");
        };
        for isa in Isa::testable() {
            for (&x, got) in x.iter().zip(isa.run(Each(&x))) {
                let wide = f64::from(x);
                if wide > -87.336 {
                    worst(got[0], wide.exp(), 1.5e-7 * wide.exp(), "exp", x);
                }
                let e = (-wide.abs()).exp();
                let sigma = if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
                worst(got[1], sigma, 4e-7 * sigma + 2e-38, "sigmoid", x);
                worst(got[2], e / (1.0 + e).powi(2), 4e-7 * e + 2e-38, "sigmoid'", x);
                let tail = lower_tail(-wide.abs());
                let (cdf, bound) = if x < 0.0 {
                    (tail, tail * (3e-7 + 1e-7 * wide * wide) + 2e-38)
                } else {
                    (1.0 - tail, 2e-7)
                };
                worst(got[3], cdf, bound, "normal", x);
                let density = (-0.5 * wide * wide).exp() * 0.398_942_280_401_432_7;
                let bound = density * (4e-7 + 1e-7 * wide * wide) + 2e-38;
                worst(got[4], density, bound, "density", x);
            }
        }
    }

    #[test]
    fn special_values() {
        let inf = f32::INFINITY;
        let mut x = [0.0; LANES];
        x[..8].copy_from_slice(&[f32::NAN, inf, -inf, 0.0, 88.72, 88.73, -87.4, 1e30]);
        for isa in Isa::testable() {
            let got = isa.run(Each(&x));
            assert!(got[0].iter().all(|v| v.is_nan()), "{isa:?}: {:?}", got[0]);
            assert_eq!(got[1], [inf, 1.0, 0.0, 1.0, 0.0]);
            assert_eq!(got[2], [0.0; 5]);
            assert_eq!(got[3][..3], [1.0, 0.5, 0.25]);
            assert!((got[4][0] / 88.72_f32.exp() - 1.0).abs() < 3e-7, "{isa:?}: {}", got[4][0]);
            assert_eq!((got[5][0], got[6][0], got[7][0]), (inf, 0.0, inf));
        }
    }
}
