//! The optimiser step over the flat parameter vector, and the gradient norm.
//!
//! ```text
//! g = grad_scale * grad          m = β1 m + (1 - β1) g          v = β2 v + (1 - β2) g²
//! p = p (1 - lr decay) - lr / (1 - β1^t) * m / (sqrt(v) / sqrt(1 - β2^t) + eps)
//! ```

use std::ops::Range;

use super::{
    super::ops::*,
    Cpu, GRAIN,
    isa::{Element, LANES, Simd, SimdOp},
    math::total,
    threads::run_tasks,
    with_element,
};
use crate::tensor::Tensor;

/// A smaller moment becomes 0: without gradients it would end as a denormal number, 4 * 2^-149 for ever, and each operation on
/// those takes a hundred times as long. 2^-120, next to nothing beside the step's eps.
const LEAST: f32 = 7.523_164e-37;
/// Elements that are summed in f32 before f64 takes over.
const BLOCK: usize = 4096;

pub(super) fn sum_of_squares(cpu: &Cpu, tensor: &Tensor<Cpu>) -> f64 {
    with_element!(tensor.dtype, T => squares::<T>(cpu, tensor.items::<T>()))
}

pub(super) fn sum_of_squares_in(cpu: &Cpu, tensor: &Tensor<Cpu>, ranges: &[Range<usize>]) -> f64 {
    let values = tensor.f32s();
    ranges.iter().map(|range| squares::<f32>(cpu, &values[range.clone()])).sum()
}

fn squares<T: Element>(cpu: &Cpu, items: &[T::Item]) -> f64 {
    let mut partial = vec![0.0; items.len().div_ceil(BLOCK)];
    let of_task = GRAIN / BLOCK;
    let tasks = partial.chunks_mut(of_task).zip(items.chunks(of_task * BLOCK));
    run_tasks(tasks, |(partial, items)| {
        for (partial, x) in partial.iter_mut().zip(items.chunks(BLOCK)) {
            *partial = f64::from(cpu.isa.run(SumOfSquares::<T> { x }));
        }
    });
    partial.iter().sum()
}

struct SumOfSquares<'a, T: Element> {
    x: &'a [T::Item],
}

impl<T: Element> SimdOp for SumOfSquares<'_, T> {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let (x, tail) = self.x.as_chunks::<LANES>();
        let mut sums = [s.splat(0.0); 4];
        for four in x.chunks(4) {
            for (sum, x) in sums.iter_mut().zip(four) {
                let x = T::load(s, x);
                *sum = s.fma(x, x, *sum);
            }
        }
        let tail = T::load_part(s, tail);
        sums[3] = s.fma(tail, tail, sums[3]);
        total(s, sums)
    }
}

pub(super) fn adamw(cpu: &Cpu, args: AdamW<'_, Cpu>) {
    let AdamW { params, m, v, grads, groups, grad_scale, step, beta1, beta2, eps } = args;
    let Some(grad_scale) = grad_scale.on_host(cpu) else { return };
    let (params, m, v, grads) = (params.f32s_mut(), m.f32s_mut(), v.f32s_mut(), grads.f32s());
    assert!(params.len() == grads.len() && m.len() == grads.len() && v.len() == grads.len());
    let correction1 = 1.0 - beta1.powf(step as f64);
    let correction2 = 1.0 - beta2.powf(step as f64);
    for ParamGroup { range, lr, weight_decay } in groups {
        let (lr, weight_decay) = (f64::from(*lr), f64::from(*weight_decay));
        let factors = Factors {
            grad_scale,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            minus_rate: (-lr / correction1) as f32,
            inverse_root: (1.0 / correction2.sqrt()) as f32,
            eps,
        };
        let moments = m[range.clone()].chunks_mut(GRAIN).zip(v[range.clone()].chunks_mut(GRAIN));
        let chunks =
            params[range.clone()].chunks_mut(GRAIN).zip(grads[range.clone()].chunks(GRAIN));
        run_tasks(chunks.zip(moments), |((params, grads), (m, v))| {
            cpu.isa.run(Step { params, m, v, grads, factors });
        });
    }
}

