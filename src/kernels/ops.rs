//! The arguments and results of the operations, each with its formula and shapes.
//!
//! `tokens` below is the number of tokens of the whole batch: sequences lie one after the other,
//! without padding. Tensors of parameters, gradients, statistics and mixing weights are
//! [`Precision::Full`](super::Precision); the others are activations.

use std::{ops::Range, sync::Arc};

use super::Backend;
pub use super::{philox::Key, segments::Segments};
use crate::tensor::Tensor;
pub use crate::{activation::Activation, weighting::Weighting};

/// Which example a token belongs to and where it stands in it: what dropout is counted by, so that
/// it depends neither on the batch split nor on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenKey {
    /// The example's number within the optimiser step.
    pub example: u32,
    /// The token's position in its sequence.
    pub position: u32,
}

/// Counter-based dropout: the same arguments always drop the same elements.
///
/// Element `(token, col)` is dropped where its 16 random bits are below [`Dropout::threshold`]; the
/// bits are half-word `col % 8` (low halves first) of the Philox block with counter
/// `[col / 8, position, example, site]`. Kept elements are divided by the exact probability of
/// being kept. Dropped ones are multiplied by 0, as PyTorch does: a NaN or an infinity stays seen.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Probability of dropping, in `[0, 1)`; rounded to a multiple of 2^-16.
    pub p: f32,
    /// Seed, purpose and step.
    pub key: Key,
    /// Which dropout of the model this is.
    pub site: u32,
    /// The key of each token, `[tokens]`.
    pub tokens: Arc<[TokenKey]>,
}

impl Dropout {
    /// Elements whose 16 bits are below this are dropped.
    pub fn threshold(&self) -> u32 {
        ((self.p * 65536.0).round() as u32).min(65535) // Something is always kept.
    }

    /// What kept elements are multiplied by.
    pub fn scale(&self) -> f32 {
        (65536.0 / f64::from(65536 - self.threshold())) as f32
    }

    /// The factor (0 or [`Dropout::scale`]) of the element in column `col` of token `token`.
    pub fn factor(&self, token: usize, col: usize) -> f32 {
        let TokenKey { example, position } = self.tokens[token];
        let block = self.key.block([(col / 8) as u32, position, example, self.site]);
        let bits = (block[col % 8 / 2] >> (16 * (col % 2))) & 0xFFFF;
        if bits < self.threshold() { 0.0 } else { self.scale() }
    }
}

/// Consecutive rows for each sequence: where they start and how many they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// The first row of each sequence.
    pub starts: Vec<usize>,
    /// The number of rows of each sequence.
    pub lens: Vec<usize>,
}

impl Spans {
    /// Sequences of these lengths, one after the other.
    pub fn packed(lens: &[usize]) -> Self {
        let starts = lens.iter().scan(0, |at, len| Some(std::mem::replace(at, *at + len)));
        Self { starts: starts.collect(), lens: lens.to_vec() }
    }

    /// The number of sequences.
    pub fn n(&self) -> usize {
        self.lens.len()
    }

    /// One past the last row that any sequence uses.
    pub fn end(&self) -> usize {
        self.starts.iter().zip(&self.lens).map(|(s, l)| s + l).max().unwrap_or(0)
    }
}

/// The order in which a linear adds up its products. Fixed for an engine, so that a row's bits never
/// depend on the number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// In blocks of 256 along the input features, in sequence within a block: outer products over
    /// packed panels; on AMX in steps of 32. For many rows.
    Panel,
    /// In 16 lanes along the input features: dot products that stream each weight row once; on AMX in steps
    /// of 32. For up to about 16 rows.
    Dot,
}

/// Arguments of [`Backend::embed`]: `y[t] = scale * table[ids[t]]`, `[tokens, d_model]`.
pub struct Embed<'a, B: Backend> {
    /// `[vocabulary, d_model]`.
    pub table: &'a B::Weight,
    /// `[tokens]`, each below the vocabulary.
    pub ids: &'a [u32],
    /// Multiplies the rows.
    pub scale: f32,
}

