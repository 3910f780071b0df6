//! Rows by index: the tokens that the head reads. Saved: which rows.

use crate::{
    kernels::{
        Backend, Precision,
        ops::{CacheWrite, Gather},
    },
    tape::{Operation, Pass, Tape, Var},
};

struct GatherNode {
    rows: Vec<usize>,
    /// Tokens of `x`.
    n_tokens: usize,
    x_id: Option<usize>,
    y_id: Option<usize>,
}

impl<B: Backend> Tape<'_, B> {
    /// `y[i] = x[rows[i]]`, rows distinct; without `rows` all of `x`.
    pub fn gather(&mut self, x: Var<B>, rows: Option<&[usize]>) -> Var<B> {
        let Some(rows) = rows else { return x };
        let y = self.backend.gather(Gather { x: x.tensor(), rows });
        let y_id = self.new_id(x.id().is_some());
        if y_id.is_some() {
            let (rows, n_tokens) = (rows.to_vec(), x.tensor().rows());
            self.push(GatherNode { rows, n_tokens, x_id: x.id(), y_id });
        }
        Var { tensor: y, id: y_id, again: None }
    }
}

impl<'m, B: Backend> Operation<'m, B> for GatherNode {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Some(d_y) = pass.take(self.y_id) else { return };
        let mut d_x = pass.backend.zeros(self.n_tokens, d_y.cols(), Precision::Activation);
        let (source, rows) = (&d_y, &self.rows[..]);
        pass.backend.cache_write(CacheWrite { cache: &mut d_x, source, rows });
        pass.give(self.x_id, d_x);
    }
}
