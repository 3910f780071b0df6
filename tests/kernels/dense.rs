//! Embedding, norm, linears, gated products, element-wise operations, the head, and the optimiser.

use std::ops::Range;

use polytape::{
    dtype::Dtype,
    kernels::{
        Backend, Precision, ops,
        ops::{Activation, SamplingRules},
        oracle::Oracle,
    },
    tensor::Tensor,
};

use super::common::{
    Batch, Case, Class, Cut, Gen, Inputs, Loaded, Op, Output, SPECIALS, SPECIALS_FINITE, U, check,
};

/// Activations of a class, with special values planted in the special class.
pub fn activations(random: &mut Gen, class: Class, n: usize, specials: &[f64]) -> Vec<f64> {
    let mut values = random.values(class, n, false);
    if class == Class::Special {
        random.plant(&mut values, specials);
    }
    values
}

#[derive(Debug)]
pub struct Linear {
    projections: Vec<Projection>,
    order: ops::Order,
    output: Precision,
}

impl Linear {
    /// A frozen linear and nothing else.
    pub fn plain() -> Self {
        let projection = Projection { bias: false, lora: None, dropout: None, residual: false };
        let (order, output) = (ops::Order::Panel, Precision::Activation);
        Self { projections: vec![projection], order, output }
    }
}

#[derive(Debug)]
struct Projection {
    bias: bool,
    lora: Option<Lora>,
    dropout: Option<f32>,
    residual: bool,
}

#[derive(Debug)]
enum Lora {
    Mixed,
    Stacked(ops::Bank),
}

impl Op for Linear {
    const CUT: Cut = Cut::Token;

    fn splits_operands(&self) -> bool {
        true
    }

    fn split_on_tiles(&self, inputs: &Inputs) -> Option<Inputs> {
        if self.order == ops::Order::Dot {
            return None;
        }
        let mut of_terms = vec![false]; // x
        for projection in &self.projections {
            match projection.lora {
                None => {}
                Some(Lora::Mixed) => of_terms.extend([true; 2]),
                Some(Lora::Stacked(_)) => of_terms.extend([false; 3]),
            }
            of_terms.extend(projection.residual.then_some(false));
        }
        Some(inputs.only_of_terms(&of_terms))
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let segments = batch.segments();
        let (mut t, mut w) = (inputs.t.iter(), inputs.w.iter());
        let mut t = || t.next().unwrap();
        let mut w = || w.next().unwrap();
        let x = t();
        let dropouts: Vec<_> = (self.projections.iter().enumerate())
            .map(|(site, p)| p.dropout.map(|p| batch.dropout(site as u32, p)))
            .collect();
        let project = |(projection, dropout): (&Projection, _)| ops::Projection {
            weight: w(),
            bias: projection.bias.then(&mut w),
            lora: projection.lora.as_ref().map(|lora| ops::Expand {
                z: t(),
                segments: &segments,
                rhs: match lora {
                    Lora::Mixed => ops::ExpandRhs::Mixed(t()),
                    &Lora::Stacked(bank) => {
                        ops::ExpandRhs::Stacked(ops::Stacked { bank, params: t(), weights: t() })
                    }
                },
            }),
            dropout,
            residual: projection.residual.then(&mut t),
        };
        let dropouts = dropouts.iter().map(Option::as_ref);
        let projections: Vec<_> = self.projections.iter().zip(dropouts).map(project).collect();
        let (order, output) = (self.order, self.output);
        let y = backend.linear(ops::Linear { x, projections: &projections, order, output });
        y.iter().map(|y| Output::tokens(backend, "y", y)).collect()
    }
}

pub fn linear(random: &mut Gen, class: Class, batch: Batch) -> Case<Linear> {
    let n_splits = random.pick(&[1, 1, 2, 4]);
    let most = random.pick(&[257, 257, 513]);
    let (d_in, rank) = (n_splits * random.size(most / n_splits), random.size(17));
    let n = batch.n_tokens();
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d_in, activations(random, class, n * d_in, &SPECIALS));
    let siblings = 1 + random.below(3);
    let has_lora = random.coin();
    let projection = |random: &mut Gen, inputs: &mut Inputs| {
        let d_out = n_splits * random.size(257 / n_splits);
        inputs.weights.push(random.weight(class, d_out, d_in));
        let bias = random.coin();
        if bias {
            inputs.weights.push(random.weight(class, 1, d_out));
        }
        let lora = has_lora.then(|| {
            let z = activations(random, class, n * rank, &SPECIALS_FINITE);
            inputs.tokens_full(&batch, rank, z);
            if random.coin() {
                let values = random.values(class, batch.n_rows * rank * d_out, true);
                inputs.full(batch.n_rows * rank, d_out, values);
                Lora::Mixed
            } else {
                let bank = super::lora::bank(random, n_splits, d_in, d_out, rank);
                super::lora::stacked(random, class, &bank, batch.n_rows, inputs);
                Lora::Stacked(bank)
            }
        });
        let dropout = (random.below(3) == 0).then_some(0.5);
        let residual = random.coin();
        if residual {
            inputs.tokens(&batch, d_out, random.values(class, n * d_out, false));
        }
        Projection { bias, lora, dropout, residual }
    };
    let projections = (0..siblings).map(|_| projection(random, &mut inputs)).collect();
    let order = random.pick(&[ops::Order::Panel, ops::Order::Dot]);
    let output = random.pick(&[Precision::Activation, Precision::Full]);
    Case { class, batch, inputs, op: Linear { projections, order, output } }
}

