//! Root-mean-square norm and layer norm, forward and backward.
//!
//! ```text
//! c   = x, or x - mean(x) where it is centered (layer norm)
//! y   = c * rstd * weight + bias              rstd = 1 / sqrt(mean(c²) + eps)
//! d_x = d_residual + rstd * (g - mean(g) - c * rstd² * mean(g * c))        g = d_y * weight
//! ```
//!
//! Where it is not centered `mean(x)` and `mean(g)` are 0. A row is read twice (three times where it is
//! centered). Sums go over 64 lanes (four vectors).

use super::{
    super::{Precision, ops::*},
    Cpu, GRAIN,
    isa::{ElementMut, LANES, Simd, SimdOp},
    math::total,
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

pub(super) fn norm(cpu: &Cpu, args: Norm<'_, Cpu>) -> Normed<Cpu> {
    let Norm { x, weight, bias, centered, eps } = args;
    let mut rstd = cpu.alloc(x.rows, 1, Precision::Full);
    let mut mean = centered.then(|| cpu.alloc(x.rows, 1, Precision::Full));
    with_element!(x.dtype, T => {
        let rows = rows_of_a_task(x.cols);
        let chunks = rstd.f32s_mut().chunks_mut(rows).zip(x.items::<T>().chunks(rows * x.cols));
        match &mut mean {
            Some(mean) => {
                run_tasks(chunks.zip(mean.f32s_mut().chunks_mut(rows)), |((rstd, x), mean)| {
                    cpu.isa.run(Moments::<T> { x, eps, mean, rstd });
                });
            }
            None => run_tasks(chunks, |(rstd, x)| cpu.isa.run(Rstd::<T> { x, eps, rstd })),
        }
    });
    let stats = NormStats { mean, rstd };
    let y = norm_again(cpu, NormAgain { x, weight, bias, stats: &stats });
    Normed { y, stats }
}

pub(super) fn norm_again(cpu: &Cpu, args: NormAgain<'_, Cpu>) -> Tensor<Cpu> {
    let NormAgain { x, weight, bias, stats } = args;
    let (weight, bias) = (weight.to_f32(), bias.map(|bias| bias.to_f32()));
    assert_eq!((x.cols, x.rows), (weight.len(), stats.rstd.len()));
    assert!(bias.as_ref().is_none_or(|bias| bias.len() == x.cols));
    let mut y = cpu.alloc(x.rows, x.cols, Precision::Activation);
    with_element!(x.dtype, T => {
        let rows = rows_of_a_task(x.cols);
        let size = rows * x.cols;
        let chunks = y.items_mut::<T>().chunks_mut(size).zip(x.items::<T>().chunks(size));
        run_tasks(chunks.enumerate(), |(task, (y, x))| {
            let (weight, bias) = (&weight[..], bias.as_deref());
            let stats = RowStats::new(stats, task * rows);
            cpu.isa.run(Apply::<T> { x, weight, bias, stats, y });
        });
    });
    y
}

pub(super) fn norm_backward(cpu: &Cpu, args: NormBackward<'_, Cpu>) -> Tensor<Cpu> {
    let NormBackward { x, weight, stats, d_y, d_residual } = args;
    let weight = weight.to_f32();
    assert_eq!((x.cols, x.rows), (weight.len(), stats.rstd.len()));
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
        let inputs = x.items::<T>().chunks(size).zip(d_y.items::<T>().chunks(size));
        let chunks = d_x.items_mut::<T>().chunks_mut(size).zip(inputs);
        run_tasks(chunks.enumerate(), |(task, (d_x, (x, d_y)))| {
            let stats = RowStats::new(stats, task * rows);
            cpu.isa.run(Backward::<T> { x, weight: &weight, stats, d_y, residual, d_x });
        });
    });
    d_x
}

/// The statistics from some row on.
#[derive(Clone, Copy)]
struct RowStats<'a> {
    mean: Option<&'a [f32]>,
    rstd: &'a [f32],
}

