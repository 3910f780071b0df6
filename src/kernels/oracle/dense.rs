//! Embedding, norm, linears, and the head with its loss.

use super::{Oracle, kept, lora, sum};
use crate::{
    kernels::{
        ops::*,
        sampling::{self, Candidate},
    },
    tensor::Tensor,
};

/// `y[t] = scale * table[ids[t]]`.
pub(super) fn embed(args: Embed<'_, Oracle>) -> Tensor<Oracle> {
    let Embed { table, ids, scale } = args;
    let scale = f64::from(scale);
    Tensor::from_fn(ids.len(), table.cols, |t, c| scale * table.at(ids[t] as usize, c))
}

/// With `c, s` the cosine and sine of the token's position and the pair: `y_i = c x_i - s x_(i + d/2)`
/// and `y_(i + d/2) = c x_(i + d/2) + s x_i`; `-s` for the inverse.
pub(super) fn rope(args: Rope<'_, Oracle>) -> Tensor<Oracle> {
    let Rope { x, rotary, positions, inverse } = args;
    let head_dim = rotary.table.cols;
    let half = head_dim / 2;
    assert_eq!((positions.len(), x.cols % head_dim), (x.rows, 0));
    Tensor::from_fn(x.rows, x.cols, |t, col| {
        let (pair, first) = (col % head_dim % half, col % head_dim < half);
        let cos = rotary.table.at(positions[t] as usize, pair);
        let sin = rotary.table.at(positions[t] as usize, half + pair);
        let sin = if inverse { -sin } else { sin };
        if first {
            cos * x.at(t, col) - sin * x.at(t, col + half)
        } else {
            cos * x.at(t, col) + sin * x.at(t, col - half)
        }
    })
}

/// What a norm scales: `x`, or its distance from the mean.
fn centered(x: &Tensor<Oracle>, stats: &NormStats<Oracle>, t: usize, c: usize) -> f64 {
    x.at(t, c) - stats.mean.as_ref().map_or(0.0, |mean| mean.at(t, 0))
}

/// With `c = x` or `x - mean(x)`: `y = c * rstd * weight + bias`, `rstd = 1 / sqrt(mean(c²) + eps)`.
pub(super) fn norm(args: Norm<'_, Oracle>) -> Normed<Oracle> {
    let Norm { x, weight, bias, eps, .. } = args;
    let n = x.cols as f64;
    let mean =
        args.centered.then(|| Tensor::from_fn(x.rows, 1, |t, _| sum(x.cols, |c| x.at(t, c)) / n));
    let mut stats = NormStats { mean, rstd: Tensor::from_fn(x.rows, 1, |_, _| 1.0) };
    stats.rstd = Tensor::from_fn(x.rows, 1, |t, _| {
        let square = sum(x.cols, |c| centered(x, &stats, t, c).powi(2)) / n;
        1.0 / (square + f64::from(eps)).sqrt()
    });
    Normed { y: norm_again(NormAgain { x, weight, bias, stats: &stats }), stats }
}

/// `y = c * rstd * weight + bias`.
pub(super) fn norm_again(args: NormAgain<'_, Oracle>) -> Tensor<Oracle> {
    let NormAgain { x, weight, bias, stats } = args;
    stats.rstd.assert_shape(x.rows, 1);
    assert_eq!((weight.rows, weight.cols), (1, x.cols));
    Tensor::from_fn(x.rows, x.cols, |t, c| {
        let bias = bias.map_or(0.0, |bias| bias.at(0, c));
        centered(x, stats, t, c) * stats.rstd.at(t, 0) * weight.at(0, c) + bias
    })
}

/// With `g = d_y * weight`: `d_x = d_residual + rstd * (g - mean(g) - c * rstd² * mean(g * c))`,
/// without `mean(g)` where the forward did not center.
pub(super) fn norm_backward(args: NormBackward<'_, Oracle>) -> Tensor<Oracle> {
    let NormBackward { x, weight, stats, d_y, d_residual } = args;
    d_y.assert_shape(x.rows, x.cols);
    let n = x.cols as f64;
    let g = |t: usize, c: usize| d_y.at(t, c) * weight.at(0, c);
    let mean_g = |t: usize| match stats.mean {
        Some(_) => sum(x.cols, |c| g(t, c)) / n,
        None => 0.0,
    };
    let product = |t: usize| sum(x.cols, |c| g(t, c) * centered(x, stats, t, c)) / n;
    let means = Tensor::<Oracle>::from_fn(x.rows, 2, |t, i| [mean_g(t), product(t)][i]);
    Tensor::from_fn(x.rows, x.cols, |t, c| {
        let rstd = stats.rstd.at(t, 0);
        let along = centered(x, stats, t, c) * rstd * rstd * means.at(t, 1);
        let through = g(t, c) - means.at(t, 0) - along;
        d_residual.as_ref().map_or(0.0, |d| d.at(t, c)) + rstd * through
    })
}

