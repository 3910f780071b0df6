//! Gated activation, forward and backward: `h = dropout(activation(gate) * up)`.
//!
//! Nothing but `gate` and `up` is kept; the backward computes the activation again, with its slope.

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    elementwise::{FACTORS, factors, load, store},
    isa::{ElementMut, LANES, Simd, SimdOp},
    math::{normal, sigmoid},
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

pub(super) fn gated(cpu: &Cpu, args: &Gated<'_, Cpu>) -> Tensor<Cpu> {
    check(args);
    let (tokens, width) = (args.gate.rows, args.gate.cols);
    let mut h = cpu.alloc(tokens, width, Precision::Activation);
    if h.is_empty() {
        return h;
    }
    with_element!(h.dtype, T => {
        let rows = rows_of_a_task(width);
        let inputs = Inputs::<T>::new(args);
        run_tasks(h.items_mut::<T>().chunks_mut(rows * width).enumerate(), |(task, h)| {
            cpu.isa.run(Forward::<T> { inputs: inputs.rows(task * rows, h.len() / width), h });
        });
    });
    h
}

pub(super) fn gated_backward(
    cpu: &Cpu,
    args: &Gated<'_, Cpu>,
    d_h: &Tensor<Cpu>,
) -> (Tensor<Cpu>, Option<Tensor<Cpu>>) {
    check(args);
    let (tokens, width) = (args.gate.rows, args.gate.cols);
    assert_eq!((d_h.rows, d_h.cols), (tokens, width));
    let mut d_gate = cpu.alloc(tokens, width, Precision::Activation);
    let mut d_up = args.up.map(|_| cpu.alloc(tokens, width, Precision::Activation));
    if d_gate.is_empty() {
        return (d_gate, d_up);
    }
    with_element!(d_h.dtype, T => {
        let rows = rows_of_a_task(width);
        let inputs = Inputs::<T>::new(args);
        let chunks = d_gate
            .items_mut::<T>()
            .chunks_mut(rows * width)
            .zip(d_h.items::<T>().chunks(rows * width))
            .enumerate();
        let run = |task: usize, d_gate: &mut [_], d_up: Option<&mut [_]>, d_h| {
            let inputs = inputs.rows(task * rows, d_gate.len() / width);
            cpu.isa.run(Backward::<T> { inputs, d_h, d_gate, d_up });
        };
        match &mut d_up {
            Some(d_up) => {
                let tasks = chunks.zip(d_up.items_mut::<T>().chunks_mut(rows * width));
                run_tasks(tasks, |((task, (d_gate, d_h)), d_up)| {
                    run(task, d_gate, Some(d_up), d_h);
                });
            }
            None => run_tasks(chunks, |(task, (d_gate, d_h))| run(task, d_gate, None, d_h)),
        }
    });
    (d_gate, d_up)
}

fn check(args: &Gated<'_, Cpu>) {
    if let Some(up) = args.up {
        assert_eq!((up.rows, up.cols), (args.gate.rows, args.gate.cols));
    }
    if let Some(dropout) = args.dropout {
        assert_eq!(dropout.tokens.len(), args.gate.rows, "a key for each token");
    }
}

fn rows_of_a_task(width: usize) -> usize {
    (GRAIN / 2 / width).max(1) // An activation is some twenty operations.
}

/// What both directions read: all rows, or a task's.
#[derive(Clone, Copy)]
struct Inputs<'a, T: ElementMut> {
    gate: &'a [T::Item],
    up: Option<&'a [T::Item]>,
    activation: Activation,
    dropout: Option<&'a Dropout>,
    first_token: usize,
    width: usize,
}

/// [`Inputs`] of at most [`FACTORS`] columns of one row.
struct Block<'a, T: ElementMut> {
    gate: &'a [T::Item],
    up: Option<&'a [T::Item]>,
    factors: [f32; FACTORS],
}

impl<'a, T: ElementMut> Inputs<'a, T> {
    fn new(args: &'a Gated<'_, Cpu>) -> Self {
        Self {
            gate: args.gate.items::<T>(),
            up: args.up.map(Tensor::items::<T>),
            activation: args.activation,
            dropout: args.dropout,
            first_token: 0,
            width: args.gate.cols,
        }
    }

