//! What the routers of an adapter have learned, as heat maps.
//!
//! Every adapted linear has a router of its own. [`mixing_weights`] averages them over the linears:
//! which skills a task uses. Skills of different linears have nothing in common but their number,
//! though, so that average hides what does not happen to line up. [`agreement`] does not: it
//! compares two tasks within each linear, and only then averages.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::heat_map::{HeatMap, Panel, heat_map_svg};
use crate::{
    formats::{adapter::AdapterModule, poly_config::PolyConfig},
    weighting::Weighting,
};

/// An adapter's tensors, by the path of the adapted linear.
pub type Modules = BTreeMap<String, AdapterModule>;

/// Mixing weights in inference, `[n_tasks, n_splits, n_skills]`, averaged over the adapted linears.
pub fn mixing_weights(config: &PolyConfig, modules: &Modules) -> Vec<f64> {
    let mut mean = vec![0.0; config.n_tasks * config.n_splits * config.n_skills];
    for module in modules.values() {
        let weights = weights(config, module, config.weighting);
        mean.iter_mut().zip(weights).for_each(|(mean, w)| *mean += w / modules.len() as f64);
    }
    mean
}

/// How much of their skills two tasks share, `[n_tasks, n_tasks]`: the overlap Σ_s min(w_i, w_j),
/// averaged over splits and adapted linears. 1 is the same mixture, 0 has no skill in common.
pub fn agreement(config: &PolyConfig, modules: &Modules) -> Vec<f64> {
    let &PolyConfig { n_tasks, n_splits, n_skills, .. } = config;
    let width = n_splits * n_skills;
    let mut sum = vec![0.0; n_tasks * n_tasks];
    for module in modules.values() {
        // Shares of a mixture, whether or not that is what is multiplied.
        let shares = Weighting { average_correction: false, ..config.weighting };
        let weights = weights(config, module, shares);
        for i in 0..n_tasks {
            for j in 0..n_tasks {
                let (a, b) = (&weights[i * width..][..width], &weights[j * width..][..width]);
                sum[i * n_tasks + j] += a.iter().zip(b).map(|(a, b)| a.min(*b)).sum::<f64>();
            }
        }
    }
    let n = (modules.len() * n_splits).max(1) as f64;
    sum.into_iter().map(|s| s / n).collect()
}

/// How decided the routers are: the three numbers of the authors' code, over all routers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sharpness {
    /// Mean entropy of the Bernoulli variables σ(z), in bits: 0 is decided, 1 is not at all.
    pub discreteness: f64,
    /// Share of the skills with σ(z) > 1/2.
    pub sparsity: f64,
    /// Entropy of the skills' shares of all σ(z), over its largest value: 1 where all are used alike.
    pub usage: f64,
}

/// [`Sharpness`] of some linears of an adapter, averaged over them and their splits.
pub fn sharpness<'m>(
    config: &PolyConfig,
    modules: impl IntoIterator<Item = &'m AdapterModule>,
) -> Sharpness {
    let n_skills = config.n_skills;
    let (mut entropy, mut on, mut n) = (0.0, 0.0, 0.0);
    let (mut usage, mut n_usages) = (0.0, 0.0);
    let of = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    for module in modules {
        let mut sums = vec![0.0; config.n_splits * n_skills];
        for row in module.router_logits.chunks_exact(sums.len()) {
            for (sum, &z) in sums.iter_mut().zip(row) {
                let p = 1.0 / (1.0 + (-f64::from(z)).exp());
                entropy += (of(p) + of(1.0 - p)) / std::f64::consts::LN_2;
                on += f64::from(u8::from(p > 0.5));
                n += 1.0;
                *sum += p;
            }
        }
        for split in sums.chunks_exact(n_skills) {
            let total: f64 = split.iter().sum();
            if n_skills > 1 && total > 0.0 {
                let entropy: f64 = split.iter().map(|sum| of(sum / total)).sum();
                usage += entropy / (n_skills as f64).ln();
            } else {
                usage += 1.0;
            }
            n_usages += 1.0;
        }
    }
    let mean = |sum: f64, n: f64| if n > 0.0 { sum / n } else { 0.0 };
    Sharpness {
        discreteness: mean(entropy, n),
        sparsity: mean(on, n),
        usage: mean(usage, n_usages),
    }
}

