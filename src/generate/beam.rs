//! Beam search, as transformers' `_beam_search` does it, one example independent of the others.
//!
//! An example has `num_beams` slots. Each step takes the best `num_beams * max(2, 1 + end ids)`
//! continuations of its running beams; those that end may become finished sequences, the best others
//! run on. A beam keeps its parent's slot; only a parent's further children get a copy of it.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    Engine, GenerateOptions, Generated,
    options::EarlyStopping,
    scores::{Progress, Scoring, log_softmax},
    stepper::{Seats, Stepper},
};
use crate::{
    kernels::{Backend, ops::Ids},
    model::Example,
};

/// A sequence that runs on.
struct Beam {
    slot: usize,
    /// The decoder's tokens, the prompt included.
    history: Vec<u32>,
    /// The sum of its tokens' scores.
    score: f64,
}

/// The search of one example.
struct Search {
    /// Its index.
    example: usize,
    seat: usize,
    running: Vec<Beam>,
    /// New tokens and final score, the best first; at most `num_beams`.
    finished: Vec<(Vec<u32>, f64)>,
    prompt_len: usize,
    /// Whether the prompt is still being read.
    is_reading: bool,
    done: bool,
}

/// A continuation of beam `parent`.
#[derive(Clone, Copy)]
struct Candidate {
    parent: usize,
    id: u32,
    score: f64,
}

impl<B: Backend> Engine<'_, B> {
    /// The best `num_return_sequences` sequences of each example, the best first. `on_best` gets an
    /// example's index and best ids when its search is over.
    pub(super) fn beam_search(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
        on_best: &mut dyn FnMut(usize, &[u32]),
    ) -> Vec<Vec<Generated>> {
        let n_beams = options.num_beams;
        let scoring = Scoring { options, model: self.model.generation() };
        let n_seats = (self.capacity / n_beams).clamp(1, examples.len().max(1));
        let mut stepper = Stepper::new(self, examples, n_seats * n_beams, options);
        let mut seats = Seats::new(n_seats, examples.len());
        let slots_of = |seat: usize| seat * n_beams..(seat + 1) * n_beams;
        let mut searches: Vec<Search> = Vec::new();
        let mut outputs: Vec<Vec<Generated>> = vec![Vec::new(); examples.len()];
        loop {
            let entered = seats.enter();
            searches.extend(entered.iter().map(|&(example, seat)| {
                let history = self.prompt(examples[example]);
                Search {
                    example,
                    seat,
                    prompt_len: history.len(),
                    // All beams begin alike, so only one runs at first.
                    running: vec![Beam { slot: slots_of(seat).start, history, score: 0.0 }],
                    finished: Vec::new(),
                    is_reading: self.start().is_none(),
                    done: false,
                }
            }));
            stepper.admit(entered.iter().map(|&(i, seat)| (examples[i], slots_of(seat))));
            if searches.is_empty() {
                break;
            }
            let mut copies = Vec::new();
            // A search whose prompt ends here takes its first step by it, and the next with the others.
            if let Some((slots, logits)) = stepper.prefill() {
                let mut scores = self.scores(&logits);
                for (slot, scores) in slots.iter().zip(scores.chunks_mut(logits.cols())) {
                    let search = searches.iter_mut().find(|s| s.running[0].slot == *slot);
                    let Some(search) = search else { unreachable!("a search for each prompt") };
                    search.is_reading = false;
                    let slots = slots_of(search.seat);
                    search.advance(&scoring, [scores].into_iter(), &stepper, slots, &mut copies);
                }
                stepper.copy_slots(&copies);
                copies.clear();
            }
            let active = || searches.iter().filter(|search| !search.is_reading && !search.done);
            let beams = active().flat_map(|search| &search.running);
            let (ids, slots): (Vec<u32>, Vec<usize>) =
                beams.map(|beam| (beam.history[beam.history.len() - 1], beam.slot)).unzip();
            if !slots.is_empty() {
                let logits = stepper.step(Ids::Given(&ids), &slots);
                let mut scores = self.scores(&logits);
                let mut scores = scores.chunks_mut(logits.cols());
                for search in searches.iter_mut().filter(|s| !s.is_reading && !s.done) {
                    let of_search = scores.by_ref().take(search.running.len());
                    let slots = slots_of(search.seat);
                    search.advance(&scoring, of_search, &stepper, slots, &mut copies);
                }
                stepper.copy_slots(&copies);
            }
            searches.retain_mut(|search| {
                if search.done {
                    seats.leave(search.seat);
                    let best = search.finished.drain(..).take(options.num_return_sequences);
                    let best = best.map(|(ids, score)| Generated { ids, score: Some(score) });
                    outputs[search.example] = best.collect();
                    if let Some(best) = outputs[search.example].first() {
                        on_best(search.example, &best.ids);
                    }
                }
                !search.done
            });
        }
        outputs
    }
}

