//! The oracle: every operation in plain f64, written from its formula and from nothing else.
//!
//! This is the definition that every other backend is compared with, so it shares no code with them
//! (beyond the definitions in [`ops`](super::ops): dropout's factors, segments, Philox) and is never
//! clever: a matrix is a closure of row and column, attention has its score matrix, a gradient is
//! its formula. It also runs the whole engine in f64, for gradient checks.

mod activation;
mod attention;
mod dense;
mod lora;
mod optimizer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::{Backend, Precision, ops::*};
use crate::{
    dtype::Dtype,
    tensor::{Frozen, Tensor},
};

/// The f64 backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Oracle;

/// A frozen weight in f64, `[rows, cols]`.
#[derive(Debug)]
pub struct Weight {
    values: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Weight {
    fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }
}

impl Tensor<Oracle> {
    /// The matrix whose element `(row, col)` is `value(row, col)`.
    fn from_fn(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
        Self::new(values, Dtype::F64, rows, cols)
    }

    fn at(&self, row: usize, col: usize) -> f64 {
        assert!(col < self.cols);
        self.buffer[row * self.cols + col]
    }

    /// Everything, for an update in place.
    ///
    /// # Panics
    /// If somebody else holds the buffer.
    fn values_mut(&mut self) -> &mut [f64] {
        self.buffer_mut().expect("a tensor that is written is held once")
    }

    fn assert_shape(&self, rows: usize, cols: usize) {
        assert_eq!((self.rows, self.cols), (rows, cols));
    }
}

/// The sum of `term(0), ..., term(n - 1)`, in order.
fn sum(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    (0..n).map(term).fold(0.0, |sum, term| sum + term)
}

/// What dropout multiplies the element with: 0, or one over the probability of being kept.
fn kept(dropout: Option<&Dropout>, token: usize, col: usize) -> f64 {
    dropout.map_or(1.0, |dropout| f64::from(dropout.factor(token, col)))
}

impl Backend for Oracle {
    type Buffer = Vec<f64>;
    type Weight = Arc<Weight>;
    type Numbers = Vec<f64>;
    type Chosen = Vec<u32>;

    fn dtype(&self, _: Precision) -> Dtype {
        Dtype::F64
    }

    fn weight(&self, frozen: &Frozen) -> Arc<Weight> {
        let values = frozen.to_f32().into_iter().map(f64::from).collect();
        Arc::new(Weight { values, rows: frozen.rows(), cols: frozen.cols() })
    }

    fn upload(&self, values: &[f64], rows: usize, cols: usize, _: Precision) -> Tensor<Self> {
        assert_eq!(values.len(), rows * cols);
        Tensor::new(values.to_vec(), Dtype::F64, rows, cols)
    }

    fn zeros(&self, rows: usize, cols: usize, _: Precision) -> Tensor<Self> {
        Tensor::from_fn(rows, cols, |_, _| 0.0)
    }

    fn room(&self, rows: usize, cols: usize, _: Precision) -> Tensor<Self> {
        Tensor::from_fn(rows, cols, |_, _| f64::NAN)
    }

    fn download(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        tensor.buffer.to_vec()
    }

    fn copy(&self, tensor: &Tensor<Self>) -> Tensor<Self> {
        Tensor::new(tensor.buffer.to_vec(), Dtype::F64, tensor.rows, tensor.cols)
    }

    fn number(&self, value: f64) -> Vec<f64> {
        vec![value]
    }
    fn numbers(&self, numbers: &Vec<f64>) -> Vec<f64> {
        numbers.clone()
    }
    fn add_up(&self, total: &mut Vec<f64>, numbers: &Vec<f64>, n: usize) {
        total[0] += sum(n, |i| numbers[i]);
    }

