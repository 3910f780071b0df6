//! The router: mixing weights of every routing row in every adapted linear, and their backward.
//!
//! ```text
//! p  = clamp(σ(z), ε, 1 - ε)      u' = clamp(u, ε, 1 - ε)      ℓ = ln u' - ln(1 - u') + ln p - ln(1 - p)
//! s̃ = clamp(σ(ℓ), tiny, 1 - ε)   (without noise s̃ = σ(z))     w = s̃ / n,  n = Σ_s s̃ + 1e-12
//! d_s̃ = (d_w - Σ_s w d_w) / n    d_z = d_s̃ s̃ (1 - s̃), and 0 where σ(z) or σ(ℓ) was clamped
//! ```
//!
//! [`Weighting`](crate::weighting::Weighting) has the other ways from s̃ to w.
//!
//! A few thousand numbers in plain f32, whose machine epsilon the clamps are made of: what PyTorch
//! computes.

use std::mem;

use super::{
    super::{Precision, ops::*, philox::unit},
    Cpu,
    threads::run_tasks,
};

pub(super) fn route(cpu: &Cpu, args: &Route<'_, Cpu>) -> Routing<Cpu> {
    let width = args.n_splits * args.n_skills;
    let rows = args.logits.len() * args.tasks.len();
    let mut weights = cpu.alloc(rows, width, Precision::Full);
    let mut samples = cpu.alloc(rows, width, Precision::Full);
    if rows * width == 0 {
        return Routing { weights, samples };
    }
    let all =
        weights.f32s_mut().chunks_exact_mut(width).zip(samples.f32s_mut().chunks_exact_mut(width));
    run_tasks(all.enumerate(), |(row, (weights, samples))| {
        let draws = Draws::new(args, row);
        for (sample, (value, _)) in samples.iter_mut().zip(draws.samples()) {
            *sample = value;
        }
        let splits = weights.chunks_exact_mut(args.n_skills).zip(samples.chunks(args.n_skills));
        let weigh = Weigh::new(args);
        for (weights, samples) in splits {
            let n = weigh.normalizer(samples);
            for (w, &s) in weights.iter_mut().zip(samples) {
                *w = match weigh.factor {
                    Some(factor) => weigh.value(s) * factor,
                    None => weigh.value(s) / n,
                };
            }
        }
    });
    Routing { weights, samples }
}

pub(super) fn route_backward(args: RouteBackward<'_, Cpu>) {
    let RouteBackward { forward, routing, d_weights, grads } = args;
    let width = forward.n_splits * forward.n_skills;
    if routing.weights.is_empty() {
        return;
    }
    assert_eq!(d_weights.len(), routing.weights.len());
    let (weights, samples) = (routing.weights.f32s(), routing.samples.f32s());
    let (d_weights, mut rest) = (d_weights.f32s(), grads.f32s_mut());
    let weigh = Weigh::new(forward);
    // Rows of a task, and linears that share a router, meet in the same logits: how many add up there is
    // not bounded, so they do in f64, in the order of the rows.
    let start = |row: &usize| Draws::new(forward, *row).start;
    let mut rows: Vec<_> = (0..weights.len() / width).collect();
    rows.sort_by_key(start);
    let mut end = 0;
    let tasks = rows.chunk_by(|a, b| start(a) == start(b)).map(|same| {
        let start = start(&same[0]);
        let (grads, later) = mem::take(&mut rest)[start - end..].split_at_mut(width);
        (rest, end) = (later, start + width);
        (same, grads)
    });
    run_tasks(tasks, |(same, grads)| {
        let mut sums = vec![0.0_f64; width];
        for &row in same {
            let draws = Draws::new(forward, row);
            let passes: Vec<bool> = draws.samples().map(|(_, passes)| passes).collect();
            for first in (0..width).step_by(forward.n_skills) {
                let split = row * width + first..row * width + first + forward.n_skills;
                let (weights, samples) = (&weights[split.clone()], &samples[split.clone()]);
                let d_weights = &d_weights[split];
                let n = weigh.normalizer(samples);
                let mean: f32 = weights.iter().zip(d_weights).map(|(w, d)| w * d).sum();
                for (i, col) in (first..first + forward.n_skills).enumerate() {
                    if passes[col] {
                        let d_sample = match weigh.factor {
                            Some(factor) => d_weights[i] * factor,
                            None => (d_weights[i] - mean) / n,
                        };
                        sums[col] += f64::from(d_sample * samples[i] * (1.0 - samples[i]));
                    }
                }
            }
        }
        for (grad, sum) in grads.iter_mut().zip(&sums) {
            *grad = (f64::from(*grad) + sum) as f32;
        }
    });
}

