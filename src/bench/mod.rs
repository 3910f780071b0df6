//! Kernels as cases: made from a shape, checked against the f64 oracle, then timed. The command line's
//! `bench gemm`, `bench routed` and `bench attention` and the Criterion benches run the same ones.
//!
//! Operands are multiples of 1/128 in `[-1, 1)`, so no type rounds them, and a check's bound is that of
//! the sums alone: `4 * 2^-24 * Σ|a b|`, and half a step of the result's type.

mod attention;
mod gemm;
mod routed;

use std::time::{Duration, Instant};

pub use attention::{AttentionCase, AttentionShape};
pub use gemm::{Direction, GemmCase, GemmShape};
pub use routed::{RoutedCase, RoutedShape};

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    kernels::philox::{Key, Purpose},
};

/// What of [`Checked::units`] the sums of CPUs take.
const UNITS: f64 = 4.0;

/// How long a case took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Median of all runs, seconds.
    pub median_s: f64,
    /// The shortest run, seconds.
    pub min_s: f64,
    /// Runs.
    pub n: usize,
}

/// Runs `run` once to warm up, then at least five times and for at least `at_least`.
pub fn time(at_least: Duration, mut run: impl FnMut()) -> Timing {
    run();
    let started = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < 5 || started.elapsed() < at_least {
        let started = Instant::now();
        run();
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Timing { median_s: seconds[seconds.len() / 2], min_s: seconds[0], n: seconds.len() }
}

/// `n` operands of stream `stream`.
fn operands(stream: u64, n: usize) -> Vec<f64> {
    let key = Key::new(stream, Purpose::Data, 0);
    let step = |word: u32| f64::from((word >> 24) as u8 as i8) / 128.0;
    let blocks = (0..n.div_ceil(4)).flat_map(|i| key.block([i as u32, 0, 0, 0]));
    blocks.map(step).take(n).collect()
}

/// A result beside the oracle's.
struct Checked<'a> {
    got: &'a [f64],
    want: &'a [f64],
    /// The oracle's, of the operands' magnitudes.
    magnitude: &'a [f64],
    dtype: Dtype,
    /// The bound of the sums, in units of `2^-24 * Σ|a b|`.
    units: f64,
}

impl Checked<'_> {
    /// The largest error in units of its bound.
    ///
    /// # Errors
    /// If it is above 1: no timing of a wrong result.
    fn worst(&self, what: &str) -> Result<f64> {
        assert_eq!((self.got.len(), self.want.len()), (self.want.len(), self.magnitude.len()));
        // Of a number with 8 or 24 digits, the first one included: of 1.0, half of 2^-7 or of 2^-23.
        let half_step =
            if self.dtype == Dtype::Bf16 { 2.0_f64.powi(-8) } else { 2.0_f64.powi(-24) };
        let mut worst = 0.0_f64;
        for (i, ((got, want), magnitude)) in
            self.got.iter().zip(self.want).zip(self.magnitude).enumerate()
        {
            let sums = self.units * 2.0_f64.powi(-24) * magnitude;
            let bound = sums + half_step * (want.abs() + sums);
            let error = (got - want).abs();
            let in_bounds = if error == 0.0 { 0.0 } else { error / bound };
            if in_bounds > 1.0 || in_bounds.is_nan() {
                return Err(Error::Device(format!(
                    "{what}: element {i} is {got}, the oracle says {want}: {in_bounds:.1} times the bound"
                )));
            }
            worst = worst.max(in_bounds);
        }
        Ok(worst)
    }
}

/// Up to three rows of `n`: first, middle, last.
fn sample_rows(n: usize) -> Vec<usize> {
    let mut rows = vec![0, n / 2, n.saturating_sub(1)];
    rows.dedup();
    rows.retain(|&row| row < n);
    rows
}

/// Some rows of a row-major matrix.
fn take_rows(values: &[f64], cols: usize, rows: &[usize]) -> Vec<f64> {
    rows.iter().flat_map(|&row| values[row * cols..(row + 1) * cols].iter().copied()).collect()
}

/// Every element's magnitude.
fn abs(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v.abs()).collect()
}
