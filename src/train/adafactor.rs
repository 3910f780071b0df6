//! Adafactor (Shazeer and Stern 2018) as transformers has it, without relative steps, warm-up and
//! first moment: what the T0 recipes use.
//!
//! ```text
//! β = 1 - t^-0.8      u = g² + 1e-30
//! of matrices         R = β R + (1 - β) mean_cols(u)      C = β C + (1 - β) mean_rows(u)
//!                     d = g / sqrt( R / mean(R) ⊗ C )
//! d = d / max(1, rms(d))      lr' = lr · max(1e-3, rms(p)) where parameters scale, else lr
//! p = p (1 - lr' decay) - lr' d
//! ```
//!
//! Two numbers a row and column are kept instead of one a parameter. A tensor of more dimensions is
//! as many matrices as its leading dimensions say; rms is over all of it. Computed on the host in
//! f64 from f32 parameters and f32 state, on any backend: some milliseconds a million parameters.

use std::ops::Range;

/// What is not a rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Whether a tensor's rate is multiplied by the root mean square of its values.
    pub scale_parameter: bool,
}

/// Added to squared gradients.
const EPS: f64 = 1e-30;
/// The least that scaled rates are multiplied by.
const MIN_SCALE: f64 = 1e-3;
/// The largest root mean square of an update.
const CLIP: f64 = 1.0;
const DECAY: f64 = -0.8;

/// A tensor among the parameters, as matrices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrices {
    /// Where it lies in the flat vector, `[n, rows, cols]`.
    pub range: Range<usize>,
    /// Rows of each matrix.
    pub rows: usize,
    /// Columns of each matrix.
    pub cols: usize,
}

impl Matrices {
    fn n(&self) -> usize {
        self.range.len() / (self.rows * self.cols).max(1)
    }
}

/// The means of squared gradients of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Of rows, `[n, rows]`.
    pub row: Vec<f64>,
    /// Of columns, `[n, cols]`.
    pub col: Vec<f64>,
}

impl Moments {
    /// Before the first step.
    pub fn new(tensor: &Matrices) -> Self {
        Self { row: vec![0.0; tensor.n() * tensor.rows], col: vec![0.0; tensor.n() * tensor.cols] }
    }

    /// Rounds to what a checkpoint keeps, so that a resumed run goes on with the same numbers.
    pub fn round(&mut self) {
        self.row
            .iter_mut()
            .chain(&mut self.col)
            .for_each(|value| *value = f64::from(*value as f32));
    }
}

/// One step of one tensor.
pub struct Step<'a> {
    /// The tensor's values.
    pub params: &'a mut [f64],
    /// Its gradients, clipped.
    pub grads: &'a [f64],
    /// Its moments.
    pub moments: &'a mut Moments,
    /// Its learning rate.
    pub lr: f64,
    /// Its decoupled weight decay.
    pub weight_decay: f64,
    /// The step's number, from 1.
    pub step: u64,
}

impl Adafactor {
    /// Updates a tensor.
    pub fn update(self, tensor: &Matrices, args: Step<'_>) {
        let Step { params, grads, moments, lr, weight_decay, step } = args;
        let &Matrices { rows, cols, .. } = tensor;
        let scale = if self.scale_parameter { rms(params).max(MIN_SCALE) } else { 1.0 };
        let lr = lr * scale;
        let beta = 1.0 - (step as f64).powf(DECAY);
        let mut update = vec![0.0; params.len()];
        for (i, (grads, update)) in
            grads.chunks_exact(rows * cols).zip(update.chunks_exact_mut(rows * cols)).enumerate()
        {
            let row = &mut moments.row[i * rows..][..rows];
            let col = &mut moments.col[i * cols..][..cols];
            let square = |r: usize, c: usize| grads[r * cols + c].powi(2) + EPS;
            for (r, value) in row.iter_mut().enumerate() {
                let mean = (0..cols).map(|c| square(r, c)).sum::<f64>() / cols as f64;
                *value = beta * *value + (1.0 - beta) * mean;
            }
            for (c, value) in col.iter_mut().enumerate() {
                let mean = (0..rows).map(|r| square(r, c)).sum::<f64>() / rows as f64;
                *value = beta * *value + (1.0 - beta) * mean;
            }
            let mean = row.iter().sum::<f64>() / rows as f64;
            for r in 0..rows {
                for c in 0..cols {
                    let factor = (row[r] / mean).sqrt() * col[c].sqrt();
                    update[r * cols + c] = grads[r * cols + c] / factor;
                }
            }
        }
        let clip = (rms(&update) / CLIP).max(1.0);
        for (param, update) in params.iter_mut().zip(&update) {
            *param -= lr * weight_decay * *param;
            *param -= lr * update / clip;
        }
    }
}

fn rms(values: &[f64]) -> f64 {
    (values.iter().map(|v| v * v).sum::<f64>() / values.len().max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        scale_parameter: bool,
        weight_decay: f64,
        lr: f64,
        shapes: Vec<Vec<usize>>,
        init: Vec<Vec<f64>>,
        grads: Vec<Vec<Vec<f64>>>,
        #[serde(rename = "final")]
        last: Vec<Vec<f64>>,
    }

    /// Recorded by `tests/data/record_adafactor.py` in f64.
    #[test]
    fn steps_are_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/adafactor.json");
        let cases: Vec<Case> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(cases.len(), 3);
        for case in cases {
            let adafactor = Adafactor { scale_parameter: case.scale_parameter };
            for (i, shape) in case.shapes.iter().enumerate() {
                let [.., rows, cols] = shape[..] else { unreachable!() };
                let mut params = case.init[i].clone();
                let tensor = Matrices { range: 0..params.len(), rows, cols };
                let mut moments = Moments::new(&tensor);
                for (step, grads) in (1..).zip(&case.grads) {
                    let (lr, weight_decay) = (case.lr, case.weight_decay);
                    let (params, grads, moments) = (&mut params[..], &grads[i][..], &mut moments);
                    let args = Step { params, grads, moments, lr, weight_decay, step };
                    adafactor.update(&tensor, args);
                }
                for (found, expected) in params.iter().zip(&case.last[i]) {
                    assert!(
                        (found - expected).abs() <= 1e-12 * expected.abs().max(1.0),
                        "{shape:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn moments_keep_what_a_file_keeps() {
        let tensor = Matrices { range: 0..6, rows: 2, cols: 3 };
        let mut moments = Moments::new(&tensor);
        assert_eq!((moments.row.len(), moments.col.len()), (2, 3));
        moments.row[0] = 0.1;
        moments.round();
        assert_eq!(moments.row[0], f64::from(0.1_f32));
    }
}
