//! Dropout on its own: after the embedding and after the last norm of a stack. (Elsewhere it is part
//! of the operation before it.)
//!
//! Nothing is saved: the same counters drop the same elements again.

use crate::{
    kernels::{Backend, ops::Dropout},
    tape::{Operation, Pass, Tape, Var},
};

struct DropoutNode {
    dropout: Dropout,
    x_id: Option<usize>,
    y_id: Option<usize>,
}

impl<B: Backend> Tape<'_, B> {
    /// Drops elements, if there is a dropout.
    pub fn dropout(&mut self, x: Var<B>, dropout: Option<Dropout>) -> Var<B> {
        let Some(dropout) = dropout else { return x };
        let y = self.backend.dropout(x.tensor(), &dropout);
        let y_id = self.new_id(x.id().is_some());
        if y_id.is_some() {
            self.push(DropoutNode { dropout, x_id: x.id(), y_id });
        }
        Var { tensor: y, id: y_id, again: None }
    }
}

impl<'m, B: Backend> Operation<'m, B> for DropoutNode {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_y) = pass.take(self.y_id) else { return };
        let d_x = pass.backend.dropout(&d_y, &self.dropout);
        pass.give(self.x_id, d_x);
    }
}
