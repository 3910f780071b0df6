//! The harness: random cases of an operation, run on every backend and compared with the oracle.
//!
//! A case is made from one 64-bit seed. Every failure prints `POLYTAPE_CASE=<operation>/<seed>`, and
//! setting that variable replays that case alone. `POLYTAPE_CASES` sets how many cases each operation
//! gets, `POLYTAPE_SEED` another base seed. A seed without an operation replays it in every one.
//!
//! ```text
//! POLYTAPE_CASES=10000 cargo test --no-default-features --test kernels
//! ```
//!
//! `POLYTAPE_BACKENDS` names those that run, of `cpu` (each instruction set of this CPU), `emulated-cpu` (those
//! that it lacks, on `tests/x86_emulator`), `emulated` (the CUDA backend on `tests/cuda_emulator`) and `gpu`;
//! all by default, and what the machine lacks is reported as skipped.
//!
//! Each case runs for f32 and for bf16 on each instruction set, with buffers that start as NaN, and must
//!
//! 1. agree with the oracle: bit for bit on small integers, else within a bound per element that is
//!    derived from the sizes of the terms ([`Op::tolerance`]);
//! 2. give the same bits again, and on 1, 2, 3 and 7 threads;
//! 3. give a token or sequence the same bits alone as among its neighbours.

#[cfg(test)]
#[path = "../cuda_emulator/mod.rs"]
mod cuda_emulator;
pub mod guard;
mod wanted;
#[cfg(test)]
#[path = "../x86_emulator/mod.rs"]
mod x86_emulator;

use std::{
    any::Any,
    cell::Cell,
    fmt::Debug,
    io::Write,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
};

use guard::{Guarded, Placement};
use half::{bf16, f16};
use polytape::{
    dtype::Dtype,
    kernels::{
        Backend, Precision,
        cpu::{Cpu, isa::Isa},
        cuda::{Cuda, catch_faults},
        ops::{Dropout, Key, Segments, Spans, TokenKey},
        oracle::Oracle,
        philox::Purpose,
    },
    tensor::{Bytes, Frozen, Tensor},
};
use wanted::is_wanted;
#[cfg(test)]
use {polytape::kernels::cuda::Gemm, x86_emulator::lacking};

/// Unit roundoff of f32: what everything is computed in.
pub const U: f64 = 1.0 / 16_777_216.0;
/// The smallest normal f32: an exponential below it may be 0.
pub const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
/// Below this nothing is compared: products of f32 may be flushed or denormal.
const TINY: f64 = 1e-36;

/// Numbers that look random: splitmix64. A fuzzer steers the choices.
pub struct Gen {
    state: u64,
    /// The next choices, the next one last; then splitmix64 makes them.
    choices: Vec<u8>,
    max_size: usize,
}

impl Gen {
    pub fn new(seed: u64) -> Self {
        Self { state: seed, choices: Vec::new(), max_size: usize::MAX }
    }

    /// Eight bytes seed the values; the others choose sizes and flags while they last. Sizes are kept
    /// small, as a fuzzer wants many cases.
    pub fn steered(bytes: &[u8]) -> Self {
        let (seed, choices) = bytes.split_at(bytes.len().min(8));
        let state = seed.iter().fold(0, |state, &byte| state << 8 | u64::from(byte));
        Self { state, choices: choices.iter().rev().copied().collect(), max_size: 65 }
    }

