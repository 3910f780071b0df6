//! Activation, gated or not: `h = dropout(activation(gate) * up)`.
//!
//! Saved: `gate` and `up`. The product is not kept; it is computed again where the down projection
//! is adapted and needs its input.

use crate::{
    kernels::{
        Backend,
        ops::{Activation, Dropout, Gated},
    },
    tape::{Operation, Pass, Tape, Var},
    tensor::Tensor,
};

struct GatedNode<B: Backend> {
    gate: Var<B>,
    up: Option<Var<B>>,
    activation: Activation,
    dropout: Option<Dropout>,
    h_id: Option<usize>,
}

impl<B: Backend> GatedNode<B> {
    fn args(&self) -> Gated<'_, B> {
        Gated {
            gate: self.gate.tensor(),
            up: self.up.as_ref().map(Var::tensor),
            activation: self.activation,
            dropout: self.dropout.as_ref(),
        }
    }
}

impl<B: Backend> Tape<'_, B> {
    /// `dropout(activation(gate) * up)`, `[tokens, d_ff]`; without `up` the activation alone.
    pub fn gated(
        &mut self,
        gate: Var<B>,
        up: Option<Var<B>>,
        activation: Activation,
        dropout: Option<Dropout>,
    ) -> Var<B> {
        let needed = gate.id().is_some() || up.as_ref().is_some_and(|up| up.id().is_some());
        let mut node = GatedNode { gate, up, activation, dropout, h_id: None };
        let tensor = self.backend.gated(&node.args());
        if !self.recording {
            return Var::constant(tensor);
        }
        node.h_id = self.new_id(needed);
        let id = node.h_id;
        Var { tensor, id, again: Some(self.push(node)) }
    }
}

impl<'m, B: Backend> Operation<'m, B> for GatedNode<B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_h) = pass.take(self.h_id) else { return };
        let (d_gate, d_up) = pass.backend.gated_backward(&self.args(), &d_h);
        pass.give(self.gate.id(), d_gate);
        if let (Some(up), Some(d_up)) = (&self.up, d_up) {
            pass.give(up.id(), d_up);
        }
    }

    fn again(&self, backend: &B) -> Tensor<B> {
        backend.gated(&self.args())
    }
}