/// What a draw of a token leaves out, one rule over what the one before left, as transformers orders them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingRules {
    /// So many of the most probable tokens, and equals of the last of them; 0: all.
    pub top_k: usize,
    /// The most probable tokens until their probabilities reach this sum; 1: all.
    pub top_p: f64,
    /// Tokens that are at least so probable, relative to the most probable one; 0: all.
    pub min_p: f64,
}

/// Arguments of [`Backend::sample`]: the column of each row is drawn with probability
/// `softmax(scale * logits)`, after the rules ([`sampling`](super::sampling)); never one of less than 2^-40 of the largest
/// probability. Backends may differ where weights of f32 differ in the last place and a draw falls between them.
pub struct Sample<'a, B: Backend> {
    /// `[rows, columns]`, f32.
    pub logits: &'a Tensor<B>,
    /// Above 0: the head's scale over the temperature.
    pub scale: f32,
    /// Columns that are not drawn.
    pub forbidden: &'a [u32],
    /// Whether the forbidden columns are forbidden in a row, `[rows]`.
    pub forbids: &'a [bool],
    /// What else is not.
    pub rules: SamplingRules,
    /// The chance: a number in `[0, 1)` for each row.
    pub uniforms: &'a [f64],
}

/// Ids that were given, or that were chosen on the device.
pub enum Ids<'a, B: Backend> {
    /// Each below the vocabulary.
    Given(&'a [u32]),
    /// By [`Backend::argmax`] or [`Backend::sample`].
    Chosen(&'a B::Chosen),
}

impl<B: Backend> Clone for Ids<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Ids<'_, B> {}

/// Arguments of [`Backend::rope`]: the pair of features `i` and `i + head_dim / 2` of every head of
/// token `t` is turned by the angle of position `positions[t]` and pair `i` (Hugging Face's
/// `rotate_half`; the original Llama's neighbouring pairs are permuted when a checkpoint is converted).
pub struct Rope<'a, B: Backend> {
    /// `[tokens, n_heads * head_dim]`; reused for the result where nobody else holds it.
    pub x: Tensor<B>,
    /// The angles.
    pub rotary: &'a Rotary<B>,
    /// Where each token stands in its sequence, `[tokens]`, below the table's rows.
    pub positions: &'a [u32],
    /// Turns the other way: the backward.
    pub inverse: bool,
}

/// Cosines and sines of the angles of every position.
pub struct Rotary<B: Backend> {
    /// `[positions, head_dim]`, full precision: first the cosines of all pairs, then the sines.
    pub table: Tensor<B>,
}

impl<B: Backend> Clone for Rotary<B> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone() }
    }
}

/// Arguments of [`Backend::gather`]: `y[i] = x[rows[i]]`.
pub struct Gather<'a, B: Backend> {
    /// `[tokens, width]`.
    pub x: &'a Tensor<B>,
    /// Rows of `x`.
    pub rows: &'a [usize],
}

/// Arguments of [`Backend::norm`]: with `c = x`, or `x - mean(x)` where it is centered,
/// `y = c * rstd * weight + bias`, `rstd = 1 / sqrt(mean(c²) + eps)`.
pub struct Norm<'a, B: Backend> {
    /// `[tokens, d]`.
    pub x: &'a Tensor<B>,
    /// `[1, d]`.
    pub weight: &'a B::Weight,
    /// `[1, d]`.
    pub bias: Option<&'a B::Weight>,
    /// Whether the mean is subtracted first (layer norm) or not (root-mean-square norm).
    pub centered: bool,
    /// Added to the mean square.
    pub eps: f32,
}

/// Result of [`Backend::norm`].
pub struct Normed<B: Backend> {
    /// `[tokens, d]`.
    pub y: Tensor<B>,
    /// The mean (0 where it is not centered) and `rstd` of each token.
    pub stats: NormStats<B>,
}

/// What [`Backend::norm`] finds out about each token.
pub struct NormStats<B: Backend> {
    /// `[tokens, 1]`, full precision; none where it is not centered.
    pub mean: Option<Tensor<B>>,
    /// `[tokens, 1]`, full precision.
    pub rstd: Tensor<B>,
}