#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    keep: f32,
    minus_rate: f32,
    inverse_root: f32,
    eps: f32,
}

struct Step<'a> {
    params: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grads: &'a [f32],
    factors: Factors,
}

impl Step<'_> {
    /// New parameters and moments of 16 elements.
    #[inline(always)]
    fn vector<S: Simd>(s: S, f: &Factors, [p, m, v, g]: [S::V; 4]) -> [S::V; 3] {
        let g = s.mul(s.splat(f.grad_scale), g);
        let m = s.fma(s.splat(f.beta1), m, s.mul(s.splat(f.one_minus_beta1), g));
        let v = s.fma(s.splat(f.beta2), v, s.mul(s.splat(f.one_minus_beta2), s.mul(g, g)));
        let (least, zero) = (s.splat(LEAST), s.splat(0.0));
        let m = s.select_lt(s.max(m, s.sub(zero, m)), least, zero, m);
        let v = s.select_lt(v, least, zero, v);
        let root = s.fma(s.sqrt(v), s.splat(f.inverse_root), s.splat(f.eps));
        let decayed = s.mul(p, s.splat(f.keep));
        [s.fma(s.splat(f.minus_rate), s.div(m, root), decayed), m, v]
    }
}

impl SimdOp for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let f = &self.factors;
        let (params, p_tail) = self.params.as_chunks_mut::<LANES>();
        let (m, m_tail) = self.m.as_chunks_mut::<LANES>();
        let (v, v_tail) = self.v.as_chunks_mut::<LANES>();
        let (grads, g_tail) = self.grads.as_chunks::<LANES>();
        for (((p, m), v), g) in params.iter_mut().zip(m).zip(v).zip(grads) {
            let new = Self::vector(s, f, [s.load(p), s.load(m), s.load(v), s.load(g)]);
            s.store(new[0], p);
            s.store(new[1], m);
            s.store(new[2], v);
        }
        let (p, m) = (s.load_part(p_tail, 0.0), s.load_part(m_tail, 0.0));
        let (v, g) = (s.load_part(v_tail, 0.0), s.load_part(g_tail, 0.0));
        let new = Self::vector(s, f, [p, m, v, g]);
        s.store_part(new[0], p_tail);
        s.store_part(new[1], m_tail);
        s.store_part(new[2], v_tail);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::{Backend, Precision},
            testing::{Random, SIZES, bits, each_cpu, same_for_any_threads},
        },
        *,
    };

    #[test]
    fn sum_of_squares_is_exact_on_integers() {
        each_cpu(|cpu| {
            for n in SIZES.into_iter().chain([4095, 4096, 4097, 50_000]) {
                let values = Random::new(n as u64).integers(n, 16);
                let want: f64 = values.iter().map(|v| v * v).sum();
                for precision in [Precision::Full, Precision::Activation] {
                    let tensor = cpu.upload(&values, 1, n, precision);
                    assert_eq!(cpu.sum_of_squares(&tensor), [want]);
                    if precision == Precision::Full {
                        let ranges = [0..n / 3, n / 2..n];
                        let some = [&values[..n / 3], &values[n / 2..]].concat();
                        let want: f64 = some.iter().map(|v| v * v).sum();
                        assert_eq!(cpu.sum_of_squares_in(&tensor, &ranges), [want]);
                    }
                }
            }
        });
    }

    /// Moments without gradients end at zero, not among denormal numbers, and a NaN stays one.
    #[test]
    fn moments_that_fade_become_zero() {
        each_cpu(|cpu| {
            let full = Precision::Full;
            let values = [1.0, -1.0, f64::NAN, 1e-36, -1e-37];
            let mut params = cpu.upload(&[1.0; 5], 1, 5, full);
            let (mut m, mut v) = (cpu.upload(&values, 1, 5, full), cpu.zeros(1, 5, full));
            let grads = cpu.zeros(1, 5, full);
            for step in 1..=900 {
                let groups = &[ParamGroup { range: 0..5, lr: 1e-3, weight_decay: 0.0 }];
                let grad_scale = GradScale::Given(1.0);
                let (params, m, v, grads) = (&mut params, &mut m, &mut v, &grads);
                let (beta1, beta2, eps) = (0.9, 0.999, 1e-8);
                cpu.adamw(AdamW {
                    params,
                    m,
                    v,
                    grads,
                    groups,
                    grad_scale,
                    step,
                    beta1,
                    beta2,
                    eps,
                });
                if step == 1 {
                    let left = cpu.download(&*m);
                    assert!((left[0] - 0.9).abs() < 1e-6 && left[3] > 0.0 && left[4] == 0.0);
                }
            }
            let left = cpu.download(&m);
            assert!(left[2].is_nan() && [0, 1, 3, 4].iter().all(|&i| left[i] == 0.0), "{left:?}");
        });
    }

    /// Three steps of two groups, against the same steps in f64; elements in no group stay.
    #[test]
    fn agrees_with_f64() {
        each_cpu(|cpu| {
            for n in SIZES {
                let full = Precision::Full;
                let mut random = Random::new(n as u64);
                let start = random.reals(n + 5);
                let mut params = cpu.upload(&start, 1, n + 5, full);
                let start = cpu.download(&params);
                let (mut m, mut v) = (cpu.zeros(1, n + 5, full), cpu.zeros(1, n + 5, full));
                let groups = [
                    ParamGroup { range: 0..n / 2, lr: 1e-3, weight_decay: 0.1 },
                    ParamGroup { range: n / 2..n, lr: 0.1, weight_decay: 0.0 },
                ];
                let (beta1, beta2, eps) = (0.9_f64, 0.999_f64, 1e-8_f32);
                let (b1, b2) = (beta1, beta2);
                let mut want: Vec<_> = start.iter().map(|&p| (p, 0.0, 0.0)).collect();
                for step in 1..=3 {
                    let grads = cpu.upload(&random.reals(n + 5), 1, n + 5, full);
                    let g = cpu.download(&grads);
                    for group in &groups {
                        let (lr, decay) = (f64::from(group.lr), f64::from(group.weight_decay));
                        for i in group.range.clone() {
                            let (p, m, v) = &mut want[i];
                            let g = 0.5 * g[i];
                            *p *= 1.0 - lr * decay;
                            *m = b1 * *m + (1.0 - b1) * g;
                            *v = b2 * *v + (1.0 - b2) * g * g;
                            let root = v.sqrt() / (1.0 - b2.powi(step)).sqrt() + f64::from(eps);
                            *p -= lr / (1.0 - b1.powi(step)) * *m / root;
                        }
                    }
                    cpu.adamw(AdamW {
                        params: &mut params,
                        m: &mut m,
                        v: &mut v,
                        grads: &grads,
                        groups: &groups,
                        grad_scale: GradScale::Given(0.5),
                        step: step as u64,
                        beta1,
                        beta2,
                        eps,
                    });
                }
                for (i, (got, (p, _, _))) in cpu.download(&params).iter().zip(&want).enumerate() {
                    assert!((got - p).abs() < 5e-7, "{cpu:?} [{i}]: {got}, not {p}");
                }
                assert_eq!(bits(&cpu.download(&params)[n..]), bits(&start[n..]));
                assert!(cpu.download(&m)[n..].iter().all(|&m| m == 0.0));
            }
        });
    }

    #[test]
    fn threads_change_nothing() {
        same_for_any_threads(|cpu| {
            let (n, full) = (100_003, Precision::Full);
            let mut random = Random::new(2);
            let mut params = cpu.upload(&random.reals(n), 1, n, full);
            let (mut m, mut v) = (cpu.zeros(1, n, full), cpu.zeros(1, n, full));
            let grads = cpu.upload(&random.reals(n), 1, n, full);
            cpu.adamw(AdamW {
                params: &mut params,
                m: &mut m,
                v: &mut v,
                grads: &grads,
                groups: &[ParamGroup { range: 0..n, lr: 1e-3, weight_decay: 0.0 }],
                grad_scale: GradScale::Given(1.0),
                step: 1,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
            });
            let mut all = cpu.download(&params);
            all.extend(cpu.sum_of_squares(&grads));
            all
        });
    }
}
