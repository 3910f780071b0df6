//! A backend that computes nothing: it counts the bytes of the tensors that are alive, so that what a step
//! will need is known before its first operation.
//!
//! ```text
//! Model on Sizes -> Trainer -> step on the longest rows -> Sizes::peak    bytes, in a millisecond or two
//! ```
//!
//! The tensors are those of the CPU's and the GPU's steps, because the same model makes them, and keeps for the
//! backward what it keeps there. What is not in the count is what a kernel needs while it runs: packed panels, some MiB a
//! thread, and chunks of logits.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{Backend, Precision, ops::*};
use crate::{
    dtype::Dtype,
    tensor::{Frozen, Tensor},
};

/// Counts bytes; computes nothing: every number that an operation gives to the host is 0.
#[derive(Clone, Debug)]
pub struct Sizes {
    activations: Dtype,
    is_queued: bool,
    count: Arc<Count>,
}

#[derive(Debug, Default)]
struct Count {
    now: AtomicU64,
    peak: AtomicU64,
}

/// The size of a tensor's storage, counted while it lives.
#[derive(Debug)]
pub struct Held {
    bytes: u64,
    count: Arc<Count>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.count.now.fetch_sub(self.bytes, Relaxed);
    }
}

/// Rows and columns of a frozen weight.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    rows: usize,
    cols: usize,
}

impl Sizes {
    /// In the place of a backend: with its activations, and queued as it is.
    pub fn instead_of<B: Backend>(backend: &B) -> Self {
        let activations = backend.dtype(Precision::Activation);
        Self { activations, is_queued: backend.is_queued(), count: Arc::default() }
    }

    /// The bytes that are alive.
    pub fn held(&self) -> u64 {
        self.count.now.load(Relaxed)
    }

    /// The most bytes that were alive at a time.
    pub fn peak(&self) -> u64 {
        self.count.peak.load(Relaxed)
    }

    fn of(&self, rows: usize, cols: usize, dtype: Dtype) -> Tensor<Self> {
        let bytes = (rows * cols * dtype.size_bytes()) as u64;
        let now = self.count.now.fetch_add(bytes, Relaxed) + bytes;
        self.count.peak.fetch_max(now, Relaxed);
        Tensor::new(Held { bytes, count: Arc::clone(&self.count) }, dtype, rows, cols)
    }

    fn activation(&self, rows: usize, cols: usize) -> Tensor<Self> {
        self.of(rows, cols, self.activations)
    }

    fn full(&self, rows: usize, cols: usize) -> Tensor<Self> {
        self.of(rows, cols, Dtype::F32)
    }

    fn like(&self, x: &Tensor<Self>) -> Tensor<Self> {
        self.of(x.rows, x.cols, x.dtype)
    }

    /// A tensor's own buffer for a result of its size, where nobody else holds it.
    fn reuse(&self, mut x: Tensor<Self>) -> Tensor<Self> {
        if x.buffer_mut().is_some() { x } else { self.like(&x) }
    }
}

impl Backend for Sizes {
    type Buffer = Held;
    type Weight = Shape;
    type Numbers = Vec<f64>;
    type Chosen = Vec<u32>;

    fn dtype(&self, precision: Precision) -> Dtype {
        match precision {
            Precision::Activation => self.activations,
            Precision::Full => Dtype::F32,
        }
    }

    fn weight(&self, frozen: &Frozen) -> Shape {
        Shape { rows: frozen.rows(), cols: frozen.cols() }
    }

    fn upload(&self, _: &[f64], rows: usize, cols: usize, to: Precision) -> Tensor<Self> {
        self.of(rows, cols, self.dtype(to))
    }

    fn zeros(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        self.of(rows, cols, self.dtype(precision))
    }

    fn room(&self, rows: usize, cols: usize, precision: Precision) -> Tensor<Self> {
        self.of(rows, cols, self.dtype(precision))
    }

    fn download(&self, tensor: &Tensor<Self>) -> Vec<f64> {
        vec![0.0; tensor.len()]
    }

    fn copy(&self, tensor: &Tensor<Self>) -> Tensor<Self> {
        self.like(tensor)
    }

    fn number(&self, value: f64) -> Vec<f64> {
        vec![value]
    }

    fn numbers(&self, numbers: &Vec<f64>) -> Vec<f64> {
        numbers.clone()
    }

    fn add_up(&self, _: &mut Vec<f64>, _: &Vec<f64>, _: usize) {}

    fn embed(&self, args: Embed<'_, Self>) -> Tensor<Self> {
        self.activation(args.ids.len(), args.table.cols)
    }

    fn embed_chosen(&self, table: &Shape, ids: &Vec<u32>, scale: f32) -> Tensor<Self> {
        self.embed(Embed { table, ids, scale })
    }

    fn rope(&self, args: Rope<'_, Self>) -> Tensor<Self> {
        self.reuse(args.x)
    }

    fn gather(&self, args: Gather<'_, Self>) -> Tensor<Self> {
        self.of(args.rows.len(), args.x.cols, args.x.dtype)
    }

