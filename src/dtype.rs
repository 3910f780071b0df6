//! Element types: what weights have on disk and what activations have in memory.

use std::fmt;

/// An element type. Weights come as `F32`, `Bf16` or `F16`; activations are `F32` or `Bf16` (on the
/// oracle `F64`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE binary16. On disk only: T5 overflows in it, so nothing is computed in it.
    F16,
    /// IEEE binary64. The oracle's only type.
    F64,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F64 => 8,
        }
    }

    /// The unit roundoff: the largest relative error of one rounding to this type.
    pub fn unit_roundoff(self) -> f64 {
        match self {
            Self::F32 => f64::powi(2.0, -24),
            Self::Bf16 => f64::powi(2.0, -8),
            Self::F16 => f64::powi(2.0, -11),
            Self::F64 => f64::powi(2.0, -53),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F64 => "f64",
        })
    }
}
