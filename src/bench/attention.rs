//! Attention, forward and backward.

use super::{Checked, UNITS, abs, operands};
use crate::{
    dtype::Dtype,
    error::Result,
    kernels::{
        Backend, Precision,
        cpu::Cpu,
        ops::{Attended, Attention, AttentionBackward, Spans},
        oracle::Oracle,
    },
    tensor::Tensor,
};

/// Sequences of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Queries of a sequence.
    pub n_queries: usize,
    /// Keys of a sequence.
    pub n_keys: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a query sees only keys up to its own position.
    pub causal: bool,
}

impl AttentionShape {
    /// Floating point operations of a forward: two products of all queries with all keys they see.
    pub fn flops(&self) -> f64 {
        let pairs: usize = (0..self.n_queries)
            .map(|i| if self.causal { self.n_keys - self.n_queries + i + 1 } else { self.n_keys })
            .sum();
        4.0 * (self.batch * pairs * self.n_heads * self.head_dim) as f64
    }

    /// Elements of queries, keys and values: each is read once at least.
    pub fn elements_read(&self) -> f64 {
        let queries = self.n_queries * self.n_heads;
        let keys = 2 * self.n_keys * self.n_kv_heads;
        (self.batch * (queries + keys) * self.head_dim) as f64
    }

    /// With the output and its gradient, which the backward reads, too.
    pub fn elements_read_backward(&self) -> f64 {
        let queries = self.batch * self.n_queries * self.n_heads * self.head_dim;
        self.elements_read() + 2.0 * queries as f64
    }

    fn args<'a, B: Backend>(
        &self,
        operands: &'a Operands<B>,
        queries: &'a Spans,
        keys: &'a Spans,
    ) -> Attention<'a, B> {
        Attention {
            q: &operands.q,
            k: &operands.k,
            v: &operands.v,
            queries,
            keys,
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).sqrt().recip(),
            causal: self.causal,
            window: None,
            bias: None,
            dropout: None,
        }
    }
}

struct Operands<B: Backend> {
    q: Tensor<B>,
    k: Tensor<B>,
    v: Tensor<B>,
    d_o: Tensor<B>,
}

impl<B: Backend> Operands<B> {
    /// Of the first `batch` sequences.
    fn new(backend: &B, shape: &AttentionShape, batch: usize) -> Self {
        let tensor = |stream, rows: usize, heads: usize| {
            let cols = heads * shape.head_dim;
            let values = operands(stream, batch * rows * cols);
            backend.upload(&values, batch * rows, cols, Precision::Activation)
        };
        Self {
            q: tensor(1, shape.n_queries, shape.n_heads),
            k: tensor(2, shape.n_keys, shape.n_kv_heads),
            v: tensor(3, shape.n_keys, shape.n_kv_heads),
            d_o: tensor(4, shape.n_queries, shape.n_heads),
        }
    }
}

/// Every element's magnitude.
fn magnitudes(tensor: &Tensor<Oracle>) -> Tensor<Oracle> {
    let values = abs(&tensor.buffer);
    Oracle.upload(&values, tensor.rows(), tensor.cols(), Precision::Activation)
}

/// An [`AttentionShape`] with operands.
pub struct AttentionCase<'a> {
    cpu: &'a Cpu,
    shape: AttentionShape,
    operands: Operands<Cpu>,
    queries: Spans,
    keys: Spans,
    forward: Attended<Cpu>,
}

impl<'a> AttentionCase<'a> {
    /// Operands for a shape.
    pub fn new(cpu: &'a Cpu, shape: AttentionShape) -> Self {
        let operands = Operands::new(cpu, &shape, shape.batch);
        let queries = Spans::packed(&vec![shape.n_queries; shape.batch]);
        let keys = Spans::packed(&vec![shape.n_keys; shape.batch]);
        let forward = cpu.attention(&shape.args(&operands, &queries, &keys));
        Self { cpu, shape, operands, queries, keys, forward }
    }

    /// Compares the first sequence with the oracle. An output is an average of values, so its error is
    /// bounded by that of the softmax's exponents, in units of the average of the values' magnitudes;
    /// so is the values' gradient, and those of queries and keys in units of their largest. The largest error
    /// in units of its bound.
    ///
    /// # Errors
    /// If it is above 1.
    pub fn check(&self) -> Result<f64> {
        let Self { cpu, shape, .. } = self;
        let one = Operands::new(&Oracle, shape, 1);
        let (q, k) = (one.q.clone(), one.k.clone());
        let size = Operands { q, k, v: magnitudes(&one.v), d_o: magnitudes(&one.d_o) };
        let (queries, keys) = (Spans::packed(&[shape.n_queries]), Spans::packed(&[shape.n_keys]));
        let want = Oracle.attention(&shape.args(&one, &queries, &keys));
        let got = cpu.download(&self.forward.o);
        let got = &got[..want.o.len()];
        // In f32 a score's absolute error is some 2^-24 √head_dim; bf16 rounds probabilities, too, but
        // where a sequence has one query.
        let dtype = cpu.compute_dtype();
        let unit = |rounds: bool| match rounds && dtype == Dtype::Bf16 {
            true => 2.0_f64.powi(15),
            false => 64.0 * (shape.head_dim as f64).sqrt(),
        };
        let times = |unit: f64, sizes: &[f64]| sizes.iter().map(|v| unit * v).collect::<Vec<_>>();
        let sizes = Oracle.attention(&shape.args(&size, &queries, &keys));
        let magnitude = times(unit(shape.n_queries > 1), &sizes.o.buffer);
        let checked =
            Checked { got, want: &want.o.buffer, magnitude: &magnitude, dtype, units: UNITS };
        let worst = checked.worst(&format!("o of {shape:?}"))?;

        let forward = &shape.args(&one, &queries, &keys);
        let backward = |d_o: &Tensor<Oracle>| {
            let (o, lse) = (&want.o, &want.lse);
            Oracle.attention_backward(AttentionBackward { forward, o, lse, d_o })
        };
        let [_, _, size] = backward(&size.d_o);
        let want = backward(&one.d_o);
        let got = self.backward();
        let mut all = worst;
        for ((got, want), what) in got.iter().zip(&want).zip(["d_q", "d_k", "d_v"]) {
            let got = cpu.download(got);
            let magnitude = match what {
                "d_v" => times(unit(true), &size.buffer),
                _ => {
                    let largest = abs(&want.buffer).into_iter().fold(1.0, f64::max);
                    vec![unit(true) * largest; want.len()]
                }
            };
            let got = &got[..want.len()];
            let checked =
                Checked { got, want: &want.buffer, magnitude: &magnitude, dtype, units: UNITS };
            all = all.max(checked.worst(&format!("{what} of {shape:?}"))?);
        }
        Ok(all)
    }

    /// The forward once.
    pub fn run(&self) {
        self.cpu.attention(&self.shape.args(&self.operands, &self.queries, &self.keys));
    }

    /// The backward once; 2.5 times the forward's products.
    pub fn run_backward(&self) {
        self.backward();
    }

    fn backward(&self) -> [Tensor<Cpu>; 3] {
        self.cpu.attention_backward(AttentionBackward {
            forward: &self.shape.args(&self.operands, &self.queries, &self.keys),
            o: &self.forward.o,
            lse: &self.forward.lse,
            d_o: &self.operands.d_o,
        })
    }
}
