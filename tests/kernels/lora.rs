//! The routed LoRA: router, mixing, thin products, and their gradients.

use polytape::{
    kernels::{Backend, ops, ops::Bank, oracle::Oracle, philox::Purpose},
    weighting::Weighting,
};

use super::{
    common::{
        Batch, Case, Class, Cut, Gen, Inputs, Loaded, Op, Output, SPECIALS, SPECIALS_FINITE, U,
        check,
    },
    dense::activations,
};

/// A bank somewhere in a flat vector, of one of two linears.
pub fn bank(random: &mut Gen, n_splits: usize, d_in: usize, d_out: usize, rank: usize) -> Bank {
    let (linear, n_skills) = (random.below(2), 1 + random.below(5));
    let mut bank = Bank {
        linear,
        a_start: random.below(40),
        b_start: 0,
        n_splits,
        n_skills,
        d_in,
        d_out,
        rank,
    };
    bank.b_start = bank.a().end + random.below(3);
    bank
}

/// A bank of any shape.
fn any_bank(random: &mut Gen) -> Bank {
    let n_splits = random.pick(&[1, 2, 4]);
    let size = |random: &mut Gen| n_splits * random.size(257 / n_splits);
    let (d_in, d_out, rank) = (size(random), size(random), random.size(17));
    bank(random, n_splits, d_in, d_out, rank)
}

/// All parameters, and the mixing weights.
pub fn stacked(random: &mut Gen, class: Class, bank: &Bank, n_rows: usize, inputs: &mut Inputs) {
    let n_params = bank.b().end + random.below(9);
    inputs.full(1, n_params, random.values(class, n_params, true));
    let (rows, cols) = (2 * n_rows, bank.n_splits * bank.n_skills);
    inputs.full(rows, cols, random.values(class, rows * cols, true));
}

#[derive(Debug)]
pub struct Shrink {
    pub scale: f32,
    pub order: ops::Order,
}

impl Op for Shrink {
    const CUT: Cut = Cut::Token;

    fn splits_operands(&self) -> bool {
        true
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let mixed_a: Vec<_> = inputs.t[1..].iter().collect();
        let (x, segments) = (&inputs.t[0], &batch.segments());
        let &Self { scale, order } = self;
        let z = backend.shrink(ops::Shrink { x, mixed_a: &mixed_a, segments, scale, order });
        assert_eq!(z.len(), mixed_a.len());
        z.iter().map(|z| Output::tokens(backend, "z", z)).collect()
    }
}

pub fn shrink(random: &mut Gen, class: Class, batch: Batch) -> Case<Shrink> {
    let (d_in, rank, n) = (random.size(257), random.size(33), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d_in, activations(random, class, n * d_in, &SPECIALS));
    for _ in 0..1 + random.below(3) {
        let mut values = random.values(class, batch.n_rows * d_in * rank, true);
        if class == Class::Special {
            random.plant(&mut values, &SPECIALS);
        }
        inputs.full(batch.n_rows * d_in, rank, values);
    }
    let order = random.pick(&[ops::Order::Panel, ops::Order::Dot]);
    Case { class, batch, inputs, op: Shrink { scale: random.pick(&[1.0, 0.25]), order } }
}

#[test]
fn shrinks() {
    check("shrink", shrink);
}

#[derive(Debug)]
pub struct ShrinkStacked {
    bank: Bank,
    scale: f32,
}

impl Op for ShrinkStacked {
    const CUT: Cut = Cut::Token;

    fn splits_operands(&self) -> bool {
        true
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [x, params, weights] = &inputs.t[..] else { unreachable!() };
        let stacked = ops::Stacked { bank: self.bank, params, weights };
        let (segments, scale) = (&batch.segments(), self.scale);
        let z = backend.shrink_stacked(ops::ShrinkStacked { x, stacked, segments, scale });
        vec![Output::tokens(backend, "z", &z)]
    }
}

