//! The routed LoRA: router, mixing, the two thin products, and all their gradients.
//!
//! ```text
//! logits -> s̃ -> w      Â = Σ_s w A, B̂ = Σ_s w B      z = scale * x·Â      Δ = z·B̂
//! ```

use super::{Oracle, activation::sigmoid, sum};
use crate::{
    kernels::{ops::*, philox},
    tensor::Tensor,
};

/// Machine epsilon of f32: PyTorch's bound on probabilities and draws.
const EPS: f64 = f32::EPSILON as f64;
/// The smallest normal f32: PyTorch's lower bound on samples.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// The routing row of a token.
pub(super) fn routing_row(segments: &Segments, token: usize) -> usize {
    let (_, row) = segments.iter().find(|(run, _)| run.contains(&token)).expect("a token's run");
    row
}

/// The router logit of a row of the mixing weights (`linear * n_rows + row`) and column.
fn logit(args: &Route<'_, Oracle>, at: usize, c: usize) -> f64 {
    let (linear, row) = (at / args.tasks.len(), at % args.tasks.len());
    let n_cols = args.n_splits * args.n_skills;
    args.params.buffer[args.logits[linear] + args.tasks[row] as usize * n_cols + c]
}

/// `w = v / (Σ_s v + 1e-12)` with `v` a plain sigmoid or a relaxed Bernoulli sample, or as
/// [`Weighting`](crate::weighting::Weighting) says.
pub(super) fn route(args: &Route<'_, Oracle>) -> Routing<Oracle> {
    let n_skills = args.n_skills;
    let (n_at, n_cols) = (args.logits.len() * args.tasks.len(), args.n_splits * n_skills);
    let samples = Tensor::from_fn(n_at, n_cols, |at, c| {
        let z = logit(args, at, c);
        match args.noise {
            Noise::Off => sigmoid(z),
            Noise::Given(draws) => relaxed_bernoulli(z, draws[at * n_cols + c]),
            Noise::Philox { key, examples } => {
                let (linear, row) = (at / args.tasks.len(), at % args.tasks.len());
                let block = key.block([(c / 4) as u32, 0, examples[row], linear as u32]);
                relaxed_bernoulli(z, f64::from(philox::unit(block[c % 4])))
            }
        }
    });
    let weights = Tensor::from_fn(n_at, n_cols, |at, c| {
        let value = args.weighting.value(samples.at(at, c));
        match args.weighting.factor(args.n_splits, n_skills) {
            Some(factor) => value * factor,
            None => value / normalizer(args, &samples, at, c / n_skills),
        }
    });
    Routing { weights, samples }
}

/// `Σ_s v[at, split, s] + 1e-12`, or as the weighting says.
fn normalizer(args: &Route<'_, Oracle>, samples: &Tensor<Oracle>, at: usize, split: usize) -> f64 {
    let value = |s| args.weighting.value(samples.at(at, split * args.n_skills + s));
    args.weighting.normalizer(sum(args.n_skills, value))
}

/// A sample at temperature 1: `σ(logit(u) + logit(p))`, `p = σ(z)`, each clamped as PyTorch does.
fn relaxed_bernoulli(z: f64, u: f64) -> f64 {
    let p = sigmoid(z).clamp(EPS, 1.0 - EPS);
    let u = u.clamp(EPS, 1.0 - EPS);
    sigmoid(u.ln() - (-u).ln_1p() + p.ln() - (-p).ln_1p()).clamp(TINY, 1.0 - EPS)
}

/// `d_s̃ = (d_w - Σ_j w_j d_w_j) / (Σ_s v + 1e-12)` (or `d_w` times the factor), then
/// `d_z = d_s̃ * s̃ (1 - s̃)`, which is 0 where a clamp of the sample cut; added up over the routing rows
/// of a task.
pub(super) fn route_backward(args: RouteBackward<'_, Oracle>) {
    let RouteBackward { forward, routing: Routing { weights, samples }, d_weights, grads } = args;
    let (n_skills, n_cols) = (forward.n_skills, forward.n_splits * forward.n_skills);
    d_weights.assert_shape(weights.rows, n_cols);
    for at in 0..weights.rows {
        for c in 0..n_cols {
            let split = c / n_skills;
            let inner = sum(n_skills, |s| {
                weights.at(at, split * n_skills + s) * d_weights.at(at, split * n_skills + s)
            });
            let sample = samples.at(at, c);
            let d_sample = match forward.weighting.factor(forward.n_splits, n_skills) {
                Some(factor) => d_weights.at(at, c) * factor,
                None => (d_weights.at(at, c) - inner) / normalizer(forward, samples, at, split),
            };
            let p = sigmoid(logit(forward, at, c));
            let cut = !matches!(forward.noise, Noise::Off)
                && (!(EPS..=1.0 - EPS).contains(&p) || sample <= TINY || sample >= 1.0 - EPS);
            let (linear, row) = (at / forward.tasks.len(), at % forward.tasks.len());
            let place = forward.logits[linear] + forward.tasks[row] as usize * n_cols + c;
            if !cut {
                grads.values_mut()[place] += d_sample * sample * (1.0 - sample);
            }
        }
    }
}

