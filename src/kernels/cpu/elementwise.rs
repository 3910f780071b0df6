//! Dropout and addition.

use std::ops::Range;

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    isa::{Element, ElementMut, LANES, Simd, SimdOp},
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

/// Columns whose dropout factors are made at once: 16 Philox blocks.
pub(super) const FACTORS: usize = 128;

/// The dropout factors (0 or the scale) of consecutive columns of a token; `cols` starts at a
/// multiple of 8.
#[inline(always)] // Or the rounds are compiled for the baseline instead of the caller's features.
pub(super) fn factors(dropout: &Dropout, token: usize, cols: Range<usize>, out: &mut [f32]) {
    assert_eq!(out.len(), cols.len());
    assert_eq!(cols.start % 8, 0, "a Philox block holds the bits of 8 columns");
    let TokenKey { example, position } = dropout.tokens[token];
    let (threshold, scale) = (dropout.threshold(), dropout.scale());
    let mut first = (cols.start / 8) as u32;
    for out in out.chunks_mut(8 * 8) {
        // Eight blocks side by side, so that the rounds run on vectors.
        let mut words = [[0; 8]; 4];
        for lane in 0..8 {
            let counter = [first.wrapping_add(lane as u32), position, example, dropout.site];
            let block = dropout.key.block(counter);
            for (words, word) in words.iter_mut().zip(block) {
                words[lane] = word;
            }
        }
        let mut all = [0.0; 64];
        for lane in 0..8 {
            for word in 0..4 {
                let bits = words[word][lane];
                let keep = |bits: u32| if bits < threshold { 0.0 } else { scale };
                all[8 * lane + 2 * word] = keep(bits & 0xFFFF);
                all[8 * lane + 2 * word + 1] = keep(bits >> 16);
            }
        }
        out.copy_from_slice(&all[..out.len()]);
        first = first.wrapping_add(8);
    }
}

/// Vector `i` of a slice, whose last one may be partial.
#[inline(always)]
pub(super) fn load<S: Simd, T: Element>(s: S, from: &[T::Item], i: usize) -> S::V {
    let (whole, tail) = from.as_chunks::<LANES>();
    match whole.get(i) {
        Some(x) => T::load(s, x), // Not `map_or_else`: intrinsics are not inlined into closures.
        None => T::load_part(s, tail),
    }
}

/// Vector `i` of a slice, whose last one may be partial.
#[inline(always)]
pub(super) fn store<S: Simd, T: ElementMut>(s: S, v: S::V, to: &mut [T::Item], i: usize) {
    let (whole, tail) = to.as_chunks_mut::<LANES>();
    match whole.get_mut(i) {
        Some(to) => T::store(s, v, to),
        None => T::store_part(s, v, tail),
    }
}

pub(super) fn dropout(cpu: &Cpu, x: &Tensor<Cpu>, dropout: &Dropout) -> Tensor<Cpu> {
    assert_eq!(dropout.tokens.len(), x.rows, "a key for each token");
    let mut y = cpu.alloc(x.rows, x.cols, Precision::Activation);
    if x.is_empty() {
        return y;
    }
    let width = x.cols;
    with_element!(x.dtype, T => {
        let rows = (GRAIN / 4 / width).max(1); // Random bits cost more than the product.
        let size = rows * width;
        let chunks = y.items_mut::<T>().chunks_mut(size).zip(x.items::<T>().chunks(size));
        run_tasks(chunks.enumerate(), |(task, (y, x))| {
            cpu.isa.run(Drop::<T> { x, dropout, first_token: task * rows, width, y });
        });
    });
    y
}

/// `y = factors * x`.
struct Drop<'a, T: ElementMut> {
    x: &'a [T::Item],
    dropout: &'a Dropout,
    first_token: usize,
    width: usize,
    y: &'a mut [T::Item],
}