#[test]
fn linears() {
    check("linear", linear);
}

#[derive(Debug)]
pub struct LinearBackward {
    /// Whether each sibling has LoRA.
    lora: Vec<bool>,
    residual: bool,
}

impl Op for LinearBackward {
    const CUT: Cut = Cut::Token;

    fn splits_operands(&self) -> bool {
        true
    }

    fn split_on_tiles(&self, inputs: &Inputs) -> Option<Inputs> {
        let of_terms = self.lora.iter().flat_map(|&lora| {
            let of_lora: &[bool] = if lora { &[true; 2] } else { &[] };
            [&[false], of_lora].concat()
        });
        let of_terms: Vec<_> = of_terms.chain(self.residual.then_some(false)).collect();
        Some(inputs.only_of_terms(&of_terms))
    }

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let segments = batch.segments();
        let mut t = inputs.t.iter();
        let mut t = || t.next().unwrap();
        let terms: Vec<_> = (self.lora.iter().zip(&inputs.w))
            .map(|(&lora, weight)| ops::LinearBackwardTerm {
                d_y: t(),
                weight,
                lora: lora.then(|| (t(), t(), &segments)),
            })
            .collect();
        // Held twice: the result must not be written into it.
        let residual = self.residual.then(&mut t).cloned();
        let run = |d_residual| {
            let d_x = backend.linear_backward(ops::LinearBackward { terms: &terms, d_residual });
            Output::tokens(backend, "d_x", &d_x)
        };
        let owned = run(residual.as_ref().map(|residual| backend.copy(residual)));
        let shared = run(residual);
        vec![owned, shared]
    }
}

pub fn linear_backward(random: &mut Gen, class: Class, batch: Batch) -> Case<LinearBackward> {
    let (d_in, rank, n) = (random.size(257), random.size(17), batch.n_tokens());
    let mut inputs = Inputs::default();
    let lora: Vec<_> = (0..1 + random.below(3)).map(|_| random.coin()).collect();
    for &lora in &lora {
        let d_out = random.size(257);
        inputs.tokens(&batch, d_out, activations(random, class, n * d_out, &SPECIALS));
        inputs.weights.push(random.weight(class, d_out, d_in));
        if lora {
            inputs.tokens_full(&batch, rank, activations(random, class, n * rank, &SPECIALS));
            let values = random.values(class, batch.n_rows * d_in * rank, true);
            inputs.full(batch.n_rows * d_in, rank, values);
        }
    }
    let residual = random.coin();
    if residual {
        inputs.tokens(&batch, d_in, random.values(class, n * d_in, false));
    }
    Case { class, batch, inputs, op: LinearBackward { lora, residual } }
}

#[test]
fn linears_backward() {
    check("linear_backward", linear_backward);
}

#[derive(Debug)]
pub struct Embed {
    vocabulary: usize,
    scale: f32,
}

impl Op for Embed {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let ids = batch.ids_below(self.vocabulary);
        let y = backend.embed(ops::Embed { table: &inputs.w[0], ids: &ids, scale: self.scale });
        vec![Output::tokens(backend, "y", &y)]
    }
}

pub fn embed(random: &mut Gen, class: Class, batch: Batch) -> Case<Embed> {
    let (vocabulary, d_model) = (random.size(129), random.size(257));
    let weights = vec![random.weight(class, vocabulary, d_model)];
    let inputs = Inputs { weights, ..Inputs::default() };
    // Gemma's is the root of its width; powers of two keep integers exact.
    let scale = [1.0, 4.0][random.size(2) - 1];
    Case { class, batch, inputs, op: Embed { vocabulary, scale } }
}

#[test]
fn embeddings() {
    check("embed", embed);
}

#[derive(Debug)]
pub struct Rope {
    pub inverse: bool,
}

impl Rope {
    /// Table rows: positions come back after these many.
    const POSITIONS: u32 = 50;
}

impl Op for Rope {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [x, table] = &inputs.t[..] else { unreachable!() };
        let rotary = ops::Rotary { table: table.clone() };
        let positions: Vec<u32> =
            batch.token_keys.iter().map(|key| key.position % Self::POSITIONS).collect();
        let run = |x| {
            let (inverse, rotary, positions) = (self.inverse, &rotary, &positions);
            let y = backend.rope(ops::Rope { x, rotary, positions, inverse });
            Output::tokens(backend, "y", &y)
        };
        let owned = run(backend.copy(x)); // Held twice: the result must not be written into it.
        vec![owned, run(x.clone())]
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, _: &[Output]) -> Vec<Vec<f64>> {
        let [x, table] = &inputs.abs().tensors[..] else { unreachable!() };
        let half = table.cols / 2;
        let bound = |i: usize| {
            let (t, col) = (i / x.cols, i % x.cols);
            let position = (batch.token_keys[t].position % Self::POSITIONS) as usize;
            let (pair, other) = match col % table.cols {
                pair if pair < half => (pair, col + half),
                second => (second - half, col - half),
            };
            let (cos, sin) = (table.at(position, pair), table.at(position, half + pair));
            4.0 * U * (cos * x.at(t, col) + sin * x.at(t, other))
        };
        let bounds: Vec<_> = (0..x.values.len()).map(bound).collect();
        vec![bounds.clone(), bounds]
    }
}