/// [`Weighting`](crate::weighting::Weighting) in f32.
struct Weigh {
    rounds: bool,
    factor: Option<f32>,
}

impl Weigh {
    fn new(args: &Route<'_, Cpu>) -> Self {
        let factor = args.weighting.factor(args.n_splits, args.n_skills);
        Self { rounds: args.weighting.straight_through, factor: factor.map(|f| f as f32) }
    }

    fn value(&self, sample: f32) -> f32 {
        match self.rounds {
            true if sample > 0.5 => 1.0,
            true if sample <= 0.5 => 0.0,
            _ => sample, // A NaN stays one.
        }
    }

    fn normalizer(&self, samples: &[f32]) -> f32 {
        let sum = samples.iter().map(|&s| self.value(s)).sum::<f32>();
        match self.rounds {
            true if sum < 1.0 => 1.0,
            true => sum,
            false => sum + 1e-12,
        }
    }
}

/// The logits and draws of one routing row in one linear.
struct Draws<'a> {
    /// Where the row's logits start in the parameters.
    start: usize,
    logits: &'a [f32],
    linear: usize,
    row: usize,
    width: usize,
    noise: Noise<'a>,
    n_rows: usize,
}

impl<'a> Draws<'a> {
    /// Of row `index` of the mixing weights.
    fn new(args: &Route<'a, Cpu>, index: usize) -> Self {
        let width = args.n_splits * args.n_skills;
        let n_rows = args.tasks.len();
        let (linear, row) = (index / n_rows, index % n_rows);
        let start = args.logits[linear] + args.tasks[row] as usize * width;
        let logits = &args.params.f32s()[start..][..width];
        Self { start, logits, linear, row, width, noise: args.noise, n_rows }
    }

    /// The uniform draws of four columns from `4 * block` on.
    fn uniforms(&self, block: usize) -> [Option<f32>; 4] {
        match self.noise {
            Noise::Off => [None; 4],
            Noise::Philox { key, examples } => {
                let counter = [block as u32, 0, examples[self.row], self.linear as u32];
                key.block(counter).map(|word| Some(unit(word)))
            }
            Noise::Given(draws) => {
                let of_row = (self.linear * self.n_rows + self.row) * self.width;
                let columns = 4 * block..self.width.min(4 * block + 4);
                let mut four = [None; 4];
                for (u, col) in four.iter_mut().zip(columns) {
                    *u = Some(draws[of_row + col] as f32);
                }
                four
            }
        }
    }

    /// By column: `s̃`, and whether the gradient passes (nothing was clamped).
    fn samples(&self) -> impl Iterator<Item = (f32, bool)> + '_ {
        self.logits.chunks(4).enumerate().flat_map(|(block, logits)| {
            logits.iter().zip(self.uniforms(block)).map(|(&z, u)| Self::sample(z, u))
        })
    }

    /// Of a logit and its draw, if there is noise.
    fn sample(z: f32, u: Option<f32>) -> (f32, bool) {
        let Some(u) = u else { return (sigmoid(z), true) };
        let (low, high) = (f32::EPSILON, 1.0 - f32::EPSILON);
        let raw_p = sigmoid(z);
        let (p, u) = (raw_p.clamp(low, high), u.clamp(low, high));
        let raw = sigmoid(u.ln() - (-u).ln_1p() + p.ln() - (-p).ln_1p());
        let passes = (low..=high).contains(&raw_p) && (f32::MIN_POSITIVE..=high).contains(&raw);
        (raw.clamp(f32::MIN_POSITIVE, high), passes)
    }
}