/// Arguments of [`Backend::norm_again`].
pub struct NormAgain<'a, B: Backend> {
    /// `[tokens, d]`.
    pub x: &'a Tensor<B>,
    /// `[1, d]`.
    pub weight: &'a B::Weight,
    /// `[1, d]`.
    pub bias: Option<&'a B::Weight>,
    /// From the forward.
    pub stats: &'a NormStats<B>,
}

/// Arguments of [`Backend::norm_backward`]: with `g = d_y * weight`,
/// `d_x = d_residual + rstd * (g - mean(g) - c * rstd² * mean(g * c))`, without `mean(g)` where it is
/// not centered.
pub struct NormBackward<'a, B: Backend> {
    /// `[tokens, d]`.
    pub x: &'a Tensor<B>,
    /// `[1, d]`.
    pub weight: &'a B::Weight,
    /// From the forward.
    pub stats: &'a NormStats<B>,
    /// `[tokens, d]`.
    pub d_y: &'a Tensor<B>,
    /// The gradient that reaches `x` past the norm; reused for the result where nobody else holds it.
    pub d_residual: Option<Tensor<B>>,
}

/// Arguments of [`Backend::linear`]: for each projection
/// `y = residual + dropout(x·Wᵀ + bias + z·B̂)`, rounded once at the end.
pub struct Linear<'a, B: Backend> {
    /// `[tokens, d_in]`.
    pub x: &'a Tensor<B>,
    /// The siblings that share `x`.
    pub projections: &'a [Projection<'a, B>],
    /// How sums are ordered.
    pub order: Order,
    /// Precision of the outputs (logits are `Full`).
    pub output: super::Precision,
}

/// One output of [`Backend::linear`].
pub struct Projection<'a, B: Backend> {
    /// `[d_out, d_in]`.
    pub weight: &'a B::Weight,
    /// `[1, d_out]`.
    pub bias: Option<&'a B::Weight>,
    /// The routed LoRA's second half.
    pub lora: Option<Expand<'a, B>>,
    /// Applied before the residual is added.
    pub dropout: Option<&'a Dropout>,
    /// `[tokens, d_out]`.
    pub residual: Option<&'a Tensor<B>>,
}

impl<'a, B: Backend> Projection<'a, B> {
    /// A frozen linear and nothing else.
    pub fn plain(weight: &'a B::Weight) -> Self {
        Self { weight, bias: None, lora: None, dropout: None, residual: None }
    }
}

/// `z·B̂`, the second half of the routed LoRA (the scale is already in `z`).
pub struct Expand<'a, B: Backend> {
    /// `[tokens, rank]`, full precision.
    pub z: &'a Tensor<B>,
    /// Which routing row a token belongs to.
    pub segments: &'a Segments,
    /// Where `B̂` comes from.
    pub rhs: ExpandRhs<'a, B>,
}

/// Where [`Expand`] finds `B̂`.
pub enum ExpandRhs<'a, B: Backend> {
    /// Mixed: `[rows * rank, d_out]`, row block `i` belongs to routing row `i`.
    Mixed(&'a Tensor<B>),
    /// Stacked: output split `q` gets `Σ_s (w[row, q, s] z)·B[q, s]`, straight from the bank.
    Stacked(Stacked<'a, B>),
}

/// A bank with the mixing weights of one of its linears.
pub struct Stacked<'a, B: Backend> {
    /// The bank's place and shape.
    pub bank: Bank,
    /// All parameters, flat.
    pub params: &'a Tensor<B>,
    /// `[n_linears * rows, n_splits * n_skills]`.
    pub weights: &'a Tensor<B>,
}

impl<B: Backend> Clone for Stacked<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Stacked<'_, B> {}

/// Arguments of [`Backend::linear_backward`]:
/// `d_x = d_residual + Σ_i (d_y_i·W_i + d_z_i·Â_iᵀ)`, rounded once at the end.
pub struct LinearBackward<'a, B: Backend> {
    /// The siblings.
    pub terms: &'a [LinearBackwardTerm<'a, B>],
    /// Added to the result; reused for it where nobody else holds it.
    pub d_residual: Option<Tensor<B>>,
}

