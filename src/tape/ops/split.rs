//! A matrix's columns in parts of equal width: q, k and v of one linear. Nothing is saved.
//!
//! In memory `[tokens, n · width]` is `[tokens · n, width]`, of which part i has every n-th row.

use crate::{
    kernels::{
        Backend, Precision,
        ops::{CacheWrite, Gather},
    },
    tape::{Operation, Pass, Tape, Var},
};

struct SplitNode {
    n_tokens: usize,
    width: usize,
    x_id: Option<usize>,
    part_ids: Vec<Option<usize>>,
}

/// The rows of part `i` of `n`.
fn rows(n_tokens: usize, i: usize, n: usize) -> Vec<usize> {
    (0..n_tokens).map(|token| token * n + i).collect()
}

impl<B: Backend> Tape<'_, B> {
    /// The parts of `x` `[tokens, N * width]`, `[tokens, width]` each.
    pub fn split<const N: usize>(&mut self, x: Var<B>) -> [Var<B>; N] {
        let needed = x.id().is_some();
        let (n_tokens, width) = (x.tensor().rows(), x.tensor().cols() / N);
        let tall = x.tensor().clone().reshaped(n_tokens * N, width);
        let parts = std::array::from_fn(|i| {
            let rows = &rows(n_tokens, i, N)[..];
            let tensor = self.backend.gather(Gather { x: &tall, rows });
            Var { tensor, id: self.new_id(needed), again: None }
        });
        if needed {
            let part_ids = parts.iter().map(Var::id).collect();
            self.push(SplitNode { n_tokens, width, x_id: x.id(), part_ids });
        }
        parts
    }
}

impl<'m, B: Backend> Operation<'m, B> for SplitNode {
    fn backward(&self, pass: &mut Pass<'_, 'm, B>) {
        let Self { n_tokens, width, x_id, .. } = *self;
        let n = self.part_ids.len();
        let mut d_x = pass.backend.zeros(n_tokens * n, width, Precision::Activation);
        let mut any = false;
        for (i, &id) in self.part_ids.iter().enumerate() {
            let Some(source) = &pass.take(id) else { continue };
            let rows = &rows(n_tokens, i, n)[..];
            pass.backend.cache_write(CacheWrite { cache: &mut d_x, source, rows });
            any = true;
        }
        if any {
            pass.give(x_id, d_x.reshaped(n_tokens, n * width));
        }
    }
}
