//! The instruction sets of x86-64 on other CPUs, where nobody has a token of them.

use super::SimdOp;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub enum Avx2 {}

impl Avx2 {
    /// None.
    pub fn detect() -> Option<Self> {
        None
    }

    /// Never called.
    pub fn run<O: SimdOp>(self, _: O) -> O::Output {
        match self {}
    }
}

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy, Debug)]
pub enum Avx512 {}

impl Avx512 {
    /// None.
    pub fn detect() -> Option<Self> {
        None
    }

    pub(super) fn with_bf16(self) -> Option<Self> {
        match self {}
    }

    /// # Safety
    /// Nobody can keep the promise.
    #[allow(unsafe_code)]
    pub(super) unsafe fn assume(_: bool) -> Self {
        unreachable!("a CPU that is not x86-64 executes none of it")
    }

    /// Never called.
    pub fn run<O: SimdOp>(self, _: O) -> O::Output {
        match self {}
    }
}