impl<T: ElementMut> SimdOp for Drop<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let rows = self.x.chunks_exact(self.width).zip(self.y.chunks_exact_mut(self.width));
        for (row, (x, y)) in rows.enumerate() {
            for (block, (x, y)) in x.chunks(FACTORS).zip(y.chunks_mut(FACTORS)).enumerate() {
                let mut kept = [0.0; FACTORS];
                let kept = &mut kept[..x.len()];
                let start = block * FACTORS;
                factors(self.dropout, self.first_token + row, start..start + x.len(), kept);
                let ((x, x_tail), (kept, kept_tail)) =
                    (x.as_chunks::<LANES>(), kept.as_chunks::<LANES>());
                let (y, y_tail) = y.as_chunks_mut::<LANES>();
                for ((x, f), y) in x.iter().zip(kept).zip(y) {
                    T::store(s, s.mul(T::load(s, x), s.load(f)), y);
                }
                let f = s.load_part(kept_tail, 0.0);
                T::store_part(s, s.mul(T::load_part(s, x_tail), f), y_tail);
            }
        }
    }
}

pub(super) fn add(cpu: &Cpu, a: Tensor<Cpu>, b: &Tensor<Cpu>) -> Tensor<Cpu> {
    assert_eq!((a.rows, a.cols, a.dtype), (b.rows, b.cols, b.dtype));
    let mut sum = a.own(cpu);
    with_element!(b.dtype, T => {
        let tasks = sum.items_mut::<T>().chunks_mut(GRAIN).zip(b.items::<T>().chunks(GRAIN));
        run_tasks(tasks, |(sum, b)| cpu.isa.run(Add::<T> { sum, b }));
    });
    sum
}

/// `sum += b`.
struct Add<'a, T: ElementMut> {
    sum: &'a mut [T::Item],
    b: &'a [T::Item],
}

impl<T: ElementMut> SimdOp for Add<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (sum, sum_tail) = self.sum.as_chunks_mut::<LANES>();
        let (b, b_tail) = self.b.as_chunks::<LANES>();
        for (sum, b) in sum.iter_mut().zip(b) {
            T::store(s, s.add(T::load(s, sum), T::load(s, b)), sum);
        }
        let tail = s.add(T::load_part(s, sum_tail), T::load_part(s, b_tail));
        T::store_part(s, tail, sum_tail);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::Backend,
            testing::{
                Random, SIZES, activation, dropout_of, each_cpu, rounded, same_for_any_threads,
            },
        },
        *,
    };

    #[test]
    fn dropout_multiplies_by_its_factors() {
        each_cpu(|cpu| {
            for width in SIZES {
                for tokens in [0, 1, 5] {
                    let dropout = dropout_of(0.3, tokens);
                    let mut random = Random::new(width as u64);
                    let (x, values) = activation(cpu, &mut random, tokens, width);
                    let y = cpu.download(&cpu.dropout(&x, &dropout));
                    for (i, (y, x)) in y.iter().zip(&values).enumerate() {
                        let factor = dropout.factor(i / width, i % width);
                        let want = rounded(cpu, f64::from(*x as f32 * factor));
                        assert_eq!(*y, want, "{cpu:?} {width} [{i}]");
                    }
                }
            }
        });
    }

    #[test]
    fn factors_start_at_any_block() {
        let dropout = dropout_of(0.5, 3);
        for cols in [0..200, 8..9, 64..129, 200..216, 1024..1024] {
            let mut got = vec![f32::NAN; cols.len()];
            factors(&dropout, 2, cols.clone(), &mut got);
            let want: Vec<f32> = cols.map(|col| dropout.factor(2, col)).collect();
            assert_eq!(got, want);
        }
    }

    #[test]
    fn add_rounds_once_and_spares_shared_buffers() {
        each_cpu(|cpu| {
            for n in SIZES {
                let mut random = Random::new(n as u64);
                let (a, a_values) = activation(cpu, &mut random, 1, n);
                let (b, b_values) = activation(cpu, &mut random, 1, n);
                let held = a.clone();
                let want: Vec<f64> = a_values
                    .iter()
                    .zip(&b_values)
                    .map(|(&a, &b)| rounded(cpu, f64::from(a as f32 + b as f32)))
                    .collect();
                assert_eq!(cpu.download(&cpu.add(a, &b)), want);
                assert_eq!(cpu.download(&held), a_values);
                assert_eq!(cpu.download(&cpu.add(held, &b)), want);
            }
        });
    }

    #[test]
    fn threads_change_nothing() {
        same_for_any_threads(|cpu| {
            let mut random = Random::new(5);
            let (x, _) = activation(cpu, &mut random, 70, 1025);
            let y = cpu.dropout(&x, &dropout_of(0.1, 70));
            cpu.download(&cpu.add(y, &x))
        });
    }
}
