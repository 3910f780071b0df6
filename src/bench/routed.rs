//! A linear with a routed LoRA beside the frozen linear alone.

use super::{Checked, UNITS, abs, operands, sample_rows, take_rows};
use crate::{
    dtype::Dtype,
    error::Result,
    kernels::{
        Backend, Precision,
        cpu::Cpu,
        ops::{
            Bank, Expand, ExpandRhs, Linear, LinearBackward, LinearBackwardTerm, LoraBackward,
            LoraGradients, LoraTerm, Mix, MixedPair, Noise, Order, Projection, Route, Segments,
            Shrink, Stacked, Unmix, Weighting,
        },
        oracle::Oracle,
    },
    tensor::{Frozen, Tensor},
};

/// Tokens through one adapted linear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoutedShape {
    /// Tokens, an equal share for each task.
    pub rows: usize,
    /// Output features.
    pub d_out: usize,
    /// Input features.
    pub d_in: usize,
    /// Rank.
    pub r: usize,
    /// Skills.
    pub n_skills: usize,
    /// Splits.
    pub n_splits: usize,
    /// Tasks in the batch.
    pub n_tasks: usize,
    /// The frozen weight's type.
    pub weights: Dtype,
}

/// Operands on a backend.
struct Operands<B: Backend> {
    x: Tensor<B>,
    d_y: Tensor<B>,
    weight: B::Weight,
    params: Tensor<B>,
}

impl<B: Backend> Operands<B> {
    fn new(backend: &B, shape: &RoutedShape, weight: &Frozen, map: fn(&[f64]) -> Vec<f64>) -> Self {
        let n = |stream, n| map(&operands(stream, n));
        let n_params = shape.bank().b().end + shape.n_tasks * shape.n_splits * shape.n_skills;
        let (x, d_y) = (n(1, shape.rows * shape.d_in), n(3, shape.rows * shape.d_out));
        Self {
            x: backend.upload(&x, shape.rows, shape.d_in, Precision::Activation),
            d_y: backend.upload(&d_y, shape.rows, shape.d_out, Precision::Activation),
            weight: backend.weight(weight),
            params: backend.upload(&n(4, n_params), 1, n_params, Precision::Full),
        }
    }
}

impl RoutedShape {
    /// Floating point operations of the frozen linear, and bytes of its weight.
    pub fn frozen_work(&self) -> [f64; 2] {
        let n = self.d_out as f64 * self.d_in as f64;
        [2.0 * self.rows as f64 * n, n * self.weights.size_bytes() as f64]
    }

    /// With the tokens through their tasks' pairs, and the bytes of these: two products more.
    pub fn routed_work(&self) -> [f64; 2] {
        let [flops, bytes] = self.frozen_work();
        let width = self.pair_elements();
        [flops + 2.0 * self.rows as f64 * width, bytes + 4.0 * self.n_tasks as f64 * width]
    }

    /// [`RoutedShape::frozen_work`] of a forward and its backward.
    pub fn frozen_step_work(&self) -> [f64; 2] {
        self.frozen_work().map(|work| 2.0 * work)
    }

    /// With the routed LoRA: of the rank, two products of the tokens forward and four backward; of the bank, whose
    /// bytes are read for both, one mixing forward and two backward, for A and B and for the weights.
    pub fn routed_step_work(&self) -> [f64; 2] {
        let [flops, bytes] = self.frozen_step_work();
        let width = self.pair_elements();
        let (rows, n_tasks, n_skills) =
            (self.rows as f64, self.n_tasks as f64, self.n_skills as f64);
        [
            flops + 6.0 * rows * width + 6.0 * n_tasks * n_skills * width,
            bytes + 8.0 * (n_tasks + n_skills) * width,
        ]
    }

    /// Of A and B of a skill, or of a task.
    fn pair_elements(&self) -> f64 {
        ((self.d_in + self.d_out) * self.r) as f64
    }

    fn bank(&self) -> Bank {
        let Self { r, n_skills, n_splits, d_in, d_out, .. } = *self;
        let b_start = n_skills * d_in * r;
        Bank { linear: 0, a_start: 0, b_start, n_splits, n_skills, d_in, d_out, rank: r }
    }

    fn segments(&self) -> Segments {
        let rows: Vec<usize> = (0..self.n_tasks).collect();
        let len = |i: usize| (i + 1) * self.rows / self.n_tasks - i * self.rows / self.n_tasks;
        Segments::new(&rows.iter().map(|&i| len(i)).collect::<Vec<_>>(), &rows, self.n_tasks)
    }

    fn scale(&self) -> f32 {
        1.0 / self.r as f32
    }