/// Where `A[q, s, i, r]` lies in the flat vector.
fn a_at(bank: &Bank, q: usize, s: usize, i: usize, r: usize) -> usize {
    bank.a_start + ((q * bank.n_skills + s) * (bank.d_in / bank.n_splits) + i) * bank.rank + r
}

/// Where `B[q, s, r, o]` lies in the flat vector.
fn b_at(bank: &Bank, q: usize, s: usize, r: usize, o: usize) -> usize {
    bank.b_start + ((q * bank.n_skills + s) * bank.rank + r) * (bank.d_out / bank.n_splits) + o
}

impl Stacked<'_, Oracle> {
    /// The mixing weight of a routing row of the bank's own linear.
    fn w(&self, n_rows: usize, row: usize, q: usize, s: usize) -> f64 {
        self.weights.at(self.bank.linear * n_rows + row, q * self.bank.n_skills + s)
    }

    /// `A`, with the input feature counted over all splits, for one skill.
    fn a(&self, s: usize, i: usize, r: usize) -> f64 {
        let width = self.bank.d_in / self.bank.n_splits;
        self.params.buffer[a_at(&self.bank, i / width, s, i % width, r)]
    }

    /// `B`, with the output feature counted over all splits, for one skill.
    fn b(&self, s: usize, r: usize, o: usize) -> f64 {
        let width = self.bank.d_out / self.bank.n_splits;
        self.params.buffer[b_at(&self.bank, o / width, s, r, o % width)]
    }
}

/// `Â[row] = Σ_s w[row, q, s] A[q, s]` and likewise `B̂`, `q` being the feature's split.
pub(super) fn mix(args: Mix<'_, Oracle>) -> MixedPair<Oracle> {
    let Mix { stacked, n_rows } = args;
    let Bank { n_splits, n_skills, d_in, d_out, rank, .. } = stacked.bank;
    let a = Tensor::from_fn(n_rows * d_in, rank, |at, r| {
        let (row, i) = (at / d_in, at % d_in);
        sum(n_skills, |s| stacked.w(n_rows, row, i / (d_in / n_splits), s) * stacked.a(s, i, r))
    });
    let b = Tensor::from_fn(n_rows * rank, d_out, |at, o| {
        let (row, r) = (at / rank, at % rank);
        sum(n_skills, |s| stacked.w(n_rows, row, o / (d_out / n_splits), s) * stacked.b(s, r, o))
    });
    MixedPair { a, b }
}

/// `z = scale * x·Â` of each sibling.
pub(super) fn shrink(args: Shrink<'_, Oracle>) -> Vec<Tensor<Oracle>> {
    let Shrink { x, mixed_a, segments, scale, order: _ } = args;
    assert_eq!(x.rows, segments.n_tokens());
    let shrink_one = |mixed_a: &&Tensor<Oracle>| {
        assert_eq!(mixed_a.rows, segments.n_rows() * x.cols);
        Tensor::from_fn(x.rows, mixed_a.cols, |t, r| {
            let row = routing_row(segments, t);
            f64::from(scale) * sum(x.cols, |i| x.at(t, i) * mixed_a.at(row * x.cols + i, r))
        })
    };
    mixed_a.iter().map(shrink_one).collect()
}

/// `z = scale * Σ_q x_q · Σ_s w[q, s] A[q, s]`.
pub(super) fn shrink_stacked(args: ShrinkStacked<'_, Oracle>) -> Tensor<Oracle> {
    let ShrinkStacked { x, stacked, segments, scale } = args;
    let width = stacked.bank.d_in / stacked.bank.n_splits;
    x.assert_shape(segments.n_tokens(), stacked.bank.d_in);
    Tensor::from_fn(x.rows, stacked.bank.rank, |t, r| {
        let row = routing_row(segments, t);
        let skill = |s, i| stacked.w(segments.n_rows(), row, i / width, s) * stacked.a(s, i, r);
        let mixed = |i| sum(stacked.bank.n_skills, |s| skill(s, i));
        f64::from(scale) * sum(x.cols, |i| x.at(t, i) * mixed(i))
    })
}

