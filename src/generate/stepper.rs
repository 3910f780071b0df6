//! Slots that sequences enter and leave while others are being decoded.
//!
//! ```text
//! waiting ─ admit ─> [encoder runs; prompts queue] ─ prefill ─> first logits
//!                                                  ─ step ────> next logits ... ─ vacate ─>
//! ```
//!
//! A prompt is read in pieces of at most [`PREFILL_TOKENS`], cut at places of its own, so that a
//! long one holds nobody up for long and takes bounded memory. Its bits do not depend on who is there:
//! prompts run in one order of summation, single tokens in that of the engine's capacity.

use std::{ops::Range, sync::Arc};

use super::{DOT_ROWS, Engine, GenerateOptions};
use crate::{
    kernels::{
        Backend,
        ops::{Ids, Order, Segments},
    },
    model::{
        Example,
        cache::{Decoding, Room, Step},
        network::Sides,
    },
    tape::{Tape, Var},
    tensor::Tensor,
};

/// Tokens of prompts that are read in one pass.
const PREFILL_TOKENS: usize = 512;

/// A prompt that has not been read to its end.
struct Prompt {
    slot: usize,
    ids: Vec<u32>,
    n_read: usize,
}

/// The slots of a call.
pub(super) struct Stepper<'e, B: Backend> {
    engine: &'e Engine<'e, B>,
    prefill: Tape<'e, B>,
    decode: Tape<'e, B>,
    decoding: Decoding<B>,
    /// By slot.
    routing_rows: Vec<usize>,
    n_routing_rows: usize,
    /// First in, first out.
    prompts: Vec<Prompt>,
    max_positions: usize,
}

impl<'e, B: Backend> Stepper<'e, B> {
    /// Empty slots with room for any of these examples.
    pub(super) fn new(
        engine: &'e Engine<'e, B>,
        examples: &[&Example],
        n_slots: usize,
        options: &GenerateOptions,
    ) -> Self {
        let max_positions = engine.model.config().max_positions().unwrap_or(usize::MAX);
        let inputs = examples.iter().map(|example| example.input.len());
        let longest = inputs.max().unwrap_or(0);
        let prompt = if engine.start().is_some() { 1 } else { longest };
        let tokens = prompt.saturating_add(options.max_new_tokens).min(max_positions);
        let room = Room { slots: n_slots, tokens, source: longest };
        let decoding = engine.model.network().room(engine.model.backend(), room);
        let order = if engine.capacity <= DOT_ROWS { Order::Dot } else { Order::Panel };
        let (prefill, decode) = (engine.tape(Order::Panel), engine.tape(order));
        let (routing_rows, prompts) = (vec![0; n_slots], Vec::new());
        let n_routing_rows = engine.adapter.as_ref().map_or(1, |attached| attached.row_of.len());
        Self {
            engine,
            prefill,
            decode,
            decoding,
            routing_rows,
            n_routing_rows,
            prompts,
            max_positions,
        }
    }

    /// Gives each example slots, whatever was in them; a causal model's prompt goes to the first of
    /// them.
    pub(super) fn admit<'x>(
        &mut self,
        admitted: impl Iterator<Item = (&'x Example, Range<usize>)>,
    ) {
        let (examples, slots): (Vec<&Example>, Vec<Range<usize>>) = admitted.unzip();
        if examples.is_empty() {
            return;
        }
        let (batch, rows) = self.engine.batch(&examples);
        for (slots, &row) in slots.iter().zip(&rows.of_example) {
            self.routing_rows[slots.clone()].fill(row);
            self.decoding.vacate(slots.clone());
        }
        let sides = Sides::new(&batch, &rows, None);
        let slots: Vec<usize> = slots.iter().map(|slots| slots.start).collect();
        let network = self.engine.model.network();
        network.encode(&mut self.prefill, &mut self.decoding, &batch, &sides, &slots);
        if self.engine.start().is_none() {
            let prompts = examples.iter().zip(slots);
            self.prompts.extend(prompts.map(|(example, slot)| Prompt {
                slot,
                ids: example.input.clone(),
                n_read: 0,
            }));
        }
    }