impl<'a> RowStats<'a> {
    fn new(stats: &'a NormStats<Cpu>, first: usize) -> Self {
        let mean = stats.mean.as_ref().map(|mean| &mean.f32s()[first..]);
        Self { mean, rstd: &stats.rstd.f32s()[first..] }
    }

    /// Mean (0 where it is not centered) and `rstd` of a row.
    #[inline(always)]
    fn of(&self, row: usize) -> (f32, f32) {
        (self.mean.map_or(0.0, |mean| mean[row]), self.rstd[row])
    }
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

/// Mean and `rstd` of each row.
struct Moments<'a, T: ElementMut> {
    x: &'a [T::Item],
    eps: f32,
    mean: &'a mut [f32],
    rstd: &'a mut [f32],
}

impl<T: ElementMut> SimdOp for Moments<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let width = self.x.len() / self.rstd.len();
        let rows = self.rstd.iter_mut().zip(self.mean).zip(self.x.chunks_exact(width));
        for ((rstd, mean), x) in rows {
            let (x, tail) = x.as_chunks::<LANES>();
            let mut sums = [s.splat(0.0); 4];
            for four in x.chunks(4) {
                for (sum, x) in sums.iter_mut().zip(four) {
                    *sum = s.add(*sum, T::load(s, x));
                }
            }
            sums[3] = s.add(sums[3], T::load_part(s, tail));
            *mean = total(s, sums) / width as f32;

            let center = s.splat(*mean);
            let mut sums = [s.splat(0.0); 4];
            for four in x.chunks(4) {
                for (sum, x) in sums.iter_mut().zip(four) {
                    let c = s.sub(T::load(s, x), center);
                    *sum = s.fma(c, c, *sum);
                }
            }
            let mut c = [0.0; LANES]; // Not the distance of what is not there from the mean.
            for (c, &x) in c.iter_mut().zip(tail) {
                *c = T::get(x) - *mean;
            }
            let c = s.load(&c);
            sums[3] = s.fma(c, c, sums[3]);
            *rstd = 1.0 / (total(s, sums) / width as f32 + self.eps).sqrt();
        }
    }
}

/// `y` of each row.
struct Apply<'a, T: ElementMut> {
    x: &'a [T::Item],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    stats: RowStats<'a>,
    y: &'a mut [T::Item],
}

impl<T: ElementMut> SimdOp for Apply<'_, T> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let (weight, weight_tail) = self.weight.as_chunks::<LANES>();
        let rows = self.x.chunks_exact(width).zip(self.y.chunks_exact_mut(width));
        for (row, (x, y)) in rows.enumerate() {
            let (mean, rstd) = self.stats.of(row);
            let (mean, rstd) = (s.splat(mean), s.splat(rstd));
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (y, y_tail) = y.as_chunks_mut::<LANES>();
            let tail = s.mul(s.sub(T::load_part(s, x_tail), mean), rstd);
            let tail_weight = s.load_part(weight_tail, 0.0);
            match self.bias {
                None => {
                    for ((x, y), w) in x.iter().zip(y).zip(weight) {
                        let c = s.sub(T::load(s, x), mean);
                        T::store(s, s.mul(s.mul(c, rstd), s.load(w)), y);
                    }
                    T::store_part(s, s.mul(tail, tail_weight), y_tail);
                }
                Some(bias) => {
                    let (bias, bias_tail) = bias.as_chunks::<LANES>();
                    for (((x, y), w), b) in x.iter().zip(y).zip(weight).zip(bias) {
                        let c = s.sub(T::load(s, x), mean);
                        T::store(s, s.fma(s.mul(c, rstd), s.load(w), s.load(b)), y);
                    }
                    let bias = s.load_part(bias_tail, 0.0);
                    T::store_part(s, s.fma(tail, tail_weight, bias), y_tail);
                }
            }
        }
    }
}