pub fn rope(random: &mut Gen, class: Class, batch: Batch) -> Case<Rope> {
    let (n_heads, head_dim) = (random.pick(&[1, 2, 5]), 2 * random.size(65));
    let (n, n_positions) = (batch.n_tokens(), Rope::POSITIONS as usize);
    let mut inputs = Inputs::default();
    let width = n_heads * head_dim;
    inputs.tokens(&batch, width, activations(random, class, n * width, &SPECIALS));
    let table = random.values(class.finite(), n_positions * head_dim, true);
    inputs.full(n_positions, head_dim, table);
    Case { class, batch, inputs, op: Rope { inverse: random.coin() } }
}

#[test]
fn ropes() {
    check("rope", rope);
}

#[derive(Debug)]
pub struct Gather {
    /// By number, any size: rows of `x`.
    rows: Vec<usize>,
}

impl Op for Gather {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let x = &inputs.t[0];
        let rows: Vec<usize> = self.rows.iter().map(|row| row % x.rows().max(1)).collect();
        let rows = if x.rows() == 0 { &[][..] } else { &rows };
        vec![Output::whole(backend, "y", &backend.gather(ops::Gather { x, rows }))]
    }

    fn tolerance(&self, _: &Batch, _: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        expected.iter().map(|output| vec![0.0; output.values.len()]).collect()
    }
}

pub fn gather(random: &mut Gen, class: Class, batch: Batch) -> Case<Gather> {
    let (d, n) = (random.size(257), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS));
    let rows = (0..random.below(20)).map(|_| random.below(1 << 20)).collect();
    Case { class, batch, inputs, op: Gather { rows } }
}

#[test]
fn gathered_rows() {
    check("gather", gather);
}

#[derive(Debug)]
pub struct Norm {
    pub eps: f32,
    pub centered: bool,
    pub bias: bool,
}

impl Op for Norm {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let (x, weight, bias) = (&inputs.t[0], &inputs.w[0], self.bias.then(|| &inputs.w[1]));
        let (centered, eps) = (self.centered, self.eps);
        let ops::Normed { y, stats } = backend.norm(ops::Norm { x, weight, bias, centered, eps });
        let again = backend.norm_again(ops::NormAgain { x, weight, bias, stats: &stats });
        let bits = |tensor: &Tensor<B>| -> Vec<u64> {
            let values = backend.download(tensor).into_iter();
            values.map(|v| if v.is_nan() { u64::MAX } else { v.to_bits() }).collect()
        };
        assert_eq!(bits(&y), bits(&again), "norm_again gives the bits of norm");
        let mut outputs =
            vec![Output::tokens(backend, "y", &y), Output::tokens(backend, "rstd", &stats.rstd)];
        outputs.extend(stats.mean.map(|mean| Output::tokens(backend, "mean", &mean)));
        outputs
    }

    fn tolerance(&self, _: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        if !self.centered {
            // The squares are positive: their sum, and so rstd, has a small relative error.
            let relative =
                |output: &Output| output.values.iter().map(|v| 8.0 * U * v.abs()).collect();
            return expected.iter().map(relative).collect();
        }
        // The mean has an error of its terms' size; the distances from it inherit that, and rstd
        // what they give the mean square.
        let x = &inputs.tensors[0];
        let (weight, n) = (inputs.weights[0].to_f32(), x.cols as f64);
        let bias = self.bias.then(|| inputs.weights[1].to_f32());
        let mut bounds: Vec<Vec<f64>> = expected.iter().map(|_| Vec::new()).collect();
        for t in 0..x.rows {
            let row = |c: usize| x.at(t, c);
            let (rstd, mean) = (expected[1].values[t], expected[2].values[t]);
            let mean_error = 4.0 * U * (0..x.cols).map(|c| row(c).abs()).sum::<f64>() / n;
            let distance = |c: usize| (row(c) - mean).abs();
            let error = |c: usize| mean_error + U * distance(c);
            let square_error =
                (0..x.cols).map(|c| 2.0 * distance(c) * error(c) + error(c).powi(2)).sum::<f64>()
                    / n;
            let square = (0..x.cols).map(|c| distance(c).powi(2)).sum::<f64>() / n;
            // d rstd = rstd³ / 2 d square, as long as that is small; else the whole of it.
            let shift = square_error + 6.0 * U * square;
            let least = (square - shift).max(0.0) + f64::from(self.eps);
            let rstd_error = (1.0 / least.sqrt() - rstd).max(0.0) + 8.0 * U * rstd;
            bounds[1].push(rstd_error);
            bounds[2].push(mean_error);
            for c in 0..x.cols {
                let scaled = distance(c) * rstd_error + error(c) * (rstd + rstd_error);
                let w = f64::from(weight[c]).abs();
                let b = bias.as_ref().map_or(0.0, |bias| f64::from(bias[c]).abs());
                bounds[0].push(w * (scaled + 4.0 * U * distance(c) * rstd) + 2.0 * U * b);
            }
        }
        bounds
    }
}

pub fn norm(random: &mut Gen, class: Class, batch: Batch) -> Case<Norm> {
    let (class, d, n) = (class.inexact(), random.size(257), batch.n_tokens());
    let centered = random.coin();
    // The limits at infinity of a distance from an infinite mean are not defined.
    let class = if centered { class.finite() } else { class };
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS));
    inputs.weights.push(random.weight(class, 1, d));
    inputs.weights.push(random.weight(class, 1, d));
    let (eps, bias) = (random.pick(&[1e-6, 1e-5, 0.1]), random.coin());
    let op = Norm { eps, centered, bias: centered && bias };
    Case { class, batch, inputs, op }
}