    fn embed(&self, args: Embed<'_, Self>) -> Tensor<Self> {
        dense::embed(args)
    }
    fn embed_chosen(&self, table: &Arc<Weight>, ids: &Vec<u32>, scale: f32) -> Tensor<Self> {
        dense::embed(Embed { table, ids, scale })
    }
    fn rope(&self, args: Rope<'_, Self>) -> Tensor<Self> {
        dense::rope(args)
    }
    fn gather(&self, args: Gather<'_, Self>) -> Tensor<Self> {
        Tensor::from_fn(args.rows.len(), args.x.cols, |i, c| args.x.at(args.rows[i], c))
    }
    fn norm(&self, args: Norm<'_, Self>) -> Normed<Self> {
        dense::norm(args)
    }
    fn norm_again(&self, args: NormAgain<'_, Self>) -> Tensor<Self> {
        dense::norm_again(args)
    }
    fn norm_backward(&self, args: NormBackward<'_, Self>) -> Tensor<Self> {
        dense::norm_backward(args)
    }
    fn linear(&self, args: Linear<'_, Self>) -> Vec<Tensor<Self>> {
        dense::linear(args)
    }
    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Tensor<Self> {
        dense::linear_backward(args)
    }
    fn attention(&self, args: &Attention<'_, Self>) -> Attended<Self> {
        attention::attention(args)
    }
    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> [Tensor<Self>; 3] {
        attention::attention_backward(args)
    }
    fn cache_write(&self, args: CacheWrite<'_, Self>) {
        attention::cache_write(args);
    }
    fn gated(&self, args: &Gated<'_, Self>) -> Tensor<Self> {
        activation::gated(args)
    }
    fn gated_backward(
        &self,
        args: &Gated<'_, Self>,
        d_h: &Tensor<Self>,
    ) -> (Tensor<Self>, Option<Tensor<Self>>) {
        activation::gated_backward(args, d_h)
    }
    fn dropout(&self, x: &Tensor<Self>, dropout: &Dropout) -> Tensor<Self> {
        Tensor::from_fn(x.rows, x.cols, |t, c| kept(Some(dropout), t, c) * x.at(t, c))
    }
    fn add(&self, a: Tensor<Self>, b: &Tensor<Self>) -> Tensor<Self> {
        b.assert_shape(a.rows, a.cols);
        Tensor::from_fn(a.rows, a.cols, |t, c| a.at(t, c) + b.at(t, c))
    }
    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Loss<Self> {
        dense::head_loss(args)
    }
    fn argmax(&self, logits: &Tensor<Self>, forbidden: &[u32]) -> Vec<u32> {
        dense::argmax(logits, forbidden)
    }
    fn sample(&self, args: &Sample<'_, Self>) -> Vec<u32> {
        dense::sample(args)
    }
    fn tokens(&self, chosen: Vec<u32>) -> Vec<u32> {
        chosen
    }

    fn route(&self, args: &Route<'_, Self>) -> Routing<Self> {
        lora::route(args)
    }
    fn route_backward(&self, args: RouteBackward<'_, Self>) {
        lora::route_backward(args);
    }
    fn mix(&self, args: Mix<'_, Self>) -> MixedPair<Self> {
        lora::mix(args)
    }
    fn shrink(&self, args: Shrink<'_, Self>) -> Vec<Tensor<Self>> {
        lora::shrink(args)
    }
    fn shrink_stacked(&self, args: ShrinkStacked<'_, Self>) -> Tensor<Self> {
        lora::shrink_stacked(args)
    }
    fn lora_backward(&self, args: LoraBackward<'_, Self>) -> Vec<LoraGradients<Self>> {
        lora::lora_backward(args)
    }
    fn unmix(&self, args: Unmix<'_, Self>) {
        lora::unmix(args);
    }

    fn sum_of_squares(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        vec![sum(tensor.len(), |i| tensor.buffer[i] * tensor.buffer[i])]
    }
    fn clear(&self, tensor: &mut Tensor<Self>) {
        tensor.values_mut().fill(0.0);
    }
    fn adamw(&self, args: AdamW<'_, Self>) {
        optimizer::adamw(args);
    }
}
