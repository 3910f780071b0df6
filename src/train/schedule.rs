//! Learning-rate schedules, as transformers has them.

use crate::error::{Error, Result};

/// How the learning rate changes after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Down to zero at the last step, in a line.
    Linear,
    /// Down to zero at the last step, as half a cosine.
    Cosine,
    /// Not at all.
    Constant,
}

impl Schedule {
    /// The factor of step `step` (from 1) out of `total`, after `warmup` steps of a line from zero:
    /// transformers' `get_*_schedule_with_warmup` at its step `step - 1`.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        let step = step - 1;
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => {
                (0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())).max(0.0)
            }
            Self::Constant => 1.0,
        }
    }
}

impl std::str::FromStr for Schedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            "constant" | "constant_with_warmup" => Ok(Self::Constant),
            _ => Err(Error::Usage(format!(
                "unknown lr scheduler type {name:?}: linear, cosine and constant are there"
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
        assert_eq!(Schedule::Constant.factor(100, 0, 10), 1.0);
    }
}