    /// Mixing weights of all tasks.
    fn weights<B: Backend>(&self, backend: &B, params: &Tensor<B>) -> Tensor<B> {
        let tasks: Vec<u32> = (0..self.n_tasks as u32).collect();
        let logits = &[self.bank().b().end];
        let (n_splits, n_skills) = (self.n_splits, self.n_skills);
        let route = Route {
            params,
            logits,
            tasks: &tasks,
            n_splits,
            n_skills,
            noise: Noise::Off,
            weighting: Weighting::default(),
        };
        backend.route(&route).weights
    }

    fn mix<B: Backend>(
        &self,
        backend: &B,
        params: &Tensor<B>,
        weights: &Tensor<B>,
    ) -> MixedPair<B> {
        let stacked = Stacked { bank: self.bank(), params, weights };
        backend.mix(Mix { stacked, n_rows: self.n_tasks })
    }

    fn shrink<B: Backend>(&self, backend: &B, on: &Operands<B>, pair: &MixedPair<B>) -> Tensor<B> {
        let (segments, order) = (&self.segments(), Order::Panel);
        let mixed_a = &[&pair.a];
        let shrink = Shrink { x: &on.x, mixed_a, segments, scale: self.scale(), order };
        backend.shrink(shrink).swap_remove(0)
    }

    fn lora_backward<B: Backend>(
        &self,
        backend: &B,
        on: &Operands<B>,
        pair: &MixedPair<B>,
        z: &Tensor<B>,
    ) -> LoraGradients<B> {
        let segments = &self.segments();
        let terms = &[LoraTerm { z, d_y: &on.d_y, mixed_b: &pair.b }];
        let scale = self.scale();
        backend.lora_backward(LoraBackward { x: &on.x, terms, segments, scale }).swap_remove(0)
    }
}

/// A [`RoutedShape`] with operands and a pair mixed for each task.
pub struct RoutedCase<'a> {
    cpu: &'a Cpu,
    shape: RoutedShape,
    frozen: Frozen,
    on: Operands<Cpu>,
    segments: Segments,
    weights: Tensor<Cpu>,
    pair: MixedPair<Cpu>,
    grads: Tensor<Cpu>,
    d_weights: Tensor<Cpu>,
}

impl<'a> RoutedCase<'a> {
    /// Operands for a shape.
    pub fn new(cpu: &'a Cpu, shape: RoutedShape) -> Self {
        let values: Vec<f32> =
            operands(2, shape.d_out * shape.d_in).into_iter().map(|v| v as f32).collect();
        let frozen = Frozen::from_f32(&values, shape.d_out, shape.d_in, shape.weights);
        let on = Operands::new(cpu, &shape, &frozen, <[f64]>::to_vec);
        let weights = shape.weights(cpu, &on.params);
        let pair = shape.mix(cpu, &on.params, &weights);
        let grads = cpu.zeros(1, on.params.cols(), Precision::Full);
        let d_weights = cpu.zeros(weights.rows(), weights.cols(), Precision::Full);
        Self { cpu, shape, frozen, on, segments: shape.segments(), weights, pair, grads, d_weights }
    }

