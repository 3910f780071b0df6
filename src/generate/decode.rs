//! One sequence a slot: greedy, or by draws.
//!
//! ```text
//! device   step 1 ─────── step 2 ─────── step 3 ───────
//! host        ask for 2      ask for 3      ask for 4
//!                       read 1         read 2
//! ```
//!
//! Where the logits choose the next token and the backend queues what it is asked for, a step is asked
//! for before the tokens of the one before it are known: it takes them where they were chosen. A sequence that
//! has ended is in one step more, which is of no consequence: no row's bits depend on its neighbours. When one
//! ends, the host catches up before others enter.

use super::{
    Engine, GenerateOptions, Generated,
    sample::{Draw, rules, sample, sharpness},
    scores::{Progress, Scoring, largest},
    stepper::{Seats, Stepper},
};
use crate::{
    kernels::{
        Backend,
        ops::{Ids, Sample},
    },
    model::Example,
    tensor::Tensor,
};

/// A sequence in a slot.
struct Running {
    /// An index into the call's sequences.
    sequence: usize,
    slot: usize,
    /// The decoder's tokens, the prompt included.
    history: Vec<u32>,
    prompt_len: usize,
    /// The token that the decoder reads next; none while the prompt is being read.
    next: Option<u32>,
}

impl Running {
    fn n_new(&self) -> usize {
        self.history.len() - self.prompt_len
    }
}

/// A step whose tokens were chosen, and are not known to the host.
struct Flight<B: Backend> {
    /// Whose, in order; of one that has ended meanwhile none is left.
    slots: Vec<usize>,
    chosen: B::Chosen,
}

/// The sequences of a call.
struct Decoder<'c, 'e, B: Backend> {
    engine: &'c Engine<'e, B>,
    scoring: Scoring<'c>,
    sequences: &'c [(usize, usize)],
    stepper: Stepper<'c, B>,
    seats: Seats,
    running: Vec<Running>,
    outputs: Vec<Vec<u32>>,
    on_token: &'c mut dyn FnMut(usize, u32),
}