pub fn shrink_stacked(random: &mut Gen, class: Class, batch: Batch) -> Case<ShrinkStacked> {
    let (bank, n) = (any_bank(random), batch.n_tokens());
    let mut inputs = Inputs::default();
    // No infinities: whether the skills or the features are added up first is left open.
    inputs.tokens(&batch, bank.d_in, activations(random, class, n * bank.d_in, &SPECIALS_FINITE));
    stacked(random, class, &bank, batch.n_rows, &mut inputs);
    Case { class, batch, inputs, op: ShrinkStacked { bank, scale: random.pick(&[1.0, 0.25]) } }
}

#[test]
fn shrinks_from_the_bank() {
    check("shrink_stacked", shrink_stacked);
}

#[derive(Debug)]
pub struct Mix {
    pub bank: Bank,
}

impl Op for Mix {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, weights] = &inputs.t[..] else { unreachable!() };
        let stacked = ops::Stacked { bank: self.bank, params, weights };
        let ops::MixedPair { a, b } = backend.mix(ops::Mix { stacked, n_rows: batch.n_rows });
        vec![Output::whole(backend, "a", &a), Output::whole(backend, "b", &b)]
    }
}

pub fn mix(random: &mut Gen, class: Class, batch: Batch) -> Case<Mix> {
    let bank = any_bank(random);
    let mut inputs = Inputs::default();
    stacked(random, class, &bank, batch.n_rows, &mut inputs);
    if class == Class::Special {
        random.plant(&mut inputs.tensors[0].values, &SPECIALS);
    }
    Case { class, batch, inputs, op: Mix { bank } }
}

#[test]
fn mixes() {
    check("mix", mix);
}

/// Several linears at once, beside one after the other.
#[derive(Debug)]
pub struct MixEach {
    banks: Vec<Bank>,
}

/// Up to six banks of one rank, of as many linears, in a flat vector.
fn banks(random: &mut Gen) -> (Vec<Bank>, usize) {
    let (n_splits, n_skills) = (random.pick(&[1, 2, 4]), 1 + random.below(5));
    let (n_linears, mut at) = (1 + random.below(6), random.below(9));
    let bank = |linear| {
        let size = |random: &mut Gen| n_splits * random.size(65 / n_splits);
        let (a_start, d_in, d_out, rank) = (at, size(random), size(random), random.size(9));
        let mut bank = Bank { linear, a_start, b_start: 0, n_splits, n_skills, d_in, d_out, rank };
        bank.b_start = bank.a().end + random.below(3);
        at = bank.b().end + random.below(3);
        bank
    };
    let banks = (0..n_linears).map(bank).collect();
    (banks, at)
}

impl Op for MixEach {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, weights] = &inputs.t[..] else { unreachable!() };
        let n_rows = batch.n_rows;
        let mix = |&bank| ops::Mix { stacked: ops::Stacked { bank, params, weights }, n_rows };
        let pairs = backend.mix_each(&self.banks.iter().map(mix).collect::<Vec<_>>());
        let outputs = |pair: &ops::MixedPair<B>| {
            [Output::whole(backend, "a", &pair.a), Output::whole(backend, "b", &pair.b)]
        };
        pairs.iter().flat_map(outputs).collect()
    }
}

pub fn mix_each(random: &mut Gen, class: Class, batch: Batch) -> Case<MixEach> {
    let (banks, n_params) = banks(random);
    let mut inputs = Inputs::default();
    inputs.full(1, n_params, random.values(class, n_params, true));
    let (rows, cols) = (banks.len() * batch.n_rows, banks[0].n_splits * banks[0].n_skills);
    inputs.full(rows, cols, random.values(class, rows * cols, true));
    Case { class, batch, inputs, op: MixEach { banks } }
}

#[test]
fn mixes_several() {
    check("mix_each", mix_each);
}

#[derive(Debug)]
pub struct LoraBackward {
    scale: f32,
}

impl Op for LoraBackward {
    const CUT: Cut = Cut::Token;