#[test]
fn norms() {
    check("norm", norm);
}

#[derive(Debug)]
pub struct NormBackward {
    residual: bool,
    centered: bool,
}

impl Op for NormBackward {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [x, d_y, rstd, mean, residual] = &inputs.t[..] else { unreachable!() };
        let (weight, mean) = (&inputs.w[0], self.centered.then(|| mean.clone()));
        let stats = &ops::NormStats { mean, rstd: rstd.clone() };
        let run = |d_residual| {
            let args = ops::NormBackward { x, weight, stats, d_y, d_residual };
            Output::tokens(backend, "d_x", &backend.norm_backward(args))
        };
        let owned = run(self.residual.then(|| backend.copy(residual)));
        let shared = run(self.residual.then(|| residual.clone()));
        vec![owned, shared]
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, _: &[Output]) -> Vec<Vec<f64>> {
        let [x, d_y, rstd, mean, residual] = &inputs.abs().tensors[..] else { unreachable!() };
        let weight = inputs.abs().weights[0].to_f32();
        let d = x.cols;
        let bound = |t: usize, c: usize| {
            let through = |c: usize| d_y.at(t, c) * f64::from(weight[c]);
            let center = if self.centered { mean.at(t, 0) } else { 0.0 };
            let distance = |c: usize| x.at(t, c) + center;
            let product = (0..d).map(|c| through(c) * distance(c)).sum::<f64>() / d as f64;
            let mean_g = (0..d).map(through).sum::<f64>() / d as f64;
            let mean_g = if self.centered { mean_g } else { 0.0 };
            let rstd = rstd.at(t, 0);
            let past = if self.residual { residual.at(t, c) } else { 0.0 };
            let inner = through(c) + mean_g + distance(c) * rstd * rstd * product;
            10.0 * U * (past + rstd * inner)
        };
        let bounds: Vec<_> = (0..batch.n_tokens() * d).map(|i| bound(i / d, i % d)).collect();
        vec![bounds.clone(), bounds]
    }
}

pub fn norm_backward(random: &mut Gen, class: Class, batch: Batch) -> Case<NormBackward> {
    let (class, d, n) = (class.inexact(), random.size(257), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS_FINITE));
    inputs.tokens(&batch, d, random.values(class, n * d, false));
    let rstd = (0..n).map(|_| 0.25 + random.unit()).collect();
    inputs.tokens_full(&batch, 1, rstd);
    inputs.tokens_full(&batch, 1, random.values(class.finite(), n, false));
    inputs.tokens(&batch, d, random.values(class, n * d, false));
    inputs.weights.push(random.weight(class.finite(), 1, d));
    let op = NormBackward { residual: random.coin(), centered: random.coin() };
    Case { class, batch, inputs, op }
}

#[test]
fn norms_backward() {
    check("norm_backward", norm_backward);
}

#[derive(Debug)]
pub struct Gated {
    pub activation: Activation,
    pub up: bool,
    pub dropout: Option<f32>,
}

impl Op for Gated {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [gate, up, d_h] = &inputs.t[..] else { unreachable!() };
        let dropout = self.dropout.map(|p| batch.dropout(9, p));
        let (up, activation) = (self.up.then_some(up), self.activation);
        let args = ops::Gated { gate, up, activation, dropout: dropout.as_ref() };
        let h = backend.gated(&args);
        let (d_gate, d_up) = backend.gated_backward(&args, d_h);
        assert_eq!(d_up.is_some(), self.up);
        let mut outputs =
            vec![Output::tokens(backend, "h", &h), Output::tokens(backend, "d_gate", &d_gate)];
        outputs.extend(d_up.map(|d_up| Output::tokens(backend, "d_up", &d_up)));
        outputs
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        // The activation is x times, its slope a sum of terms that are, at most about 1; both with
        // an absolute error of that scale, as `1 + erf` or `1 + tanh` have it.
        let dropout = self.dropout.map(|p| batch.dropout(9, p));
        let kept = |i: usize| {
            let (token, col) = (i / inputs.tensors[0].cols, i % inputs.tensors[0].cols);
            dropout.as_ref().map_or(1.0, |d| f64::from(d.factor(token, col)))
        };
        let size = |which: usize, i: usize| inputs.tensors[which].values[i].abs();
        let up = |i: usize| if self.up { size(1, i) } else { 1.0 };
        let n = inputs.tensors[0].values.len();
        let all = |bound: &dyn Fn(usize) -> f64| -> Vec<f64> { (0..n).map(bound).collect() };
        let mut bounds = vec![
            all(&|i| 8.0 * U * kept(i) * size(0, i) * up(i)),
            all(&|i| 16.0 * U * kept(i) * size(2, i) * up(i)),
            all(&|i| 8.0 * U * kept(i) * size(2, i) * size(0, i)),
        ];
        bounds.truncate(expected.len());
        bounds
    }
}

