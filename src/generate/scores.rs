//! A row's scores on their way to the next token: penalties and bans, in the order in which
//! transformers applies its logits processors.

use std::collections::HashSet;

use super::GenerateOptions;
use crate::formats::config::GenerationConfig;

/// What changes scores, for all rows.
pub(super) struct Scoring<'a> {
    pub(super) options: &'a GenerateOptions,
    pub(super) model: &'a GenerationConfig,
}

/// Where a row is.
pub(super) struct Progress<'a> {
    /// The decoder's tokens so far: a causal model's prompt or the start id, then the new ones.
    pub(super) history: &'a [u32],
    /// How many of them are new.
    pub(super) n_new: usize,
}

impl Scoring<'_> {
    /// Whether the logits choose the next token as they are, but for ids that may not be: then they need not
    /// leave the device.
    pub(super) fn is_plain(&self) -> bool {
        let GenerateOptions { repetition_penalty, no_repeat_ngram_size, .. } = *self.options;
        repetition_penalty == 1.0
            && no_repeat_ngram_size == 0
            && self.model.forced_bos_token_id.is_none()
            && self.model.forced_eos_token_id.is_none()
    }

    /// Ids that may not come next, after a prompt and some new tokens.
    pub(super) fn forbidden(&self, prompt_len: usize, n_new: usize) -> &[u32] {
        if n_new < self.options.least_new(prompt_len) { &self.model.eos_token_ids } else { &[] }
    }

    /// Applies penalties and bans to logits or log-probabilities, `[vocabulary]`.
    pub(super) fn apply(&self, progress: &Progress<'_>, scores: &mut [f64]) {
        let Progress { history, n_new } = *progress;
        let penalty = self.options.repetition_penalty;
        if penalty != 1.0 {
            let seen: HashSet<u32> = history.iter().copied().collect();
            for id in seen {
                let score = &mut scores[id as usize];
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }
        let n = self.options.no_repeat_ngram_size;
        if n > 0 && history.len() >= n {
            let (before, _) = history.split_at(history.len() - (n - 1));
            let last = &history[before.len()..];
            for window in history.windows(n) {
                if window[..n - 1] == *last {
                    scores[window[n - 1] as usize] = f64::NEG_INFINITY;
                }
            }
        }
        let prompt_len = history.len() - n_new;
        for &id in self.forbidden(prompt_len, n_new) {
            scores[id as usize] = f64::NEG_INFINITY;
        }
        // As transformers: where there is one token, an encoder-decoder's start id or a prompt of one.
        let first = (history.len() == 1).then_some(self.model.forced_bos_token_id).flatten();
        let last = (n_new + 1 == self.options.most_new(prompt_len))
            .then_some(self.model.forced_eos_token_id)
            .flatten();
        if let Some(forced) = last.or(first) {
            scores.fill(f64::NEG_INFINITY);
            scores[forced as usize] = 0.0;
        }
    }
}

/// The id of the largest score, the smaller of equals. NaN is never larger.
pub(super) fn largest(scores: &[f64]) -> u32 {
    let mut best = 0;
    for (id, &score) in scores.iter().enumerate() {
        if score > scores[best] || scores[best].is_nan() {
            best = id;
        }
    }
    best as u32
}

/// Logits as log-probabilities.
pub(super) fn log_softmax(scores: &mut [f64]) {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
    let shift = largest + sum.ln();
    scores.iter_mut().for_each(|score| *score -= shift);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> GenerationConfig {
        GenerationConfig { eos_token_ids: vec![1], ..GenerationConfig::default() }
    }

    fn applied(options: &GenerateOptions, history: &[u32], n_new: usize) -> Vec<f64> {
        let mut scores = vec![1.0, 2.0, -3.0, 4.0];
        let model = model();
        let progress = Progress { history, n_new };
        Scoring { options, model: &model }.apply(&progress, &mut scores);
        scores
    }

    #[test]
    fn a_repeated_token_is_penalised_once() {
        let options = GenerateOptions { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(applied(&options, &[2, 3, 3, 2], 2), [1.0, 2.0, -6.0, 2.0]);
    }

    #[test]
    fn what_would_repeat_an_ngram_is_banned() {
        let banned = f64::NEG_INFINITY;
        let options = GenerateOptions { no_repeat_ngram_size: 2, ..Default::default() };
        assert_eq!(applied(&options, &[3, 0, 3, 2, 3], 4), [banned, 2.0, banned, 4.0]);
        assert_eq!(applied(&options, &[3], 0), [1.0, 2.0, -3.0, 4.0]);
        let one = GenerateOptions { no_repeat_ngram_size: 1, ..Default::default() };
        assert_eq!(applied(&one, &[3, 0], 1), [banned, 2.0, -3.0, banned]);
    }

    #[test]
    fn no_end_before_its_time_and_a_forced_one_at_the_last() {
        let banned = f64::NEG_INFINITY;
        let options =
            GenerateOptions { min_new_tokens: 2, max_new_tokens: 3, ..Default::default() };
        assert_eq!(applied(&options, &[0, 3], 1), [1.0, banned, -3.0, 4.0]);
        assert_eq!(applied(&options, &[0, 3, 3], 2), [1.0, 2.0, -3.0, 4.0]);
        let model = GenerationConfig {
            forced_bos_token_id: Some(0),
            forced_eos_token_id: Some(1),
            ..model()
        };
        let scoring = Scoring { options: &options, model: &model };
        let mut scores = vec![1.0, 2.0, -3.0, 4.0];
        scoring.apply(&Progress { history: &[0, 3, 3], n_new: 2 }, &mut scores);
        assert_eq!(largest(&scores), 1);
        scoring.apply(&Progress { history: &[0], n_new: 0 }, &mut scores);
        assert_eq!(largest(&scores), 0);
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let mut scores = vec![1000.0, 1001.0, f64::NEG_INFINITY, 999.0];
        log_softmax(&mut scores);
        let sum: f64 = scores.iter().map(|score| score.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
    }
}