    /// Compares with the oracle: all gradients of the LoRA, some rows of the linear. The largest error
    /// in units of its bound.
    ///
    /// # Errors
    /// If it is above 1.
    pub fn check(&self) -> Result<f64> {
        let Self { cpu, shape, frozen, on, .. } = self;
        let want = Operands::new(&Oracle, shape, frozen, <[f64]>::to_vec);
        let magnitudes: Vec<f32> = frozen.to_f32().iter().map(|v| v.abs()).collect();
        let magnitudes = Frozen::from_f32(&magnitudes, shape.d_out, shape.d_in, Dtype::F32);
        let size = Operands::new(&Oracle, shape, &magnitudes, abs);
        let weights = shape.weights(&Oracle, &want.params);
        let want_pair = shape.mix(&Oracle, &want.params, &weights);
        let size_pair = shape.mix(&Oracle, &size.params, &weights);
        let (got_z, want_z, size_z) = (
            shape.shrink(*cpu, on, &self.pair),
            shape.shrink(&Oracle, &want, &want_pair),
            shape.shrink(&Oracle, &size, &size_pair),
        );
        // What is computed from something rounded inherits its error, relative to its magnitude: 16
        // roundings cover routing, mixing, shrinking.
        let compare = |got: &Tensor<Cpu>, want: &[f64], size: &[f64], what: &str| {
            let magnitude: Vec<f64> = size.iter().map(|v| 4.0 * v).collect();
            let got = cpu.download(got);
            let checked =
                Checked { got: &got, want, magnitude: &magnitude, dtype: Dtype::F32, units: UNITS };
            checked.worst(&format!("{what} of {shape:?}"))
        };
        let mut worst = compare(&got_z, &want_z.buffer, &size_z.buffer, "z")?;
        let got = shape.lora_backward(*cpu, on, &self.pair, &got_z);
        let want_grads = shape.lora_backward(&Oracle, &want, &want_pair, &want_z);
        let size_grads = shape.lora_backward(&Oracle, &size, &size_pair, &size_z);
        for (got, want, size, what) in [
            (&got.d_z, &want_grads.d_z, &size_grads.d_z, "d_z"),
            (&got.d_a, &want_grads.d_a, &size_grads.d_a, "d_A"),
            (&got.d_b, &want_grads.d_b, &size_grads.d_b, "d_B"),
        ] {
            worst = worst.max(compare(got, &want.buffer, &size.buffer, what)?);
        }

        // The linear, row by row: a token has its task's pair.
        let rows = sample_rows(shape.rows);
        let output = self.linear(&got_z);
        let got = take_rows(&cpu.download(&output), shape.d_out, &rows);
        let some = |on: &Operands<Oracle>, pair: &MixedPair<Oracle>, z: &Tensor<Oracle>| {
            let x = take_rows(&on.x.buffer, shape.d_in, &rows);
            let z = take_rows(&z.buffer, shape.r, &rows);
            let x = Oracle.upload(&x, rows.len(), shape.d_in, Precision::Activation);
            let z = Oracle.upload(&z, rows.len(), shape.r, Precision::Full);
            let of_row: Vec<usize> = rows
                .iter()
                .map(|&row| {
                    self.segments.iter().find(|(run, _)| run.contains(&row)).map_or(0, |s| s.1)
                })
                .collect();
            let segments = Segments::new(&vec![1; rows.len()], &of_row, shape.n_tasks);
            Oracle.download(&linear(&Oracle, &x, &on.weight, &z, &segments, pair))
        };
        let want = some(&want, &want_pair, &want_z);
        let magnitude: Vec<f64> =
            some(&size, &size_pair, &size_z).iter().map(|v| 4.0 * v).collect();
        let checked = Checked {
            got: &got,
            want: &want,
            magnitude: &magnitude,
            dtype: output.dtype(),
            units: UNITS,
        };
        Ok(worst.max(checked.worst(&format!("y of {shape:?}"))?))
    }

    fn linear(&self, z: &Tensor<Cpu>) -> Tensor<Cpu> {
        linear(self.cpu, &self.on.x, &self.on.weight, z, &self.segments, &self.pair)
    }

    /// The frozen linear alone.
    pub fn run_frozen(&self) {
        self.cpu.scope(|| {
            let projections = &[Projection::plain(&self.on.weight)];
            let (order, output) = (Order::Panel, Precision::Activation);
            self.cpu.linear(Linear { x: &self.on.x, projections, order, output });
        });
    }

    /// The same with the routed LoRA, its pairs mixed before: an evaluation.
    pub fn run_routed(&self) {
        self.cpu.scope(|| {
            let z = self.shape.shrink(self.cpu, &self.on, &self.pair);
            self.linear(&z);
        });
    }

    /// The frozen linear forward and backward.
    pub fn run_frozen_step(&self) {
        self.run_frozen();
        self.cpu.scope(|| {
            let terms =
                &[LinearBackwardTerm { d_y: &self.on.d_y, weight: &self.on.weight, lora: None }];
            self.cpu.linear_backward(LinearBackward { terms, d_residual: None });
        });
    }

    /// The same with the routed LoRA, mixing and the gradients of the bank: a training step.
    pub fn run_routed_step(&mut self) {
        let (cpu, shape) = (self.cpu, self.shape);
        cpu.scope(|| {
            let pair = shape.mix(cpu, &self.on.params, &self.weights);
            let z = shape.shrink(cpu, &self.on, &pair);
            self.linear(&z);
            let gradients = shape.lora_backward(cpu, &self.on, &pair, &z);
            let terms = &[LinearBackwardTerm {
                d_y: &self.on.d_y,
                weight: &self.on.weight,
                lora: Some((&gradients.d_z, &pair.a, &self.segments)),
            }];
            cpu.linear_backward(LinearBackward { terms, d_residual: None });
            cpu.unmix(Unmix {
                stacked: Stacked {
                    bank: shape.bank(),
                    params: &self.on.params,
                    weights: &self.weights,
                },
                d_a: &gradients.d_a,
                d_b: &gradients.d_b,
                grads: &mut self.grads,
                d_weights: &mut self.d_weights,
            });
        });
    }
}

fn linear<B: Backend>(
    backend: &B,
    x: &Tensor<B>,
    weight: &B::Weight,
    z: &Tensor<B>,
    segments: &Segments,
    pair: &MixedPair<B>,
) -> Tensor<B> {
    let lora = Some(Expand { z, segments, rhs: ExpandRhs::Mixed(&pair.b) });
    let projections = &[Projection { lora, ..Projection::plain(weight) }];
    let (order, output) = (Order::Panel, Precision::Activation);
    backend.linear(Linear { x, projections, order, output }).swap_remove(0)
}
