//! Draws of the next token. A draw is a pure function of the seed, the row's index, which of the
//! row's sequences it is for, and the token's position: rows do not share a stream.

use super::GenerateOptions;
use crate::kernels::{
    ops::SamplingRules,
    philox::{Key, Purpose},
    sampling::{self, Candidate},
};

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
    pub(super) fn uniform(self, seed: u64) -> f64 {
        let Self { row, sequence, n_new } = self;
        let counter = [row as u32, (row as u64 >> 32) as u32, sequence as u32, n_new as u32];
        let [high, low, ..] = Key::new(seed, Purpose::Sample, 0).block(counter);
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

/// What a draw leaves out.
pub(super) fn rules(options: &GenerateOptions) -> SamplingRules {
    let GenerateOptions { top_k, top_p, min_p, .. } = *options;
    SamplingRules { top_k, top_p, min_p }
}

/// What multiplies logits before a draw: the head's scale over the temperature, above 0 and finite for any temperature.
pub(super) fn sharpness(options: &GenerateOptions, scale: f32) -> f32 {
    let exact = f64::from(scale) / options.temperature;
    exact.clamp(f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)) as f32
}

/// Draws an id by scores that were changed on the host, `[vocabulary]`.
pub(super) fn sample(options: &GenerateOptions, draw: Draw, scores: &[f64]) -> u32 {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let candidate = |(id, &score): (u32, &f64)| {
        let weight = ((score - largest) / options.temperature).exp();
        Candidate::new(id, score as f32, weight)
    };
    let candidates = (0..).zip(scores).filter_map(candidate).collect();
    sampling::draw(candidates, &rules(options), draw.uniform(options.seed))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBABILITIES: [f64; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

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
    fn any_temperature_has_a_sharpness() {
        for temperature in [f64::MIN_POSITIVE, 1e-300, 1e-40, 1.0, 1e40, 1e300, f64::MAX] {
            let options = GenerateOptions { temperature, ..Default::default() };
            options.check().unwrap();
            for scale in [1.0, 768.0_f32.powf(-0.5)] {
                let sharpness = sharpness(&options, scale);
                assert!(sharpness > 0.0 && sharpness.is_finite(), "{temperature}: {sharpness}");
            }
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