impl<B: Backend> Engine<'_, B> {
    /// One sequence for each of `sequences`: an index into `examples` and which of the example's
    /// sequences it is. `on_token` gets an index into `sequences`.
    pub(super) fn decode(
        &self,
        examples: &[&Example],
        sequences: &[(usize, usize)],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32),
    ) -> Vec<Generated> {
        let n_slots = self.capacity.min(sequences.len());
        let mut decoder = Decoder {
            engine: self,
            scoring: Scoring { options, model: self.model.generation() },
            sequences,
            stepper: Stepper::new(self, examples, n_slots, options),
            seats: Seats::new(n_slots, sequences.len()),
            running: Vec::new(),
            outputs: vec![Vec::new(); sequences.len()],
            on_token,
        };
        loop {
            decoder.enter(examples);
            if decoder.running.is_empty() {
                break;
            }
            decoder.step();
        }
        decoder.outputs.into_iter().map(|ids| Generated { ids, score: None }).collect()
    }

    /// The id that an encoder-decoder's decoder begins with; none of a causal model.
    pub(super) fn start(&self) -> Option<u32> {
        self.model.generation().decoder_start_token_id
    }

    /// What a sequence's decoder begins with: the start id, or a causal model's prompt.
    pub(super) fn prompt(&self, example: &Example) -> Vec<u32> {
        self.start().map_or_else(|| example.input.clone(), |start| vec![start])
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

impl<B: Backend> Decoder<'_, '_, B> {
    /// Sequences that wait take what seats are free.
    fn enter(&mut self, examples: &[&Example]) {
        let entered = self.seats.enter();
        let example = |sequence: usize| examples[self.sequences[sequence].0];
        self.running.extend(entered.iter().map(|&(sequence, slot)| {
            let history = self.engine.prompt(example(sequence));
            let (prompt_len, next) = (history.len(), self.engine.start());
            Running { sequence, slot, history, prompt_len, next }
        }));
        self.stepper.admit(entered.iter().map(|&(s, slot)| (example(s), slot..slot + 1)));
    }

    /// Reads prompts that wait, and says at least one token of each sequence that has none.
    fn step(&mut self) {
        let begun = self.stepper.prefill().map(|(slots, logits)| {
            let ids = self.choose(&logits, &slots);
            (slots, ids)
        });
        let ready = self.running.iter().filter_map(|r| r.next.map(|id| (id, r.slot)));
        let (ids, slots): (Vec<u32>, Vec<usize>) = ready.unzip();
        let logits = (!slots.is_empty()).then(|| self.stepper.step(Ids::Given(&ids), &slots));
        let next = logits.map(|logits| (self.chosen(&logits, &slots, 0), logits));
        if let Some((slots, ids)) = begun {
            self.say(&slots, &ids, false);
        }
        match next {
            None => {}
            Some((Some(chosen), _)) => self.fly(Flight { slots, chosen }),
            Some((None, logits)) => {
                let ids = self.sampled(&logits, &slots);
                self.say(&slots, &ids, false);
            }
        }
    }

    /// Steps for as long as each can be asked for before the tokens of the last are known.
    fn fly(&mut self, mut flight: Flight<B>) {
        loop {
            let mut next = None;
            if self.can_follow(&flight) {
                let slots = flight.slots.clone();
                let logits = self.stepper.step(Ids::Chosen(&flight.chosen), &slots);
                next = self.chosen(&logits, &slots, 1).map(|chosen| Flight { slots, chosen });
            }
            let Flight { slots, chosen } = flight;
            let ids = self.engine.model.backend().tokens(chosen);
            self.say(&slots, &ids, next.is_some());
            let Some(following) = next else { break };
            flight = following;
        }
    }

    /// Whether every sequence is in this step and, as far as can be known, goes on after it.
    fn can_follow(&self, flight: &Flight<B>) -> bool {
        let goes_on = |r: &Running| {
            flight.slots.contains(&r.slot)
                && r.n_new() + 1 < self.scoring.options.most_new(r.prompt_len)
                && !self.stepper.is_full(r.slot)
        };
        self.engine.model.backend().is_queued()
            && self.running.len() == flight.slots.len()
            && self.running.iter().all(goes_on)
            && !self.stepper.is_reading()
            && self.is_chosen_there(&flight.slots, 1)
    }

    fn in_slot(&self, slot: usize) -> Option<&Running> {
        self.running.iter().find(|r| r.slot == slot)
    }

    /// A token for each of these slots; one that has ended has no use for it. Where the step after it was
    /// asked for, there was room for that.
    fn say(&mut self, slots: &[usize], ids: &[u32], is_followed: bool) {
        for (&slot, &id) in slots.iter().zip(ids) {
            let Some(r) = self.running.iter_mut().find(|r| r.slot == slot) else { continue };
            self.outputs[r.sequence].push(id);
            r.history.push(id);
            r.next = Some(id);
            (self.on_token)(r.sequence, id);
        }
        let Self { scoring, stepper, seats, .. } = self;
        self.running.retain(|r| {
            let ends = r.n_new() == scoring.options.most_new(r.prompt_len)
                || r.n_new() > 0
                    // A token at the last position is said, but there is no room to go on from it.
                    && (!is_followed && stepper.is_full(r.slot)
                        || scoring.model.eos_token_ids.contains(&r.history[r.history.len() - 1]));
            if ends {
                seats.leave(r.slot);
            }
            !ends
        });
    }

    /// New tokens of a slot's sequence, `n_unknown` of them not known; of one that has ended, whatever.
    fn n_new(&self, slot: usize, n_unknown: usize) -> usize {
        self.in_slot(slot).map_or(0, Running::n_new) + n_unknown
    }

    /// Ids that may not come next in a slot, as [`Self::n_new`].
    fn forbidden(&self, slot: usize, n_unknown: usize) -> &[u32] {
        let prompt_len = self.in_slot(slot).map_or(0, |r| r.prompt_len);
        self.scoring.forbidden(prompt_len, self.n_new(slot, n_unknown))
    }

    /// Whether the backend chooses the tokens of these slots after `n_unknown` more.
    fn is_chosen_there(&self, slots: &[usize], n_unknown: usize) -> bool {
        let forbidden = |slot: &usize| self.forbidden(*slot, n_unknown);
        let are_equal = || slots.windows(2).all(|pair| forbidden(&pair[0]) == forbidden(&pair[1]));
        // The most probable token is the same wherever it is looked for; a draw's weights are not, so all draws of
        // a call are made in one place.
        self.scoring.is_plain() && (self.scoring.options.do_sample || are_equal())
    }

    /// The next token of each slot, by its row of logits, where the backend chooses it.
    fn chosen(&self, logits: &Tensor<B>, slots: &[usize], n_unknown: usize) -> Option<B::Chosen> {
        if !self.is_chosen_there(slots, n_unknown) {
            return None;
        }
        let (backend, options) = (self.engine.model.backend(), self.scoring.options);
        let n_new = |slot: &usize| self.n_new(*slot, n_unknown);
        let forbidden = slots.iter().map(|slot| self.forbidden(*slot, n_unknown));
        let forbids: Vec<bool> = forbidden.clone().map(|ids| !ids.is_empty()).collect();
        let forbidden = forbidden.max_by_key(|ids| ids.len()).unwrap_or_default();
        if !options.do_sample {
            return Some(backend.argmax(logits, forbidden));
        }
        let uniform = |slot: &usize| {
            let (row, sequence) = self.sequences[self.in_slot(*slot)?.sequence];
            Some(Draw { row, sequence, n_new: n_new(slot) }.uniform(options.seed))
        };
        let uniforms: Vec<f64> = slots.iter().map(|slot| uniform(slot).unwrap_or(0.0)).collect();
        Some(backend.sample(&Sample {
            logits,
            scale: sharpness(options, self.engine.model.network().head().scale),
            forbidden,
            forbids: &forbids,
            rules: rules(options),
            uniforms: &uniforms,
        }))
    }

    /// The next token of each slot, by its row of logits.
    fn choose(&self, logits: &Tensor<B>, slots: &[usize]) -> Vec<u32> {
        match self.chosen(logits, slots, 0) {
            Some(chosen) => self.engine.model.backend().tokens(chosen),
            None => self.sampled(logits, slots),
        }
    }

    /// The same by the rules of the options, on the host.
    fn sampled(&self, logits: &Tensor<B>, slots: &[usize]) -> Vec<u32> {
        let options = self.scoring.options;
        let mut scores = self.engine.scores(logits);
        let rows = slots.iter().filter_map(|&slot| self.in_slot(slot));
        rows.zip(scores.chunks_mut(logits.cols()))
            .map(|(running, scores)| {
                let progress = Progress { history: &running.history, n_new: running.n_new() };
                self.scoring.apply(&progress, scores);
                if options.do_sample {
                    let (row, sequence) = self.sequences[running.sequence];
                    sample(options, Draw { row, sequence, n_new: progress.n_new }, scores)
                } else {
                    largest(scores)
                }
            })
            .collect()
    }
}