/// One sibling's part of [`LinearBackward`].
pub struct LinearBackwardTerm<'a, B: Backend> {
    /// `[tokens, d_out]`.
    pub d_y: &'a Tensor<B>,
    /// `[d_out, d_in]`.
    pub weight: &'a B::Weight,
    /// `d_z` `[tokens, rank]` (with the scale in it), `Â` `[rows * d_in, rank]`, and the segments.
    pub lora: Option<(&'a Tensor<B>, &'a Tensor<B>, &'a Segments)>,
}

/// Arguments of [`Backend::attention`]: per sequence and head
/// `o_i = Σ_j dropout(softmax_j(scale * q_i·k_j + bias[head, j - i])) v_j`.
///
/// Query `i` of a sequence stands at position `i + n_keys - n_queries` of its keys (so that decoding
/// with a cache and training agree); `causal` lets it see keys up to that position, `window` of those
/// only the last few.
pub struct Attention<'a, B: Backend> {
    /// `[query tokens, n_heads * head_dim]`.
    pub q: &'a Tensor<B>,
    /// `[key rows, n_kv_heads * head_dim]`.
    pub k: &'a Tensor<B>,
    /// `[key rows, n_kv_heads * head_dim]`.
    pub v: &'a Tensor<B>,
    /// Each sequence's rows of `q`, packed in order.
    pub queries: &'a Spans,
    /// Each sequence's rows of `k` and `v` (anywhere in them: a cache has room between).
    pub keys: &'a Spans,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores (T5: 1).
    pub scale: f32,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
    /// With `causal`: how many keys a query sees at most, its own included.
    pub window: Option<usize>,
    /// Added to the scaled scores.
    pub bias: Option<&'a RelativeBias<B>>,
    /// On the probabilities; token = query token, column = `head * round_up(n_keys, 8) + key`.
    pub dropout: Option<&'a Dropout>,
}

/// A score bias that depends on head and distance only.
pub struct RelativeBias<B: Backend> {
    /// `[n_heads, distances]`, full precision; distance `key - query` is column `zero + key - query`.
    pub table: Tensor<B>,
    /// The column of distance 0.
    pub zero: usize,
}

impl<B: Backend> Clone for RelativeBias<B> {
    fn clone(&self) -> Self {
        Self { table: self.table.clone(), zero: self.zero }
    }
}

/// Result of [`Backend::attention`].
pub struct Attended<B: Backend> {
    /// `[query tokens, n_heads * head_dim]`.
    pub o: Tensor<B>,
    /// Log-sum-exp of the scores, `[query tokens, n_heads]`, full precision.
    pub lse: Tensor<B>,
}

/// Arguments of [`Backend::attention_backward`].
pub struct AttentionBackward<'a, B: Backend> {
    /// What the forward got.
    pub forward: &'a Attention<'a, B>,
    /// What the forward gave.
    pub o: &'a Tensor<B>,
    /// What the forward gave.
    pub lse: &'a Tensor<B>,
    /// `[query tokens, n_heads * head_dim]`.
    pub d_o: &'a Tensor<B>,
}

/// Arguments of [`Backend::cache_write`]: `cache[rows[i]] = source[i]`. Into zeros it is also the
/// backward of [`Backend::gather`].
pub struct CacheWrite<'a, B: Backend> {
    /// `[n_rows, width]`, held by nobody else.
    pub cache: &'a mut Tensor<B>,
    /// `[n, width]`.
    pub source: &'a Tensor<B>,
    /// `[n]`, distinct.
    pub rows: &'a [usize],
}

/// Arguments of [`Backend::gated`].
pub struct Gated<'a, B: Backend> {
    /// `[tokens, d_ff]`, before the activation.
    pub gate: &'a Tensor<B>,
    /// `[tokens, d_ff]`; without it `h = dropout(activation(gate))`.
    pub up: Option<&'a Tensor<B>>,
    /// The non-linearity.
    pub activation: Activation,
    /// On the product.
    pub dropout: Option<&'a Dropout>,
}

