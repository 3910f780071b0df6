//! Sums of two: a residual that no linear adds.

use crate::{
    kernels::Backend,
    tape::{Operation, Pass, Tape, Var},
};

struct AddNode {
    ids: [Option<usize>; 2],
    sum_id: Option<usize>,
}

impl<B: Backend> Tape<'_, B> {
    /// `x + y`, `[tokens, d]` each. Nothing is saved.
    pub fn add(&mut self, x: &Var<B>, y: Var<B>) -> Var<B> {
        let ids = [x.id(), y.id()];
        let sum_id = self.new_id(ids.iter().any(Option::is_some));
        let sum = self.backend.add(y.tensor, x.tensor());
        if sum_id.is_some() {
            self.push(AddNode { ids, sum_id });
        }
        Var { tensor: sum, id: sum_id, again: None }
    }
}

impl<'m, B: Backend> Operation<'m, B> for AddNode {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_sum) = pass.take(self.sum_id) else { return };
        let [x, y] = self.ids;
        pass.give(x, d_sum.clone());
        pass.give(y, d_sum);
    }
}