fn sigmoid(x: f32) -> f32 {
    let e = (-x.abs()).exp();
    if x < 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::{
                Backend,
                philox::{Key, Purpose},
            },
            testing::{Random, bits, each_cpu},
        },
        *,
    };
    use crate::{tensor::Tensor, weighting::Weighting};

    const PEFT: Weighting = Weighting { straight_through: false, average_correction: false };

    /// The golden vector of the specification: two tasks, splits and skills; ids `[1, 0]`.
    const LOGITS: [f64; 8] = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0];
    const DRAWS: [f64; 8] = [0.25, 0.5, 0.75, 0.1, 0.9, 0.6, 0.3, 0.8];
    #[rustfmt::skip]
    const EVAL: [f64; 8] = [0.622_459_331_2, 0.377_540_668_8, 0.872_752_137_0, 0.127_247_863_0,
                            0.406_154_515_0, 0.593_845_485_0, 0.233_915_296_0, 0.766_084_704_0];
    #[rustfmt::skip]
    const TRAIN: [f64; 8] = [0.484_376_287_5, 0.515_623_712_5, 0.984_333_023_6, 0.015_666_976_4,
                             0.528_463_736_0, 0.471_536_264_0, 0.123_420_865_5, 0.876_579_134_5];

    fn args<'a>(params: &'a Tensor<Cpu>, noise: Noise<'a>) -> Route<'a, Cpu> {
        Route {
            params,
            logits: &[3],
            tasks: &[1, 0],
            n_splits: 2,
            n_skills: 2,
            noise,
            weighting: PEFT,
        }
    }

    fn golden_params(cpu: &Cpu) -> Tensor<Cpu> {
        let params: Vec<f64> = [9.0; 3].into_iter().chain(LOGITS).collect();
        cpu.upload(&params, 1, 11, Precision::Full)
    }

    #[test]
    fn golden_weights() {
        each_cpu(|cpu| {
            let params = golden_params(cpu);
            for (noise, want) in [(Noise::Off, EVAL), (Noise::Given(&DRAWS), TRAIN)] {
                let got = cpu.download(&cpu.route(&args(&params, noise)).weights);
                for (got, want) in got.iter().zip(want) {
                    assert!((got - want).abs() < 3e-7, "{got}, not {want}");
                }
            }
        });
    }

    /// The forward in f64, without clamps.
    fn weights(logits: &[f64], draws: Option<&[f64]>) -> Vec<f64> {
        let samples = logits.iter().enumerate().map(|(i, z)| {
            let noise = draws.map_or(0.0, |u| (u[i] / (1.0 - u[i])).ln());
            1.0 / (1.0 + (-(z + noise)).exp())
        });
        let samples: Vec<f64> = samples.collect();
        samples.chunks(2).flat_map(|s| [s[0] / (s[0] + s[1]), s[1] / (s[0] + s[1])]).collect()
    }

    #[test]
    fn backward_is_the_difference_quotient() {
        each_cpu(|cpu| {
            let params = golden_params(cpu);
            let d_weights = [1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, 0.0];
            let d = cpu.upload(&d_weights, 2, 4, Precision::Full);
            for draws in [None, Some(&DRAWS)] {
                let noise = draws.map_or(Noise::Off, |u| Noise::Given(u));
                let forward = args(&params, noise);
                let routing = cpu.route(&forward);
                let mut grads = cpu.upload(&[1.0; 11], 1, 11, Precision::Full);
                cpu.route_backward(RouteBackward {
                    forward: &forward,
                    routing: &routing,
                    d_weights: &d,
                    grads: &mut grads,
                });
                let got = cpu.download(&grads);
                assert_eq!(got[..3], [1.0; 3]);
                for (row, task) in [1, 0].into_iter().enumerate() {
                    let draws = draws.map(|u| &u[4 * row..][..4]);
                    for col in 0..4 {
                        let objective = |step: f64| {
                            let mut logits = LOGITS[4 * task..][..4].to_vec();
                            logits[col] += step;
                            let weights = weights(&logits, draws);
                            (0..4).map(|i| weights[i] * d_weights[4 * row + i]).sum::<f64>()
                        };
                        let want = 1.0 + (objective(1e-5) - objective(-1e-5)) / 2e-5;
                        let got = got[3 + 4 * task + col];
                        assert!((got - want).abs() < 2e-6, "{got}, not {want}");
                    }
                }
            }
        });
    }

    #[test]
    fn clamps_bound_the_sample_and_stop_the_gradient() {
        each_cpu(|cpu| {
            // σ(z) clamped below and above, σ(ℓ) clamped above, and the smallest draw.
            let params = cpu.upload(&[-17.0, 17.0, 15.0, 0.5], 1, 4, Precision::Full);
            let draws = [0.5, 0.5, 1.0 - f64::powi(2.0, -24), 0.0];
            let (logits, tasks) = ([0], [0]);
            let forward = Route {
                params: &params,
                logits: &logits,
                tasks: &tasks,
                n_splits: 1,
                n_skills: 4,
                noise: Noise::Given(&draws),
                weighting: PEFT,
            };
            let routing = cpu.route(&forward);
            let samples = cpu.download(&routing.samples);
            let eps = f64::from(f32::EPSILON);
            assert!((samples[0] / eps - 1.0).abs() < 1e-5, "{samples:?}");
            assert_eq!(samples[2], 1.0 - eps);
            assert!(samples[3] > 0.0 && samples[3] < 3.0 * eps, "{samples:?}");
            let d_weights = cpu.upload(&[1.0, 2.0, 3.0, 40.0], 1, 4, Precision::Full);
            let mut grads = cpu.zeros(1, 4, Precision::Full);
            cpu.route_backward(RouteBackward {
                forward: &forward,
                routing: &routing,
                d_weights: &d_weights,
                grads: &mut grads,
            });
            let grads = cpu.download(&grads);
            assert_eq!(grads[..3], [0.0; 3]);
            assert!(grads[3] > 0.0);
        });
    }

    #[test]
    fn everything_off_gives_zero_weights() {
        each_cpu(|cpu| {
            let params = cpu.upload(&[-120.0, -120.0], 1, 2, Precision::Full);
            let (logits, tasks) = ([0], [0]);
            let routing = cpu.route(&Route {
                params: &params,
                logits: &logits,
                tasks: &tasks,
                n_splits: 1,
                n_skills: 2,
                noise: Noise::Off,
                weighting: PEFT,
            });
            assert_eq!(cpu.download(&routing.weights), [0.0, 0.0]);
        });
    }

    /// A row's draws depend on its example and linear alone.
    #[test]
    fn philox_draws_do_not_depend_on_the_batch() {
        each_cpu(|cpu| {
            let params = cpu.upload(&Random::new(1).reals(60), 1, 60, Precision::Full);
            let key = Key::new(7, Purpose::Router, 3);
            let run = |tasks: &[u32], examples: &[u32]| {
                let noise = Noise::Philox { key, examples };
                let (logits, n_splits, n_skills) = (&[0, 30], 2, 3);
                let weighting = PEFT;
                let params = &params;
                let args = Route { params, logits, tasks, n_splits, n_skills, noise, weighting };
                cpu.download(&cpu.route(&args).weights)
            };
            let (all, one) = (run(&[0, 4, 2], &[8, 9, 5]), run(&[4], &[9]));
            assert_eq!(bits(&all[6..12]), bits(&one[..6]));
            assert_eq!(bits(&all[24..30]), bits(&one[6..]));
            assert_ne!(run(&[4], &[8])[..6], one[..6]);
            assert!(run(&[], &[]).is_empty());
            let draws: Vec<f64> = (0..12)
                .map(|i| {
                    let (linear, col) = (i / 6, i % 6);
                    let block = key.block([col / 4, 0, 9, linear]);
                    f64::from(unit(block[col as usize % 4]))
                })
                .collect();
            let given = Route {
                params: &params,
                logits: &[0, 30],
                tasks: &[4],
                n_splits: 2,
                n_skills: 3,
                noise: Noise::Given(&draws),
                weighting: PEFT,
            };
            assert_eq!(bits(&cpu.download(&cpu.route(&given).weights)), bits(&one));
        });
    }
}
