//! Frozen linears: `x·Wᵀ`, and `d_y·W` of the backward.

use std::sync::Arc;

use super::{Checked, UNITS, abs, operands, sample_rows, take_rows};
use crate::{
    dtype::Dtype,
    error::Result,
    kernels::{
        Backend, Precision,
        ops::{Linear, LinearBackward, LinearBackwardTerm, Order, Projection},
        oracle::Oracle,
    },
    tensor::{Frozen, Tensor},
};

/// Weights that a run cycles through take at least this much, so that none is in a cache when its turn
/// comes: as in a model.
const WEIGHT_BYTES: usize = 192 << 20;

/// Up to so many rows the dot kernels run, as in decoding.
const DOT_ROWS: usize = 16;

/// Which product of a linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `x·Wᵀ`.
    Forward,
    /// `d_y·W`.
    Backward,
}

/// `[rows, d_in]` through a weight `[d_out, d_in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmShape {
    /// Tokens.
    pub rows: usize,
    /// Output features of the linear.
    pub d_out: usize,
    /// Input features of the linear.
    pub d_in: usize,
    /// Forward or backward.
    pub direction: Direction,
    /// The weights' type.
    pub weights: Dtype,
}

impl GemmShape {
    /// Floating point operations of a run.
    pub fn flops(&self) -> f64 {
        2.0 * self.rows as f64 * self.d_out as f64 * self.d_in as f64
    }

    /// Bytes of the weight.
    pub fn weight_bytes(&self) -> f64 {
        (self.d_out * self.d_in * self.weights.size_bytes()) as f64
    }

    fn input_cols(&self) -> usize {
        if self.direction == Direction::Forward { self.d_in } else { self.d_out }
    }

    fn run<B: Backend>(&self, backend: &B, input: &Tensor<B>, weight: &B::Weight) -> Tensor<B> {
        if self.direction == Direction::Backward {
            let terms = &[LinearBackwardTerm { d_y: input, weight, lora: None }];
            return backend.linear_backward(LinearBackward { terms, d_residual: None });
        }
        let projections = &[Projection::plain(weight)];
        let order = if self.rows <= DOT_ROWS { Order::Dot } else { Order::Panel };
        let output = Precision::Activation;
        let mut outputs = backend.linear(Linear { x: input, projections, order, output });
        outputs.swap_remove(0)
    }
}

/// A [`GemmShape`] with operands.
pub struct GemmCase<'a, B: Backend> {
    backend: &'a B,
    shape: GemmShape,
    values: Vec<f64>,
    input: Tensor<B>,
    /// What all `weights` are.
    weight: Frozen,
    weights: Vec<B::Weight>,
    next: usize,
    /// See [`Checked::units`].
    units: f64,
}

impl<'a, B: Backend> GemmCase<'a, B> {
    /// Operands for a shape.
    pub fn new(backend: &'a B, shape: GemmShape) -> Self {
        let cols = shape.input_cols();
        let values = operands(1, shape.rows * cols);
        let input = backend.upload(&values, shape.rows, cols, Precision::Activation);
        let one: Vec<f32> =
            operands(2, shape.d_out * shape.d_in).into_iter().map(|v| v as f32).collect();
        let one = Frozen::from_f32(&one, shape.d_out, shape.d_in, shape.weights);
        let n = WEIGHT_BYTES.div_ceil(one.bytes().len().max(1)).max(1);
        let all: Arc<Vec<u8>> = Arc::new(one.bytes().repeat(n));
        let size = one.bytes().len();
        let weights = (0..n)
            .map(|i| {
                let range = i * size..(i + 1) * size;
                let weight =
                    Frozen::new(all.clone(), range, shape.weights, shape.d_out, shape.d_in);
                backend.weight(&weight)
            })
            .collect();
        Self { backend, shape, values, input, weight: one, weights, next: 0, units: UNITS }
    }

    /// Checked as what tensor cores compute. They may cut 2^-23 of the running sum off at each 16 products:
    /// of k products of random sign the sum is about √k of their magnitudes' k, so in all √k / 8 times 2^-24 of
    /// those; twice that is allowed.
    pub fn on_tensor_cores(self) -> Self {
        let depth = self.shape.input_cols() as f64;
        Self { units: UNITS + depth.sqrt() / 4.0, ..self }
    }

    /// Compares some rows with the oracle; the largest error in units of its bound.
    ///
    /// # Errors
    /// If it is above 1.
    pub fn check(&self) -> Result<f64> {
        let rows = sample_rows(self.shape.rows);
        let shape = GemmShape { rows: rows.len(), ..self.shape };
        let cols = shape.input_cols();
        let values = take_rows(&self.values, cols, &rows);
        let weight = &self.weight;
        let magnitudes: Vec<f32> = weight.to_f32().iter().map(|v| v.abs()).collect();
        let magnitudes = Frozen::from_f32(&magnitudes, weight.rows(), weight.cols(), Dtype::F32);
        let oracle = |values: &[f64], weight: &Frozen| {
            let input = Oracle.upload(values, rows.len(), cols, Precision::Activation);
            Oracle.download(&shape.run(&Oracle, &input, &Oracle.weight(weight)))
        };
        let output = self.shape.run(self.backend, &self.input, &self.weights[0]);
        let got = take_rows(&self.backend.download(&output), output.cols(), &rows);
        let (want, magnitude) = (oracle(&values, weight), oracle(&abs(&values), &magnitudes));
        let dtype = output.dtype();
        let units = self.units;
        let checked = Checked { got: &got, want: &want, magnitude: &magnitude, dtype, units };
        checked.worst(&format!("{:?}", self.shape))
    }

    /// Runs it once, with the next weight. A GPU's is queued.
    pub fn run(&mut self) {
        let weight = &self.weights[self.next % self.weights.len()];
        self.next += 1;
        self.backend.scope(|| drop(self.shape.run(self.backend, &self.input, weight)));
    }
}
