//! The seam: everything that computes, behind one trait.
//!
//! A [`Backend`] has buffers and some thirty operations on whole matrices. Each operation takes one
//! struct of named arguments ([`ops`]) and returns new tensors; only gradients and optimiser state
//! are updated in place. The definition of each operation is its plain f64 version in [`oracle`];
//! `cpu` (and a GPU backend) must agree with it within a derived bound, and exactly on small
//! integers.
//!
//! ```text
//! embed  norm  rope  linear  shrink  attention  gated  gather  dropout  head_loss   activations
//! argmax  sample                                                         the next token
//! route  mix  lora_backward  unmix                                       the routed LoRA
//! adamw  sum_of_squares                                                  the optimiser
//! ```
//!
//! What every backend promises: the same inputs give the same bits, for any number of threads; and
//! an output row's bits depend on the row's own inputs, the shapes of the weights and the chosen
//! [`ops::Order`], never on how many other rows there are or what is in them.

pub mod cpu;
pub mod cuda;
pub mod ops;
pub mod oracle;
pub mod philox;
pub mod planner;
pub mod sampling;
pub mod segments;
pub mod sizes;

use std::ops::Range;

use crate::{
    dtype::Dtype,
    tensor::{Frozen, Tensor},
};
use ops::*;

/// How precisely a tensor is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// The compute type: f32 or bf16.
    Activation,
    /// f32: parameters, gradients, statistics, mixing weights.
    Full,
}