    pub fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`, or the next choice.
    pub fn below(&mut self, n: usize) -> usize {
        let choice = if n <= 256 { self.choices.pop().map(u64::from) } else { None };
        (choice.unwrap_or_else(|| self.word()) % n as u64) as usize
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-24.
    pub fn unit(&mut self) -> f64 {
        (self.word() >> 40) as f64 * U
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A size around those where kernels change what they do.
    pub fn size(&mut self, max: usize) -> usize {
        const AWKWARD: [usize; 31] = [
            1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 63, 64, 65, 96, 127, 128,
            129, 192, 255, 256, 257, 288, 512, 513,
        ];
        let max = max.min(self.max_size);
        let n = AWKWARD.iter().filter(|&&size| size <= max).count();
        if self.below(4) == 0 { 1 + self.below(max) } else { AWKWARD[self.below(n)] }
    }

    /// Values of a class. Weights are smaller integers, and equal where activations cancel.
    pub fn values(&mut self, class: Class, n: usize, weights: bool) -> Vec<f64> {
        let mut values = Vec::with_capacity(n);
        for i in 0..n {
            let uniform = 2.0 * self.unit() - 1.0;
            values.push(match class {
                Class::Exact => (uniform * if weights { 2.5 } else { 4.5 }).round(),
                Class::Uniform | Class::Special => uniform,
                Class::Spread => uniform.signum() * (16.0 * self.unit() - 10.0).exp2(),
                Class::Cancelling if i % 2 == 0 => uniform,
                Class::Cancelling => values[i - 1] * if weights { 1.0 } else { -1.0 },
            });
        }
        values
    }

    /// Puts a few of `what` somewhere in `values`.
    pub fn plant(&mut self, values: &mut [f64], what: &[f64]) {
        for _ in 0..3.min(values.len()) {
            let i = self.below(values.len());
            values[i] = self.pick(what);
        }
    }

    /// A frozen weight of any file type between guard pages.
    pub fn weight(&mut self, class: Class, rows: usize, cols: usize) -> Frozen {
        let mut values = self.values(class, rows * cols, true);
        if class == Class::Special && self.coin() {
            self.plant(&mut values, &SPECIALS);
        }
        self.weight_of(&values, rows, cols)
    }

    pub fn weight_of(&mut self, values: &[f64], rows: usize, cols: usize) -> Frozen {
        let dtype = self.pick(&[Dtype::F32, Dtype::Bf16, Dtype::F16]);
        let placement = self.pick(&[Placement::AtStart, Placement::AtEnd, Placement::BeforeEnd(1)]);
        let placement = match placement {
            Placement::BeforeEnd(_) => Placement::BeforeEnd(1 + self.below(63)),
            other => other,
        };
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let plain = Frozen::from_f32(&values, rows, cols, dtype);
        let guarded = Guarded::new(plain.bytes(), placement);
        let range = 0..guarded.bytes().len();
        Frozen::new(Arc::new(guarded), range, dtype, rows, cols)
    }
}

/// What the inputs of a case are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Small integers: every order of adding up gives the same bits.
    Exact,
    /// Uniform in `[-1, 1)`.
    Uniform,
    /// Magnitudes from 2^-10 to 2^6, logarithmically uniform.
    Spread,
    /// Neighbours that cancel.
    Cancelling,
    /// Uniform, with a few NaN, infinities, denormals and zeros of both signs.
    Special,
}

impl Class {
    const ALL: [Self; 5] =
        [Self::Exact, Self::Uniform, Self::Spread, Self::Cancelling, Self::Special];

    /// For operations that are not exact on integers.
    pub fn inexact(self) -> Self {
        if self == Self::Exact { Self::Uniform } else { self }
    }

    /// For operations whose limits at infinity are not defined.
    pub fn finite(self) -> Self {
        if self == Self::Special { Self::Uniform } else { self }
    }
}

pub const SPECIALS: [f64; 7] =
    [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-40, -1e-40, 0.0, -0.0];
pub const SPECIALS_FINITE: [f64; 6] = [f64::NAN, 1e-40, -1e-40, 0.0, -0.0, 1e4];

/// Sequences one after the other: the tokens that per-token inputs have rows for.
#[derive(Clone, Debug)]
pub struct Batch {
    pub lens: Vec<usize>,
    /// The routing row of each sequence.
    pub rows: Vec<usize>,
    pub n_rows: usize,
    /// The keys of each sequence, for attention.
    pub keys: Spans,
    pub token_keys: Vec<TokenKey>,
    /// Ids or labels of each token, any size.
    pub ids: Vec<u32>,
}

impl Batch {
    pub fn random(random: &mut Gen) -> Self {
        let len = |random: &mut Gen| random.size(33);
        let (lens, rows): (Vec<usize>, Vec<usize>) = match random.below(10) {
            0 => (vec![1], vec![0]),
            1 => (vec![0, len(random), 0], vec![2, 1, 0]),
            2 => (vec![1; 40], (0..40).map(|_| random.below(7)).collect()),
            3 => (vec![len(random), 1, len(random)], vec![1, 0, 1]),
            4 => (vec![1, 0, random.size(129), 2], vec![0, 3, 1, 2]),
            5 => (vec![0, 0], vec![0, 1]),
            6 => (vec![64 + random.size(129)], vec![random.below(2)]),
            // Where tiles of 16 rows end, several of them in a block of 32.
            7 => {
                let n = 1 + random.below(6);
                (vec![16; n], (0..n).map(|_| random.below(3)).collect())
            }
            _ => {
                let n = 1 + random.below(6);
                (
                    (0..n).map(|_| random.below(12)).collect(),
                    (0..n).map(|_| random.below(n)).collect(),
                )
            }
        };
        let n_rows = rows.iter().max().map_or(1, |max| max + 1) + random.below(3);
        let tokens = lens.iter().enumerate().flat_map(|(s, &len)| (0..len).map(move |t| (s, t)));
        let token_keys: Vec<_> =
            tokens.map(|(s, t)| TokenKey { example: 3 + s as u32, position: t as u32 }).collect();
        let ids = token_keys.iter().map(|_| random.word() as u32).collect();
        let keys = Spans::packed(&lens);
        Self { lens, rows, n_rows, keys, token_keys, ids }
    }

    pub fn n_tokens(&self) -> usize {
        self.token_keys.len()
    }

    pub fn segments(&self) -> Segments {
        Segments::new(&self.lens, &self.rows, self.n_rows)
    }

    pub fn dropout(&self, site: u32, p: f32) -> Dropout {
        let key = Key::new(7, Purpose::Dropout, 3);
        Dropout { p, key, site, tokens: self.token_keys.clone().into() }
    }

    /// `ids`, below `n`.
    pub fn ids_below(&self, n: usize) -> Vec<u32> {
        self.ids.iter().map(|id| id % n as u32).collect()
    }

    /// At most `n` tokens of it, of one sequence where it has more.
    pub fn few(self, n: usize) -> Self {
        let longest = (0..self.lens.len()).max_by_key(|&s| self.lens[s]);
        match longest {
            Some(sequence) if self.n_tokens() > n => {
                let tokens = self.tokens_of(sequence);
                self.only(sequence, tokens.start..tokens.end.min(tokens.start + n))
            }
            _ => self,
        }
    }

    fn tokens_of(&self, sequence: usize) -> Range<usize> {
        let start = self.lens[..sequence].iter().sum();
        start..start + self.lens[sequence]
    }

    /// These tokens of a sequence and nothing else.
    fn only(&self, sequence: usize, tokens: Range<usize>) -> Self {
        Self {
            lens: vec![tokens.len()],
            rows: vec![self.rows[sequence]],
            n_rows: self.n_rows,
            keys: Spans {
                starts: vec![self.keys.starts[sequence]],
                lens: vec![self.keys.lens[sequence]],
            },
            token_keys: self.token_keys[tokens.clone()].to_vec(),
            ids: self.ids[tokens].to_vec(),
        }
    }
}

/// An input tensor.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub values: Vec<f64>,
    pub rows: usize,
    pub cols: usize,
    pub precision: Precision,
    /// Whether row `t` belongs to token `t` of the batch.
    pub per_token: bool,
}

impl Matrix {
    pub fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }
}

/// What an operation reads.
#[derive(Clone, Default)]
pub struct Inputs {
    pub tensors: Vec<Matrix>,
    pub weights: Vec<Frozen>,
}

impl Inputs {
    /// An activation with a row a token.
    pub fn tokens(&mut self, batch: &Batch, cols: usize, values: Vec<f64>) {
        let (rows, precision) = (batch.n_tokens(), Precision::Activation);
        self.tensors.push(Matrix { values, rows, cols, precision, per_token: true });
    }

    /// A full-precision matrix with a row a token.
    pub fn tokens_full(&mut self, batch: &Batch, cols: usize, values: Vec<f64>) {
        let (rows, precision) = (batch.n_tokens(), Precision::Full);
        self.tensors.push(Matrix { values, rows, cols, precision, per_token: true });
    }

    /// A full-precision matrix.
    pub fn full(&mut self, rows: usize, cols: usize, values: Vec<f64>) {
        let precision = Precision::Full;
        self.tensors.push(Matrix { values, rows, cols, precision, per_token: false });
    }

    /// As a backend that computes in `compute` sees them.
    fn rounded(&self, compute: Dtype) -> Self {
        let mut inputs = self.clone();
        for tensor in &mut inputs.tensors {
            let full = tensor.precision == Precision::Full;
            let to = if full { Dtype::F32 } else { compute };
            tensor.values.iter_mut().for_each(|value| *value = round(*value, to));
        }
        inputs
    }

    /// With weights whose file has this type.
    fn with_weights_in(&self, dtype: Dtype) -> Self {
        let mut inputs = self.clone();
        for weight in &mut inputs.weights {
            *weight = Frozen::from_f32(&weight.to_f32(), weight.rows(), weight.cols(), dtype);
        }
        inputs
    }

    /// With zeros for the weights and for the tensors that are not of certain terms.
    pub fn only_of_terms(&self, of_terms: &[bool]) -> Self {
        assert_eq!(of_terms.len(), self.tensors.len());
        let mut inputs = self.clone();
        for (tensor, _) in
            inputs.tensors.iter_mut().zip(of_terms).filter(|(_, of_terms)| !**of_terms)
        {
            tensor.values.fill(0.0);
        }
        for weight in &mut inputs.weights {
            let zeros = vec![0.0; weight.rows() * weight.cols()];
            *weight = Frozen::from_f32(&zeros, weight.rows(), weight.cols(), Dtype::F32);
        }
        inputs
    }

    /// Their absolute values.
    pub fn abs(&self) -> Self {
        let mut inputs = self.clone();
        for tensor in &mut inputs.tensors {
            tensor.values.iter_mut().for_each(|value| *value = value.abs());
        }
        for weight in &mut inputs.weights {
            let values: Vec<f32> = weight.to_f32().iter().map(|value| value.abs()).collect();
            *weight = Frozen::from_f32(&values, weight.rows(), weight.cols(), Dtype::F32);
        }
        inputs
    }

    /// Denormals as zeros, which the tiles of AMX take them for.
    fn without_denormals(&self) -> Self {
        let mut inputs = self.clone();
        for tensor in &mut inputs.tensors {
            let tiny = tensor.values.iter_mut().filter(|v| v.abs() < f64::from(f32::MIN_POSITIVE));
            tiny.for_each(|value| *value = 0.0);
        }
        for weight in &mut inputs.weights {
            let mut values = weight.to_f32();
            let tiny = values.iter_mut().filter(|v| v.abs() < f32::MIN_POSITIVE);
            tiny.for_each(|value| *value = 0.0);
            *weight = Frozen::from_f32(&values, weight.rows(), weight.cols(), Dtype::F32);
        }
        inputs
    }

    /// The rows of these tokens.
    fn only(&self, tokens: &Range<usize>) -> Self {
        let mut inputs = self.clone();
        for tensor in inputs.tensors.iter_mut().filter(|tensor| tensor.per_token) {
            tensor.rows = tokens.len();
            tensor.values =
                tensor.values[tokens.start * tensor.cols..tokens.end * tensor.cols].to_vec();
        }
        inputs
    }

    pub fn load<B: Backend>(&self, backend: &B) -> Loaded<B> {
        let upload = |t: &Matrix| backend.upload(&t.values, t.rows, t.cols, t.precision);
        Loaded {
            t: self.tensors.iter().map(upload).collect(),
            w: self.weights.iter().map(|weight| backend.weight(weight)).collect(),
        }
    }
}

/// [`Inputs`] on a backend, in the same order.
pub struct Loaded<B: Backend> {
    pub t: Vec<Tensor<B>>,
    pub w: Vec<B::Weight>,
}

/// One result of an operation.
#[derive(Clone, Debug)]
pub struct Output {
    pub name: &'static str,
    pub values: Vec<f64>,
    pub cols: usize,
    /// What values were rounded to.
    pub dtype: Dtype,
    /// Whether row `t` belongs to token `t` of the batch.
    pub per_token: bool,
}

impl Output {
    pub fn tokens<B: Backend>(backend: &B, name: &'static str, tensor: &Tensor<B>) -> Self {
        Self { per_token: true, ..Self::whole(backend, name, tensor) }
    }

    pub fn whole<B: Backend>(backend: &B, name: &'static str, tensor: &Tensor<B>) -> Self {
        let (values, cols, dtype) = (backend.download(tensor), tensor.cols(), tensor.dtype());
        assert_eq!(values.len(), tensor.rows() * cols, "{name}");
        Self { name, values, cols, dtype, per_token: false }
    }

    pub fn numbers(name: &'static str, values: Vec<f64>, per_token: bool) -> Self {
        Self { name, values, cols: 1, dtype: Dtype::F64, per_token }
    }

    /// As if a perfect backend had computed it.
    fn rounded(&self, dtype: Dtype) -> Self {
        let values = self.values.iter().map(|&value| round(value, dtype)).collect();
        Self { values, dtype, ..self.clone() }
    }
}

/// How finely a batch can be cut without changing a token's results.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    Token,
    Sequence,
    Never,
}

/// An operation with its arguments other than tensors.
pub trait Op: Debug {
    const CUT: Cut;

    fn run<B: Backend>(&self, backend: &B, batch: &Batch, inputs: &Loaded<B>) -> Vec<Output>;

    /// Whether a GPU multiplies f32 operands of this on tensor cores, each as the sum of two bf16.
    fn splits_operands(&self) -> bool {
        false
    }

    /// What the terms are made of whose factors, of f32, tiles of AMX multiply as sums of two bf16 each: the inputs with zeros
    /// elsewhere. None if there are no such terms.
    fn split_on_tiles(&self, inputs: &Inputs) -> Option<Inputs> {
        let _ = inputs;
        None
    }

    /// How much further it may be where tiles of AMX, or a GPU's tensor cores, multiply f32 operands of this
    /// that were rounded to bf16, for each output: 2^-8 of the sizes of the terms with them. None if they do
    /// not.
    fn rounding_on_tiles(
        &self,
        batch: &Batch,
        inputs: &Inputs,
        expected: &[Output],
    ) -> Option<Vec<Vec<f64>>> {
        let _ = (batch, inputs, expected);
        None
    }

    /// For each output, how far each element may be from the oracle's, before it is rounded.
    ///
    /// Most operations are sums of products: their bound is a few units in the last place of the
    /// sum of the terms' sizes, which is the operation itself on absolute values. The 4 is what
    /// blocked sums in f32 keep with room (2 in practice, `notes/reliability.md`), the other 2 are
    /// for what happens to the finished sum.
    fn tolerance(&self, batch: &Batch, inputs: &Inputs, expected: &[Output]) -> Vec<Vec<f64>> {
        let _ = expected;
        let sizes = self.run(&Oracle, batch, &inputs.abs().load(&Oracle));
        sizes.into_iter().map(|size| size.values.iter().map(|v| 6.0 * U * v).collect()).collect()
    }
}

/// An operation with everything it needs.
pub struct Case<O> {
    pub class: Class,
    pub batch: Batch,
    pub inputs: Inputs,
    pub op: O,
}

/// To the nearest value of a type.
pub fn round(value: f64, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(value as f32),
        // By way of f32, as backends do: a sum that is exact in f32 is rounded once.
        Dtype::Bf16 => bf16::from_f32(value as f32).to_f64(),
        Dtype::F16 => f16::from_f64(value).to_f64(),
        Dtype::F64 => value,
    }
}

/// Whether results are what they should be; else, what is wrong.
pub fn compare(
    class: Class,
    found: &[Output],
    expected: &[Output],
    tolerance: &[Vec<f64>],
) -> Result<(), String> {
    assert_eq!((found.len(), expected.len()), (expected.len(), tolerance.len()));
    for ((found, expected), tolerance) in found.iter().zip(expected).zip(tolerance) {
        let name = found.name;
        if found.values.len() != expected.values.len() {
            return Err(format!("{name} has {} elements", found.values.len()));
        }
        assert_eq!(expected.values.len(), tolerance.len(), "{name}");
        let mut wrong = (0..found.values.len()).filter(|&i| {
            let (value, target) = (found.values[i], expected.values[i]);
            !agrees(class, value, target, tolerance[i], found.dtype)
        });
        if let Some(i) = wrong.next() {
            return Err(format!(
                "{name}[{}, {}] is {:e}, not {:e} +- {:e}, and {} more of {}",
                i / found.cols,
                i % found.cols,
                found.values[i],
                expected.values[i],
                tolerance[i],
                wrong.count(),
                found.values.len()
            ));
        }
    }
    Ok(())
}

fn agrees(class: Class, found: f64, expected: f64, tolerance: f64, dtype: Dtype) -> bool {
    if expected.is_nan() {
        return found.is_nan();
    }
    if expected.is_infinite() || class == Class::Exact {
        return found == round(expected, dtype);
    }
    if class == Class::Special && tolerance.is_nan() {
        return true; // An infinity somewhere in what it was made of.
    }
    (found - expected).abs() <= allowed(expected, tolerance, dtype)
}

/// How far a finite value may be from the oracle's: the tolerance, and one rounding to its type.
fn allowed(expected: f64, tolerance: f64, dtype: Dtype) -> f64 {
    tolerance + dtype.unit_roundoff() * (expected.abs() + tolerance) + TINY
}

/// The largest error of results that [`compare`] accepts, in units of what is allowed.
fn worst(class: Class, found: &[Output], expected: &[Output], tolerance: &[Vec<f64>]) -> f64 {
    if class == Class::Exact {
        return 0.0;
    }
    let mut worst = 0.0_f64;
    for ((found, expected), tolerance) in found.iter().zip(expected).zip(tolerance) {
        for ((value, target), tolerance) in found.values.iter().zip(&expected.values).zip(tolerance)
        {
            let allowed = allowed(*target, *tolerance, found.dtype);
            if target.is_finite() && allowed.is_finite() {
                worst = worst.max((value - target).abs() / allowed);
            }
        }
    }
    worst
}

fn assert_same_bits(what: &str, found: &[Output], expected: &[Output]) {
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.values.len(), expected.values.len(), "{}: {what}", found.name);
        for (i, (a, b)) in found.values.iter().zip(&expected.values).enumerate() {
            let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(same, "{}[{i}] is {a:e}, not {b:e}: {what}", found.name);
        }
    }
}

/// The rows of these tokens.
fn rows_of(outputs: &[Output], tokens: &Range<usize>) -> Vec<Output> {
    let cut = |output: &Output| {
        let values = output.values[tokens.start * output.cols..tokens.end * output.cols].to_vec();
        Output { values, ..output.clone() }
    };
    outputs.iter().filter(|output| output.per_token).map(cut).collect()
}

/// Of 40 cases of an operation, those that run on the CUDA emulator too, which is slow: each class thrice.
const EMULATED_OF_40: usize = 15;
/// And those on the x86 emulator, which is slower: each class once.
const EMULATED_CPU_OF_40: usize = 5;

/// How many of the emulators a case runs on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Emulate {
    Nothing,
    Cuda,
    All,
}

/// A backend in variants that must give the same bits.
struct Subject {
    name: String,
    compute: Dtype,
    variants: Vec<Variant>,
    /// From what on it runs.
    emulated: Emulate,
}

/// A backend, of whichever type.
enum Variant {
    Cpu(Cpu),
    Cuda(Cuda),
}

impl Variant {
    fn run<O: Op>(&self, op: &O, batch: &Batch, inputs: &Inputs) -> Vec<Output> {
        match self {
            Self::Cpu(cpu) => op.run(cpu, batch, &inputs.load(cpu)),
            Self::Cuda(cuda) => {
                let run = || Ok(op.run(cuda, batch, &inputs.load(cuda)));
                catch_faults(run).unwrap_or_else(|error| panic!("{error}"))
            }
        }
    }
}

/// The CUDA backend on this machine's GPU, twice over: nothing depends on what ran before.
fn gpu() -> Vec<Subject> {
    let subject = |compute: Dtype| {
        let open = || Cuda::new(compute).map(Variant::Cuda);
        let (name, variants) = (format!("cuda {compute}"), vec![open()?, open()?]);
        Ok(Subject { name, compute, variants, emulated: Emulate::Nothing })
    };
    let subjects: polytape::Result<_> =
        [Dtype::F32, Dtype::Bf16].into_iter().map(subject).collect();
    subjects.unwrap_or_else(|why| {
        say(&format!("skipped: the CUDA kernels on a GPU: {why}"));
        vec![]
    })
}

/// Fuzz targets search for cases that break Rust; the emulator would only slow them down.
#[cfg(not(test))]
fn emulated() -> Vec<Subject> {
    vec![]
}

/// As above.
#[cfg(not(test))]
fn lacking() -> Vec<Isa> {
    vec![]
}

/// The CUDA backend on the emulator, with threads in two orders.
#[cfg(test)]
fn emulated() -> Vec<Subject> {
    // Both products of bf16 add in the same order, so they are variants of each other: the same bits.
    let on = |compute: Dtype, seed| -> Result<Variant, String> {
        let device = Arc::new(cuda_emulator::Emulator::new(seed)?);
        let gemm = if seed == 2 { Gemm::Wgmma } else { Gemm::Mma };
        Ok(Variant::Cuda(Cuda::with_device(device, compute).unwrap().with_gemm(gemm).unwrap()))
    };
    let subject = |compute: Dtype| {
        let variants =
            [1, 2].into_iter().map(|seed| on(compute, seed)).collect::<Result<_, _>>()?;
        Ok(Subject {
            name: format!("emulated cuda {compute}"),
            compute,
            variants,
            emulated: Emulate::Cuda,
        })
    };
    let subjects: Result<_, String> = [Dtype::F32, Dtype::Bf16].into_iter().map(subject).collect();
    subjects.unwrap_or_else(|why| {
        say(&format!("skipped: the CUDA kernels on the emulator: {why}"));
        vec![]
    })
}

/// Says it where `cargo test` shows it, though the tests pass.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn subjects() -> &'static [Subject] {
    static SUBJECTS: OnceLock<Vec<Subject>> = OnceLock::new();
    SUBJECTS.get_or_init(|| {
        let own = if is_wanted("cpu") { Isa::available() } else { vec![] };
        let foreign = if is_wanted("emulated-cpu") { lacking() } else { vec![] };
        let isas = own.into_iter().map(|isa| (isa, Emulate::Nothing));
        let isas = isas.chain(foreign.into_iter().map(|isa| (isa, Emulate::All)));
        let triples =
            isas.flat_map(|(isa, emulated)| [Dtype::F32, Dtype::Bf16].map(|d| (isa, emulated, d)));
        let cpus = triples.map(|(isa, emulated, compute)| {
            let on = |n| Variant::Cpu(Cpu::with_isa(isa, compute, n).unwrap().poisoned());
            let name = match emulated {
                Emulate::Nothing => format!("{} {compute}", isa.name()),
                _ => format!("emulated {} {compute}", isa.name()),
            };
            Subject { name, compute, variants: [2, 1, 3, 7].map(on).into(), emulated }
        });
        let emulated = if is_wanted("emulated") { emulated() } else { vec![] };
        let gpu = if is_wanted("gpu") { gpu() } else { vec![] };
        cpus.chain(emulated).chain(gpu).collect()
    })
}

/// Every CPU backend.
pub fn backends() -> impl Iterator<Item = &'static Cpu> {
    subjects().iter().filter_map(|subject| match &subject.variants[0] {
        Variant::Cpu(cpu) => Some(cpu),
        Variant::Cuda(_) => None,
    })
}

/// Every CUDA backend.
pub fn cuda_backends() -> impl Iterator<Item = &'static Cuda> {
    subjects().iter().filter_map(|subject| match &subject.variants[0] {
        Variant::Cpu(_) => None,
        Variant::Cuda(cuda) => Some(cuda),
    })
}

/// The seeds of an operation's cases; the last digit of a seed (base 5) is its class.
fn seeds(name: &str) -> Vec<u64> {
    let parse = |text: &str| text.parse::<u64>().unwrap_or_else(|e| panic!("{text}: {e}"));
    if let Ok(case) = std::env::var("POLYTAPE_CASE") {
        return match case.rsplit_once('/') {
            Some((op, seed)) if op == name => vec![parse(seed)],
            Some(_) => vec![],
            None => vec![parse(&case)],
        };
    }
    let n = std::env::var("POLYTAPE_CASES").map_or(40, |n| parse(&n));
    let base = std::env::var("POLYTAPE_SEED").map_or(1, |seed| parse(&seed));
    (0..n).map(|i| seed_of(name, base, i)).collect()
}

/// The seed of an operation's case `i`, from a base seed.
pub fn seed_of(name: &str, base: u64, i: u64) -> u64 {
    let name_bits = name.bytes().fold(base, |h, b| Gen::new(h ^ u64::from(b)).word());
    let n_classes = Class::ALL.len() as u64;
    Gen::new(name_bits ^ i).word() / 8 * n_classes + i % n_classes
}

/// The case of a seed.
pub fn case<O>(seed: u64, make: impl Fn(&mut Gen, Class, Batch) -> Case<O>) -> Case<O> {
    let mut random = Gen::new(seed);
    let batch = Batch::random(&mut random);
    make(&mut random, Class::ALL[(seed % Class::ALL.len() as u64) as usize], batch)
}

/// Checks an operation on its cases.
pub fn check<O: Op>(name: &str, make: impl Fn(&mut Gen, Class, Batch) -> Case<O>) {
    for (i, seed) in seeds(name).into_iter().enumerate() {
        let replay = format!("replay with POLYTAPE_CASE={name}/{seed}");
        let emulate = match i % 40 {
            0..EMULATED_CPU_OF_40 => Emulate::All,
            EMULATED_CPU_OF_40..EMULATED_OF_40 => Emulate::Cuda,
            _ => Emulate::Nothing,
        };
        check_seed(seed, emulate, &make)
            .unwrap_or_else(|error| panic!("{name}: {error}\n{replay}"));
    }
}

/// Checks the case of a seed; what is wrong, if anything is.
pub fn check_seed<O: Op>(
    seed: u64,
    emulate: Emulate,
    make: impl Fn(&mut Gen, Class, Batch) -> Case<O>,
) -> Result<Vec<Passed>, String> {
    let message = |panic: Box<dyn Any + Send>| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.into())).unwrap_or_default()
    };
    let run = AssertUnwindSafe(|| {
        let case = case(seed, &make);
        let run = AssertUnwindSafe(|| check_case(&case, seed, emulate));
        catch_unwind(run).map_err(|panic| {
            let (op, class, lens) = (&case.op, case.class, &case.batch.lens);
            format!("{}\n{op:?} {class:?}, sequences of {lens:?}", message(panic))
        })
    });
    catch_unwind(run).unwrap_or_else(|panic| Err(message(panic)))
}

/// What a backend did in a case that it passed, as `verify` reports it.
#[cfg_attr(test, allow(dead_code))]
pub struct Passed {
    pub backend: &'static str,
    /// The largest error, in units of what is allowed.
    pub worst: f64,
    /// How often it ran the operation.
    pub executions: u64,
}

/// Checks the case that a fuzzer chose.
pub fn check_steered<O: Op>(mut random: Gen, make: impl Fn(&mut Gen, Class, Batch) -> Case<O>) {
    let class = random.pick(&Class::ALL);
    let batch = Batch::random(&mut random);
    let case = make(&mut random, class, batch);
    check_case(&case, random.word(), Emulate::Cuda);
}

/// Of the size of a product of two factors that are two bf16 each: these lose up to 2^-17 of a number, for each factor, and
/// the product of the second parts, up to 2^-16, is left out.
const OF_TWO_PARTS: f64 = 1.0 / 32_768.0;

fn check_case<O: Op>(case: &Case<O>, seed: u64, emulate: Emulate) -> Vec<Passed> {
    let mut passed = Vec::new();
    for compute in [Dtype::F32, Dtype::Bf16] {
        let own_weights = case.inputs.rounded(compute);
        let own_answer = answer(case, &own_weights);
        let less_exact = |inputs: &Inputs, (expected, mut tolerance): Answer| {
            let more = case.op.rounding_on_tiles(&case.batch, inputs, &expected);
            widen(&mut tolerance, more.into_iter().flatten());
            (expected, tolerance)
        };
        // A GPU keeps the base in the compute type.
        let rounded = (compute == Dtype::Bf16).then(|| {
            let inputs = own_weights.with_weights_in(compute);
            let (expected, mut tolerance) = answer(case, &inputs);
            if case.op.splits_operands() {
                let units = OF_TWO_PARTS / (6.0 * U);
                tolerance.iter_mut().flatten().for_each(|bound| *bound *= units);
            }
            let answer = less_exact(&inputs, (expected, tolerance));
            (inputs, answer)
        });
        let on_tiles = (compute == Dtype::Bf16).then(|| {
            let (expected, mut tolerance) = own_answer.clone();
            if let Some(split) = case.op.split_on_tiles(&own_weights) {
                let sizes = case.op.run(&Oracle, &case.batch, &split.abs().load(&Oracle));
                let of_terms =
                    |size: Output| size.values.iter().map(|v| OF_TWO_PARTS * v).collect();
                widen(&mut tolerance, sizes.into_iter().map(of_terms));
            }
            less_exact(&own_weights, (expected, tolerance))
        });
        let subjects = subjects()
            .iter()
            .filter(|subject| subject.compute == compute && subject.emulated <= emulate);
        for subject in subjects {
            let (inputs, (expected, tolerance)) = match (&subject.variants[0], &rounded) {
                (Variant::Cuda(_), Some((inputs, answer))) => (inputs, answer),
                _ if is_on_amx(subject) => (&own_weights, on_tiles.as_ref().unwrap_or(&own_answer)),
                _ => (&own_weights, &own_answer),
            };
            let executions = Cell::new(0);
            let run = |variant: &Variant, batch: &Batch, inputs: &Inputs| {
                executions.set(executions.get() + 1);
                variant.run(&case.op, batch, inputs)
            };
            let [first, others @ ..] = &subject.variants[..] else { unreachable!() };
            let name = &subject.name;
            let found = run(first, &case.batch, inputs);
            let mut expected = expected.clone();
            if is_on_amx(subject) && case.class == Class::Special {
                // An infinity times a denormal is one on vectors, and NaN on tiles.
                let flushed =
                    case.op.run(&Oracle, &case.batch, &inputs.without_denormals().load(&Oracle));
                for ((want, flushed), found) in expected.iter_mut().zip(&flushed).zip(&found) {
                    let pairs = want.values.iter_mut().zip(&flushed.values).zip(&found.values);
                    for ((want, flushed), found) in pairs {
                        if found.is_nan() && flushed.is_nan() && want.is_infinite() {
                            *want = f64::NAN;
                        }
                    }
                }
            }
            let expected = &expected;
            if let Err(error) = compare(case.class, &found, expected, tolerance) {
                panic!("{name}: {error}");
            }
            let worst = worst(case.class, &found, expected, tolerance);
            assert_same_bits(&format!("{name}, again"), &run(first, &case.batch, inputs), &found);
            for other in others {
                let what = match other {
                    Variant::Cpu(cpu) => format!("{name}, on {} threads", cpu.n_threads()),
                    Variant::Cuda(_) => format!("{name}, once more"),
                };
                assert_same_bits(&what, &run(other, &case.batch, inputs), &found);
            }
            for (sequence, tokens) in parts(&case.batch, O::CUT, seed) {
                let batch = case.batch.only(sequence, tokens.clone());
                let alone = run(first, &batch, &inputs.only(&tokens));
                let alone: Vec<_> = alone.into_iter().filter(|output| output.per_token).collect();
                let what = format!("{name}, tokens {tokens:?} alone");
                assert_same_bits(&what, &alone, &rows_of(&found, &tokens));
            }
            passed.push(Passed { backend: name, worst, executions: executions.get() });
        }
    }
    passed
}

/// Adds to each bound.
fn widen(tolerance: &mut [Vec<f64>], more: impl Iterator<Item = Vec<f64>>) {
    for (bounds, more) in tolerance.iter_mut().zip(more) {
        bounds.iter_mut().zip(more).for_each(|(bound, more)| *bound += more);
    }
}

/// Whether it computes on the tiles of AMX what can be computed there.
fn is_on_amx(subject: &Subject) -> bool {
    matches!(&subject.variants[0], Variant::Cpu(cpu) if matches!(cpu.isa(), Isa::Amx(_)))
}

/// What the oracle says, and how far each element of a backend's may be from it.
type Answer = (Vec<Output>, Vec<Vec<f64>>);

/// What the oracle says, and how far a backend may be from it.
pub fn answer<O: Op>(case: &Case<O>, inputs: &Inputs) -> Answer {
    let expected = case.op.run(&Oracle, &case.batch, &inputs.load(&Oracle));
    let mut tolerance = case.op.tolerance(&case.batch, inputs, &expected);
    if matches!(case.class, Class::Spread | Class::Special) {
        // Where one term is as large as all others together, each later addition rounds at its
        // scale: up to 256 times in a row, a random walk of 16 * 0.58 units, four times that wide.
        tolerance.iter_mut().flatten().for_each(|bound| *bound *= 7.0);
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let perfect: Vec<_> = expected.iter().map(|output| output.rounded(dtype)).collect();
        if let Err(error) = compare(case.class, &perfect, &expected, &tolerance) {
            panic!("the harness rejects a perfect {dtype} backend: {error}");
        }
    }
    (expected, tolerance)
}

/// Some sequences and some single tokens.
fn parts(batch: &Batch, cut: Cut, seed: u64) -> Vec<(usize, Range<usize>)> {
    let mut random = Gen::new(seed);
    let with_tokens: Vec<_> = (0..batch.lens.len()).filter(|&s| batch.lens[s] > 0).collect();
    if cut == Cut::Never || with_tokens.is_empty() {
        return vec![];
    }
    let mut parts = Vec::new();
    for _ in 0..2 {
        let sequence = random.pick(&with_tokens);
        let tokens = batch.tokens_of(sequence);
        if cut == Cut::Token {
            let token = tokens.start + random.below(tokens.len());
            parts.push((sequence, token..token + 1));
        }
        parts.push((sequence, tokens));
    }
    parts
}