pub fn gated(random: &mut Gen, class: Class, batch: Batch) -> Case<Gated> {
    let (class, d_ff, n) = (class.inexact(), random.size(257), batch.n_tokens());
    let mut inputs = Inputs::default();
    let gate = activations(random, class, n * d_ff, &SPECIALS_FINITE);
    let gate = gate.into_iter().map(|g| if class == Class::Uniform { 12.0 * g } else { g });
    inputs.tokens(&batch, d_ff, gate.collect());
    inputs.tokens(&batch, d_ff, random.values(class, n * d_ff, false));
    inputs.tokens(&batch, d_ff, random.values(class, n * d_ff, false));
    let activation =
        random.pick(&[Activation::Relu, Activation::GeluNew, Activation::Gelu, Activation::Silu]);
    let dropout = random.coin().then_some(0.3);
    Case { class, batch, inputs, op: Gated { activation, up: random.coin(), dropout } }
}

#[test]
fn gated_products() {
    check("gated", gated);
}

#[derive(Debug)]
pub struct Dropout {
    pub p: f32,
    pub site: u32,
}

impl Op for Dropout {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let y = backend.dropout(&inputs.t[0], &batch.dropout(self.site, self.p));
        vec![Output::tokens(backend, "y", &y)]
    }
}

pub fn dropout(random: &mut Gen, class: Class, batch: Batch) -> Case<Dropout> {
    let (d, n) = (random.size(257), batch.n_tokens());
    let p = if class == Class::Exact { 0.5 } else { random.pick(&[0.0, 0.1, 0.9]) };
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS));
    Case { class, batch, inputs, op: Dropout { p, site: random.word() as u32 } }
}

#[test]
fn dropouts() {
    check("dropout", dropout);
}

#[derive(Debug)]
pub struct Add;

impl Op for Add {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [a, b] = &inputs.t[..] else { unreachable!() };
        let owned = backend.add(backend.copy(a), b);
        let shared = backend.add(a.clone(), b);
        let itself = backend.add(a.clone(), a);
        [owned, shared, itself].map(|y| Output::tokens(backend, "y", &y)).into()
    }
}

pub fn add(random: &mut Gen, class: Class, batch: Batch) -> Case<Add> {
    let (d, n) = (random.size(257), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS));
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS));
    Case { class, batch, inputs, op: Add }
}

#[test]
fn additions() {
    check("add", add);
}

#[derive(Debug)]
pub struct CacheWrite {
    rows: Vec<usize>,
}

impl Op for CacheWrite {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let mut cache = backend.copy(&inputs.t[0]);
        let (source, rows) = (&inputs.t[1], &self.rows[..]);
        backend.cache_write(ops::CacheWrite { cache: &mut cache, source, rows });
        vec![Output::whole(backend, "cache", &cache)]
    }
}

pub fn cache_write(random: &mut Gen, class: Class, batch: Batch) -> Case<CacheWrite> {
    let (width, n) = (random.size(129), batch.n_tokens());
    let n_rows = n + random.below(20);
    let mut rows: Vec<_> = (0..n_rows).collect();
    (1..n_rows).rev().for_each(|i| rows.swap(i, random.below(i + 1)));
    rows.truncate(n);
    let mut inputs = Inputs::default();
    inputs.full(n_rows, width, activations(random, class, n_rows * width, &SPECIALS));
    inputs.tensors[0].precision = Precision::Activation;
    inputs.tokens(&batch, width, activations(random, class, n * width, &SPECIALS));
    Case { class, batch, inputs, op: CacheWrite { rows } }
}

#[test]
fn cache_writes() {
    check("cache_write", cache_write);
}

#[derive(Debug)]
pub struct HeadLoss {
    pub scale: f32,
    pub d_nll: f32,
    pub label_shift: u32,
}

impl HeadLoss {
    /// A token's logits, and the sums of their terms' sizes.
    fn logits(&self, inputs: &Inputs, token: usize) -> [Vec<f64>; 2] {
        let (x, weight) = (&inputs.tensors[0], inputs.weights[0].to_f32());
        let rows = weight.chunks(x.cols.max(1)).take(inputs.weights[0].rows());
        let scale = f64::from(self.scale);
        let sum = |row: &[f32], term: &dyn Fn(f64) -> f64| -> f64 {
            row.iter().enumerate().map(|(i, &w)| term(scale * x.at(token, i) * f64::from(w))).sum()
        };
        let (logits, sizes) = rows.map(|row| (sum(row, &|term| term), sum(row, &f64::abs))).unzip();
        [logits, sizes]
    }

    /// `Σ_v term(p[v], 1 where v is the label) |w[v, i]|` times what all gradients have, of a token.
    fn gradients(
        &self,
        (batch, inputs): (&Batch, &Inputs),
        token: usize,
        logits: &[f64],
        term: impl Fn(f64, f64) -> f64,
    ) -> Vec<f64> {
        let (weight, d) = (inputs.weights[0].to_f32(), inputs.tensors[0].cols);
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
        let label = (batch.ids[token] % self.label_shift) as usize;
        let factor = (f64::from(self.d_nll) * f64::from(self.scale)).abs();
        let mut all = vec![0.0; d];
        for (v, logit) in logits.iter().enumerate() {
            let size = factor * term((logit - max).exp() / sum, f64::from(u8::from(v == label)));
            let row = &weight[v * d..][..d];
            all.iter_mut().zip(row).for_each(|(all, w)| *all += size * f64::from(w.abs()));
        }
        all
    }
}