/// Arguments of [`Backend::head_loss`]: `nll[t] = -ln softmax((scale * x_t)·Wᵀ)[labels[t]]`.
pub struct HeadLoss<'a, B: Backend> {
    /// `[tokens, d_model]`.
    pub x: &'a Tensor<B>,
    /// `[vocabulary, d_model]`.
    pub weight: &'a B::Weight,
    /// `[tokens]`, each below the vocabulary.
    pub labels: &'a [u32],
    /// Multiplies the logits (T5 v1.0: `d_model^-0.5`).
    pub scale: f32,
    /// The gradient of the loss with respect to each nll, or none if `d_x` is not wanted.
    pub d_nll: Option<f32>,
}

/// Result of [`Backend::head_loss`].
pub struct Loss<B: Backend> {
    /// In nats, `[tokens]`.
    pub nll: B::Numbers,
    /// `[tokens, d_model]`, where it was asked for.
    pub d_x: Option<Tensor<B>>,
}

/// Place and shape of one adapted linear's bank in the flat parameter vector.
///
/// `A` is `[n_splits, n_skills, d_in / n_splits, rank]`, `B` is `[n_splits, n_skills, rank,
/// d_out / n_splits]`, both contiguous (PEFT's layout).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bank {
    /// The linear's number: which block of rows of the mixing weights is its own.
    pub linear: usize,
    /// First element of `A`.
    pub a_start: usize,
    /// First element of `B`.
    pub b_start: usize,
    /// Splits of the feature axes.
    pub n_splits: usize,
    /// Skills.
    pub n_skills: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
    /// Rank.
    pub rank: usize,
}

impl Bank {
    /// Elements of `A`.
    pub fn a_len(&self) -> usize {
        self.n_skills * self.d_in * self.rank
    }

    /// Elements of `B`.
    pub fn b_len(&self) -> usize {
        self.n_skills * self.d_out * self.rank
    }

    /// Where `A` lies in the flat vector.
    pub fn a(&self) -> Range<usize> {
        self.a_start..self.a_start + self.a_len()
    }

    /// Where `B` lies in the flat vector.
    pub fn b(&self) -> Range<usize> {
        self.b_start..self.b_start + self.b_len()
    }
}

/// Arguments of [`Backend::route`].
pub struct Route<'a, B: Backend> {
    /// All parameters, flat.
    pub params: &'a Tensor<B>,
    /// Where each adapted linear's router logits `[n_tasks, n_splits * n_skills]` start.
    pub logits: &'a [usize],
    /// The task of each routing row, each below `n_tasks`.
    pub tasks: &'a [u32],
    /// Splits.
    pub n_splits: usize,
    /// Skills.
    pub n_skills: usize,
    /// Sampling in training, plain sigmoid in evaluation.
    pub noise: Noise<'a>,
    /// How samples become mixing weights.
    pub weighting: Weighting,
}

/// The uniform draws of relaxed Bernoulli routing.
#[derive(Clone, Copy, Debug)]
pub enum Noise<'a> {
    /// No sampling: `s̃ = σ(z)`.
    Off,
    /// `u` of `(linear, row, split, skill)` is word `c % 4` of the block with counter
    /// `[c / 4, 0, example, linear]`, `c = split * n_skills + skill`, as `(word >> 8) * 2^-24`.
    Philox {
        /// Seed, purpose and step.
        key: Key,
        /// The example of each routing row.
        examples: &'a [u32],
    },
    /// Recorded draws in `[0, 1)`, `[n_linears * rows, n_splits * n_skills]`.
    Given(&'a [f64]),
}

/// Result of [`Backend::route`]; both `[n_linears * rows, n_splits * n_skills]`, full precision.
pub struct Routing<B: Backend> {
    /// `w = s̃ / (Σ_s s̃ + 1e-12)`, normalised over the skills of each split, or as the weighting says.
    pub weights: Tensor<B>,
    /// `s̃`: `σ(z)`, or the relaxed Bernoulli sample at temperature 1 with the clamps of PyTorch's f32.
    pub samples: Tensor<B>,
}