    fn rows(&self, first: usize, n: usize) -> Self {
        let range = first * self.width..(first + n) * self.width;
        Self {
            gate: &self.gate[range.clone()],
            up: self.up.map(|up| &up[range]),
            first_token: first,
            ..*self
        }
    }

    /// Rows and starts of the blocks, in order.
    fn n_blocks(&self) -> usize {
        self.width.div_ceil(FACTORS)
    }

    #[inline(always)]
    fn block(&self, row: usize, block: usize) -> Block<'a, T> {
        let start = block * FACTORS;
        let end = (start + FACTORS).min(self.width);
        let range = row * self.width + start..row * self.width + end;
        let mut kept = [1.0; FACTORS];
        if let Some(dropout) = self.dropout {
            factors(dropout, self.first_token + row, start..end, &mut kept[..end - start]);
        }
        let up = self.up.map(|up| &up[range.clone()]);
        Block { gate: &self.gate[range], up, factors: kept }
    }
}

impl<T: ElementMut> Block<'_, T> {
    /// Vector `i` of the gate, of `up` (1 without one) and of the factors, and how many lanes.
    #[inline(always)]
    fn vectors<S: Simd>(&self, s: S, i: usize) -> (S::V, S::V, S::V) {
        let up = match self.up {
            Some(up) => load::<S, T>(s, up, i),
            None => s.splat(1.0),
        };
        let kept = s.load(&self.factors.as_chunks::<LANES>().0[i]);
        (load::<S, T>(s, self.gate, i), up, kept)
    }
}

/// The activation and its slope.
#[inline(always)]
fn activate<S: Simd>(s: S, activation: Activation, x: S::V) -> (S::V, S::V) {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    match activation {
        Activation::Relu => (s.select_lt(x, zero, zero, x), s.select_lt(zero, x, one, zero)),
        Activation::Silu => {
            let (sigma, slope) = sigmoid(s, x);
            (s.mul(x, sigma), s.fma(x, slope, sigma))
        }
        Activation::Gelu => {
            let (cdf, density) = normal(s, x);
            (s.mul(x, cdf), s.fma(x, density, cdf))
        }
        Activation::GeluNew => {
            // (1 + tanh(u)) / 2 = σ(2u), which keeps its digits where tanh is near -1.
            let two_u = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            let (linear, cubic) = (s.splat(two_u as f32), s.splat((two_u * 0.044_715) as f32));
            let cubic_x2 = s.mul(cubic, s.mul(x, x));
            let (sigma, slope) = sigmoid(s, s.mul(x, s.add(cubic_x2, linear)));
            let inner = s.fma(s.splat(3.0), cubic_x2, linear);
            (s.mul(x, sigma), s.fma(s.mul(x, slope), inner, sigma))
        }
    }
}

struct Forward<'a, T: ElementMut> {
    inputs: Inputs<'a, T>,
    h: &'a mut [T::Item],
}

impl<T: ElementMut> SimdOp for Forward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        for (row, h) in self.h.chunks_exact_mut(self.inputs.width).enumerate() {
            for (block, h) in h.chunks_mut(FACTORS).enumerate() {
                let block = self.inputs.block(row, block);
                for i in 0..h.len().div_ceil(LANES) {
                    let (gate, up, kept) = block.vectors(s, i);
                    let (value, _) = activate(s, self.inputs.activation, gate);
                    store::<S, T>(s, s.mul(s.mul(value, up), kept), h, i);
                }
            }
        }
    }
}

struct Backward<'a, T: ElementMut> {
    inputs: Inputs<'a, T>,
    d_h: &'a [T::Item],
    d_gate: &'a mut [T::Item],
    d_up: Option<&'a mut [T::Item]>,
}