    fn norm(&self, args: Norm<'_, Self>) -> Normed<Self> {
        let rows = args.x.rows;
        Normed {
            y: self.activation(rows, args.x.cols),
            stats: NormStats {
                mean: args.centered.then(|| self.full(rows, 1)),
                rstd: self.full(rows, 1),
            },
        }
    }

    fn norm_again(&self, args: NormAgain<'_, Self>) -> Tensor<Self> {
        self.activation(args.x.rows, args.x.cols)
    }

    fn norm_backward(&self, args: NormBackward<'_, Self>) -> Tensor<Self> {
        match args.d_residual {
            Some(d_residual) => self.reuse(d_residual),
            None => self.like(args.x),
        }
    }

    fn linear(&self, args: Linear<'_, Self>) -> Vec<Tensor<Self>> {
        let dtype = self.dtype(args.output);
        args.projections.iter().map(|p| self.of(args.x.rows, p.weight.rows, dtype)).collect()
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Tensor<Self> {
        match args.d_residual {
            Some(d_residual) => self.reuse(d_residual),
            None => self.activation(args.terms[0].d_y.rows, args.terms[0].weight.cols),
        }
    }

    fn attention(&self, args: &Attention<'_, Self>) -> Attended<Self> {
        Attended { o: self.like(args.q), lse: self.full(args.q.rows, args.n_heads) }
    }

    fn attention_backward(&self, args: AttentionBackward<'_, Self>) -> [Tensor<Self>; 3] {
        let Attention { q, k, v, .. } = args.forward;
        [q, k, v].map(|x| self.like(x))
    }

    fn cache_write(&self, _: CacheWrite<'_, Self>) {}

    fn gated(&self, args: &Gated<'_, Self>) -> Tensor<Self> {
        self.like(args.gate)
    }

    fn gated_backward(
        &self,
        args: &Gated<'_, Self>,
        d_h: &Tensor<Self>,
    ) -> (Tensor<Self>, Option<Tensor<Self>>) {
        (self.like(d_h), args.up.map(|up| self.like(up)))
    }

    fn dropout(&self, x: &Tensor<Self>, _: &Dropout) -> Tensor<Self> {
        self.like(x)
    }

    fn add(&self, a: Tensor<Self>, _: &Tensor<Self>) -> Tensor<Self> {
        self.reuse(a)
    }

    fn head_loss(&self, args: HeadLoss<'_, Self>) -> Loss<Self> {
        let d_x = args.d_nll.map(|_| self.like(args.x));
        Loss { nll: vec![0.0; args.labels.len()], d_x }
    }

    fn argmax(&self, logits: &Tensor<Self>, _: &[u32]) -> Vec<u32> {
        vec![0; logits.rows]
    }

    fn sample(&self, args: &Sample<'_, Self>) -> Vec<u32> {
        vec![0; args.logits.rows]
    }

    fn is_queued(&self) -> bool {
        self.is_queued
    }

    fn tokens(&self, chosen: Vec<u32>) -> Vec<u32> {
        chosen
    }

    fn route(&self, args: &Route<'_, Self>) -> Routing<Self> {
        let (rows, cols) = (args.logits.len() * args.tasks.len(), args.n_splits * args.n_skills);
        Routing { weights: self.full(rows, cols), samples: self.full(rows, cols) }
    }

    fn route_backward(&self, _: RouteBackward<'_, Self>) {}

    fn mix(&self, args: Mix<'_, Self>) -> MixedPair<Self> {
        let Bank { d_in, d_out, rank, .. } = args.stacked.bank;
        MixedPair {
            a: self.full(args.n_rows * d_in, rank),
            b: self.full(args.n_rows * rank, d_out),
        }
    }

    fn shrink(&self, args: Shrink<'_, Self>) -> Vec<Tensor<Self>> {
        args.mixed_a.iter().map(|a| self.full(args.x.rows, a.cols)).collect()
    }

    fn shrink_stacked(&self, args: ShrinkStacked<'_, Self>) -> Tensor<Self> {
        self.full(args.x.rows, args.stacked.bank.rank)
    }

    fn lora_backward(&self, args: LoraBackward<'_, Self>) -> Vec<LoraGradients<Self>> {
        let gradients = |term: &LoraTerm<'_, Self>| {
            let rank = term.z.cols;
            let n_rows = term.mixed_b.rows / rank.max(1);
            LoraGradients {
                d_z: self.like(term.z),
                d_a: self.full(n_rows * args.x.cols, rank),
                d_b: self.like(term.mixed_b),
            }
        };
        args.terms.iter().map(gradients).collect()
    }

    fn unmix(&self, _: Unmix<'_, Self>) {}

    fn sum_of_squares(&self, _: &Tensor<Self>) -> Vec<f64> {
        vec![0.0]
    }

    fn clear(&self, _: &mut Tensor<Self>) {}

    fn adamw(&self, _: AdamW<'_, Self>) {}
}