    fn splits_operands(&self) -> bool {
        true
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let (x, rest) = inputs.t.split_first().unwrap();
        let chunks = rest.as_chunks().0.iter();
        let terms: Vec<_> =
            chunks.map(|[z, d_y, mixed_b]| ops::LoraTerm { z, d_y, mixed_b }).collect();
        let (segments, scale) = (&batch.segments(), self.scale);
        let args = ops::LoraBackward { x, terms: &terms, segments, scale };
        let outputs = |gradients: ops::LoraGradients<B>| {
            let ops::LoraGradients { d_z, d_a, d_b } = gradients;
            [
                Output::tokens(backend, "d_z", &d_z),
                Output::whole(backend, "d_a", &d_a),
                Output::whole(backend, "d_b", &d_b),
            ]
        };
        backend.lora_backward(args).into_iter().flat_map(outputs).collect()
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, _: &[Output]) -> Vec<Vec<f64>> {
        // `d_a` is made of `d_z`, which has the same relative error.
        let sizes = self.run(&Oracle, batch, &inputs.abs().load(&Oracle));
        let bound = |size: Output| size.values.iter().map(|v| 12.0 * U * v).collect();
        sizes.into_iter().map(bound).collect()
    }
}

pub fn lora_backward(random: &mut Gen, class: Class, batch: Batch) -> Case<LoraBackward> {
    let (d_in, rank, n) = (random.size(257), random.size(17), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d_in, activations(random, class, n * d_in, &SPECIALS));
    for _ in 0..1 + random.below(3) {
        let d_out = random.size(257);
        inputs.tokens_full(&batch, rank, random.values(class, n * rank, false));
        inputs.tokens(&batch, d_out, activations(random, class, n * d_out, &SPECIALS));
        let values = random.values(class, batch.n_rows * rank * d_out, true);
        inputs.full(batch.n_rows * rank, d_out, values);
    }
    Case { class, batch, inputs, op: LoraBackward { scale: random.pick(&[1.0, 0.5]) } }
}

#[test]
fn lora_gradients() {
    check("lora_backward", lora_backward);
}

#[derive(Debug)]
pub struct Unmix {
    bank: Bank,
}

impl Op for Unmix {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, weights, d_a, d_b, grads, d_weights] = &inputs.t[..] else { unreachable!() };
        let (mut grads, mut d_weights) = (backend.copy(grads), backend.copy(d_weights));
        backend.unmix(ops::Unmix {
            stacked: ops::Stacked { bank: self.bank, params, weights },
            d_a,
            d_b,
            grads: &mut grads,
            d_weights: &mut d_weights,
        });
        vec![
            Output::whole(backend, "grads", &grads),
            Output::whole(backend, "d_weights", &d_weights),
        ]
    }
}

pub fn unmix(random: &mut Gen, class: Class, batch: Batch) -> Case<Unmix> {
    let bank = any_bank(random);
    let mut inputs = Inputs::default();
    stacked(random, class, &bank, batch.n_rows, &mut inputs);
    let (a_rows, b_rows) = (batch.n_rows * bank.d_in, batch.n_rows * bank.rank);
    inputs.full(a_rows, bank.rank, activations(random, class, a_rows * bank.rank, &SPECIALS));
    inputs.full(b_rows, bank.d_out, random.values(class, b_rows * bank.d_out, false));
    for like in 0..2 {
        let (rows, cols) = (inputs.tensors[like].rows, inputs.tensors[like].cols);
        inputs.full(rows, cols, random.values(class, rows * cols, false));
    }
    Case { class, batch, inputs, op: Unmix { bank } }
}

#[test]
fn unmixes() {
    check("unmix", unmix);
}

#[derive(Debug)]
pub struct UnmixEach {
    banks: Vec<Bank>,
}

