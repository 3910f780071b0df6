//! Learning-rate schedules, as transformers has them.

use crate::error::{Error, Result};

/// How the learning rate changes after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Down to zero at the last step, in a line.
    Linear,
    /// Down to zero at the last step, as half a cosine.
    Cosine,
    /// Not at all, and without warm-up.
    Constant,
    /// Not at all.
    ConstantWithWarmup,
}

impl Schedule {
    /// Its name in transformers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
        }
    }

    /// The factor of step `step` (from 1) out of `total`, after `warmup` steps of a line from zero:
    /// transformers' `get_scheduler` at its step `step - 1`.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        let step = step - 1;
        if step < warmup && self != Self::Constant {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress =
            step.saturating_sub(warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => {
                (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0)
            }
            Self::Constant | Self::ConstantWithWarmup => 1.0,
        }
    }
}

impl std::str::FromStr for Schedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            "constant" => Ok(Self::Constant),
            "constant_with_warmup" => Ok(Self::ConstantWithWarmup),
            _ => Err(Error::Usage(format!(
                "unknown lr scheduler type {name:?}: linear, cosine, constant and constant_with_warmup are there"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_transformers() {
        let linear: Vec<_> = (1..=6).map(|s| Schedule::Linear.factor(s, 2, 6)).collect();
        assert_eq!(linear, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        let cosine = Schedule::Cosine.factor(5, 0, 8);
        assert!((cosine - 0.5).abs() < 1e-12);
        let rising: Vec<_> =
            (1..=4).map(|s| Schedule::ConstantWithWarmup.factor(s, 2, 6)).collect();
        assert_eq!(rising, [0.0, 0.5, 1.0, 1.0]);
        assert!((1..=100).all(|s| Schedule::Constant.factor(s, 5, 10) == 1.0));
    }
}
