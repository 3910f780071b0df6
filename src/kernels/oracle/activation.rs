//! Pointwise non-linearities, their derivatives, and the gated product around them.

use std::f64::consts::PI;

use super::{Oracle, kept};
use crate::{
    kernels::ops::{Activation, Gated},
    tensor::Tensor,
};

/// `h = dropout(activation(gate) * up)`.
pub(super) fn gated(args: &Gated<'_, Oracle>) -> Tensor<Oracle> {
    let &Gated { gate, up, activation, dropout } = args;
    Tensor::from_fn(gate.rows, gate.cols, |t, c| {
        kept(dropout, t, c) * value(activation, gate.at(t, c)) * up.map_or(1.0, |up| up.at(t, c))
    })
}

/// `d_gate = dropout(d_h) * up * activation'(gate)` and `d_up = dropout(d_h) * activation(gate)`.
pub(super) fn gated_backward(
    args: &Gated<'_, Oracle>,
    d_h: &Tensor<Oracle>,
) -> (Tensor<Oracle>, Option<Tensor<Oracle>>) {
    let &Gated { gate, up, activation, dropout } = args;
    d_h.assert_shape(gate.rows, gate.cols);
    let d_product = |t, c| kept(dropout, t, c) * d_h.at(t, c);
    let d_gate = Tensor::from_fn(gate.rows, gate.cols, |t, c| {
        d_product(t, c) * up.map_or(1.0, |up| up.at(t, c)) * slope(activation, gate.at(t, c))
    });
    let d_up = up.map(|_| {
        Tensor::from_fn(gate.rows, gate.cols, |t, c| {
            d_product(t, c) * value(activation, gate.at(t, c))
        })
    });
    (d_gate, d_up)
}

/// `activation(x)`.
fn value(activation: Activation, x: f64) -> f64 {
    match activation {
        // Not `max`, which would hide a NaN.
        Activation::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        Activation::GeluNew => x * sigmoid(2.0 * gelu_new_argument(x)),
        Activation::Gelu => x * gauss_cdf(x),
        Activation::Silu => x * sigmoid(x),
    }
}

/// `activation'(x)`.
fn slope(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => f64::from(u8::from(x > 0.0)),
        Activation::GeluNew => {
            let s = sigmoid(2.0 * gelu_new_argument(x));
            let d_argument = (2.0 / PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
            s + x * 2.0 * d_argument * s * sigmoid(-2.0 * gelu_new_argument(x))
        }
        Activation::Gelu => gauss_cdf(x) + x * (-x * x / 2.0).exp() / (2.0 * PI).sqrt(),
        Activation::Silu => sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
    }
}

/// What GELU's approximation takes the tanh of; `(1 + tanh(a)) / 2 = σ(2a)` loses nothing where the
/// tanh is near -1.
fn gelu_new_argument(x: f64) -> f64 {
    (2.0 / PI).sqrt() * (x + 0.044715 * x * x * x)
}

/// `σ(x) = 1 / (1 + e^-x)`.
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `(1 + erf(x / sqrt(2))) / 2`.
fn gauss_cdf(x: f64) -> f64 {
    let t = x.abs() / 2f64.sqrt();
    let lower = erfc(t) / 2.0; // Of -|x|, to full relative accuracy.
    if x < 0.0 { lower } else { 1.0 - lower }
}

/// `1 - erf(t)` for `t >= 0`, to about 1e-15: below 2 by the series
/// `erf(t) = 2/sqrt(π) e^-t² Σ_n 2^n t^(2n+1) / (1·3···(2n+1))`, whose terms are all positive, above
/// by the continued fraction `e^-t² / sqrt(π) / (t + 1/2 / (t + 1 / (t + 3/2 / (t + ...))))`.
fn erfc(t: f64) -> f64 {
    if t < 2.0 {
        let (mut term, mut series) = (t, t);
        for n in 1..80 {
            term *= 2.0 * t * t / f64::from(2 * n + 1);
            series += term;
        }
        1.0 - 2.0 / PI.sqrt() * (-t * t).exp() * series
    } else {
        let fraction = (1..200).rev().fold(t, |tail, n| t + f64::from(n) / 2.0 / tail);
        (-t * t).exp() / PI.sqrt() / fraction
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erfc_has_known_values() {
        let known = [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953_5),
            (1.0, 0.157_299_207_050_285_13),
            (1.999_999, 0.004_677_755_648_073_953),
            (2.0, 0.004_677_734_981_047_266),
            (3.0, 2.209_049_699_858_544e-5),
            (10.0, 2.088_487_583_762_545e-45),
        ];
        for (t, expected) in known {
            assert!((erfc(t) - expected).abs() <= 1e-12 * expected + 1e-16, "erfc({t})");
        }
        assert!((gauss_cdf(1.5) + gauss_cdf(-1.5) - 1.0).abs() < 1e-15);
    }
}