/// How many skills a mixture uses, `[n_splits, n_skills]`: the exponential of its entropy, averaged over
/// splits. One skill alone is 1, all in equal parts are n_skills.
pub fn effective_skills(config: &PolyConfig, weights: &[f64]) -> f64 {
    let of = |split: &[f64]| {
        let sum: f64 = split.iter().sum();
        let shares = split.iter().map(|w| w / sum).filter(|share| *share > 0.0);
        if sum > 0.0 { shares.map(|p| -p * p.ln()).sum::<f64>().exp() } else { 0.0 }
    };
    weights.chunks_exact(config.n_skills).map(of).sum::<f64>() / config.n_splits as f64
}

/// How alike what two skills add is, `[n_skills, n_skills]`: the cosine of the angle between their
/// products A·B (all splits of one skill), averaged over the linears where neither is zero. 1 is the
/// same direction, 0 has nothing in common, below 0 is against it.
pub fn skill_similarity(config: &PolyConfig, modules: &Modules) -> Vec<f64> {
    let n = config.n_skills;
    let (mut sum, mut count) = (vec![0.0; n * n], vec![0.0; n * n]);
    let all: Vec<Vec<f64>> =
        modules.values().collect::<Vec<_>>().into_par_iter().map(|m| products(config, m)).collect();
    for dots in all {
        for i in 0..n {
            for j in 0..n {
                let size = (dots[i * n + i] * dots[j * n + j]).sqrt();
                if size > 0.0 {
                    sum[i * n + j] += dots[i * n + j] / size;
                    count[i * n + j] += 1.0;
                }
            }
        }
    }
    sum.iter().zip(&count).map(|(sum, &n)| if n > 0.0 { sum / n } else { 0.0 }).collect()
}

/// The inner products of what a linear's skills add, `[n_skills, n_skills]`, without forming it:
/// ⟨A_s·B_s, A_t·B_t⟩ = Σ (A_sᵀ·A_t)∘(B_s·B_tᵀ).
fn products(config: &PolyConfig, module: &AdapterModule) -> Vec<f64> {
    let &PolyConfig { n_skills: n, n_splits, r, .. } = config;
    let (part_in, part_out) = (module.d_in() / n_splits, module.d_out() / n_splits);
    let mut dots = vec![0.0; n * n];
    for s in 0..n {
        for t in 0..=s {
            let mut a = vec![0.0; r * r];
            let mut b = vec![0.0; r * r];
            for q in 0..n_splits {
                let of =
                    |skill: usize, size: usize| (q * n + skill) * size..(q * n + skill + 1) * size;
                let (a_s, a_t) = (
                    &module.lora_a.values[of(s, part_in * r)],
                    &module.lora_a.values[of(t, part_in * r)],
                );
                for (row_s, row_t) in a_s.chunks_exact(r).zip(a_t.chunks_exact(r)) {
                    for (k, &x) in row_s.iter().enumerate() {
                        for (l, &y) in row_t.iter().enumerate() {
                            a[k * r + l] += f64::from(x) * f64::from(y);
                        }
                    }
                }
                let (b_s, b_t) = (
                    &module.lora_b.values[of(s, part_out * r)],
                    &module.lora_b.values[of(t, part_out * r)],
                );
                for (k, row_s) in b_s.chunks_exact(part_out).enumerate() {
                    for (l, row_t) in b_t.chunks_exact(part_out).enumerate() {
                        let dot =
                            row_s.iter().zip(row_t).map(|(&x, &y)| f64::from(x) * f64::from(y));
                        b[k * r + l] += dot.sum::<f64>();
                    }
                }
            }
            let dot = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            (dots[s * n + t], dots[t * n + s]) = (dot, dot);
        }
    }
    dots
}