/// A device that computes: buffers and the operations on them.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Storage of a tensor.
    type Buffer: Send + Sync;
    /// A frozen weight where the device can read it.
    type Weight: Clone + Send + Sync;
    /// Numbers in f64 that stay where they were computed until [`Backend::numbers`] asks for them.
    type Numbers: Send + Sync;
    /// Tokens that stay where they were chosen until [`Backend::tokens`] asks for them.
    type Chosen: Send;

    /// Runs `work` where this backend's threads are. Operations inside start without a hand-over.
    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    /// The type of activations (and, with [`Precision::Full`], of everything else).
    fn dtype(&self, precision: Precision) -> Dtype;
    /// Makes a frozen weight readable. On the CPU this copies nothing.
    fn weight(&self, frozen: &Frozen) -> Self::Weight;
    /// A matrix from its values, row-major, each rounded once.
    fn upload(&self, values: &[f64], rows: usize, cols: usize, to: Precision) -> Tensor<Self>;
    /// A matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self>;
    /// A matrix to be written later, by [`Backend::cache_write`]: of any values, and on the CPU of
    /// pages that are taken when they are first touched.
    fn room(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self>;
    /// A matrix's values, row-major, exactly.
    fn download(&self, tensor: &Tensor<Self>) -> Vec<f64>;
    /// A copy in a buffer of its own.
    fn copy(&self, tensor: &Tensor<Self>) -> Tensor<Self>;
    /// One number.
    fn number(&self, value: f64) -> Self::Numbers;
    /// The numbers' values. A device is waited for: a training step asks once, after its last operation.
    fn numbers(&self, numbers: &Self::Numbers) -> Vec<f64>;
    /// Adds the sum of the first `n` of `numbers` to `total`, which is one number.
    fn add_up(&self, total: &mut Self::Numbers, numbers: &Self::Numbers, n: usize);

    /// `y[t] = scale * table[ids[t]]`.
    fn embed(&self, args: Embed<'_, Self>) -> Tensor<Self>;
    /// [`Backend::embed`] of tokens that may not be known yet.
    fn embed_chosen(&self, table: &Self::Weight, ids: &Self::Chosen, scale: f32) -> Tensor<Self>;
    /// Rotary position embedding: features of each head turned by an angle that grows with position.
    fn rope(&self, args: Rope<'_, Self>) -> Tensor<Self>;
    /// Rows by index.
    fn gather(&self, args: Gather<'_, Self>) -> Tensor<Self>;
    /// Root-mean-square norm, or layer norm.
    fn norm(&self, args: Norm<'_, Self>) -> Normed<Self>;
    /// `y` again, from the statistics that [`Backend::norm`] returned: the same bits.
    fn norm_again(&self, args: NormAgain<'_, Self>) -> Tensor<Self>;
    /// `d_x` of [`Backend::norm`].
    fn norm_backward(&self, args: NormBackward<'_, Self>) -> Tensor<Self>;
    /// Frozen linears of one input, with routed LoRA, bias, dropout and residual.
    fn linear(&self, args: Linear<'_, Self>) -> Vec<Tensor<Self>>;
    /// `d_x` of [`Backend::linear`], summed over the projections.
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Tensor<Self>;
    /// Attention without a score matrix in memory.
    fn attention(&self, args: &Attention<'_, Self>) -> Attended<Self>;
    /// `d_q, d_k, d_v` of [`Backend::attention`], from recomputed probabilities.
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> [Tensor<Self>; 3];
    /// Rows of `source` into rows of a key or value cache.
    fn cache_write(&self, args: CacheWrite<'_, Self>);
    /// `h = dropout(activation(gate) * up)`.
    fn gated(&self, args: &Gated<'_, Self>) -> Tensor<Self>;
    /// `(d_gate, d_up)` of [`Backend::gated`]; `d_up` where there is an `up`.
    fn gated_backward(
        &self,
        args: &Gated<'_, Self>,
        d_h: &Tensor<Self>,
    ) -> (Tensor<Self>, Option<Tensor<Self>>);
    /// `y = x` times 0 or `1 / (1 - p)`. Its own backward.
    fn dropout(&self, x: &Tensor<Self>, dropout: &Dropout) -> Tensor<Self>;
    /// `a + b`, in `a`'s buffer where nobody else holds it.
    fn add(&self, a: Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self>;
    /// Head and cross-entropy in one, over chunks of tokens; the logits are never whole.
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Loss<Self>;
    /// The column of each row's largest value among those not forbidden; the first of equals.
    fn argmax(&self, logits: &Tensor<Self>, forbidden: &[u32]) -> Self::Chosen;
    /// A column of each row, drawn by its logits.
    fn sample(&self, args: &Sample<'_, Self>) -> Self::Chosen;
    /// The tokens. A device is waited for: until it has chosen them, not until it has done what was asked
    /// of it since.
    fn tokens(&self, chosen: Self::Chosen) -> Vec<u32>;
    /// Whether operations are queued, so that it pays to ask for a decoding step before the tokens of the
    /// last one are known.
    fn is_queued(&self) -> bool {
        false
    }

    /// Mixing weights of every routing row in every adapted linear.
    fn route(&self, args: &Route<'_, Self>) -> Routing<Self>;
    /// Gradient of the router logits from that of the mixing weights.
    fn route_backward(&self, args: RouteBackward<'_, Self>);
    /// One adapted linear's mixed pair for every routing row.
    fn mix(&self, args: Mix<'_, Self>) -> MixedPair<Self>;
    /// [`Backend::mix`] of each: where launches cost, of several at a time.
    fn mix_each(&self, args: &[Mix<'_, Self>]) -> Vec<MixedPair<Self>> {
        args.iter().map(|&args| self.mix(args)).collect()
    }
    /// `z = scale * x·Â`, for siblings that share `x`.
    fn shrink(&self, args: Shrink<'_, Self>) -> Vec<Tensor<Self>>;
    /// `z = scale * Σ_q x_q · Σ_s w[q, s] A[q, s]` without forming the mixed pair.
    fn shrink_stacked(&self, args: ShrinkStacked<'_, Self>) -> Tensor<Self>;
    /// Gradients in rank space and of the mixed pairs, for siblings that share `x`.
    fn lora_backward(&self, args: LoraBackward<'_, Self>) -> Vec<LoraGradients<Self>>;
    /// From gradients of the mixed pairs to gradients of the bank and of the mixing weights.
    fn unmix(&self, args: Unmix<'_, Self>);
    /// [`Backend::unmix`] of each of these linears, which are different ones.
    fn unmix_each(&self, args: UnmixEach<'_, Self>) {
        let UnmixEach { terms, grads, d_weights } = args;
        for &UnmixTerm { stacked, d_a, d_b } in terms {
            self.unmix(Unmix { stacked, d_a, d_b, grads: &mut *grads, d_weights: &mut *d_weights });
        }
    }

    /// `Σ v²` over all elements, in a fixed order: one number.
    fn sum_of_squares(&self, tensor: &Tensor<Self>) -> Self::Numbers;
    /// `Σ v²` over ranges of a full-precision tensor's elements, range after range: one number.
    fn sum_of_squares_in(&self, tensor: &Tensor<Self>, ranges: &[Range<usize>]) -> Self::Numbers {
        let values = self.download(tensor);
        let of = |range: &Range<usize>| values[range.clone()].iter().map(|v| v * v).sum::<f64>();
        self.number(ranges.iter().map(of).sum())
    }
    /// Sets every element to zero.
    fn clear(&self, tensor: &mut Tensor<Self>);
    /// One AdamW step over a flat parameter vector.
    fn adamw(&self, args: AdamW<'_, Self>);
}