impl<T: ElementMut> SimdOp for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(mut self, s: S) {
        let width = self.inputs.width;
        for row in 0..self.d_h.len() / width {
            for b in 0..self.inputs.n_blocks() {
                let block = self.inputs.block(row, b);
                let start = row * width + b * FACTORS;
                let range = start..start + block.gate.len();
                let d_h = &self.d_h[range.clone()];
                let d_gate = &mut self.d_gate[range.clone()];
                let mut d_up = self.d_up.as_deref_mut().map(|d_up| &mut d_up[range]);
                for i in 0..d_h.len().div_ceil(LANES) {
                    let (gate, up, kept) = block.vectors(s, i);
                    let d = s.mul(load::<S, T>(s, d_h, i), kept);
                    let (value, slope) = activate(s, self.inputs.activation, gate);
                    store::<S, T>(s, s.mul(s.mul(d, up), slope), d_gate, i);
                    if let Some(d_up) = &mut d_up {
                        store::<S, T>(s, s.mul(d, value), d_up, i);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::Backend,
            testing::{
                Random, SIZES, activation, assert_close, dropout_of, each_cpu, same_for_any_threads,
            },
        },
        *,
    };

    const ALL: [Activation; 4] =
        [Activation::Relu, Activation::GeluNew, Activation::Gelu, Activation::Silu];

    /// The definition; `Φ` by its series, which is good for the small arguments here.
    fn value(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Relu => x.max(0.0),
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluNew => {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + u.tanh())
            }
            Activation::Gelu => {
                let (mut term, mut sum) = (x, x);
                for k in 1..200 {
                    term *= x * x / f64::from(2 * k + 1);
                    sum += term;
                }
                x * (0.5 + sum * (-0.5 * x * x).exp() * 0.398_942_280_401_432_7)
            }
        }
    }

    fn slope(activation: Activation, x: f64) -> f64 {
        let h = 1e-5;
        (value(activation, x + h) - value(activation, x - h)) / (2.0 * h)
    }

    #[test]
    fn agrees_with_f64() {
        each_cpu(|cpu| {
            for (case, width) in SIZES.into_iter().chain([200]).enumerate() {
                let act = ALL[case % 4];
                for (tokens, with_up, p) in [
                    (0, true, 0.0),
                    (1, true, 0.0),
                    (5, false, 0.0),
                    (3, true, 0.4),
                    (3, false, 0.4),
                ] {
                    let mut random = Random::new(width as u64);
                    let reals =
                        random.reals(tokens * width).iter().map(|r| 5.0 * r).collect::<Vec<_>>();
                    let gate = cpu.upload(&reals, tokens, width, Precision::Activation);
                    let g = cpu.download(&gate);
                    let (up, u) = activation(cpu, &mut random, tokens, width);
                    let (d_h, d) = activation(cpu, &mut random, tokens, width);
                    let dropout = dropout_of(p, tokens);
                    let args = Gated {
                        gate: &gate,
                        up: with_up.then_some(&up),
                        activation: act,
                        dropout: (p > 0.0).then_some(&dropout),
                    };
                    let h = cpu.gated(&args);
                    let (d_gate, d_up) = cpu.gated_backward(&args, &d_h);
                    let factor = |i: usize| match p > 0.0 {
                        true => f64::from(dropout.factor(i / width, i % width)),
                        false => 1.0,
                    };
                    let up_of = |i: usize| if with_up { u[i] } else { 1.0 };
                    let each = |f: &dyn Fn(usize) -> f64| (0..g.len()).map(f).collect::<Vec<_>>();
                    let bound = |i: usize| 2e-6 * factor(i);
                    let want = each(&|i| value(act, g[i]) * up_of(i) * factor(i));
                    assert_close(cpu, &h, &want, bound);
                    let want = each(&|i| d[i] * up_of(i) * slope(act, g[i]) * factor(i));
                    assert_close(cpu, &d_gate, &want, bound);
                    assert_eq!(d_up.is_some(), with_up);
                    if let Some(d_up) = d_up {
                        let want = each(&|i| d[i] * value(act, g[i]) * factor(i));
                        assert_close(cpu, &d_up, &want, bound);
                    }
                }
            }
        });
    }

    #[test]
    fn threads_change_nothing() {
        same_for_any_threads(|cpu| {
            let mut random = Random::new(6);
            let (gate, _) = activation(cpu, &mut random, 70, 1025);
            let (up, _) = activation(cpu, &mut random, 70, 1025);
            let dropout = dropout_of(0.1, 70);
            let args = Gated {
                gate: &gate,
                up: Some(&up),
                activation: Activation::GeluNew,
                dropout: Some(&dropout),
            };
            let mut all = cpu.download(&cpu.gated(&args));
            let (d_gate, d_up) = cpu.gated_backward(&args, &up);
            all.extend(cpu.download(&d_gate));
            all.extend(cpu.download(&d_up.expect("a gradient of up")));
            all
        });
    }
}