impl Op for HeadLoss {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        // The vocabulary is not known to `Loaded`; ids are made below it.
        let labels: Vec<_> = batch.ids.iter().map(|id| id % self.label_shift).collect();
        let run = |d_nll| {
            let (x, weight, labels, scale) = (&inputs.t[0], &inputs.w[0], &labels[..], self.scale);
            backend.head_loss(ops::HeadLoss { x, weight, labels, scale, d_nll })
        };
        let loss = run(Some(self.d_nll));
        let evaluated = run(None);
        assert!(evaluated.d_x.is_none());
        vec![
            Output::numbers("nll", backend.numbers(&loss.nll), true),
            Output::tokens(backend, "d_x", &loss.d_x.unwrap()),
            Output::numbers("nll without d_x", backend.numbers(&evaluated.nll), true),
        ]
    }

    fn tolerance(&self, batch: &Batch, inputs: &Inputs, _: &[Output]) -> Vec<Vec<f64>> {
        let (mut nll, mut d_x) = (Vec::new(), Vec::new());
        for t in 0..batch.n_tokens() {
            let [logits, sizes] = self.logits(inputs, t);
            let largest = |of: &[f64]| of.iter().fold(0.0, |max: f64, v| max.max(v.abs()));
            // Of a logit, and of the log-sum-exp: a mean of those errors, and its own arithmetic.
            let error = 6.0 * U * largest(&sizes);
            let error = 2.0 * error + 8.0 * U * (1.0 + largest(&logits));
            nll.push(error);
            let sizes = self.gradients((batch, inputs), t, &logits, |p, hot| p + hot);
            d_x.extend(sizes.into_iter().map(|size| (error.exp_m1() + 12.0 * U) * size));
        }
        vec![nll.clone(), d_x, nll]
    }

    fn rounding_on_tiles(
        &self,
        batch: &Batch,
        inputs: &Inputs,
        expected: &[Output],
    ) -> Option<Vec<Vec<f64>>> {
        if inputs.weights[0].dtype() != Dtype::Bf16 {
            return None; // Nor are there products on tiles.
        }
        let mut rounding: Vec<_> = expected.iter().map(|o| vec![0.0; o.values.len()]).collect();
        let gradients = (0..batch.n_tokens()).flat_map(|t| {
            let [logits, _] = self.logits(inputs, t);
            self.gradients((batch, inputs), t, &logits, |p, hot| (p - hot).abs())
        });
        let unit = Dtype::Bf16.unit_roundoff();
        rounding[1] = gradients.map(|size| unit * size).collect();
        Some(rounding)
    }
}

pub fn head_loss(random: &mut Gen, class: Class, batch: Batch) -> Case<HeadLoss> {
    let class = class.inexact();
    let (d, vocabulary, n) = (random.size(129), random.size(300), batch.n_tokens());
    let mut inputs = Inputs::default();
    inputs.tokens(&batch, d, activations(random, class, n * d, &SPECIALS_FINITE[..5]));
    inputs.weights.push(random.weight(class.finite(), vocabulary, d));
    let scale = random.pick(&[1.0, 0.125]);
    let op = HeadLoss { scale, d_nll: 0.01, label_shift: vocabulary as u32 };
    Case { class, batch, inputs, op }
}

#[test]
fn head_losses() {
    check("head_loss", head_loss);
}

#[derive(Debug)]
pub struct Argmax;

impl Op for Argmax {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let columns =
            backend.tokens(backend.argmax(&inputs.t[0], &[])).into_iter().map(f64::from).collect();
        vec![Output::numbers("column", columns, true)]
    }

    fn tolerance(&self, _: &Batch, _: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        vec![vec![0.0; expected[0].values.len()]]
    }
}

pub fn argmax(random: &mut Gen, class: Class, batch: Batch) -> Case<Argmax> {
    let (cols, n) = (random.size(300), batch.n_tokens());
    let mut inputs = Inputs::default();
    let infinities = [f64::INFINITY, f64::NEG_INFINITY];
    inputs.tokens_full(&batch, cols, activations(random, class, n * cols, &infinities));
    if n > 0 && class == Class::Special {
        inputs.tensors[0].values[..cols].fill(f64::NEG_INFINITY);
    }
    Case { class, batch, inputs, op: Argmax }
}

#[test]
fn argmaxes() {
    check("argmax", argmax);
}

#[derive(Clone, Debug)]
pub struct Sample {
    scale: f32,
    rules: SamplingRules,
    forbidden: Vec<u32>,
}

impl Sample {
    /// By logits, chances, and whether anything is forbidden.
    fn draw<B: Backend>(
        &self,
        backend: &B,
        [logits, chance, forbids]: [&Tensor<B>; 3],
    ) -> Vec<u32> {
        let forbids: Vec<bool> = backend.download(forbids).iter().map(|&f| f > 0.0).collect();
        backend.tokens(backend.sample(&ops::Sample {
            logits,
            scale: self.scale,
            forbidden: &self.forbidden,
            forbids: &forbids,
            rules: self.rules,
            uniforms: &backend.download(chance),
        }))
    }

