//! What the routers of an adapter have learned, as heat maps.
//!
//! Every adapted linear has a router of its own. [`mixing_weights`] averages them over the linears:
//! which skills a task uses. Skills of different linears have nothing in common but their number,
//! though, so that average hides what does not happen to line up. [`agreement`] does not: it
//! compares two tasks within each linear, and only then averages.

use std::collections::BTreeMap;

use super::heat_map::{HeatMap, Panel, heat_map_svg};
use crate::formats::{adapter::AdapterModule, poly_config::PolyConfig};

/// An adapter's tensors, by the path of the adapted linear.
pub type Modules = BTreeMap<String, AdapterModule>;

/// Mixing weights in inference, `[n_tasks, n_splits, n_skills]`, averaged over the adapted linears.
pub fn mixing_weights(config: &PolyConfig, modules: &Modules) -> Vec<f64> {
    let mut mean = vec![0.0; config.n_tasks * config.n_splits * config.n_skills];
    for module in modules.values() {
        let weights = weights(config, module);
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
        let weights = weights(config, module);
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

/// [`Sharpness`] of an adapter, averaged over its linears and splits.
pub fn sharpness(config: &PolyConfig, modules: &Modules) -> Sharpness {
    let n_skills = config.n_skills;
    let (mut entropy, mut on, mut n) = (0.0, 0.0, 0.0);
    let (mut usage, mut n_usages) = (0.0, 0.0);
    let of = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    for module in modules.values() {
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

/// One linear's mixing weights in inference, `[n_tasks, n_splits, n_skills]`.
fn weights(config: &PolyConfig, module: &AdapterModule) -> Vec<f64> {
    let mut weights: Vec<f64> =
        module.router_logits.iter().map(|&z| 1.0 / (1.0 + (-f64::from(z)).exp())).collect();
    for split in weights.chunks_exact_mut(config.n_skills) {
        let sum = split.iter().sum::<f64>() + 1e-12;
        split.iter_mut().for_each(|w| *w /= sum);
    }
    weights
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
    let note = format!("mean over {} adapted linears; a row of a panel sums to 1", modules.len());
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
        let of = |logits: &[f32]| {
            sharpness(&config, &BTreeMap::from([("a".to_owned(), module(logits))]))
        };
        let open = of(&[0.0; 4]);
        assert_eq!(open, Sharpness { discreteness: 1.0, sparsity: 0.0, usage: 1.0 });
        let decided = of(&[200.0, -200.0, -200.0, 200.0]);
        assert!(decided.discreteness < 1e-9, "{decided:?}");
        assert_eq!((decided.sparsity, decided.usage), (0.5, 1.0));
        let one_skill = of(&[200.0, -200.0, 200.0, -200.0]);
        assert!(one_skill.usage < 1e-9 && one_skill.sparsity == 0.5);
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