/// The picture of [`skill_similarity`]; what is below 0 is as pale as 0.
pub fn skill_similarity_svg(config: &PolyConfig, modules: &Modules) -> String {
    let skills: Vec<_> = (0..config.n_skills).map(|s| format!("skill {s}")).collect();
    let panels = [Panel { name: String::new(), values: skill_similarity(config, modules) }];
    heat_map_svg(&HeatMap {
        title: "How alike what two skills add is",
        note: "cosine of their products A·B within each adapted linear, averaged; 1 on the diagonal",
        row_names: &skills,
        column_names: &skills,
        panels: &panels,
    })
}

/// One linear's mixing weights in inference, `[n_tasks, n_splits, n_skills]`.
fn weights(config: &PolyConfig, module: &AdapterModule, weighting: Weighting) -> Vec<f64> {
    (0..config.n_tasks).flat_map(|task| module.mixing_weights(task, weighting)).collect()
}

/// The picture of [`mixing_weights`]: tasks by skills, a panel a split.
pub fn mixing_weights_svg(config: &PolyConfig, modules: &Modules, task_names: &[String]) -> String {
    let &PolyConfig { n_splits, n_skills, .. } = config;
    let mean = mixing_weights(config, modules);
    let panels: Vec<_> = (0..n_splits)
        .map(|split| Panel {
            name: if n_splits > 1 { format!("split {split}") } else { String::new() },
            values: mean
                .chunks_exact(n_splits * n_skills)
                .flat_map(|task| &task[split * n_skills..][..n_skills])
                .copied()
                .collect(),
        })
        .collect();
    let skills: Vec<_> = (0..n_skills).map(|s| format!("skill {s}")).collect();
    let sums = match config.weighting.average_correction {
        true => "scaled by sqrt(n_splits / n_skills)",
        false => "a row of a panel sums to 1",
    };
    let note = format!("mean over {} adapted linears; {sums}", modules.len());
    heat_map_svg(&HeatMap {
        title: "Which skills a task uses",
        note: &note,
        row_names: task_names,
        column_names: &skills,
        panels: &panels,
    })
}