/// For each projection `y = residual + dropout(x·Wᵀ + bias + z·B̂)`.
pub(super) fn linear(args: Linear<'_, Oracle>) -> Vec<Tensor<Oracle>> {
    let Linear { x, projections, order: _, output: _ } = args;
    let project = |projection: &Projection<'_, Oracle>| {
        let &Projection { weight, bias, ref lora, dropout, residual } = projection;
        assert_eq!(weight.cols, x.cols);
        let delta = lora.as_ref().map(|expand| lora::expand(expand, weight.rows));
        Tensor::from_fn(x.rows, weight.rows, |t, o| {
            let product = sum(x.cols, |i| x.at(t, i) * weight.at(o, i));
            let bias = bias.map_or(0.0, |bias| bias.at(0, o));
            let delta = delta.as_ref().map_or(0.0, |delta| delta.at(t, o));
            kept(dropout, t, o) * (product + bias + delta) + residual.map_or(0.0, |r| r.at(t, o))
        })
    };
    projections.iter().map(project).collect()
}

/// `d_x = d_residual + Σ_i (d_y_i·W_i + d_z_i·Â_iᵀ)`.
pub(super) fn linear_backward(args: LinearBackward<'_, Oracle>) -> Tensor<Oracle> {
    let LinearBackward { terms, d_residual } = args;
    let (tokens, d_in) = (terms[0].d_y.rows, terms[0].weight.cols);
    let frozen = |term: &LinearBackwardTerm<'_, Oracle>, t, i| {
        sum(term.d_y.cols, |o| term.d_y.at(t, o) * term.weight.at(o, i))
    };
    let routed = |term: &LinearBackwardTerm<'_, Oracle>, t, i| {
        let Some((d_z, mixed_a, segments)) = term.lora else { return 0.0 };
        let row = lora::routing_row(segments, t);
        sum(d_z.cols, |r| d_z.at(t, r) * mixed_a.at(row * d_in + i, r))
    };
    Tensor::from_fn(tokens, d_in, |t, i| {
        let terms = sum(terms.len(), |n| frozen(&terms[n], t, i) + routed(&terms[n], t, i));
        d_residual.as_ref().map_or(0.0, |d| d.at(t, i)) + terms
    })
}

/// `nll[t] = ln Σ_v e^(logit[v]) - logit[label]`, `logit = (scale * x_t)·Wᵀ`, and
/// `d_x = d_nll * scale * Σ_v (softmax[v] - [v = label]) W[v]`.
pub(super) fn head_loss(args: HeadLoss<'_, Oracle>) -> Loss<Oracle> {
    let HeadLoss { x, weight, labels, scale, d_nll } = args;
    assert_eq!(labels.len(), x.rows);
    let scale = f64::from(scale);
    let logits = Tensor::<Oracle>::from_fn(x.rows, weight.rows, |t, v| {
        sum(x.cols, |i| scale * x.at(t, i) * weight.at(v, i))
    });
    let lse: Vec<f64> = (0..x.rows)
        .map(|t| log_sum_exp(&(0..weight.rows).map(|v| logits.at(t, v)).collect::<Vec<_>>()))
        .collect();
    let nll = (0..x.rows).map(|t| lse[t] - logits.at(t, labels[t] as usize)).collect();
    let d_x = d_nll.map(|d_nll| {
        let d_logits = Tensor::<Oracle>::from_fn(x.rows, weight.rows, |t, v| {
            let label = f64::from(u8::from(v == labels[t] as usize));
            f64::from(d_nll) * ((logits.at(t, v) - lse[t]).exp() - label)
        });
        Tensor::from_fn(x.rows, x.cols, |t, i| {
            scale * sum(weight.rows, |v| d_logits.at(t, v) * weight.at(v, i))
        })
    });
    Loss { nll, d_x }
}

/// `ln Σ e^x`, without overflow. Minus infinity of nothing.
pub(super) fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY && !x.iter().any(|x| x.is_nan()) {
        return max;
    }
    max + sum(x.len(), |i| (x[i] - max).exp()).ln()
}

/// The column of each row's largest value; the first of equals.
pub(super) fn argmax(logits: &Tensor<Oracle>, forbidden: &[u32]) -> Vec<u32> {
    let first_largest = |t| {
        let allowed = (0..logits.cols).filter(|&c| !forbidden.contains(&(c as u32)));
        let larger = |best: usize, c| if logits.at(t, c) > logits.at(t, best) { c } else { best };
        allowed.reduce(larger).unwrap_or(0) as u32
    };
    (0..logits.rows).map(first_largest).collect()
}

/// A column of each row, drawn by its weights.
pub(super) fn sample(args: &Sample<'_, Oracle>) -> Vec<u32> {
    let Sample { logits, scale, forbidden, forbids, rules, uniforms } = *args;
    let draw = |t: usize| {
        let allowed = |&c: &usize| !(forbids[t] && forbidden.contains(&(c as u32)));
        let columns = || (0..logits.cols).filter(allowed);
        let largest = columns().map(|c| logits.at(t, c)).fold(f64::NEG_INFINITY, f64::max);
        let candidates = columns().filter_map(|c| {
            let logit = logits.at(t, c);
            let weight = (f64::from(scale) * (logit - largest)).exp();
            Candidate::new(c as u32, logit as f32, weight)
        });
        sampling::draw(candidates.collect(), &rules, uniforms[t])
    };
    (0..logits.rows).map(draw).collect()
}
