//! Head and cross-entropy, fused over chunks of tokens.
//!
//! The head is frozen, so the gradient of its input is known as soon as a chunk's logits are: it is
//! computed in the forward, and the logits of all tokens never exist together. Saved: `d_x`.
//!
//! Other losses change that gradient afterwards ([`LossShape`]): it is linear in the weights of the
//! tokens, and label smoothing adds what does not depend on the logits at all.
//!
//! ```text
//! (1 - ε) nll + ε mean_v(-ln p_v)      d_x = scale · Σ_v (p_v - (1 - ε) [v = label] - ε / V) W_v
//!                                          = that of nll + scale · ε · (W_label - mean_v W_v)
//! ```

use crate::{
    kernels::{
        Backend, Precision,
        ops::{Embed, HeadLoss},
    },
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

struct HeadNode<B: Backend> {
    d_x: Tensor<B>,
    x_id: Option<usize>,
}

/// What the head and the loss are, beside their input.
pub struct HeadSpec<'a, B: Backend> {
    /// `[vocabulary, d_model]`.
    pub weight: &'a B::Weight,
    /// `[tokens]`.
    pub labels: &'a [u32],
    /// Multiplies the logits.
    pub scale: f32,
    /// The gradient of the loss with respect to each token's nll.
    pub d_nll: f32,
}

/// From the nll of each token, the gradient of the loss with respect to each.
pub type TokenWeights<'m> = Box<dyn Fn(&[f64]) -> Vec<f64> + Send + Sync + 'm>;

/// How the loss differs from `d_nll · Σ nll`. The nll that is reported is the plain one.
#[derive(Default)]
pub struct LossShape<'m> {
    /// The share ε of the label's probability that goes to all others, and the mean row of the head,
    /// `[d_model]` ([`mean_row`]).
    pub smoothing: Option<(f64, &'m [f64])>,
    /// Replaces `d_nll`.
    pub weights: Option<TokenWeights<'m>>,
}

/// The mean over a head's rows, `[vocabulary, d_model]` -> `[d_model]`.
pub fn mean_row<B: Backend>(backend: &B, weight: &B::Weight, vocabulary: usize) -> Vec<f64> {
    let mut mean = Vec::new();
    let ids: Vec<u32> = (0..vocabulary as u32).collect();
    for ids in ids.chunks(1024) {
        let rows = backend.embed(Embed { table: weight, ids, scale: 1.0 });
        mean.resize(rows.cols(), 0.0);
        for row in backend.download(&rows).chunks_exact(rows.cols()) {
            mean.iter_mut().zip(row).for_each(|(mean, v)| *mean += v / vocabulary as f64);
        }
    }
    mean
}

impl<'m, B: Backend> Tape<'m, B> {
    /// Another loss than the plain one, for the head losses of this tape.
    pub fn shape_loss(&mut self, shape: LossShape<'m>) {
        self.loss_shape = Some(shape);
    }

    /// `-ln p(label)` of each token, in nats. The loss that is differentiated is `d_nll` times their
    /// sum, or as [`Tape::shape_loss`] says.
    pub fn head_loss(&mut self, x: &Var<B>, spec: HeadSpec<'_, B>) -> B::Numbers {
        let HeadSpec { weight, labels, scale, d_nll } = spec;
        let needed = x.id().map(|_| d_nll);
        let shaped = self.loss_shape.as_ref().is_some_and(|shape| shape.weights.is_some());
        // Weights that depend on the nll are not known yet: the gradient of each nll comes first.
        let d_nll = if shaped { needed.map(|_| 1.0) } else { needed };
        let loss = self.backend.head_loss(HeadLoss { x: x.tensor(), weight, labels, scale, d_nll });
        if let (Some(mut d_x), Some(d_nll)) = (loss.d_x, d_nll) {
            if let Some(shape) = &self.loss_shape {
                let plain = || vec![f64::from(d_nll); labels.len()];
                let weights = shape
                    .weights
                    .as_ref()
                    .map_or_else(plain, |of| of(&self.backend.numbers(&loss.nll)));
                d_x =
                    self.reshape(d_x, &weights, shaped, HeadSpec { weight, labels, scale, d_nll });
            }
            self.push(HeadNode { d_x, x_id: x.id() });
        }
        loss.nll
    }

    /// The gradient with the tokens' weights (where it has none yet) and label smoothing in it.
    fn reshape(
        &self,
        d_x: Tensor<B>,
        weights: &[f64],
        unweighted: bool,
        spec: HeadSpec<'_, B>,
    ) -> Tensor<B> {
        let (backend, d_model) = (self.backend, d_x.cols());
        let mut values = backend.download(&d_x);
        if unweighted {
            for (row, weight) in values.chunks_exact_mut(d_model).zip(weights) {
                row.iter_mut().for_each(|v| *v *= weight);
            }
        }
        if let Some((epsilon, mean)) = self.loss_shape.as_ref().and_then(|shape| shape.smoothing) {
            let of_labels =
                backend.embed(Embed { table: spec.weight, ids: spec.labels, scale: 1.0 });
            let of_labels = backend.download(&of_labels);
            let rows = values.chunks_exact_mut(d_model).zip(of_labels.chunks_exact(d_model));
            for ((row, of_label), weight) in rows.zip(weights) {
                let factor = weight * f64::from(spec.scale) * epsilon;
                for ((v, w), mean) in row.iter_mut().zip(of_label).zip(mean) {
                    *v += factor * (w - mean);
                }
            }
        }
        backend.upload(&values, d_x.rows(), d_model, Precision::Activation)
    }
}