/// The picture of [`agreement`]: tasks by tasks. Darker than the rest of its row is what matters.
pub fn agreement_svg(config: &PolyConfig, modules: &Modules, task_names: &[String]) -> String {
    let panels = [Panel { name: String::new(), values: agreement(config, modules) }];
    heat_map_svg(&HeatMap {
        title: "How much of their skills two tasks share",
        note: "overlap of mixing weights within each adapted linear, averaged; 1 on the diagonal",
        row_names: task_names,
        column_names: task_names,
        panels: &panels,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::adapter::Bank;

    fn module(logits: &[f32]) -> AdapterModule {
        let bank = || Bank { shape: [2, 2, 1, 1], values: vec![0.0; 4] };
        AdapterModule { lora_a: bank(), lora_b: bank(), router_logits: logits.to_vec() }
    }

    /// Two linears whose skills are numbered the other way round: the average sees nothing, the
    /// agreement of the tasks does.
    #[test]
    fn agreement_survives_a_renumbering_of_skills() {
        let config = PolyConfig { n_tasks: 2, n_splits: 2, n_skills: 2, ..Default::default() };
        let on = 40.0_f32;
        let a = module(&[on, -on, -on, on, -on, on, -on, on]);
        let b = module(&[-on, on, on, -on, on, -on, on, -on]);
        let modules = BTreeMap::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        let mean = mixing_weights(&config, &modules);
        assert_eq!(mean.len(), 8);
        assert!(mean.iter().all(|w| (w - 0.5).abs() < 1e-9), "{mean:?}");
        // Task 0 and 1 differ in split 0 and agree in split 1, in both linears.
        let shared = agreement(&config, &modules);
        for (found, expected) in shared.iter().zip([1.0, 0.5, 0.5, 1.0]) {
            assert!((found - expected).abs() < 1e-9, "{shared:?}");
        }
    }

    #[test]
    fn sharpness_tells_decided_routers_from_others() {
        let config = PolyConfig { n_tasks: 2, n_splits: 1, n_skills: 2, ..Default::default() };
        let of = |logits: &[f32]| sharpness(&config, [&module(logits)]);
        let open = of(&[0.0; 4]);
        assert_eq!(open, Sharpness { discreteness: 1.0, sparsity: 0.0, usage: 1.0 });
        let decided = of(&[200.0, -200.0, -200.0, 200.0]);
        assert!(decided.discreteness < 1e-9, "{decided:?}");
        assert_eq!((decided.sparsity, decided.usage), (0.5, 1.0));
        let one_skill = of(&[200.0, -200.0, 200.0, -200.0]);
        assert!(one_skill.usage < 1e-9 && one_skill.sparsity == 0.5);
    }

    /// Against the products themselves, entry by entry.
    #[test]
    fn skills_are_compared_by_what_they_add() {
        let config = PolyConfig { n_splits: 2, n_skills: 3, r: 2, ..Default::default() };
        let values = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + seed) * 7919 % 23) as f32 - 11.0) / 7.0).collect()
        };
        // 6 -> 4; the third skill is minus twice the first.
        let mut lora_a = Bank { shape: [2, 3, 3, 2], values: values(36, 1) };
        let mut lora_b = Bank { shape: [2, 3, 2, 2], values: values(24, 5) };
        for q in 0..2 {
            for i in 0..6 {
                lora_a.values[q * 18 + 12 + i] = lora_a.values[q * 18 + i];
            }
            for i in 0..4 {
                lora_b.values[q * 12 + 8 + i] = -2.0 * lora_b.values[q * 12 + i];
            }
        }
        let delta = |s: usize| -> Vec<f64> {
            let entry = |i: usize, o: usize| -> f64 {
                let a = |k: usize| lora_a.values[((i / 3 * 3 + s) * 3 + i % 3) * 2 + k];
                let b = |k: usize| lora_b.values[((o / 2 * 3 + s) * 2 + k) * 2 + o % 2];
                (0..2).map(|k| f64::from(a(k)) * f64::from(b(k))).sum()
            };
            (0..6).flat_map(|i| (0..4).map(move |o| (i, o))).map(|(i, o)| entry(i, o)).collect()
        };
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let deltas: Vec<_> = (0..3).map(delta).collect();
        let module = AdapterModule { lora_a, lora_b, router_logits: vec![0.0; 6] };
        let found = skill_similarity(&config, &BTreeMap::from([("a".to_owned(), module)]));
        for s in 0..3 {
            for t in 0..3 {
                let size = dot(&deltas[s], &deltas[s]).sqrt() * dot(&deltas[t], &deltas[t]).sqrt();
                let want = dot(&deltas[s], &deltas[t]) / size;
                assert!((found[s * 3 + t] - want).abs() < 1e-9, "{s} {t}: {found:?}");
            }
        }
        assert!((found[2] + 1.0).abs() < 1e-9, "opposite");
    }

    #[test]
    fn effective_skills_count_what_is_used() {
        let config = PolyConfig { n_splits: 2, n_skills: 4, ..Default::default() };
        let near = |weights: [f64; 8], n: f64| {
            assert!((effective_skills(&config, &weights) - n).abs() < 1e-9, "{weights:?}");
        };
        near([0.25; 8], 4.0);
        near([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5], 1.5);
        near([0.0; 8], 0.0);
    }

    #[test]
    fn pictures_name_tasks_and_skills() {
        let config = PolyConfig { n_tasks: 2, n_splits: 2, n_skills: 2, ..Default::default() };
        let modules = BTreeMap::from([("a".to_owned(), module(&[0.0; 8]))]);
        let tasks = ["first".to_owned(), "second".to_owned()];
        let svg = mixing_weights_svg(&config, &modules, &tasks);
        assert!(svg.contains("<title>second, skill 1: 0.500</title>") && svg.contains("split 1"));
        assert!(agreement_svg(&config, &modules, &tasks).contains("<title>first, second: 1.000"));
    }
}