/// Arguments of [`Backend::route_backward`]: adds the gradient of the logits to `grads`.
pub struct RouteBackward<'a, B: Backend> {
    /// What the forward got.
    pub forward: &'a Route<'a, B>,
    /// What the forward gave.
    pub routing: &'a Routing<B>,
    /// `[n_linears * rows, n_splits * n_skills]`.
    pub d_weights: &'a Tensor<B>,
    /// All gradients, flat, laid out as the parameters; added to.
    pub grads: &'a mut Tensor<B>,
}

/// Arguments of [`Backend::mix`]: `Â[row] = Σ_s w[row, q, s] A[q, s]` and likewise `B̂`.
pub struct Mix<'a, B: Backend> {
    /// The bank with its mixing weights.
    pub stacked: Stacked<'a, B>,
    /// Routing rows.
    pub n_rows: usize,
}

impl<B: Backend> Clone for Mix<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Mix<'_, B> {}

/// Result of [`Backend::mix`], full precision.
pub struct MixedPair<B: Backend> {
    /// `[rows * d_in, rank]`.
    pub a: Tensor<B>,
    /// `[rows * rank, d_out]`.
    pub b: Tensor<B>,
}

impl<B: Backend> Clone for MixedPair<B> {
    fn clone(&self) -> Self {
        Self { a: self.a.clone(), b: self.b.clone() }
    }
}

/// Arguments of [`Backend::shrink`].
pub struct Shrink<'a, B: Backend> {
    /// `[tokens, d_in]`.
    pub x: &'a Tensor<B>,
    /// Each sibling's `Â`, `[rows * d_in, rank]`; all of one rank.
    pub mixed_a: &'a [&'a Tensor<B>],
    /// Which routing row a token belongs to.
    pub segments: &'a Segments,
    /// `1 / rank`.
    pub scale: f32,
    /// How sums are ordered.
    pub order: Order,
}

/// Arguments of [`Backend::shrink_stacked`]. The result is `[tokens, rank]`, full precision.
pub struct ShrinkStacked<'a, B: Backend> {
    /// `[tokens, d_in]`.
    pub x: &'a Tensor<B>,
    /// The bank with its mixing weights.
    pub stacked: Stacked<'a, B>,
    /// Which routing row a token belongs to.
    pub segments: &'a Segments,
    /// `1 / rank`.
    pub scale: f32,
}

/// Arguments of [`Backend::lora_backward`].
pub struct LoraBackward<'a, B: Backend> {
    /// `[tokens, d_in]`.
    pub x: &'a Tensor<B>,
    /// The siblings; all of one rank.
    pub terms: &'a [LoraTerm<'a, B>],
    /// Which routing row a token belongs to.
    pub segments: &'a Segments,
    /// `1 / rank`.
    pub scale: f32,
}

/// One sibling of [`LoraBackward`].
pub struct LoraTerm<'a, B: Backend> {
    /// `[tokens, rank]`, with the scale in it.
    pub z: &'a Tensor<B>,
    /// `[tokens, d_out]`.
    pub d_y: &'a Tensor<B>,
    /// `[rows * rank, d_out]`.
    pub mixed_b: &'a Tensor<B>,
}

/// Result of [`Backend::lora_backward`], full precision.
pub struct LoraGradients<B: Backend> {
    /// `scale * d_y·B̂ᵀ`, `[tokens, rank]`.
    pub d_z: Tensor<B>,
    /// `xᵀ·d_z` of each routing row, `[rows * d_in, rank]`; zero for a row without tokens.
    pub d_a: Tensor<B>,
    /// `zᵀ·d_y` of each routing row, `[rows * rank, d_out]`; zero for a row without tokens.
    pub d_b: Tensor<B>,
}