    /// Whether weights and chances that differ a little draw the same of a row: elsewhere backends may differ.
    fn is_clear(&self, row: &[f64], chance: f64, forbids: f64) -> bool {
        let draw = |[scale, top_p, min_p, chance_by]: [f64; 4]| {
            let top_p = if self.rules.top_p < 1.0 { self.rules.top_p * top_p } else { 1.0 };
            let rules = SamplingRules { top_p, min_p: self.rules.min_p * min_p, ..self.rules };
            let scale = (f64::from(self.scale) * scale) as f32;
            let upload = |values: &[f64]| Oracle.upload(values, 1, values.len(), Precision::Full);
            let inputs = [row, &[chance * chance_by], &[forbids]].map(upload);
            Self { scale, rules, ..self.clone() }.draw(&Oracle, inputs.each_ref())
        };
        let (less, more) = (1.0 - 1e-5, 1.0 + 1e-5);
        let as_it_is = draw([1.0; 4]);
        let by = |i: u32| [0, 1, 2, 3].map(|bit| if i >> bit & 1 > 0 { more } else { less });
        (0..16).all(|i| draw(by(i)) == as_it_is)
    }
}

impl Op for Sample {
    const CUT: Cut = Cut::Token;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let columns = self.draw(backend, [&inputs.t[0], &inputs.t[1], &inputs.t[2]]);
        vec![Output::numbers("column", columns.into_iter().map(f64::from).collect(), true)]
    }

    fn tolerance(&self, _: &Batch, _: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        vec![vec![0.0; expected[0].values.len()]]
    }
}

pub fn sample(random: &mut Gen, class: Class, batch: Batch) -> Case<Sample> {
    let batch = batch.few(3); // The emulator takes its time for many threads that meet often.
    let (cols, n) = (random.size(300), batch.n_tokens());
    let infinities = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    let mut logits = activations(random, class, n * cols, &infinities);
    if n > 0 && class == Class::Special {
        logits[..cols].fill(f64::NEG_INFINITY);
    }
    let op = Sample {
        scale: random.pick(&[0.125, 1.0, 1.6]),
        rules: SamplingRules {
            top_k: random.pick(&[0, 1, 5, 50]),
            top_p: random.pick(&[1.0, 0.9, 0.3, 1e-3]),
            min_p: random.pick(&[0.0, 0.05, 0.5]),
        },
        forbidden: (0..random.below(3)).map(|_| random.below(cols) as u32).collect(),
    };
    let (mut chances, mut forbids) = (Vec::with_capacity(n), Vec::with_capacity(n));
    for row in logits.chunks_mut(cols) {
        let forbidden = f64::from(u8::from(random.coin()));
        let mut chance = || f64::from(random.unit() as f32);
        let clear = (0..20).map(|_| chance()).find(|&u| op.is_clear(row, u, forbidden));
        // Where the rules themselves are on an edge, one token is far above all others.
        chances.push(clear.unwrap_or_else(|| {
            row.fill(-100.0);
            row[cols / 2] = 300.0;
            0.5
        }));
        forbids.push(forbidden);
    }
    let mut inputs = Inputs::default();
    inputs.tokens_full(&batch, cols, logits);
    inputs.tokens_full(&batch, 1, chances);
    inputs.tokens_full(&batch, 1, forbids);
    Case { class, batch, inputs, op }
}

#[test]
fn samples() {
    check("sample", sample);
}

#[derive(Debug)]
pub struct SumOfSquares;

impl Op for SumOfSquares {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let sum = backend.sum_of_squares(&inputs.t[0]);
        vec![Output::numbers("sum", backend.numbers(&sum), false)]
    }
}

pub fn sum_of_squares(random: &mut Gen, class: Class, batch: Batch) -> Case<SumOfSquares> {
    let n = random.size(257) * random.size(257);
    let mut inputs = Inputs::default();
    inputs.full(1, n, activations(random, class, n, &SPECIALS));
    Case { class, batch, inputs, op: SumOfSquares }
}

#[test]
fn sums_of_squares() {
    check("sum_of_squares", sum_of_squares);
}

#[derive(Debug)]
pub struct SumOfSquaresIn(Vec<Range<usize>>);

impl Op for SumOfSquaresIn {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let sum = backend.sum_of_squares_in(&inputs.t[0], &self.0);
        vec![Output::numbers("sum", backend.numbers(&sum), false)]
    }
}

pub fn sum_of_squares_in(random: &mut Gen, class: Class, batch: Batch) -> Case<SumOfSquaresIn> {
    let n = 20 + random.size(257) * random.size(257);
    let mut inputs = Inputs::default();
    inputs.full(1, n, activations(random, class, n, &SPECIALS));
    // In order and disjoint, with gaps; some are empty.
    let mut ends: Vec<_> = (0..2 * random.below(6)).map(|_| random.below(n + 1)).collect();
    ends.sort_unstable();
    let ranges = ends.as_chunks().0.iter().map(|&[start, end]| start..end).collect();
    Case { class, batch, inputs, op: SumOfSquaresIn(ranges) }
}

#[test]
fn sums_of_squares_of_ranges() {
    check("sum_of_squares_in", sum_of_squares_in);
}

#[derive(Debug)]
pub struct AdamW {
    pub groups: Vec<ops::ParamGroup>,
    pub step: u64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f32,
    pub grad_scale: GradScale,
}

#[derive(Clone, Copy, Debug)]
pub enum GradScale {
    Given(f32),
    Clipped { max_norm: f64, squares: f64, loss: f64 },
}

impl GradScale {
    /// The factor; none where nothing may change.
    fn factor(self) -> Option<f64> {
        match self {
            Self::Given(scale) => Some(f64::from(scale)),
            Self::Clipped { max_norm, squares, loss } => (squares.is_finite() && loss.is_finite())
                .then(|| ops::clip_scale(max_norm, squares.sqrt())),
        }
    }
}

