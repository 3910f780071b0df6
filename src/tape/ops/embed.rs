//! Embedding: ids to rows of a frozen table. Nothing is saved and nothing flows back.

use crate::{
    kernels::{Backend, ops::Embed},
    tape::{Tape, Var},
};

impl<B: Backend> Tape<'_, B> {
    /// `x[t] = table[ids[t]]`, `[tokens, d_model]`.
    pub fn embed(&mut self, table: &B::Weight, ids: &[u32]) -> Var<B> {
        self.embed_scaled(table, ids, 1.0)
    }

    /// `x[t] = scale * table[ids[t]]`, `[tokens, d_model]`.
    pub fn embed_scaled(&mut self, table: &B::Weight, ids: &[u32], scale: f32) -> Var<B> {
        Var::constant(self.backend.embed(Embed { table, ids, scale }))
    }

    /// `x[t] = table[ids[t]] + positions[places[t]]`: ids with learned positions.
    pub fn embed_at(
        &mut self,
        (table, ids): (&B::Weight, &[u32]),
        (positions, places): (&B::Weight, &[u32]),
    ) -> Var<B> {
        let x = self.backend.embed(Embed { table, ids, scale: 1.0 });
        let at = self.backend.embed(Embed { table: positions, ids: places, scale: 1.0 });
        Var::constant(self.backend.add(x, &at))
    }
}
