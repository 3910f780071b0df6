//! Root-mean-square norm, forward and backward.
//!
//! ```text
//! y   = x * rstd * weight                     rstd = 1 / sqrt(mean(x²) + eps)
//! d_x = d_residual + rstd * (d_y * weight - x * rstd² * mean(d_y * weight * x))
//! ```
//!
//! A row is read twice, the second time from the cache. Sums go over 64 lanes (four vectors).

use rayon::prelude::*;

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    isa::{ElementMut, LANES, Simd, SimdOp},
    math::total,
    with_element,
};
use crate::tensor::Tensor;

pub(super) fn norm(cpu: &Cpu, args: Norm<'_, Cpu>) -> Normed<Cpu> {
    let Norm { x, weight, eps } = args;
    let mut rstd = cpu.alloc(x.rows, 1, Precision::Full);
    with_element!(x.dtype, T => {
        let rows = rows_of_a_task(x.cols);
        rstd.f32s_mut().par_chunks_mut(rows).zip(x.items::<T>().par_chunks(rows * x.cols)).for_each(
            |(rstd, x)| cpu.isa.run(Rstd::<T> { x, eps, rstd }),
        );
    });
    let y = norm_again(cpu, NormAgain { x, weight, rstd: &rstd });
    Normed { y, rstd }
}

pub(super) fn norm_again(cpu: &Cpu, args: NormAgain<'_, Cpu>) -> Tensor<Cpu> {
    let NormAgain { x, weight, rstd } = args;
    let weight = weight.to_f32();
    assert_eq!((x.cols, x.rows), (weight.len(), rstd.len()));
    let mut y = cpu.alloc(x.rows, x.cols, Precision::Activation);
    with_element!(x.dtype, T => {
        let rows = rows_of_a_task(x.cols);
        let size = rows * x.cols;
        (y.items_mut::<T>().par_chunks_mut(size), x.items::<T>().par_chunks(size))
            .into_par_iter()
            .zip(rstd.f32s().par_chunks(rows))
            .for_each(|((y, x), rstd)| cpu.isa.run(Apply::<T> { x, weight: &weight, rstd, y }));
    });
    y
}

pub(super) fn norm_backward(cpu: &Cpu, args: NormBackward<'_, Cpu>) -> Tensor<Cpu> {
    let NormBackward { x, weight, rstd, d_y, d_residual } = args;
    let weight = weight.to_f32();
    assert_eq!((x.cols, x.rows), (weight.len(), rstd.len()));
    assert_eq!((d_y.rows, d_y.cols), (x.rows, x.cols));
    let residual = d_residual.is_some();
    let mut d_x = match d_residual {
        Some(d_residual) => d_residual.own(cpu),
        None => cpu.alloc(x.rows, x.cols, Precision::Activation),
    };
    assert_eq!((d_x.rows, d_x.cols), (x.rows, x.cols));
    with_element!(x.dtype, T => {
        let rows = rows_of_a_task(x.cols);
        let size = rows * x.cols;
        (d_x.items_mut::<T>().par_chunks_mut(size), x.items::<T>().par_chunks(size))
            .into_par_iter()
            .zip((d_y.items::<T>().par_chunks(size), rstd.f32s().par_chunks(rows)))
            .for_each(|((d_x, x), (d_y, rstd))| {
                cpu.isa.run(Backward::<T> { x, weight: &weight, rstd, d_y, residual, d_x });
            });
    });
    d_x
}

fn rows_of_a_task(cols: usize) -> usize {
    assert!(cols > 0, "a norm has a width");
    (GRAIN / cols).max(1)
}

