//! Embedding: ids to rows of a frozen table. Nothing is saved and nothing flows back.

use crate::{
    kernels::{
        Backend,
        ops::{Embed, Ids},
    },
    tape::{Tape, Var},
};

impl<B: Backend> Tape<'_, B> {
    /// `x[t] = table[ids[t]]`, `[tokens, d_model]`.
    pub fn embed(&mut self, table: &B::Weight, ids: Ids<'_, B>) -> Var<B> {
        self.embed_scaled(table, ids, 1.0)
    }

    /// `x[t] = scale * table[ids[t]]`, `[tokens, d_model]`.
    pub fn embed_scaled(&mut self, table: &B::Weight, ids: Ids<'_, B>, scale: f32) -> Var<B> {
        Var::constant(match ids {
            Ids::Given(ids) => self.backend.embed(Embed { table, ids, scale }),
            Ids::Chosen(ids) => self.backend.embed_chosen(table, ids, scale),
        })
    }

    /// `x[t] = table[ids[t]] + positions[places[t]]`: ids with learned positions.
    pub fn embed_at(
        &mut self,
        (table, ids): (&B::Weight, Ids<'_, B>),
        (positions, places): (&B::Weight, &[u32]),
    ) -> Var<B> {
        let x = self.embed(table, ids).tensor().clone();
        let at = self.backend.embed(Embed { table: positions, ids: places, scale: 1.0 });
        Var::constant(self.backend.add(x, &at))
    }
}
