//! Embedding: ids to rows of a frozen table. Nothing is saved and nothing flows back.

use crate::{
    kernels::{Backend, ops::Embed},
    tape::{Tape, Var},
};

impl<B: Backend> Tape<'_, B> {
    /// `x[t] = table[ids[t]]`, `[tokens, d_model]`.
    pub fn embed(&mut self, table: &B::Weight, ids: &[u32]) -> Var<B> {
        Var::constant(self.backend.embed(Embed { table, ids }))
    }
}