impl Op for AdamW {
    const CUT: Cut = Cut::Never;

    fn run<B: Backend>(&self, backend: &B, _: &Batch, inputs: &Loaded<B>) -> Vec<Output> {
        let [params, m, v, grads] = &inputs.t[..] else { unreachable!() };
        let [mut params, mut m, mut v] = [params, m, v].map(|tensor| backend.copy(tensor));
        let &Self { ref groups, step, beta1, beta2, eps, grad_scale } = self;
        let (squares, loss) = match grad_scale {
            GradScale::Given(_) => (0.0, 0.0),
            GradScale::Clipped { squares, loss, .. } => (squares, loss),
        };
        // Two thirds and one: the total of a step's micro-batches.
        let mut total = backend.number(loss * 2.0 / 3.0);
        backend.add_up(&mut total, &backend.number(loss / 3.0), 1);
        let squares = backend.number(squares);
        let grad_scale = match grad_scale {
            GradScale::Given(scale) => ops::GradScale::Given(scale),
            GradScale::Clipped { max_norm, .. } => {
                ops::GradScale::Clipped { max_norm, squares: &squares, loss: &total }
            }
        };
        backend.adamw(ops::AdamW {
            params: &mut params,
            m: &mut m,
            v: &mut v,
            grads,
            groups,
            grad_scale,
            step,
            beta1,
            beta2,
            eps,
        });
        [("params", params), ("m", m), ("v", v)]
            .map(|(name, tensor)| Output::whole(backend, name, &tensor))
            .into()
    }

    fn tolerance(&self, _: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        let n = inputs.tensors[0].values.len();
        let mut bounds = vec![vec![0.0; n]; 3]; // What is in no group stays as it is.
        let (beta1, beta2) = (self.beta1, self.beta2);
        let correction1 = 1.0 - beta1.powf(self.step as f64);
        let correction2 = 1.0 - beta2.powf(self.step as f64);
        let Some(factor) = self.grad_scale.factor() else { return bounds };
        for group in &self.groups {
            for i in group.range.clone() {
                let [p, m, v, g] = [0, 1, 2, 3].map(|which| inputs.tensors[which].values[i].abs());
                let g = g * factor;
                bounds[1][i] = 6.0 * U * (beta1 * m + (1.0 - beta1) * g);
                bounds[2][i] = 6.0 * U * (beta2 * v + (1.0 - beta2) * g * g);
                let root = (expected[2].values[i] / correction2).sqrt() + f64::from(self.eps);
                let lr = f64::from(group.lr);
                let moved = lr * expected[1].values[i].abs() / correction1 / root;
                let from_m = lr * bounds[1][i] / correction1 / root;
                bounds[0][i] = from_m + 12.0 * U * moved + 4.0 * U * p;
            }
        }
        bounds
    }
}

pub fn adamw(random: &mut Gen, class: Class, batch: Batch) -> Case<AdamW> {
    let (class, n) = (class.inexact().finite(), 40 + random.size(257) * random.size(33));
    let mut inputs = Inputs::default();
    for which in 0..4 {
        let values = random.values(class, n, false).into_iter();
        let values = values.map(|v| if which == 2 { v.abs() } else { v });
        inputs.full(1, n, values.collect());
    }
    let cut = 1 + random.below(n - 20);
    let groups = vec![
        ops::ParamGroup { range: 0..cut, lr: 1e-3, weight_decay: 0.01 },
        ops::ParamGroup { range: cut + 3..n - 5, lr: 0.1, weight_decay: 0.0 },
    ];
    let step = random.pick(&[1, 2, 10, 100_000]);
    let clipped = |max_norm, squares, loss| GradScale::Clipped { max_norm, squares, loss };
    let grad_scale = random.pick(&[
        GradScale::Given(1.0),
        GradScale::Given(0.3),
        clipped(0.5, 3.7, 2.0),
        clipped(0.5, 0.01, 2.0),
        clipped(0.0, 1e300, 2.0),
        clipped(1.0, 0.0, 0.0),
        clipped(1.0, f64::INFINITY, 2.0),
        clipped(0.0, f64::NAN, 2.0),
        clipped(1.0, 4.0, f64::NAN),
        clipped(0.0, 4.0, f64::NEG_INFINITY),
    ]);
    let (beta1, beta2, eps) = (0.9, 0.999, 1e-8);
    let op = AdamW { groups, step, beta1, beta2, eps, grad_scale };
    Case { class, batch, inputs, op }
}

#[test]
fn optimizer_steps() {
    check("adamw", adamw);
}

/// Small integers survive every way in and out.
#[test]
fn uploads_copies_and_zeros() {
    fn round_trip<B: Backend>(backend: &B) {
        for precision in [Precision::Activation, Precision::Full] {
            let values = [1.0, -2.0, 0.5, 0.0, 96.0, -0.0];
            let tensor = backend.upload(&values, 2, 3, precision);
            assert_eq!(backend.download(&tensor), values);
            let mut copy = backend.copy(&tensor);
            backend.clear(&mut copy);
            assert_eq!(backend.download(&copy), [0.0; 6]);
            assert_eq!(backend.download(&tensor), values);
            assert_eq!(backend.download(&backend.zeros(5, 7, precision)), [0.0; 35]);
        }
    }
    round_trip(&Oracle);
    super::common::backends().for_each(round_trip);
    super::common::cuda_backends().for_each(round_trip);
}