impl Op for UnmixEach {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, weights, grads, d_weights, pairs @ ..] = &inputs.t[..] else { unreachable!() };
        let (mut grads, mut d_weights) = (backend.copy(grads), backend.copy(d_weights));
        let terms = self.banks.iter().zip(pairs.as_chunks().0).map(|(&bank, [d_a, d_b])| {
            ops::UnmixTerm { stacked: ops::Stacked { bank, params, weights }, d_a, d_b }
        });
        let terms: Vec<_> = terms.collect();
        let (grads_mut, d_weights_mut) = (&mut grads, &mut d_weights);
        backend.unmix_each(ops::UnmixEach {
            terms: &terms,
            grads: grads_mut,
            d_weights: d_weights_mut,
        });
        vec![
            Output::whole(backend, "grads", &grads),
            Output::whole(backend, "d_weights", &d_weights),
        ]
    }
}

pub fn unmix_each(random: &mut Gen, class: Class, batch: Batch) -> Case<UnmixEach> {
    let (banks, n_params) = banks(random);
    let mut inputs = Inputs::default();
    let (rows, cols) = (banks.len() * batch.n_rows, banks[0].n_splits * banks[0].n_skills);
    for _ in 0..2 {
        inputs.full(1, n_params, random.values(class, n_params, true));
        inputs.full(rows, cols, random.values(class, rows * cols, true));
    }
    for bank in &banks {
        let (a_rows, b_rows) = (batch.n_rows * bank.d_in, batch.n_rows * bank.rank);
        inputs.full(a_rows, bank.rank, random.values(class, a_rows * bank.rank, true));
        inputs.full(b_rows, bank.d_out, random.values(class, b_rows * bank.d_out, false));
    }
    Case { class, batch, inputs, op: UnmixEach { banks } }
}

#[test]
fn unmixes_several() {
    check("unmix_each", unmix_each);
}

#[derive(Debug)]
pub struct Route {
    pub logits: Vec<usize>,
    pub tasks: Vec<u32>,
    pub n_splits: usize,
    pub n_skills: usize,
    pub noise: Noise,
    pub weighting: Weighting,
}

#[derive(Debug)]
pub enum Noise {
    Off,
    Philox(Vec<u32>),
    Given(Vec<f64>),
}

impl Route {
    fn args<'a, B: Backend>(
        &'a self,
        params: &'a polytape::tensor::Tensor<B>,
    ) -> ops::Route<'a, B> {
        let key = ops::Key::new(11, Purpose::Router, 5);
        let noise = match &self.noise {
            Noise::Off => ops::Noise::Off,
            Noise::Philox(examples) => ops::Noise::Philox { key, examples },
            Noise::Given(draws) => ops::Noise::Given(draws),
        };
        let &Self { ref logits, ref tasks, n_splits, n_skills, weighting, .. } = self;
        ops::Route { params, logits, tasks, n_splits, n_skills, noise, weighting }
    }

    fn n_at(&self) -> usize {
        self.logits.len() * self.tasks.len()
    }

    fn n_cols(&self) -> usize {
        self.n_splits * self.n_skills
    }

    /// The place of a logit in the flat vector.
    fn place(&self, at: usize, c: usize) -> usize {
        let (linear, row) = (at / self.tasks.len(), at % self.tasks.len());
        self.logits[linear] + self.tasks[row] as usize * self.n_cols() + c
    }
}

