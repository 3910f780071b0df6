//! Head and cross-entropy, fused over chunks of tokens.
//!
//! The head is frozen, so the gradient of its input is known as soon as a chunk's logits are: it is
//! computed in the forward, and the logits of all tokens never exist together. Saved: `d_x`.

use crate::{
    kernels::{Backend, ops::HeadLoss},
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

struct HeadNode<B: Backend> {
    d_x: Tensor<B>,
    x_id: Option<usize>,
}

/// What the head and the loss are, beside their input.
pub(crate) struct HeadSpec<'a, B: Backend> {
    /// `[vocabulary, d_model]`.
    pub(crate) weight: &'a B::Weight,
    /// `[tokens]`.
    pub(crate) labels: &'a [u32],
    /// Multiplies the logits.
    pub(crate) scale: f32,
    /// The gradient of the loss with respect to each token's nll.
    pub(crate) d_nll: f32,
}

impl<B: Backend> Tape<'_, B> {
    /// `-ln p(label)` of each token, in nats. The loss that is differentiated is `d_nll` times their
    /// sum.
    pub(crate) fn head_loss(&mut self, x: &Var<B>, spec: HeadSpec<'_, B>) -> Vec<f64> {
        let HeadSpec { weight, labels, scale, d_nll } = spec;
        let d_nll = x.id().map(|_| d_nll);
        let loss = self.backend.head_loss(HeadLoss { x: x.tensor(), weight, labels, scale, d_nll });
        if let Some(d_x) = loss.d_x {
            self.push(HeadNode { d_x, x_id: x.id() });
        }
        loss.nll
    }
}

impl<'m, B: Backend> Operation<'m, B> for HeadNode<B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        pass.give(self.x_id, self.d_x.clone());
    }
}
