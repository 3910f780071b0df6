//! Decoding with a cache of keys and values, one sequence a slot: greedy, or by draws.
//!
//! All rows of a batch step together; a row that has ended leaves, and the others go on without it.

use std::sync::Arc;

use super::{
    DOT_ROWS, Engine, GenerateOptions, Generated,
    sample::{Draw, sample},
    scores::{Progress, Scoring, largest},
};
use crate::{
    kernels::{
        Backend,
        ops::{Order, Segments},
    },
    model::{
        Batch, Example,
        batch::RoutingRows,
        cache::{Decoding, Step},
    },
    tape::Tape,
    tensor::Tensor,
};

impl<B: Backend> Engine<'_, B> {
    /// One sequence for each of `sequences`: an index into `examples` and which of the example's
    /// sequences it is.
    pub(super) fn decode(
        &self,
        examples: &[&Example],
        sequences: &[(usize, usize)],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32),
    ) -> Vec<Generated> {
        let chosen: Vec<&Example> = sequences.iter().map(|&(i, _)| examples[i]).collect();
        let mut outputs: Vec<Vec<u32>> = vec![Vec::new(); chosen.len()];
        let generation = self.model.generation();
        let scoring = Scoring { options, model: generation };
        let (batch, rows) = self.batch(&chosen);
        let mut stepper = Stepper::new(self, &batch, &rows);
        let mut active: Vec<usize> = (0..chosen.len()).collect();
        let mut ids: Vec<Vec<u32>> = chosen.iter().map(|e| self.prompt(e)).collect();
        let mut history = ids.clone();
        for n_new in 0..options.max_new_tokens {
            let logits = stepper.step(&ids, &active, &active);
            let next = if scoring.is_plain() {
                self.model.backend().argmax(&logits, scoring.forbidden(n_new))
            } else {
                let mut scores = self.scores(&logits);
                let rows = scores.chunks_mut(logits.cols()).zip(&active);
                rows.map(|(scores, &i)| {
                    let progress = Progress { history: &history[i], n_new };
                    scoring.apply(&progress, scores);
                    if options.do_sample {
                        let (row, sequence) = sequences[i];
                        sample(options, Draw { row, sequence, n_new }, scores)
                    } else {
                        largest(scores)
                    }
                })
                .collect()
            };
            for (&i, &id) in active.iter().zip(&next) {
                outputs[i].push(id);
                history[i].push(id);
                on_token(i, id);
            }
            (active, ids) = active
                .iter()
                .zip(next)
                .filter(|&(&i, ref id)| {
                    // A token at the last position is said, but there is no room to go on from it.
                    !stepper.is_full(i) && !generation.eos_token_ids.contains(id)
                })
                .map(|(&i, id)| (i, vec![id]))
                .unzip();
            if active.is_empty() {
                break;
            }
        }
        outputs.into_iter().map(|ids| Generated { ids, score: None }).collect()
    }

    /// What a sequence's decoder begins with: the start id, or a causal model's prompt.
    pub(super) fn prompt(&self, example: &Example) -> Vec<u32> {
        match self.model.generation().decoder_start_token_id {
            Some(start) => vec![start],
            None => example.input.clone(),
        }
    }

    /// Logits as the model defines them.
    pub(super) fn scores(&self, logits: &Tensor<B>) -> Vec<f64> {
        let scale = f64::from(self.model.network().head().scale);
        let mut scores = self.model.backend().download(logits);
        if scale != 1.0 {
            scores.iter_mut().for_each(|score| *score *= scale);
        }
        scores
    }
}

/// A batch that is being decoded, step by step.
pub(super) struct Stepper<'e, B: Backend> {
    engine: &'e Engine<'e, B>,
    rows: &'e RoutingRows,
    prefill: Tape<'e, B>,
    decode: Tape<'e, B>,
    decoding: Decoding<B>,
    max_positions: usize,
}

impl<'e, B: Backend> Stepper<'e, B> {
    /// Runs the encoder, where there is one.
    pub(super) fn new(engine: &'e Engine<'e, B>, batch: &Batch, rows: &'e RoutingRows) -> Self {
        let sides = crate::model::network::Sides::new(batch, rows, None);
        let mut prefill = engine.tape(Order::Panel);
        let decoding = engine.model.network().start(&mut prefill, batch, &sides);
        let order = if engine.capacity <= DOT_ROWS { Order::Dot } else { Order::Panel };
        let max_positions = engine.model.config().max_positions().unwrap_or(usize::MAX);
        Self { engine, rows, prefill, decode: engine.tape(order), decoding, max_positions }
    }

    /// Appends tokens to slots, those of an example each; the logits of what comes next, `[slots,
    /// vocabulary]` before the head's scale.
    pub(super) fn step(
        &mut self,
        ids: &[Vec<u32>],
        slots: &[usize],
        examples: &[usize],
    ) -> Tensor<B> {
        let lens: Vec<usize> = ids.iter().map(Vec::len).collect();
        let of_row: Vec<usize> = examples.iter().map(|&i| self.rows.of_example[i]).collect();
        let segments = &Arc::new(Segments::new(&lens, &of_row, self.rows.n_rows));
        let is_prompt = self.decoding.is_empty(slots[0])
            && self.engine.model.generation().decoder_start_token_id.is_none();
        let step = Step { ids: &ids.concat(), slots, lens: &lens, segments };
        let tape = if is_prompt { &mut self.prefill } else { &mut self.decode };
        self.engine.model.network().next_logits(tape, &mut self.decoding, &step)
    }

    /// Whether a slot has no position left for another token.
    pub(super) fn is_full(&self, slot: usize) -> bool {
        self.decoding.len(slot) >= self.max_positions
    }

    /// See [`Decoding::fork`].
    pub(super) fn fork(&mut self, n: usize) {
        self.decoding.fork(self.engine.model.backend(), n);
    }

    /// See [`Decoding::copy_slots`].
    pub(super) fn copy_slots(&mut self, pairs: &[(usize, usize)]) {
        self.decoding.copy_slots(self.engine.model.backend(), pairs);
    }
}