impl Op for Route {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let ops::Routing { weights, samples } = backend.route(&self.args(&inputs.t[0]));
        vec![
            Output::whole(backend, "weights", &weights),
            Output::whole(backend, "samples", &samples),
        ]
    }

    fn tolerance(&self, _: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        let samples = &expected[1].values;
        let sample_error = |i: usize| {
            let (at, c) = (i / self.n_cols(), i % self.n_cols());
            let z = inputs.tensors[0].values[self.place(at, c)];
            if matches!(self.noise, Noise::Off) {
                return 8.0 * U * samples[i];
            }
            // The sample is σ of a sum of four logarithms. In f32, `1 - p` has no more digits than
            // `p` left it, here as in PyTorch. What the draw was follows from the sample.
            let p = (1.0 / (1.0 + (-z).exp())).clamp(2.0 * U, 1.0 - 2.0 * U);
            let logit_p = (p / (1.0 - p)).ln();
            let logit_u = (samples[i] / (1.0 - samples[i])).ln() - logit_p;
            let logarithms = (logit_p.abs() + 1.0) + (logit_u.abs() + 1.0);
            let error = 6.0 * U * logarithms + 2.0 * U / (1.0 - p);
            samples[i] * (error.exp_m1() * (1.0 - samples[i]) + 6.0 * U)
        };
        let errors: Vec<_> = (0..samples.len()).map(sample_error).collect();
        let over_split = |of: &[f64], i: usize| {
            let first = i / self.n_skills * self.n_skills;
            of[first..first + self.n_skills].iter().sum::<f64>()
        };
        let factor = self.weighting.factor(self.n_splits, self.n_skills);
        let values: Vec<_> = samples.iter().map(|&s| self.weighting.value(s)).collect();
        // Rounded, a value is right or, where its sample is as near to 1/2 as it may be wrong, anything.
        let value_error = |i: usize| match self.weighting.straight_through {
            true if (samples[i] - 0.5).abs() <= errors[i] => 1.0,
            true => 0.0,
            false => errors[i],
        };
        let value_errors: Vec<_> = (0..samples.len()).map(value_error).collect();
        let weight_error = |i: usize| {
            if let Some(factor) = factor {
                return factor * (value_errors[i] + 6.0 * U * values[i]);
            }
            let normalizer = self.weighting.normalizer(over_split(&values, i));
            let weight = values[i] / normalizer;
            (value_errors[i] + weight * over_split(&value_errors, i)) / normalizer
                + 6.0 * U * weight
        };
        vec![(0..samples.len()).map(weight_error).collect(), errors]
    }
}

/// A router, its logits, and its routing rows.
fn router(random: &mut Gen, class: Class, inputs: &mut Inputs) -> Route {
    let (n_tasks, n_splits, n_skills) =
        (1 + random.below(9), random.pick(&[1, 2, 4]), 1 + random.below(9));
    let n_rows = 1 + random.below(20);
    let len = n_tasks * n_splits * n_skills;
    // Linears of a sub-layer, a block or the whole model may share a router.
    let n_linears = 1 + random.below(6);
    let n_routers = 1 + random.below(n_linears);
    let router_of = |i| if i < n_routers { i } else { random.below(n_routers) };
    let logits: Vec<_> = (0..n_linears).map(router_of).map(|i| 5 + i * (len + 3)).collect();
    let tasks: Vec<_> = (0..n_rows).map(|_| random.below(n_tasks) as u32).collect();
    let n_params = logits.iter().max().unwrap() + len;
    let values = activations(random, class, n_params, &SPECIALS_FINITE[..5]).into_iter();
    // Far from where a clamp begins to cut (|z| = 15.9), or well beyond.
    let mut values: Vec<_> = values
        .map(|v| if class == Class::Uniform { 8.0 * v } else { v.clamp(-9.0, 9.0) })
        .collect();
    if class != Class::Special {
        random.plant(&mut values, &[20.0, -20.0, -28.0, -120.0, 100.0, 0.0]);
    }
    // A split whose samples are all of the size of the epsilon beside their sum: no noise does that.
    let is_small = class != Class::Special && random.below(2) == 0;
    if is_small {
        let task = random.pick(&tasks) as usize;
        let split = task * n_splits + random.below(n_splits);
        let first = random.pick(&logits) + split * n_skills;
        for value in &mut values[first..first + n_skills] {
            *value = -28.0 + 0.25 * value.clamp(-4.0, 4.0);
        }
    }
    inputs.full(1, n_params, values);
    let n_draws = logits.len() * n_rows * n_splits * n_skills;
    let noise = match random.below(3) {
        _ if is_small => Noise::Off,
        0 => Noise::Off,
        1 => Noise::Philox((0..n_rows).map(|_| random.word() as u32).collect()),
        _ => {
            let mut draws: Vec<_> = (0..n_draws).map(|_| random.unit()).collect();
            random.plant(&mut draws, &[0.0, 0.5, 1.0 - U]);
            Noise::Given(draws)
        }
    };
    let weighting = random.pick(&[
        Weighting::default(),
        Weighting { straight_through: true, ..Weighting::default() },
        Weighting { average_correction: true, ..Weighting::default() },
        Weighting { straight_through: true, average_correction: true },
    ]);
    Route { logits, tasks, n_splits, n_skills, noise, weighting }
}