/// Arguments of [`Backend::unmix`]: adds `Σ_row w[row, q, s] d_Â[row, q]` to the gradient of
/// `A[q, s]` and likewise for `B`, and `<d_Â[row, q], A[q, s]> + <d_B̂[row, q], B[q, s]>` to `d_w[row, q, s]`.
pub struct Unmix<'a, B: Backend> {
    /// The bank with its mixing weights.
    pub stacked: Stacked<'a, B>,
    /// `[rows * d_in, rank]`.
    pub d_a: &'a Tensor<B>,
    /// `[rows * rank, d_out]`.
    pub d_b: &'a Tensor<B>,
    /// All gradients, flat; added to.
    pub grads: &'a mut Tensor<B>,
    /// `[n_linears * rows, n_splits * n_skills]`; this linear's block is added to.
    pub d_weights: &'a mut Tensor<B>,
}

/// Arguments of [`Backend::unmix_each`].
pub struct UnmixEach<'a, B: Backend> {
    /// The linears; with as many routing rows each.
    pub terms: &'a [UnmixTerm<'a, B>],
    /// As in [`Unmix`].
    pub grads: &'a mut Tensor<B>,
    /// As in [`Unmix`].
    pub d_weights: &'a mut Tensor<B>,
}

/// One linear of [`UnmixEach`]; the fields are those of [`Unmix`].
pub struct UnmixTerm<'a, B: Backend> {
    /// The bank with its mixing weights.
    pub stacked: Stacked<'a, B>,
    /// `[rows * d_in, rank]`.
    pub d_a: &'a Tensor<B>,
    /// `[rows * rank, d_out]`.
    pub d_b: &'a Tensor<B>,
}

impl<B: Backend> Clone for UnmixTerm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for UnmixTerm<'_, B> {}

/// Arguments of [`Backend::adamw`]: PyTorch's AdamW (decoupled decay, bias-corrected moments). Where the
/// gradients are [clipped](GradScale::Clipped) and their norm or the loss is not finite, nothing changes.
pub struct AdamW<'a, B: Backend> {
    /// Parameters, flat.
    pub params: &'a mut Tensor<B>,
    /// First moments.
    pub m: &'a mut Tensor<B>,
    /// Second moments.
    pub v: &'a mut Tensor<B>,
    /// Gradients.
    pub grads: &'a Tensor<B>,
    /// Which elements learn how fast; disjoint. Elements in no group stay as they are.
    pub groups: &'a [ParamGroup],
    /// Multiplies the gradients.
    pub grad_scale: GradScale<'a, B>,
    /// The number of this step, from 1.
    pub step: u64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f32,
}

/// What [`AdamW`] multiplies the gradients with.
pub enum GradScale<'a, B: Backend> {
    /// Known to the host.
    Given(f32),
    /// [`clip_scale`] of numbers that the host has not seen.
    Clipped {
        /// The largest norm; 0: any.
        max_norm: f64,
        /// The gradients' squares, added up: one number.
        squares: &'a B::Numbers,
        /// The loss, or its sum: one number.
        loss: &'a B::Numbers,
    },
}

impl<B: Backend> Clone for GradScale<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for GradScale<'_, B> {}

impl<B: Backend> GradScale<'_, B> {
    /// The factor, by the host; none where nothing may change.
    pub(super) fn on_host(self, backend: &B) -> Option<f32> {
        match self {
            Self::Given(scale) => Some(scale),
            Self::Clipped { max_norm, squares, loss } => {
                let norm = backend.numbers(squares)[0].sqrt();
                let finite = norm.is_finite() && backend.numbers(loss)[0].is_finite();
                finite.then(|| clip_scale(max_norm, norm) as f32)
            }
        }
    }
}

/// What scales gradients of this global norm down to `max_norm` (0: never), as
/// `torch.nn.utils.clip_grad_norm_`: the 1e-6 keeps a zero norm from dividing.
pub fn clip_scale(max_norm: f64, norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

/// Elements that share a learning rate.
#[derive(Clone, Debug)]
pub struct ParamGroup {
    /// Of the flat vector.
    pub range: Range<usize>,
    /// Learning rate.
    pub lr: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}