/// `d_x` of each row, which holds `d_residual` where there is one.
struct Backward<'a, T: ElementMut> {
    x: &'a [T::Item],
    weight: &'a [f32],
    stats: RowStats<'a>,
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
        let centered = self.stats.mean.is_some();
        let inputs = self.x.chunks_exact(width).zip(self.d_y.chunks_exact(width));
        for (row, ((x, d_y), d_x)) in inputs.zip(self.d_x.chunks_exact_mut(width)).enumerate() {
            let (mean, rstd) = self.stats.of(row);
            let mean = s.splat(mean);
            let (x, x_tail) = x.as_chunks::<LANES>();
            let (d_y, d_y_tail) = d_y.as_chunks::<LANES>();
            let c_tail = s.sub(T::load_part(s, x_tail), mean);
            let g_tail = s.mul(T::load_part(s, d_y_tail), weight_tail);
            let (mut sums, mut sums_g) = ([s.splat(0.0); 4], [s.splat(0.0); 4]);
            for ((x, d_y), w) in x.chunks(4).zip(d_y.chunks(4)).zip(weight.chunks(4)) {
                for (i, ((x, d_y), w)) in x.iter().zip(d_y).zip(w).enumerate() {
                    let g = s.mul(T::load(s, d_y), s.load(w));
                    sums[i] = s.fma(g, s.sub(T::load(s, x), mean), sums[i]);
                    sums_g[i] = s.add(g, sums_g[i]);
                }
            }
            sums[3] = s.fma(g_tail, c_tail, sums[3]);
            sums_g[3] = s.add(g_tail, sums_g[3]);
            let minus_c = s.splat(-(rstd * rstd * (total(s, sums) / width as f32)));
            let mean_g = if centered { total(s, sums_g) / width as f32 } else { 0.0 };
            let (mean_g, rstd) = (s.splat(mean_g), s.splat(rstd));

            let (d_x, d_x_tail) = d_x.as_chunks_mut::<LANES>();
            for (((x, d_y), w), d_x) in x.iter().zip(d_y).zip(weight).zip(d_x) {
                let g = s.mul(T::load(s, d_y), s.load(w));
                let inner = s.fma(s.sub(T::load(s, x), mean), minus_c, s.sub(g, mean_g));
                let base = if self.residual { T::load(s, d_x) } else { s.splat(0.0) };
                T::store(s, s.fma(rstd, inner, base), d_x);
            }
            let inner = s.fma(c_tail, minus_c, s.sub(g_tail, mean_g));
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

    fn rms<'a>(x: &'a Tensor<Cpu>, weight: &'a Frozen) -> Norm<'a, Cpu> {
        Norm { x, weight, bias: None, centered: false, eps: EPS }
    }

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
                    let Normed { y, stats } = cpu.norm(rms(&x, &w));
                    let args = NormAgain { x: &x, weight: &w, bias: None, stats: &stats };
                    let again = cpu.norm_again(args);
                    assert_eq!(bits(&cpu.download(&y)), bits(&cpu.download(&again)));
                    let (d_y, d_y_values) = activation(cpu, &mut random, tokens, d);
                    let (d_residual, d_residual_values) = activation(cpu, &mut random, tokens, d);
                    let shared = d_residual.clone();
                    let backward = |d_residual| {
                        let (x, weight, stats, d_y) = (&x, &w, &stats, &d_y);
                        cpu.norm_backward(NormBackward { x, weight, stats, d_y, d_residual })
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
            let Normed { y, stats } = cpu.norm(rms(&x, &w));
            let mut all = cpu.download(&y);
            let row = cpu.upload(&x_values[129 * 77..129 * 78], 1, 129, Precision::Activation);
            let alone = cpu.norm(rms(&row, &w));
            assert_eq!(bits(&cpu.download(&alone.y)), bits(&all[129 * 77..129 * 78]));
            let d_x = cpu.norm_backward(NormBackward {
                x: &x,
                weight: &w,
                stats: &stats,
                d_y: &y,
                d_residual: None,
            });
            all.extend(cpu.download(&d_x));
            all
        });
    }
}
