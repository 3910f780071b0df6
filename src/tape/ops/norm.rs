//! Root-mean-square norm and layer norm.
//!
//! Saved: `x` (which is kept anyway, as the residual) and the statistics of each row. The output is not
//! kept; a linear that needs it in its backward has it computed again.

use crate::{
    kernels::{
        Backend,
        ops::{Norm, NormAgain, NormBackward, NormStats},
    },
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

struct NormNode<'m, B: Backend> {
    weight: &'m B::Weight,
    bias: Option<&'m B::Weight>,
    x: Tensor<B>,
    x_id: Option<usize>,
    /// Rows of the output; `x` has as many for each group of features that is normed by itself.
    n_tokens: usize,
    stats: NormStats<B>,
    y_id: Option<usize>,
}

/// The weights of a layer norm.
pub struct LayerNorm<B: Backend> {
    /// `[1, d]`.
    pub weight: B::Weight,
    /// `[1, d]`.
    pub bias: B::Weight,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// `y = x / sqrt(mean(x²) + eps) * weight`, `[tokens, d]`.
    pub fn norm(&mut self, x: &Var<B>, weight: &'m B::Weight, eps: f32) -> Var<B> {
        let width = x.tensor().cols();
        self.norm_groups(x, weight, eps, width)
    }

    /// `y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, `[tokens, d]`.
    pub fn layer_norm(&mut self, x: &Var<B>, layer: &'m LayerNorm<B>, eps: f32) -> Var<B> {
        let LayerNorm { weight, bias } = layer;
        self.apply_norm(x, x.tensor().cols(), weight, Some(bias), eps)
    }

    /// [`Tape::norm`] of every `width` features by themselves (Qwen 3's heads), with one weight.
    pub fn norm_groups(
        &mut self,
        x: &Var<B>,
        weight: &'m B::Weight,
        eps: f32,
        width: usize,
    ) -> Var<B> {
        self.apply_norm(x, width, weight, None, eps)
    }

    /// A norm of every `width` features; with a bias a layer norm.
    fn apply_norm(
        &mut self,
        x: &Var<B>,
        width: usize,
        weight: &'m B::Weight,
        bias: Option<&'m B::Weight>,
        eps: f32,
    ) -> Var<B> {
        let (n_tokens, cols) = (x.tensor().rows(), x.tensor().cols());
        let groups = x.tensor().clone().reshaped(n_tokens * (cols / width), width);
        let centered = bias.is_some();
        let normed = self.backend.norm(Norm { x: &groups, weight, bias, centered, eps });
        let y = normed.y.reshaped(n_tokens, cols);
        if !self.recording {
            return Var::constant(y);
        }
        // Recorded even where `x` needs no gradient: the adapter's gradient may need `y` again.
        let y_id = self.new_id(x.id().is_some());
        let x_id = x.id();
        let stats = normed.stats;
        let node = NormNode { weight, bias, x: groups, x_id, n_tokens, stats, y_id };
        let again = Some(self.push(node));
        Var { tensor: y, id: y_id, again }
    }
}

impl<'m, B: Backend> Operation<'m, B> for NormNode<'m, B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_y) = pass.take(self.y_id) else { return };
        let (rows, width, cols) = (self.x.rows(), self.x.cols(), d_y.cols());
        let d_y = d_y.reshaped(rows, width);
        let d_residual = pass.take(self.x_id).map(|d| d.reshaped(rows, width));
        let (x, weight, stats, d_y) = (&self.x, self.weight, &self.stats, &d_y);
        let args = NormBackward { x, weight, stats, d_y, d_residual };
        let d_x = pass.backend.norm_backward(args);
        pass.give(self.x_id, d_x.reshaped(self.n_tokens, cols));
    }

    fn again(&self, backend: &B) -> Tensor<B> {
        let (x, weight, bias, stats) = (&self.x, self.weight, self.bias, &self.stats);
        let y = backend.norm_again(NormAgain { x, weight, bias, stats });
        let cols = y.len() / self.n_tokens.max(1);
        y.reshaped(self.n_tokens, cols)
    }
}
