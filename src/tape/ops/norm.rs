//! Root-mean-square norm.
//!
//! Saved: `x` (which is kept anyway, as the residual) and `1/rms` of each row. The output is not
//! kept; a linear that needs it in its backward has it computed again.

use crate::{
    kernels::{
        Backend,
        ops::{Norm, NormAgain, NormBackward},
    },
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

struct NormNode<'m, B: Backend> {
    weight: &'m B::Weight,
    x: Tensor<B>,
    x_id: Option<usize>,
    rstd: Tensor<B>,
    y_id: Option<usize>,
}

impl<'m, B: Backend> Tape<'m, B> {
    /// `y = x / sqrt(mean(x²) + eps) * weight`, `[tokens, d]`.
    pub fn norm(&mut self, x: &Var<B>, weight: &'m B::Weight, eps: f32) -> Var<B> {
        let normed = self.backend.norm(Norm { x: x.tensor(), weight, eps });
        if !self.recording {
            return Var::constant(normed.y);
        }
        // Recorded even where `x` needs no gradient: the adapter's gradient may need `y` again.
        let y_id = self.new_id(x.id().is_some());
        let x_id = x.id();
        let node = NormNode { weight, x: x.tensor().clone(), x_id, rstd: normed.rstd, y_id };
        let again = Some(self.push(node));
        Var { tensor: normed.y, id: y_id, again }
    }
}

impl<'m, B: Backend> Operation<'m, B> for NormNode<'m, B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_y) = pass.take(self.y_id) else { return };
        let d_residual = pass.take(self.x_id);
        let (x, weight, rstd) = (&self.x, self.weight, &self.rstd);
        let d_x =
            pass.backend.norm_backward(NormBackward { x, weight, rstd, d_y: &d_y, d_residual });
        pass.give(self.x_id, d_x);
    }

    fn again(&self, backend: &B) -> Tensor<B> {
        backend.norm_again(NormAgain { x: &self.x, weight: self.weight, rstd: &self.rstd })
    }
}
