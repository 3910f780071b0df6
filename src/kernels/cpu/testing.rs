//! What the kernels' tests share: awkward sizes, inputs, backends, and comparison.

use half::bf16;

use super::{
    super::{
        Backend, Precision,
        ops::{Dropout, TokenKey},
        philox::{Key, Purpose},
    },
    Cpu,
    isa::Isa,
};
use crate::{dtype::Dtype, tensor::Tensor};

/// Around multiples of the vector and the tiles.
pub(super) const SIZES: [usize; 14] = [0, 1, 2, 5, 6, 7, 15, 16, 17, 33, 63, 64, 65, 129];

/// Runs a test with every instruction set and compute type, on poisoned buffers.
pub(super) fn each_cpu(test: impl Fn(&Cpu)) {
    for isa in Isa::available() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            test(&Cpu::with_isa(isa, dtype, 2).expect("a backend").poisoned());
        }
    }
}

/// Asserts that any number of threads gives the same bits.
pub(super) fn same_for_any_threads(run: impl Fn(&Cpu) -> Vec<f64>) {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let results = [1, 2, 3].map(|n| {
            let isa = Isa::detect().expect("an instruction set");
            let cpu = Cpu::with_isa(isa, dtype, n).expect("a backend").poisoned();
            bits(&run(&cpu))
        });
        assert_eq!(results[0], results[1]);
        assert_eq!(results[0], results[2]);
    }
}

/// The bits of values, to compare them exactly.
pub(super) fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Inputs.
pub(super) struct Random {
    key: Key,
    index: u64,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self { key: Key::new(seed, Purpose::Data, 0), index: 0 }
    }

    /// Uniform in `[-1, 1)`.
    pub(super) fn reals(&mut self, n: usize) -> Vec<f64> {
        (0..n)
            .map(|_| {
                self.index += 1;
                2.0 * f64::from(self.key.uniform(self.index)) - 1.0
            })
            .collect()
    }

    /// Integers in `-most..=most`.
    pub(super) fn integers(&mut self, n: usize, most: i32) -> Vec<f64> {
        self.reals(n).iter().map(|r| (r * f64::from(most)).round()).collect()
    }
}

/// An activation of random reals, and its values as the compute type has them.
pub(super) fn activation(
    cpu: &Cpu,
    random: &mut Random,
    rows: usize,
    cols: usize,
) -> (Tensor<Cpu>, Vec<f64>) {
    let tensor = cpu.upload(&random.reals(rows * cols), rows, cols, Precision::Activation);
    let values = cpu.download(&tensor);
    (tensor, values)
}

/// A dropout of probability `p` over tokens with keys of their own.
pub(super) fn dropout_of(p: f32, tokens: usize) -> Dropout {
    let tokens = (0..tokens as u32).map(|t| TokenKey { example: t / 3, position: t % 3 + 7 });
    Dropout { p, key: Key::new(9, Purpose::Dropout, 4), site: 2, tokens: tokens.collect() }
}

/// Asserts that every element of an activation is its value `want`, rounded to the compute type, up
/// to `bound` (an absolute error each before that rounding).
pub(super) fn assert_close(
    cpu: &Cpu,
    got: &Tensor<Cpu>,
    want: &[f64],
    bound: impl Fn(usize) -> f64,
) {
    let u = got.dtype().unit_roundoff();
    let values = cpu.download(got);
    assert_eq!(values.len(), want.len());
    for (i, (&got, &want)) in values.iter().zip(want).enumerate() {
        let bound = bound(i) + u * (want.abs() + bound(i)) + 1e-37;
        let error = (got - want).abs();
        assert!(error <= bound, "{cpu:?} [{i}]: {got}, not {want}: {error:e} > {bound:e}");
    }
}

/// A value as the compute type has it.
pub(super) fn rounded(cpu: &Cpu, value: f64) -> f64 {
    match cpu.dtype(Precision::Activation) {
        Dtype::Bf16 => bf16::from_f64(value).to_f64(),
        _ => f64::from(value as f32),
    }
}
