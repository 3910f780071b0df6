//! Rotary position embedding. Saved: nothing but where the tokens stand; the backward turns back.

use std::sync::Arc;

use crate::{
    kernels::{
        Backend,
        ops::{Rope, Rotary},
    },
    tape::{Operation, Pass, Tape, Var},
};

struct RopeNode<B: Backend> {
    rotary: Rotary<B>,
    positions: Arc<[u32]>,
    x_id: Option<usize>,
    y_id: Option<usize>,
}

impl<B: Backend> Tape<'_, B> {
    /// Turns the features of every head by their token's position, `[tokens, n_heads * head_dim]`.
    pub fn rope(&mut self, x: Var<B>, rotary: &Rotary<B>, positions: &Arc<[u32]>) -> Var<B> {
        let (x_id, inverse) = (x.id, false);
        let y = self.backend.rope(Rope { x: x.tensor, rotary, positions, inverse });
        let y_id = self.new_id(x_id.is_some());
        if y_id.is_some() {
            let (rotary, positions) = (rotary.clone(), Arc::clone(positions));
            self.push(RopeNode { rotary, positions, x_id, y_id });
        }
        Var { tensor: y, id: y_id, again: None }
    }
}

impl<'m, B: Backend> Operation<'m, B> for RopeNode<B> {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(x) = pass.take(self.y_id) else { return };
        let (rotary, positions, inverse) = (&self.rotary, &self.positions[..], true);
        let d_x = pass.backend.rope(Rope { x, rotary, positions, inverse });
        pass.give(self.x_id, d_x);
    }
}
