//! What this machine can do at most: the peaks that a kernel's speed is a share of.

use std::{hint::black_box, time::Instant};

use super::{
    Cpu,
    isa::{Amx, Isa, LANES, Simd, SimdOp},
};

/// Peaks of all threads together, measured.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// f32 multiply-adds in registers, FLOP/s (an addition and a product are two).
    pub fma: f64,
    /// bf16 tile products in registers, FLOP/s; on AMX.
    pub amx: Option<f64>,
    /// Reading memory that is in no cache, bytes/s.
    pub read: f64,
    /// [`Peaks::read`] by one thread alone.
    pub read_by_one: f64,
}

/// Read by each probe of bandwidth in all: more than last-level caches have for a few cores.
const READ_BYTES: usize = 256 << 20;
/// Each peak is the best of so many tries.
const N_TRIES: usize = 5;

impl Cpu {
    /// Measures what bounds any kernel; a few tenths of a second.
    pub fn peaks(&self) -> Peaks {
        let memory = vec![1.0_f32; READ_BYTES / 4];
        let part = memory.len().div_ceil(self.n_threads());
        let read = |part: usize, whole: &[f32]| {
            let seconds = self.best(|i| {
                if let Some(mine) = whole.chunks(part).nth(i) {
                    black_box(self.isa().run(Read(mine)));
                }
            });
            (4 * whole.len()) as f64 / seconds
        };
        Peaks {
            fma: self.fma_peak(),
            amx: self.amx_peak(),
            read: read(part, &memory),
            // One thread has all of a quarter, the others have nothing.
            read_by_one: read(memory.len() / 4, &memory[..memory.len() / 4]),
        }
    }

    /// [`Peaks::fma`].
    pub fn fma_peak(&self) -> f64 {
        const N_ROUNDS: usize = 1_000_000;
        // As many sums as fit into the registers: they hide the latency.
        let (n_sums, seconds) = match self.isa() {
            Isa::Avx512(_) | Isa::Amx(_) => {
                (16, self.best(|_| black_box(self.isa().run(Fma::<16>(N_ROUNDS)))))
            }
            _ => (6, self.best(|_| black_box(self.isa().run(Fma::<6>(N_ROUNDS))))),
        };
        (2 * LANES * n_sums * N_ROUNDS * self.n_threads()) as f64 / seconds
    }

    /// [`Peaks::amx`].
    pub fn amx_peak(&self) -> Option<f64> {
        const N_ROUNDS: usize = 20_000;
        let Isa::Amx(amx) = self.isa() else { return None };
        let seconds = self.best(|_| amx.with_tiles(|tiles| tiles.spin(N_ROUNDS)));
        Some((Amx::SPIN_FLOPS * N_ROUNDS * self.n_threads()) as f64 / seconds)
    }

    /// The least seconds in which all threads did their part.
    fn best<R: Send>(&self, part: impl Fn(usize) -> R + Sync) -> f64 {
        let once = || {
            let started = Instant::now();
            self.threads.on_each(|thread| drop(part(thread)));
            started.elapsed().as_secs_f64()
        };
        (0..N_TRIES).map(|_| once()).fold(f64::INFINITY, f64::min)
    }
}

/// Independent sums of products, nothing from memory.
struct Fma<const N: usize>(usize);

impl<const N: usize> SimdOp for Fma<N> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(1.0); N];
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        for _ in 0..self.0 {
            for sum in &mut sums {
                *sum = s.fma(*sum, a, b);
            }
        }
        sums.iter().map(|&sum| s.sum(sum)).sum()
    }
}

/// A sum that is memory-bound.
struct Read<'a>(&'a [f32]);

impl SimdOp for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for chunk in self.0.as_chunks::<{ 4 * LANES }>().0 {
            for (sum, x) in sums.iter_mut().zip(chunk.as_chunks().0) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        sums.iter().map(|&sum| s.sum(sum)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn peaks_are_there_and_possible() {
        for isa in Isa::available() {
            let cpu = Cpu::with_isa(isa, Dtype::F32, 2).expect("a backend");
            let peaks = cpu.peaks();
            // A core of today makes less than 1 TFLOP/s in f32 and reads less than 1 TB/s.
            assert!(peaks.fma > 1e6 && peaks.fma < 2e12, "{isa:?}: {peaks:?}");
            assert!(peaks.read > 1e6 && peaks.read < 2e12, "{isa:?}: {peaks:?}");
            assert!(peaks.read_by_one > 1e6, "{isa:?}: {peaks:?}");
            assert_eq!(peaks.amx.is_some(), isa.name() == "amx");
        }
    }
}