/// `Δ = z·B̂`, `[tokens, d_out]`.
pub(super) fn expand(args: &Expand<'_, Oracle>, d_out: usize) -> Tensor<Oracle> {
    let &Expand { z, segments, ref rhs } = args;
    assert_eq!(z.rows, segments.n_tokens());
    Tensor::from_fn(z.rows, d_out, |t, o| {
        let row = routing_row(segments, t);
        match rhs {
            ExpandRhs::Mixed(mixed_b) => {
                mixed_b.assert_shape(segments.n_rows() * z.cols, d_out);
                sum(z.cols, |r| z.at(t, r) * mixed_b.at(row * z.cols + r, o))
            }
            ExpandRhs::Stacked(stacked) => {
                assert_eq!((stacked.bank.rank, stacked.bank.d_out), (z.cols, d_out));
                let q = o / (d_out / stacked.bank.n_splits);
                let skill = |s| {
                    let w = stacked.w(segments.n_rows(), row, q, s);
                    sum(z.cols, |r| w * z.at(t, r) * stacked.b(s, r, o))
                };
                sum(stacked.bank.n_skills, skill)
            }
        }
    })
}

/// `d_z = scale * d_y·B̂ᵀ`, `d_Â = xᵀ·d_z` and `d_B̂ = zᵀ·d_y` of each routing row.
pub(super) fn lora_backward(args: LoraBackward<'_, Oracle>) -> Vec<LoraGradients<Oracle>> {
    let LoraBackward { x, terms, segments, scale } = args;
    assert_eq!(x.rows, segments.n_tokens());
    let tokens: Vec<Vec<usize>> = (0..segments.n_rows())
        .map(|row| (0..x.rows).filter(|&t| routing_row(segments, t) == row).collect())
        .collect();
    let gradients = |term: &LoraTerm<'_, Oracle>| {
        let &LoraTerm { z, d_y, mixed_b } = term;
        let (rank, d_in, d_out) = (z.cols, x.cols, d_y.cols);
        let d_z = Tensor::from_fn(x.rows, rank, |t, r| {
            let row = routing_row(segments, t);
            f64::from(scale) * sum(d_out, |o| d_y.at(t, o) * mixed_b.at(row * rank + r, o))
        });
        let d_a = Tensor::from_fn(segments.n_rows() * d_in, rank, |at, r| {
            let tokens = &tokens[at / d_in];
            sum(tokens.len(), |n| x.at(tokens[n], at % d_in) * d_z.at(tokens[n], r))
        });
        let d_b = Tensor::from_fn(segments.n_rows() * rank, d_out, |at, o| {
            let tokens = &tokens[at / rank];
            sum(tokens.len(), |n| z.at(tokens[n], at % rank) * d_y.at(tokens[n], o))
        });
        LoraGradients { d_z, d_a, d_b }
    };
    terms.iter().map(gradients).collect()
}

/// `d_A[q, s] += Σ_row w[row, q, s] d_Â[row, q]`, likewise `d_B`, and
/// `d_w[row, q, s] += <d_Â[row, q], A[q, s]> + <d_B̂[row, q], B[q, s]>`.
pub(super) fn unmix(args: Unmix<'_, Oracle>) {
    let Unmix { stacked, d_a, d_b, grads, d_weights } = args;
    let bank = &stacked.bank;
    let &Bank { linear, n_splits, n_skills, d_in, d_out, rank, .. } = bank;
    let n_rows = d_a.rows / d_in;
    d_a.assert_shape(n_rows * d_in, rank);
    d_b.assert_shape(n_rows * rank, d_out);
    let (d, o) = (d_in / n_splits, d_out / n_splits);
    for q in 0..n_splits {
        for s in 0..n_skills {
            for row in 0..n_rows {
                let w = stacked.w(n_rows, row, q, s);
                let mut d_w = 0.0;
                for (i, r) in (0..d).flat_map(|i| (0..rank).map(move |r| (i, r))) {
                    let d_mixed = d_a.at(row * d_in + q * d + i, r);
                    grads.values_mut()[a_at(bank, q, s, i, r)] += w * d_mixed;
                    d_w += d_mixed * stacked.params.buffer[a_at(bank, q, s, i, r)];
                }
                for (r, j) in (0..rank).flat_map(|r| (0..o).map(move |j| (r, j))) {
                    let d_mixed = d_b.at(row * rank + r, q * o + j);
                    grads.values_mut()[b_at(bank, q, s, r, j)] += w * d_mixed;
                    d_w += d_mixed * stacked.params.buffer[b_at(bank, q, s, r, j)];
                }
                let cols = d_weights.cols;
                d_weights.values_mut()[(linear * n_rows + row) * cols + q * n_skills + s] += d_w;
            }
        }
    }
}