pub fn route(random: &mut Gen, class: Class, batch: Batch) -> Case<Route> {
    let (class, mut inputs) = (class.inexact(), Inputs::default());
    let op = router(random, class, &mut inputs);
    Case { class, batch, inputs, op }
}

#[test]
fn routes() {
    check("route", route);
}

#[derive(Debug)]
pub struct RouteBackward(Route);

impl Op for RouteBackward {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, weights, samples, d_weights, grads] = &inputs.t[..] else { unreachable!() };
        let mut grads = backend.copy(grads);
        backend.route_backward(ops::RouteBackward {
            forward: &self.0.args(params),
            routing: &ops::Routing { weights: weights.clone(), samples: samples.clone() },
            d_weights,
            grads: &mut grads,
        });
        vec![Output::whole(backend, "grads", &grads)]
    }

    fn tolerance(&self, _: &Batch, inputs: &Inputs, _: &[Output]) -> Vec<Vec<f64>> {
        let [_, weights, samples, d_weights, grads] = &inputs.tensors[..] else { unreachable!() };
        let route = &self.0;
        let mut bounds: Vec<_> = grads.values.iter().map(|v| 6.0 * U * v.abs()).collect();
        for (at, c) in (0..route.n_at()).flat_map(|at| (0..route.n_cols()).map(move |c| (at, c))) {
            let first = c / route.n_skills * route.n_skills;
            let over = |term: &dyn Fn(usize) -> f64| -> f64 {
                (first..first + route.n_skills).map(term).sum()
            };
            let inner = over(&|s| (weights.at(at, s) * d_weights.at(at, s)).abs());
            let sum = over(&|s| route.weighting.value(samples.at(at, s)));
            let d_sample = match route.weighting.factor(route.n_splits, route.n_skills) {
                Some(factor) => d_weights.at(at, c).abs() * factor,
                None => (d_weights.at(at, c).abs() + inner) / route.weighting.normalizer(sum),
            };
            let s = samples.at(at, c);
            // A sample that a clamp cut and one that rounding put there look the same.
            let at_clamp = if s >= 1.0 - 8.0 * U { 16.0 * U * s } else { 0.0 };
            bounds[route.place(at, c)] += d_sample * (12.0 * U * s * (1.0 - s) + at_clamp);
        }
        vec![bounds]
    }
}

pub fn route_backward(random: &mut Gen, class: Class, batch: Batch) -> Case<RouteBackward> {
    let (class, mut inputs) = (class.inexact(), Inputs::default());
    let route = router(random, class.finite(), &mut inputs);
    let loaded = inputs.load(&Oracle);
    let routing = Oracle.route(&route.args(&loaded.t[0]));
    let (rows, cols) = (route.n_at(), route.n_cols());
    inputs.full(rows, cols, Oracle.download(&routing.weights));
    inputs.full(rows, cols, Oracle.download(&routing.samples));
    inputs.full(rows, cols, activations(random, class, rows * cols, &SPECIALS_FINITE));
    let n_params = inputs.tensors[0].cols;
    inputs.full(1, n_params, random.values(class, n_params, false));
    Case { class, batch, inputs, op: RouteBackward(route) }
}

#[test]
fn routes_backward() {
    check("route_backward", route_backward);
}
