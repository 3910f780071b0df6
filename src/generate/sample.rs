//! Draws of the next token. A draw is a pure function of the seed, the row's index, which of the
//! row's sequences it is for, and the token's position: rows do not share a stream.

use super::GenerateOptions;
use crate::kernels::philox::{Key, Purpose};

/// Which draw it is.
#[derive(Clone, Copy)]
pub(super) struct Draw {
    /// The row's index among those given to the engine.
    pub(super) row: usize,
    /// Which of the row's sequences.
    pub(super) sequence: usize,
    /// Tokens before it.
    pub(super) n_new: usize,
}

impl Draw {
    /// Uniform in `[0, 1)` with 53 bits.
    fn uniform(self, seed: u64) -> f64 {
        let Self { row, sequence, n_new } = self;
        let counter = [row as u32, (row as u64 >> 32) as u32, sequence as u32, n_new as u32];
        let [high, low, ..] = Key::new(seed, Purpose::Sample, 0).block(counter);
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

/// Draws an id by scores, `[vocabulary]`, after temperature, top-k, top-p and min-p, each over what
/// the one before left, as transformers orders them.
pub(super) fn sample(options: &GenerateOptions, draw: Draw, scores: &[f64]) -> u32 {
    let kept = keep(options, scores);
    let total: f64 = kept.iter().map(|&(p, _)| p).sum();
    let mut rest = draw.uniform(options.seed) * total;
    for &(p, id) in &kept {
        rest -= p;
        if rest < 0.0 {
            return id;
        }
    }
    // The sum rounds: what is left over belongs to the last one.
    kept.last().map_or(0, |&(_, id)| id)
}

/// Tokens that may be drawn with their weights, by id.
fn keep(options: &GenerateOptions, scores: &[f64]) -> Vec<(f64, u32)> {
    let GenerateOptions { temperature, top_k, top_p, min_p, .. } = *options;
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Relative to the largest, whose weight so is 1.
    let mut kept: Vec<(f64, u32)> = scores
        .iter()
        .zip(0..)
        .map(|(&score, id)| (((score - largest) / temperature).exp(), id))
        .filter(|&(weight, _)| weight > 0.0)
        .collect();
    let descending = |a: &(f64, u32), b: &(f64, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if top_k > 0 && top_k < kept.len() {
        // Equals of the last one stay, too.
        let (.., &mut (last, _), _) = kept.select_nth_unstable_by(top_k - 1, descending);
        kept.retain(|&(weight, _)| weight >= last);
    }
    if top_p < 1.0 {
        kept.sort_unstable_by(descending);
        let total: f64 = kept.iter().map(|&(weight, _)| weight).sum();
        let mut sum = 0.0;
        // A token stays while those before it have not reached top_p; the first one always.
        let n = kept.iter().take_while(|(weight, _)| {
            let before = sum;
            sum += weight;
            before < top_p * total
        });
        let n = n.count().max(1);
        kept.truncate(n);
    }
    if min_p > 0.0 {
        kept.retain(|&(weight, _)| weight >= min_p);
    }
    kept.sort_unstable_by_key(|&(_, id)| id);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBABILITIES: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

    fn ids(options: &GenerateOptions) -> Vec<u32> {
        let scores = PROBABILITIES.map(f64::ln);
        keep(options, &scores).into_iter().map(|(_, id)| id).collect()
    }

    #[test]
    fn filters_keep_what_transformers_keeps() {
        let all = GenerateOptions { top_k: 0, ..Default::default() };
        assert_eq!(ids(&all), [0, 1, 2, 3, 4]);
        assert_eq!(ids(&GenerateOptions { top_k: 2, ..all.clone() }), [1, 3]);
        assert_eq!(ids(&GenerateOptions { top_p: 0.3, ..all.clone() }), [1]);
        assert_eq!(ids(&GenerateOptions { top_p: 0.7, ..all.clone() }), [1, 3, 4]);
        assert_eq!(ids(&GenerateOptions { min_p: 0.5, ..all.clone() }), [1, 3, 4]);
        // top-p is of what top-k left: 0.4 of 0.65 is less than 0.7 of it.
        assert_eq!(ids(&GenerateOptions { top_k: 2, top_p: 0.7, ..all.clone() }), [1, 3]);
        assert_eq!(ids(&GenerateOptions { top_k: 2, top_p: 0.6, ..all }), [1]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let options = GenerateOptions { top_k: 0, seed: 7, ..Default::default() };
        let scores = PROBABILITIES.map(f64::ln);
        let n = 20_000;
        let mut counts = [0; 5];
        for row in 0..n {
            let draw = Draw { row, sequence: 0, n_new: 3 };
            counts[sample(&options, draw, &scores) as usize] += 1;
        }
        for (count, p) in counts.into_iter().zip(PROBABILITIES) {
            // Five standard deviations.
            let bound = 5.0 * (n as f64 * p * (1.0 - p)).sqrt();
            assert!((f64::from(count) - n as f64 * p).abs() < bound, "{counts:?}");
        }
    }

    #[test]
    fn a_draw_is_its_own() {
        let draw = |row, sequence, n_new| Draw { row, sequence, n_new }.uniform(1);
        assert_eq!(draw(1, 0, 2), draw(1, 0, 2));
        assert_ne!(draw(1, 0, 2), draw(2, 0, 1));
        assert_ne!(draw(1, 0, 2), draw(1, 1, 2));
    }
}