    /// Reads pieces of prompts that wait: the slots of those that were read to their end, and the
    /// logits of what comes next in each.
    pub(super) fn prefill(&mut self) -> Option<(Vec<usize>, Tensor<B>)> {
        let (mut ids, mut slots, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        let (mut done, mut ended) = (Vec::new(), Vec::new());
        for prompt in &mut self.prompts {
            let unread = &prompt.ids[prompt.n_read..];
            let piece = &unread[..unread.len().min(PREFILL_TOKENS)];
            if !ids.is_empty() && ids.len() + piece.len() > PREFILL_TOKENS {
                break;
            }
            if piece.len() == unread.len() {
                done.push(slots.len());
                ended.push(prompt.slot);
            }
            ids.extend(piece);
            slots.push(prompt.slot);
            lens.push(piece.len());
            prompt.n_read += piece.len();
        }
        if slots.is_empty() {
            return None;
        }
        self.prompts.retain(|prompt| prompt.n_read < prompt.ids.len());
        let hidden = self.advance(true, Ids::Given(&ids), &slots, &lens);
        if done.is_empty() {
            return None;
        }
        let hidden = self.prefill.gather(hidden, Some(&done));
        let logits = self.engine.model.network().apply_head(&mut self.prefill, &hidden);
        Some((ended, logits))
    }

    /// Appends a token to each of these slots; the logits of what comes next, `[slots, vocabulary]`
    /// before the head's scale.
    pub(super) fn step(&mut self, ids: Ids<'_, B>, slots: &[usize]) -> Tensor<B> {
        let hidden = self.advance(false, ids, slots, &vec![1; slots.len()]);
        self.engine.model.network().apply_head(&mut self.decode, &hidden)
    }

    fn advance(
        &mut self,
        is_prompt: bool,
        ids: Ids<'_, B>,
        slots: &[usize],
        lens: &[usize],
    ) -> Var<B> {
        let rows: Vec<usize> = slots.iter().map(|&slot| self.routing_rows[slot]).collect();
        let segments = &Arc::new(Segments::new(lens, &rows, self.n_routing_rows));
        let step = Step { ids, slots, lens, segments };
        let tape = if is_prompt { &mut self.prefill } else { &mut self.decode };
        self.engine.model.network().advance(tape, &mut self.decoding, &step)
    }

    /// Whether a prompt waits to be read.
    pub(super) fn is_reading(&self) -> bool {
        !self.prompts.is_empty()
    }

    /// Whether a slot has no position left for another token.
    pub(super) fn is_full(&self, slot: usize) -> bool {
        self.decoding.len(slot) >= self.max_positions
    }

    /// See [`Decoding::copy_slots`].
    pub(super) fn copy_slots(&mut self, pairs: &[(usize, usize)]) {
        self.decoding.copy_slots(self.engine.model.backend(), pairs);
    }
}

/// Places that sequences enter and leave: who waits, and which places are free.
pub(super) struct Seats {
    waiting: Range<usize>,
    free: Vec<usize>,
    /// So many must be free before someone enters, while others are there: those who enter together
    /// share a pass over the weights.
    refill: usize,
}

impl Seats {
    /// `n` free places, for `n_waiting`.
    pub(super) fn new(n: usize, n_waiting: usize) -> Self {
        Self { waiting: 0..n_waiting, free: (0..n).rev().collect(), refill: n.div_ceil(4) }
    }

    /// Who enters, and where.
    pub(super) fn enter(&mut self) -> Vec<(usize, usize)> {
        if self.free.len() < self.refill {
            return Vec::new();
        }
        let mut entered = Vec::new();
        while !self.free.is_empty()
            && let Some(who) = self.waiting.next()
        {
            entered.extend(self.free.pop().map(|seat| (who, seat)));
        }
        entered
    }

    /// A place becomes free.
    pub(super) fn leave(&mut self, seat: usize) {
        self.free.push(seat);
    }
}
