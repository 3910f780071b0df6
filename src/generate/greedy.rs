//! Greedy decoding with a cache of keys and values.
//!
//! All rows of a batch step together; a row that has ended leaves, and the others go on without it.

use std::sync::Arc;

use super::{DOT_ROWS, Engine};
use crate::{
    kernels::{
        Backend,
        ops::{Order, Segments},
    },
    model::{Example, cache::Step, network::Sides},
};

/// How tokens are generated.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// At most this many tokens a row.
    pub max_new_tokens: usize,
    /// No end token before this many.
    pub min_new_tokens: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 128, min_new_tokens: 0 }
    }
}

impl<B: Backend> Engine<'_, B> {
    /// The most probable continuation of each example, token by token: new tokens only, with the end
    /// token where one came; an output ends where the model's positions end. `on_token` sees each
    /// token as it is made: the example's index and the id.
    pub fn generate(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
        mut on_token: impl FnMut(usize, u32) + Send,
    ) -> Vec<Vec<u32>> {
        self.model.backend().scope(|| {
            let mut all = Vec::with_capacity(examples.len());
            for (i, chunk) in examples.chunks(self.capacity).enumerate() {
                let first = i * self.capacity;
                all.extend(
                    self.decode_batch(chunk, options, &mut |row, id| on_token(first + row, id)),
                );
            }
            all
        })
    }

    fn decode_batch(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32),
    ) -> Vec<Vec<u32>> {
        let mut outputs = vec![Vec::new(); examples.len()];
        if options.max_new_tokens == 0 || examples.is_empty() {
            return outputs;
        }
        let network = self.model.network();
        let generation = self.model.generation();
        let (batch, rows) = self.batch(examples);
        let sides = Sides::new(&batch, &rows, None);
        let mut prefill = self.tape(Order::Panel);
        let mut decoding = network.start(&mut prefill, &batch, &sides);
        let order = if self.capacity <= DOT_ROWS { Order::Dot } else { Order::Panel };
        let mut decode = self.tape(order);

        let max_positions = self.model.config().max_positions().unwrap_or(usize::MAX);
        let mut active: Vec<usize> = (0..examples.len()).collect();
        // The first step brings what comes before the first new token.
        let (mut ids, mut lens, mut tape) = match generation.decoder_start_token_id {
            Some(start) => (vec![start; active.len()], vec![1; active.len()], &mut decode),
            None => {
                // Not the batch's target: in an evaluation the labels are in it.
                let inputs = || examples.iter().map(|example| &example.input);
                let ids = inputs().flatten().copied().collect();
                (ids, inputs().map(Vec::len).collect(), &mut prefill)
            }
        };
        for n_new in 0..options.max_new_tokens {
            let of_row: Vec<usize> = active.iter().map(|&i| rows.of_example[i]).collect();
            let segments = &Arc::new(Segments::new(&lens, &of_row, rows.n_rows));
            let step = Step { ids: &ids, slots: &active, lens: &lens, segments };
            let logits = network.next_logits(tape, &mut decoding, &step);
            let forbidden: &[u32] =
                if n_new < options.min_new_tokens { &generation.eos_token_ids } else { &[] };
            let next = self.model.backend().argmax(&logits, forbidden);
            for (&row, &id) in active.iter().zip(&next) {
                outputs[row].push(id);
                on_token(row, id);
            }
            (active, ids) = active
                .iter()
                .zip(next)
                .filter(|&(&row, ref id)| {
                    // A token at the last position is said, but there is no room to go on from it.
                    let full = decoding.len(row) >= max_positions;
                    !full && !generation.eos_token_ids.contains(id)
                })
                .map(|(&row, id)| (row, id))
                .unzip();
            if active.is_empty() {
                break;
            }
            lens = vec![1; active.len()];
            tape = &mut decode;
        }
        outputs
    }
}