/// Continuations that are looked at: enough to have `num_beams` that do not end.
fn n_candidates(scoring: &Scoring<'_>) -> usize {
    scoring.options.num_beams * (1 + scoring.model.eos_token_ids.len()).max(2)
}

/// The `n` largest scores that are not minus infinity, the best first, the smaller id of equals.
fn best(scores: &[f64], n: usize, mut give: impl FnMut(u32, f64)) {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let descending =
        |&a: &u32, &b: &u32| scores[b as usize].total_cmp(&scores[a as usize]).then(a.cmp(&b));
    if n < order.len() {
        order.select_nth_unstable_by(n, descending);
        order.truncate(n);
    }
    order.sort_unstable_by(descending);
    for id in order {
        if scores[id as usize] > f64::NEG_INFINITY {
            give(id, scores[id as usize]);
        }
    }
}

impl Search {
    /// Takes a step: the logits of each running beam. `slots` are the search's.
    fn advance<'s, B: Backend>(
        &mut self,
        scoring: &Scoring<'_>,
        scores: impl Iterator<Item = &'s mut [f64]>,
        stepper: &Stepper<'_, B>,
        slots: Range<usize>,
        copies: &mut Vec<(usize, usize)>,
    ) {
        let GenerateOptions { num_beams, length_penalty, early_stopping, .. } = *scoring.options;
        let most_new = scoring.options.most_new(self.prompt_len);
        let n_new = self.running[0].history.len() - self.prompt_len;
        let is_full = self.running.iter().any(|beam| stepper.is_full(beam.slot));
        let rows: Vec<(&Beam, &mut [f64])> = self.running.iter().zip(scores).collect();
        let of_beams = rows.into_par_iter().enumerate().map(|(parent, (beam, scores))| {
            log_softmax(scores);
            scoring.apply(&Progress { history: &beam.history, n_new }, scores);
            let mut candidates = Vec::new();
            best(scores, n_candidates(scoring), |id, score| {
                candidates.push(Candidate { parent, id, score: beam.score + score });
            });
            candidates
        });
        let mut candidates = of_beams.collect::<Vec<_>>().concat();
        candidates.sort_by(|a, b| {
            b.score.total_cmp(&a.score).then((a.parent, a.id).cmp(&(b.parent, b.id)))
        });
        candidates.truncate(n_candidates(scoring));
        let n_new = n_new + 1;
        let is_last = n_new == most_new || is_full;
        let ends = |c: &Candidate| is_last || scoring.model.eos_token_ids.contains(&c.id);
        let of_length = |score: f64, len: usize| score / (len as f64).powf(length_penalty);

        for candidate in candidates.iter().take(num_beams).filter(|c| ends(c)) {
            let mut ids = self.running[candidate.parent].history[self.prompt_len..].to_vec();
            ids.push(candidate.id);
            self.finished.push((ids, of_length(candidate.score, n_new)));
        }
        self.finished.sort_by(|(_, a), (_, b)| b.total_cmp(a)); // Stable: the older of equals first.
        self.finished.truncate(num_beams);

        let next: Vec<&Candidate> =
            candidates.iter().filter(|c| !ends(c)).take(num_beams).collect();
        let is_complete = self.finished.len() == num_beams;
        let can_improve = match (next.first(), self.finished.last()) {
            (None, _) => false,
            (Some(best), Some((_, worst))) if is_complete => {
                let len = match early_stopping {
                    EarlyStopping::Never if length_penalty > 0.0 => most_new,
                    _ => n_new,
                };
                of_length(best.score, len) > *worst
            }
            _ => true,
        };
        if !can_improve || (is_complete && early_stopping == EarlyStopping::Yes) {
            self.done = true;
            return;
        }

        let mut free: Vec<usize> = slots
            .filter(|&slot| !next.iter().any(|c| self.running[c.parent].slot == slot))
            .collect();
        let mut taken = Vec::new();
        let running = next.into_iter().map(|candidate| {
            let Beam { slot, history, .. } = &self.running[candidate.parent];
            let slot = if taken.contains(slot) {
                let Some(other) = free.pop() else { unreachable!("as many slots as beams") };
                copies.push((*slot, other));
                other
            } else {
                *slot
            };
            taken.push(slot);
            let history = history.iter().copied().chain([candidate.id]).collect();
            Beam { slot, history, score: candidate.score }
        });
        self.running = running.collect();
    }
}
