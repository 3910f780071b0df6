//! Rotary position embedding: the angle of every position and pair of features.
//!
//! ```text
//! angle[position, i] = position * frequency[i]        frequency[i] = theta^(-2i / head_dim), then scaled
//! ```
//!
//! Frequencies and angles are rounded to f32 where transformers' `modeling_rope_utils.py` rounds
//! them: at position 100,000 the rounding is a hundredth of a turn, and the models were trained with it.

use crate::{
    formats::config::{RopeConfig, RopeScaling},
    kernels::{Backend, Precision, ops::Rotary},
};

/// The frequencies of a model, `[head_dim / 2]`.
pub(super) struct Frequencies(Vec<f32>);

impl Frequencies {
    pub(super) fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let plain = (0..head_dim / 2).map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / f64::from(config.theta as f32).powf(f64::from(exponent)) as f32
        });
        let scale = |frequency: f32| match config.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3(llama3) => {
                let factor = llama3.factor as f32;
                let (low, high) = (llama3.low_freq_factor, llama3.high_freq_factor);
                let original = llama3.original_max_positions as f64;
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength > (original / low) as f32 {
                    frequency / factor // Slower than the model ever saw a full turn of.
                } else if wavelength < (original / high) as f32 {
                    frequency
                } else {
                    let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        };
        Self(plain.map(scale).collect())
    }

    /// Cosines and sines of positions `0..n`.
    pub(super) fn table<B: Backend>(&self, backend: &B, n: usize) -> Rotary<B> {
        let half = self.0.len();
        let mut table = vec![0.0; n * 2 * half];
        for (position, row) in table.chunks_exact_mut(2 * half).enumerate() {
            let (cos, sin) = row.split_at_mut(half);
            for ((frequency, cos), sin) in self.0.iter().zip(cos).zip(sin) {
                (*sin, *cos) = f64::from(position as f32 * frequency).sin_cos();
            }
        }
        Rotary { table: backend.upload(&table, n, 2 * half, Precision::Full) }
    }
}
