//! How a router's samples become mixing weights: what adapters name and kernels compute.
//!
//! ```text
//! s̃      a relaxed Bernoulli sample in training, σ(z) else
//! v      s̃, or with straight-through rounding 1 where s̃ > 1/2, else 0 (dv/ds̃ is taken as 1)
//! w      v / (Σ_s v + 1e-12), or with the average correction v sqrt(n_splits / n_skills)
//! ```
//!
//! Rounded, a split may have no skill that is on. Its weights are 0, and its gradient is that of a sum of
//! 1; the authors' code divides by 1e-12 there, which drowns every other gradient.

/// How samples become mixing weights. [`Default`] is PEFT's way, which knows no other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Weighting {
    /// Whether samples are rounded; the authors' `module_logits_straight_through`.
    pub straight_through: bool,
    /// Whether they are scaled instead of normalised; the authors' `poly_average_correction`.
    pub average_correction: bool,
}

impl Weighting {
    /// What a sample is multiplied by, where it is not normalised.
    pub fn factor(self, n_splits: usize, n_skills: usize) -> Option<f64> {
        self.average_correction.then(|| (n_splits as f64).sqrt() / (n_skills as f64).sqrt())
    }

    /// The value of a sample.
    pub fn value(self, sample: f64) -> f64 {
        match self.straight_through {
            true if sample > 0.5 => 1.0,
            true if sample <= 0.5 => 0.0,
            _ => sample, // A NaN stays one.
        }
    }

    /// What the values of a split are divided by, from their sum.
    pub fn normalizer(self, sum: f64) -> f64 {
        match self.straight_through {
            true if sum < 1.0 => 1.0,
            true => sum,
            false => sum + 1e-12,
        }
    }

    /// Mixing weights from the samples of all splits, `[n_splits * n_skills]`.
    pub fn weights(self, samples: &[f64], n_skills: usize) -> Vec<f64> {
        let mut weights: Vec<f64> = samples.iter().map(|&s| self.value(s)).collect();
        let factor = self.factor(samples.len() / n_skills, n_skills);
        for split in weights.chunks_exact_mut(n_skills) {
            let n = self.normalizer(split.iter().sum());
            split.iter_mut().for_each(|w| *w = factor.map_or(*w / n, |factor| *w * factor));
        }
        weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The four ways, as the authors' selector computes them.
    #[test]
    fn weights_are_as_the_authors_have_them() {
        let samples = [0.9, 0.6, 0.5, 0.2, 0.3, 0.4];
        let of = |straight_through, average_correction| {
            Weighting { straight_through, average_correction }.weights(&samples, 3)
        };
        let near = |found: Vec<f64>, expected: [f64; 6]| {
            let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-11);
            assert!(close, "{found:?}, not {expected:?}");
        };
        near(of(false, false), [0.45, 0.3, 0.25, 2.0 / 9.0, 3.0 / 9.0, 4.0 / 9.0]);
        near(of(true, false), [0.5, 0.5, 0.0, 0.0, 0.0, 0.0]);
        let factor = (2.0_f64 / 3.0).sqrt();
        near(of(false, true), samples.map(|s| s * factor));
        near(of(true, true), [factor, factor, 0.0, 0.0, 0.0, 0.0]);
        assert!(
            Weighting { straight_through: true, ..Default::default() }.value(f64::NAN).is_nan()
        );
    }
}
