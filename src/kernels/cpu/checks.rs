//! What the tests of the matrix products share: awkward sizes, values, misaligned weights and bounds.

use std::sync::Arc;

use super::{Cpu, isa::Isa};
use crate::{
    dtype::Dtype,
    kernels::{
        Backend, Precision,
        ops::{Dropout, Key, Segments, TokenKey},
        philox::Purpose,
    },
    tensor::{Frozen, Tensor},
};

/// Sizes around tiles, lanes, panels and blocks.
pub(super) const AWKWARD: [usize; 16] = [0, 1, 2, 5, 6, 7, 11, 12, 13, 16, 17, 31, 33, 96, 97, 255];

/// Reproducible test data.
pub(super) struct Data {
    key: Key,
    drawn: u64,
    /// Small integers, whose sums are exact in any order; else reals.
    pub(super) exact: bool,
}

impl Data {
    pub(super) fn new(seed: u64, exact: bool) -> Self {
        Self { key: Key::new(seed, Purpose::Data, 0), drawn: 0, exact }
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.drawn += 1;
        self.key.word(self.drawn) as usize % n
    }

    pub(super) fn pick(&mut self, from: &[usize]) -> usize {
        from[self.below(from.len())]
    }

    pub(super) fn value(&mut self) -> f64 {
        self.drawn += 1;
        let u = f64::from(self.key.uniform(self.drawn));
        if self.exact { (u * 9.0).floor() - 4.0 } else { 2.0 * u - 1.0 }
    }

    pub(super) fn tensor(
        &mut self,
        cpu: &Cpu,
        rows: usize,
        cols: usize,
        precision: Precision,
    ) -> Tensor<Cpu> {
        let values: Vec<_> = (0..rows * cols).map(|_| self.value()).collect();
        cpu.upload(&values, rows, cols, precision)
    }

    /// A weight of any type, at an odd address three times in four.
    pub(super) fn weight(&mut self, rows: usize, cols: usize) -> Frozen {
        let dtype = [Dtype::F32, Dtype::Bf16, Dtype::F16][self.below(3)];
        let values: Vec<_> = (0..rows * cols).map(|_| self.value() as f32).collect();
        let aligned = Frozen::from_f32(&values, rows, cols, dtype);
        let offset = self.below(4);
        let mut bytes = vec![0xFF; offset];
        bytes.extend(aligned.bytes());
        let range = offset..bytes.len();
        bytes.extend([0xFF; 3]);
        Frozen::new(Arc::new(bytes), range, dtype, rows, cols)
    }

    /// Ragged segments: routing rows that come back and others without tokens.
    pub(super) fn segments(&mut self, n_tokens: usize) -> Segments {
        let n_rows = 1 + self.below(4);
        let (mut lens, mut rows, mut left) = (vec![0], vec![0], n_tokens);
        while left > 0 {
            let longest = [1, 3, 40, n_tokens][self.below(4)];
            let len = (1 + self.below(longest)).min(left);
            lens.push(len);
            rows.push(self.below(n_rows));
            left -= len;
        }
        Segments::new(&lens, &rows, n_rows + 1)
    }

    /// Half of the elements dropped, so that the others are doubled exactly.
    pub(super) fn dropout(&mut self, n_tokens: usize) -> Dropout {
        let tokens = (0..n_tokens as u32).map(|i| TokenKey { example: i / 5, position: i % 5 });
        let key = Key::new(self.drawn, Purpose::Dropout, 3);
        Dropout { p: 0.5, key, site: self.below(9) as u32, tokens: tokens.collect() }
    }
}

/// AMX in bf16, emulated where the CPU lacks it; only for tests of little work.
pub(super) fn amx() -> Option<Cpu> {
    let amx = Isa::testable().into_iter().find(|isa| matches!(isa, Isa::Amx(_)))?;
    Some(Cpu::with_isa(amx, Dtype::Bf16, 2).expect("threads start").poisoned())
}

/// Every instruction set with both compute types, on two threads, with poisoned buffers.
pub(super) fn backends() -> Vec<Cpu> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            all.push(Cpu::with_isa(isa, dtype, 2).expect("threads start").poisoned());
        }
    }
    all
}

/// The same backend with another number of threads.
pub(super) fn with_threads(cpu: &Cpu, n_threads: usize) -> Cpu {
    Cpu::with_isa(cpu.isa, cpu.compute, n_threads).expect("threads start").poisoned()
}

/// A value in f64 and the sum of its terms' magnitudes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Sized {
    pub(super) value: f64,
    pub(super) size: f64,
}

impl Sized {
    pub(super) fn add(&mut self, term: f64) {
        self.value += term;
        self.size += term.abs();
    }

    pub(super) fn add_times(&mut self, other: Self, factor: f64) {
        self.value += other.value * factor;
        self.size += other.size * factor.abs();
    }
}

/// [`check_within`] a few units of f32.
pub(super) fn check(name: &str, cpu: &Cpu, got: &Tensor<Cpu>, want: &[Sized], exact: bool) {
    check_within(4.0 * f64::powi(2.0, -24), name, cpu, got, want, exact);
}

/// [`check`] of sums with a rank term, whose factors are two bf16 each on tiles.
pub(super) fn check_with_rank(
    name: &str,
    cpu: &Cpu,
    got: &Tensor<Cpu>,
    want: &[Sized],
    exact: bool,
) {
    let on_tiles = matches!(cpu.isa, Isa::Amx(_)) && cpu.compute == Dtype::Bf16;
    let share = if on_tiles { f64::powi(2.0, -15) } else { 4.0 * f64::powi(2.0, -24) };
    check_within(share, name, cpu, got, want, exact);
}

/// Every element within a share of its size and one rounding of its type; exactly so where sums are exact.
fn check_within(share: f64, name: &str, cpu: &Cpu, got: &Tensor<Cpu>, want: &[Sized], exact: bool) {
    let unit = got.dtype().unit_roundoff();
    let got_values = cpu.download(got);
    assert_eq!(got_values.len(), want.len(), "{name}");
    for (i, (&got_value, want)) in got_values.iter().zip(want).enumerate() {
        let bound = share * want.size + unit * want.value.abs();
        let fine = if exact {
            let rounded = match got.dtype() {
                Dtype::Bf16 => half::bf16::from_f64(want.value).to_f64(),
                _ => f64::from(want.value as f32),
            };
            got_value == rounded
        } else {
            (got_value - want.value).abs() <= bound
        };
        let (row, col) = (i / got.cols(), i % got.cols());
        assert!(
            fine,
            "{name} {} {} [{row}, {col}]: {got_value}, not {} within {bound:e}",
            cpu.isa.name(),
            cpu.compute,
            want.value
        );
    }
}

/// Some rows of a tensor, in a buffer of their own.
pub(super) fn some_rows(
    cpu: &Cpu,
    tensor: &Tensor<Cpu>,
    rows: std::ops::Range<usize>,
) -> Tensor<Cpu> {
    let cols = tensor.cols();
    let values = cpu.download(tensor);
    let precision =
        if tensor.dtype() == cpu.compute { Precision::Activation } else { Precision::Full };
    cpu.upload(&values[rows.start * cols..rows.end * cols], rows.len(), cols, precision)
}

/// The bits of a tensor, so that NaN and zeros are told apart.
pub(super) fn bits(cpu: &Cpu, tensor: &Tensor<Cpu>) -> Vec<u64> {
    cpu.download(tensor).into_iter().map(f64::to_bits).collect()
}
