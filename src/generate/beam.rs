//! Beam search, as transformers' `_beam_search` does it, one example independent of the others.
//!
//! An example has `num_beams` slots. Each step takes the best `num_beams * max(2, 1 + end ids)`
//! continuations of its running beams; those that end may become finished sequences, the best others
//! run on. A beam keeps its parent's slot; only a parent's further children get a copy of it.

use super::{
    Engine, GenerateOptions, Generated,
    decode::Stepper,
    options::EarlyStopping,
    scores::{Progress, Scoring, log_softmax},
};
use crate::{kernels::Backend, model::Example};

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
    running: Vec<Beam>,
    /// New tokens and final score, the best first; at most `num_beams`.
    finished: Vec<(Vec<u32>, f64)>,
    prompt_len: usize,
    done: bool,
}

/// A continuation of beam `parent`.
struct Candidate {
    parent: usize,
    id: u32,
    score: f64,
}

impl<B: Backend> Engine<'_, B> {
    /// The best `num_return_sequences` sequences of each example, the best first.
    pub(super) fn beam_search(
        &self,
        examples: &[&Example],
        options: &GenerateOptions,
    ) -> Vec<Vec<Generated>> {
        let n_beams = options.num_beams;
        let scoring = Scoring { options, model: self.model.generation() };
        let (batch, rows) = self.batch(examples);
        let mut stepper = Stepper::new(self, &batch, &rows);
        stepper.fork(n_beams);
        let mut searches: Vec<Search> = examples
            .iter()
            .enumerate()
            .map(|(i, example)| {
                let history = self.prompt(example);
                let prompt_len = history.len();
                // All beams begin alike, so only one runs at first.
                let running = vec![Beam { slot: i * n_beams, history, score: 0.0 }];
                Search { running, finished: Vec::new(), prompt_len, done: false }
            })
            .collect();
        for n_new in 0..options.max_new_tokens {
            let (mut ids, mut slots, mut of_example) = (Vec::new(), Vec::new(), Vec::new());
            for (i, search) in searches.iter().enumerate().filter(|(_, search)| !search.done) {
                for beam in &search.running {
                    let new = if n_new == 0 { 0 } else { beam.history.len() - 1 };
                    ids.push(beam.history[new..].to_vec());
                    slots.push(beam.slot);
                    of_example.push(i);
                }
            }
            if slots.is_empty() {
                break;
            }
            let logits = stepper.step(&ids, &slots, &of_example);
            let mut scores = self.scores(&logits);
            let mut scores = scores.chunks_mut(logits.cols());
            let mut copies = Vec::new();
            for (i, search) in searches.iter_mut().enumerate().filter(|(_, search)| !search.done) {
                let mut candidates = Vec::new();
                for (parent, beam) in search.running.iter().enumerate() {
                    let Some(scores) = scores.next() else { unreachable!("a row for each beam") };
                    log_softmax(scores);
                    scoring.apply(&Progress { history: &beam.history, n_new }, scores);
                    best(scores, n_candidates(&scoring), |id, score| {
                        candidates.push(Candidate { parent, id, score: beam.score + score });
                    });
                }
                let is_full = search.running.iter().any(|beam| stepper.is_full(beam.slot));
                let slots = i * n_beams..(i + 1) * n_beams;
                search.advance(&scoring, candidates, n_new, is_full, slots, &mut copies);
            }
            stepper.copy_slots(&copies);
        }
        searches
            .into_iter()
            .map(|search| {
                let best = search.finished.into_iter().take(options.num_return_sequences);
                best.map(|(ids, score)| Generated { ids, score: Some(score) }).collect()
            })
            .collect()
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
    /// Takes a step's continuations. `is_full`: there is no position for another token.
    fn advance(
        &mut self,
        scoring: &Scoring<'_>,
        mut candidates: Vec<Candidate>,
        n_new: usize,
        is_full: bool,
        slots: std::ops::Range<usize>,
        copies: &mut Vec<(usize, usize)>,
    ) {
        let GenerateOptions { num_beams, length_penalty, early_stopping, max_new_tokens, .. } =
            *scoring.options;
        candidates.sort_by(|a, b| {
            b.score.total_cmp(&a.score).then((a.parent, a.id).cmp(&(b.parent, b.id)))
        });
        candidates.truncate(n_candidates(scoring));
        let n_new = n_new + 1;
        let is_last = n_new == max_new_tokens || is_full;
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
                    EarlyStopping::Never if length_penalty > 0.0 => max_new_tokens,
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