impl<'m, B: Backend> Operation<'m, B> for HeadNode<B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        pass.give(self.x_id, self.d_x.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kernels::{
            oracle::Oracle,
            philox::{Key, Purpose},
        },
        tape::Gradients,
        tensor::Frozen,
    };

    const TOKENS: usize = 5;
    const D: usize = 4;
    const VOCABULARY: usize = 7;
    const LABELS: [u32; TOKENS] = [6, 0, 3, 3, 1];
    const SCALE: f32 = 0.5;

    fn random(stream: u64, n: usize) -> Vec<f64> {
        let key = Key::new(stream, Purpose::Data, 0);
        (0..n as u64).map(|i| 2.0 * f64::from(key.uniform(i)) - 1.0).collect()
    }

    /// `-ln p` of every token and word, `[tokens, vocabulary]`.
    fn all_nll(x: &[f64], w: &[f64]) -> Vec<Vec<f64>> {
        x.chunks(D)
            .map(|x| {
                let logit = |w: &[f64]| -> f64 {
                    f64::from(SCALE) * x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()
                };
                let logits: Vec<f64> = w.chunks(D).map(logit).collect();
                let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
                logits.iter().map(|l| lse - l).collect()
            })
            .collect()
    }

    /// The gradient of a shaped loss is the difference quotient of its definition.
    #[test]
    fn gradients_are_those_of_the_definition() {
        let (x, w) = (random(1, TOKENS * D), random(2, VOCABULARY * D));
        let w: Vec<f64> = w.iter().map(|&v| f64::from(v as f32)).collect();
        let narrow: Vec<f32> = w.iter().map(|&v| v as f32).collect();
        let frozen = Frozen::from_f32(&narrow, VOCABULARY, D, crate::Dtype::F32);
        let weight = Oracle.weight(&frozen);
        let mean = mean_row(&Oracle, &weight, VOCABULARY);
        let (epsilon, d_nll) = (0.1, 0.25_f32);
        let nll_of = |all: &[Vec<f64>], t: usize| all[t][LABELS[t] as usize];
        // Squares, so that the weights depend on the nll.
        let cases: [(bool, bool); 3] = [(true, false), (false, true), (true, true)];
        for (smooth, squares) in cases {
            let objective = |x: &[f64]| -> f64 {
                let all = all_nll(x, &w);
                (0..TOKENS)
                    .map(|t| {
                        let nll = nll_of(&all, t);
                        let mean = all[t].iter().sum::<f64>() / VOCABULARY as f64;
                        match (smooth, squares) {
                            (true, false) => {
                                f64::from(d_nll) * ((1.0 - epsilon) * nll + epsilon * mean)
                            }
                            (false, true) => nll * nll / 2.0,
                            // Weighted by the nll of x itself, held fixed.
                            _ => {
                                let fixed = nll_of(&all_nll(&random(1, TOKENS * D), &w), t);
                                fixed * ((1.0 - epsilon) * nll + epsilon * mean)
                            }
                        }
                    })
                    .sum()
            };
            let mut tape = Tape::recording(&Oracle, None);
            tape.shape_loss(LossShape {
                smoothing: smooth.then_some((epsilon, &mean[..])),
                weights: squares.then(|| -> TokenWeights<'_> { Box::new(|nll| nll.to_vec()) }),
            });
            let var = tape.watched(Oracle.upload(&x, TOKENS, D, Precision::Activation));
            let spec = HeadSpec { weight: &weight, labels: &LABELS, scale: SCALE, d_nll };
            let nll = tape.head_loss(&var, spec);
            let all = all_nll(&x, &w);
            assert!((0..TOKENS).all(|t| (nll[t] - nll_of(&all, t)).abs() < 1e-12), "plain nll");
            let none = || Oracle.zeros(0, 0, Precision::Full);
            let mut gradients = Gradients { params: none(), weights: none() };
            let grads = tape.backward(Vec::new(), &mut gradients);
            let got = Oracle.download(grads[0].as_ref().unwrap());
            for i in 0..x.len() {
                let moved = |step: f64| {
                    let mut x = x.clone();
                    x[i] += step;
                    objective(&x)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!(
                    (got[i] - want).abs() < 1e-8,
                    "{smooth} {squares} {i}: {}, not {want}",
                    got[i]
                );
            }
        }
    }
}