/// `rstd` of each row.
struct Rstd<'a, T: ElementMut> {
    x: &'a [T::Item],
    eps: f32,
    rstd: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Rstd<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let width = self.x.len() / self.rstd.len();
        for (rstd, x) in self.rstd.iter_mut().zip(self.x.chunks_exact(width)) {
            let (x, tail) = x.as_chunks::<LANES>();
            let mut sums = [s.splat(0.0); 4];
            for four in x.chunks(4) {
                for (sum, x) in sums.iter_mut().zip(four) {
                    let x = T::load(s, x);
                    *sum = s.fma(x, x, *sum);
                }
            }
            let tail = T::load_part(s, tail);
            sums[3] = s.fma(tail, tail, sums[3]);
            *rstd = 1.0 / (total(s, sums) / width as f32 + self.eps).sqrt();
        }
    }
}

/// `y` of each row.
struct Apply<'a, T: ElementMut> {
    x: &'a [T::Item],
    weight: &'a [f32],
    rstd: &'a [f32],
    y: &'a mut [T::Item],
}

impl<T: ElementMut> SimdOp for Apply<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width));
        for ((x, y), &rstd) in rows.zip(self.rstd) {
            let rstd = s.splat(rstd);
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (y, y_tail) = y.as_chunks_mut::<LANES>();
            for ((x, y), w) in x.iter().zip(y).zip(weight) {
                T::store(s, s.mul(s.mul(T::load(s, x), rstd), s.load(w)), y);
            }
            let x = s.mul(T::load_part(s, x_tail), rstd);
            T::store_part(s, s.mul(x, s.load_part(weight_tail, 0.0)), y_tail);
        }
    }
}

/// `d_x` of each row, which holds `d_residual` where there is one.
struct Backward<'a, T: ElementMut> {
    x: &'a [T::Item],
    weight: &'a [f32],
    rstd: &'a [f32],
    d_y: &'a [T::Item],
    residual: bool,
    d_x: &'a mut [T::Item],
}

