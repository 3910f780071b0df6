//! One sequence a slot: greedy, or by draws.

use super::{
    Engine, GenerateOptions, Generated,
    sample::{Draw, sample},
    scores::{Progress, Scoring, largest},
    stepper::{Seats, Stepper},
};
use crate::{kernels::Backend, model::Example, tensor::Tensor};

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
    fn progress(&self) -> Progress<'_> {
        Progress { history: &self.history, n_new: self.history.len() - self.prompt_len }
    }
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
        let scoring = Scoring { options, model: self.model.generation() };
        let n_slots = self.capacity.min(sequences.len());
        let mut stepper = Stepper::new(self, examples, n_slots, options);
        let mut seats = Seats::new(n_slots, sequences.len());
        let mut running: Vec<Running> = Vec::new();
        let mut outputs: Vec<Vec<u32>> = vec![Vec::new(); sequences.len()];
        loop {
            let entered = seats.enter();
            running.extend(entered.iter().map(|&(sequence, slot)| {
                let history = self.prompt(examples[sequences[sequence].0]);
                Running { sequence, slot, prompt_len: history.len(), history, next: self.start() }
            }));
            stepper
                .admit(entered.iter().map(|&(s, slot)| (examples[sequences[s].0], slot..slot + 1)));
            if running.is_empty() {
                break;
            }
            let mut said = Vec::new();
            if let Some((slots, logits)) = stepper.prefill() {
                let ended = slots.iter().filter_map(|s| running.iter().position(|r| r.slot == *s));
                let ended: Vec<usize> = ended.collect();
                let ids =
                    self.choose(&scoring, &logits, sequences, ended.iter().map(|&i| &running[i]));
                said.extend(ended.into_iter().zip(ids));
            }
            let ready: Vec<usize> =
                (0..running.len()).filter(|&i| running[i].next.is_some()).collect();
            if !ready.is_empty() {
                let ids: Vec<u32> = ready.iter().filter_map(|&i| running[i].next).collect();
                let slots: Vec<usize> = ready.iter().map(|&i| running[i].slot).collect();
                let logits = stepper.step(&ids, &slots);
                let ids =
                    self.choose(&scoring, &logits, sequences, ready.iter().map(|&i| &running[i]));
                said.extend(ready.into_iter().zip(ids));
            }
            for &(i, id) in &said {
                let Running { sequence, history, next, .. } = &mut running[i];
                outputs[*sequence].push(id);
                history.push(id);
                *next = Some(id);
                on_token(*sequence, id);
            }
            running.retain(|r| {
                let n_new = r.progress().n_new;
                let ends = n_new == options.max_new_tokens
                    || n_new > 0
                        // A token at the last position is said, but there is no room to go on from it.
                        && (stepper.is_full(r.slot)
                            || scoring.model.eos_token_ids.contains(&r.history[r.history.len() - 1]));
                if ends {
                    seats.leave(r.slot);
                }
                !ends
            });
        }
        outputs.into_iter().map(|ids| Generated { ids, score: None }).collect()
    }

    /// The next token of each row of logits.
    fn choose<'r>(
        &self,
        scoring: &Scoring<'_>,
        logits: &Tensor<B>,
        sequences: &[(usize, usize)],
        rows: impl Iterator<Item = &'r Running> + Clone,
    ) -> Vec<u32> {
        let mut forbidden = rows.clone().map(|row| scoring.forbidden(row.progress().n_new));
        let first = forbidden.next().unwrap_or_default();
        if scoring.is_plain() && forbidden.all(|other| other == first) {
            return self.model.backend().argmax(logits, first);
        }
        let options = scoring.options;
        let mut scores = self.scores(logits);
        let scores = scores.chunks_mut(logits.cols());
        scores
            .zip(rows)
            .map(|(scores, running)| {
                let progress = running.progress();
                scoring.apply(&progress, scores);
                if options.do_sample {
                    let (row, sequence) = sequences[running.sequence];
                    sample(options, Draw { row, sequence, n_new: progress.n_new }, scores)
                } else {
                    largest(scores)
                }
            })
            .collect()
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
