//! A routed linear inside a model of one's own, through the tape.
//!
//!     cargo run --release --example routed_linear
//!
//! ```text
//! features ─ routed linear ─ relu ─ head ─> class        y = x·Wᵀ + (1/r) x·Â·B̂
//! ```
//!
//! W and the head are frozen and random. Two tasks sort the same points into two classes, but the
//! other way round: no one linear can do both, a bank of two skills with a row of the router for each
//! task can. Everything that learns is one flat vector: A, B, router logits.

use std::sync::Arc;

use polytape::{
    Dtype, Result,
    activation::Activation,
    kernels::{
        Backend, Precision,
        cpu::Cpu,
        ops::{
            AdamW, Bank, GradScale, Noise, ParamGroup, Route, RouteBackward, Segments, Weighting,
        },
        philox::{Key, Purpose},
    },
    tape::{
        Adapted, Gradients, Mixture, Tape, Var,
        ops::{FrozenLinear, HeadSpec, LinearSpec},
    },
    tensor::Frozen,
};

const N_FEATURES: usize = 16;
const N_HIDDEN: usize = 32;
const N_CLASSES: usize = 2;
const N_POINTS: usize = 64; // Of each task.
const N_TASKS: usize = 2;
const N_SKILLS: usize = 2;
const N_SPLITS: usize = 2;
const RANK: usize = 4;

fn main() -> Result<()> {
    let cpu = Cpu::new(Dtype::F32, 0)?;
    let random = Random { key: Key::new(7, Purpose::Init, 0) };

    // The model: frozen weights, where a real one would have a mapped file.
    let frozen = |stream, rows, cols| {
        let bound = (cols as f64).powf(-0.5);
        let values: Vec<f32> =
            random.uniform(stream, rows * cols, bound).into_iter().map(|v| v as f32).collect();
        cpu.weight(&Frozen::from_f32(&values, rows, cols, Dtype::F32))
    };
    let linear = FrozenLinear { weight: frozen(0, N_HIDDEN, N_FEATURES), bias: None, index: 0 };
    let head = frozen(1, N_CLASSES, N_HIDDEN);

    // The adapter: where everything lies in the flat vector, and how it begins (B as zeros).
    let mut bank = Bank {
        linear: 0,
        a_start: 0,
        b_start: 0,
        n_splits: N_SPLITS,
        n_skills: N_SKILLS,
        d_in: N_FEATURES,
        d_out: N_HIDDEN,
        rank: RANK,
    };
    bank.b_start = bank.a().end;
    let (banks, logits) = ([Some(bank)], [bank.b().end]);
    let n_logits = N_TASKS * N_SPLITS * N_SKILLS;
    let n_params = bank.b().end + n_logits;
    let mut values = random.uniform(2, bank.a_len(), (N_FEATURES as f64 / 2.0).powf(-0.5));
    values.resize(bank.b().end, 0.0);
    values.extend(random.uniform(3, n_logits, 1e-3));
    let mut params = cpu.upload(&values, 1, n_params, Precision::Full);
    let zeros = || cpu.zeros(1, n_params, Precision::Full);
    let (mut m, mut v) = (zeros(), zeros());

    // The points, once for each task; a segment is a task's run of tokens.
    let points = random.uniform(4, N_POINTS * N_FEATURES, 1.0);
    let is_first = |point: &[f64]| point[0] + point[1] > 0.0;
    let class = |task: usize, point: &[f64]| u32::from(is_first(point) == (task == 0));
    let of_task = |task| points.chunks(N_FEATURES).map(move |point| class(task, point));
    let labels: Vec<u32> = (0..N_TASKS).flat_map(of_task).collect();
    let inputs = points.repeat(N_TASKS);
    let inputs = cpu.upload(&inputs, N_TASKS * N_POINTS, N_FEATURES, Precision::Activation);
    let segments = Arc::new(Segments::new(&[N_POINTS; N_TASKS], &[0, 1], N_TASKS));

    for step in 1..=200 {
        // The mixing weights of both tasks; a router that samples would have a row for each example.
        let route = Route {
            params: &params,
            logits: &logits,
            tasks: &[0, 1],
            n_splits: N_SPLITS,
            n_skills: N_SKILLS,
            noise: Noise::Off,
            weighting: Weighting::default(),
        };
        let mixture = Mixture { routing: cpu.route(&route), n_rows: N_TASKS, pairs: None };

        // Forward: the tape finds the bank by the linear's index.
        let adapted = Adapted { params: &params, banks: &banks, mixture: &mixture, mode: None };
        let mut tape = Tape::recording(&cpu, Some(adapted));
        let x = Var::constant(inputs.clone());
        let spec = LinearSpec { residual: None, dropout: None, full_precision: false };
        let hidden = tape.linear(&x, &linear, &segments, spec);
        let hidden = tape.gated(hidden, None, Activation::Relu, None);
        let d_nll = 1.0 / labels.len() as f32;
        let nll =
            tape.head_loss(&hidden, HeadSpec { weight: &head, labels: &labels, scale: 1.0, d_nll });

        // Backward: into A and B, then from the mixing weights into the router.
        let weights = cpu.zeros(N_TASKS, N_SPLITS * N_SKILLS, Precision::Full);
        let mut gradients = Gradients { params: zeros(), weights };
        tape.backward(Vec::new(), &mut gradients);
        cpu.route_backward(RouteBackward {
            forward: &route,
            routing: &mixture.routing,
            d_weights: &gradients.weights,
            grads: &mut gradients.params,
        });

        // The two speeds of the papers: the router learns faster than the skills.
        let group = |range, lr| ParamGroup { range, lr, weight_decay: 0.0 };
        cpu.adamw(AdamW {
            params: &mut params,
            m: &mut m,
            v: &mut v,
            grads: &gradients.params,
            groups: &[group(0..bank.b().end, 2e-2), group(bank.b().end..n_params, 1e-1)],
            grad_scale: GradScale::Given(1.0),
            step,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        });
        if step == 1 || step % 50 == 0 {
            println!("step {step} loss {:.4}", nll.iter().sum::<f64>() / nll.len() as f64);
        }
    }
    Ok(())
}

/// Uniform numbers by the engine's own counter-based generator.
struct Random {
    key: Key,
}

impl Random {
    /// `n` numbers in ±`bound`, of one of many streams.
    fn uniform(&self, stream: u64, n: usize, bound: f64) -> Vec<f64> {
        let draw = |i: usize| f64::from(self.key.uniform((stream << 32) + i as u64));
        (0..n).map(|i| (2.0 * draw(i) - 1.0) * bound).collect()
    }
}