impl<T: ElementMut> SimdOp for Backward<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        let weight_tail = s.load_part(weight_tail, 0.0);
        let inputs = self.x.chunks_exact(width).zip(self.d_y.chunks_exact(width));
        for (((x, d_y), d_x), &rstd) in inputs.zip(self.d_x.chunks_exact_mut(width)).zip(self.rstd)
        {
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (d_y, d_y_tail) = d_y.as_chunks::<LANES>();
            let (x_tail, d_y_tail) = (T::load_part(s, x_tail), T::load_part(s, d_y_tail));
            let mut sums = [s.splat(0.0); 4];
            for ((x, d_y), w) in x.chunks(4).zip(d_y.chunks(4)).zip(weight.chunks(4)) {
                for (((sum, x), d_y), w) in sums.iter_mut().zip(x).zip(d_y).zip(w) {
                    *sum = s.fma(s.mul(T::load(s, d_y), s.load(w)), T::load(s, x), *sum);
                }
            }
            sums[3] = s.fma(s.mul(d_y_tail, weight_tail), x_tail, sums[3]);
            let minus_c = s.splat(-(rstd * rstd * (total(s, sums) / width as f32)));
            let rstd = s.splat(rstd);

            let (d_x, d_x_tail) = d_x.as_chunks_mut::<LANES>();
            for (((x, d_y), w), d_x) in x.iter().zip(d_y).zip(weight).zip(d_x) {
                let inner = s.mul(T::load(s, d_y), s.load(w));
                let inner = s.fma(T::load(s, x), minus_c, inner);
                let base = if self.residual { T::load(s, d_x) } else { s.splat(0.0) };
                T::store(s, s.fma(rstd, inner, base), d_x);
            }
            let inner = s.fma(x_tail, minus_c, s.mul(d_y_tail, weight_tail));
            let base = if self.residual { T::load_part(s, d_x_tail) } else { s.splat(0.0) };
            T::store_part(s, s.fma(rstd, inner, base), d_x_tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::Backend,
            testing::{
                Random, SIZES, activation, assert_close, bits, each_cpu, same_for_any_threads,
            },
        },
        *,
    };
    use crate::{dtype::Dtype, tensor::Frozen};

    const EPS: f32 = 1e-6;

    fn weight(random: &mut Random, d: usize) -> (Frozen, Vec<f64>) {
        let values: Vec<f32> = random.reals(d).iter().map(|&v| v as f32 + 1.0).collect();
        let wide = values.iter().map(|&v| f64::from(v)).collect();
        (Frozen::from_f32(&values, 1, d, Dtype::F32), wide)
    }

    #[test]
    fn agrees_with_f64() {
        each_cpu(|cpu| {
            for d in SIZES.into_iter().filter(|&d| d > 0).chain([768]) {
                for tokens in [0, 1, 5] {
                    let mut random = Random::new((d * 8 + tokens) as u64);
                    let (x, x_values) = activation(cpu, &mut random, tokens, d);
                    let (w, w_values) = weight(&mut random, d);
                    let Normed { y, rstd } = cpu.norm(Norm { x: &x, weight: &w, eps: EPS });
                    let again = cpu.norm_again(NormAgain { x: &x, weight: &w, rstd: &rstd });
                    assert_eq!(bits(&cpu.download(&y)), bits(&cpu.download(&again)));
                    let (d_y, d_y_values) = activation(cpu, &mut random, tokens, d);
                    let (d_residual, d_residual_values) = activation(cpu, &mut random, tokens, d);
                    let shared = d_residual.clone();
                    let backward = |d_residual| {
                        let (x, weight, rstd, d_y) = (&x, &w, &rstd, &d_y);
                        cpu.norm_backward(NormBackward { x, weight, rstd, d_y, d_residual })
                    };
                    let d_x = backward(None);
                    let d_x_residual = backward(Some(d_residual));
                    assert_eq!(cpu.download(&shared), d_residual_values);

                    let (mut want, mut want_d, mut size_d) = (vec![], vec![], vec![]);
                    for (x, d_y) in x_values.chunks(d).zip(d_y_values.chunks(d)) {
                        let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
                        let rstd = 1.0 / (mean + f64::from(EPS)).sqrt();
                        let terms = (0..d).map(|i| d_y[i] * w_values[i] * x[i]);
                        let dot = terms.clone().sum::<f64>() / d as f64;
                        let dot_size = terms.map(f64::abs).sum::<f64>() / d as f64;
                        for i in 0..d {
                            want.push(x[i] * rstd * w_values[i]);
                            want_d.push(rstd * (d_y[i] * w_values[i] - x[i] * rstd * rstd * dot));
                            let size = x[i].abs() * rstd * rstd * dot_size;
                            size_d.push(rstd * ((d_y[i] * w_values[i]).abs() + size));
                        }
                    }
                    let u = f64::powi(2.0, -24);
                    assert_close(cpu, &y, &want, |i| 8.0 * u * want[i].abs());
                    assert_close(cpu, &d_x, &want_d, |i| 12.0 * u * size_d[i]);
                    let total: Vec<f64> =
                        want_d.iter().zip(&d_residual_values).map(|(a, b)| a + b).collect();
                    assert_close(cpu, &d_x_residual, &total, |i| {
                        u * (12.0 * size_d[i] + 2.0 * total[i].abs())
                    });
                }
            }
        });
    }

    #[test]
    fn threads_and_other_rows_change_nothing() {
        same_for_any_threads(|cpu| {
            let mut random = Random::new(3);
            let (x, x_values) = activation(cpu, &mut random, 300, 129);
            let (w, _) = weight(&mut random, 129);
            let Normed { y, rstd } = cpu.norm(Norm { x: &x, weight: &w, eps: EPS });
            let mut all = cpu.download(&y);
            let row = cpu.upload(&x_values[129 * 77..129 * 78], 1, 129, Precision::Activation);
            let alone = cpu.norm(Norm { x: &row, weight: &w, eps: EPS });
            assert_eq!(bits(&cpu.download(&alone.y)), bits(&all[129 * 77..129 * 78]));
            let d_x = cpu.norm_backward(NormBackward {
                x: &x,
                weight: &w,
                rstd: &rstd,
                d_y: &y,
                d_residual: None,
            });
            all.extend(cpu.download(&d_x));
            all
        });
    }
}
