//! Several adapters on one base, as one: load them together, give each row its own, or add some up.
//!
//! ```text
//! rank     |  r of a  |  r of b  |        B of each times (sum of ranks) / (its own)
//! skill of a  A B        0                so x·Â·B̂ / (sum of ranks) is the sum of what each adds
//! skill of b  0          A B
//! task of a   its logits | off            so a task of one uses that one alone
//! ```
//!
//! No kernel knows of it: which adapters a row uses are mixing weights, and rows of different adapters
//! share a batch. Splits that differ are cut finer, to their least common multiple. A linear that an
//! adapter leaves alone has zeros for it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Mixing, routing::ON};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::{AdapterFiles, AdapterModule, Bank},
        poly_config::{PolyConfig, TargetModules},
        tasks::TaskNames,
    },
    weighting::Weighting,
};

/// One of the adapters, and its place among all.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its own configuration.
    pub config: PolyConfig,
    /// Its own tasks; none of a plain LoRA, which is the same for every task.
    pub tasks: Option<TaskNames>,
    first_task: usize,
    first_skill: usize,
}

impl Member {
    /// An adapter that is the only one.
    pub fn alone(name: String, config: PolyConfig, tasks: Option<TaskNames>) -> Self {
        Self { name, config, tasks, first_task: 0, first_skill: 0 }
    }

    /// A mixture of its own as one of all, `all` being their configuration.
    pub fn among(&self, mixing: Mixing, all: &PolyConfig) -> Mixing {
        let first = self.first_task as u32;
        let PolyConfig { n_splits, n_skills, n_tasks, .. } = self.config;
        match mixing {
            Mixing::Task(task) => Mixing::Task(first + task),
            Mixing::Blend(shares) => {
                Mixing::Blend(shares.into_iter().map(|(task, s)| (first + task, s)).collect())
            }
            Mixing::Average => {
                Mixing::Blend((first..first + n_tasks as u32).map(|task| (task, 1.0)).collect())
            }
            Mixing::Weights(weights) => {
                let finer = all.n_splits / n_splits;
                let mut spread = vec![0.0; all.n_splits * all.n_skills];
                for (q, split) in spread.chunks_exact_mut(all.n_skills).enumerate() {
                    for s in 0..n_skills {
                        let at = (q / finer * n_skills + s) % weights.len();
                        split[self.first_skill + s] = weights[at];
                    }
                }
                Mixing::Weights(spread)
            }
            Mixing::Sum(parts) => {
                Mixing::Sum(parts.into_iter().map(|part| self.among(part, all)).collect())
            }
        }
    }
}

/// Adapters of one base, with their names, as one.
///
/// # Errors
/// If two have the same name, one weighs its samples otherwise than PEFT does, two adapt a linear of other widths, or together they are too large.
pub fn united(adapters: Vec<(String, AdapterFiles)>) -> Result<(AdapterFiles, Vec<Member>)> {
    let mut names = BTreeSet::new();
    if let Some((name, _)) = adapters.iter().find(|(name, _)| !names.insert(name.clone())) {
        return Err(Error::Usage(format!(
            "two adapters are called {name:?}: give them names, --adapter NAME=DIR"
        )));
    }
    if let Some((name, _)) =
        adapters.iter().find(|(_, a)| a.config.weighting != Weighting::default())
    {
        return Err(Error::Usage(format!(
            "adapter {name:?} has straight-through rounding or the average correction, which only that adapter by itself can use: `export` its tasks as plain LoRAs"
        )));
    }
    let total = |of: fn(&PolyConfig) -> usize| adapters.iter().map(|(_, a)| of(&a.config)).sum();
    let paths: BTreeSet<&String> = adapters.iter().flat_map(|(_, a)| a.modules.keys()).collect();
    let config = PolyConfig {
        task_type: adapters.iter().find_map(|(_, a)| a.config.task_type.clone()),
        target_modules: Some(TargetModules::List(paths.iter().map(|&p| p.clone()).collect())),
        r: total(|c| c.r),
        n_tasks: total(|c| c.n_tasks),
        n_skills: total(|c| c.n_skills),
        n_splits: adapters.iter().fold(1, |n, (_, a)| lcm(n, a.config.n_splits)),
        ..PolyConfig::default()
    };
    config.validate().map_err(|error| {
        Error::Usage(format!("the adapters are too large to be used together: {error}"))
    })?;
    let mut modules: BTreeMap<String, AdapterModule> = BTreeMap::new();
    let mut members = Vec::with_capacity(adapters.len());
    let (mut first_task, mut first_skill, mut first_rank) = (0, 0, 0);
    let dir = adapters.first().map(|(_, files)| files.dir.clone()).unwrap_or_default();
    for (name, files) in adapters {
        let member = Member { name, config: files.config, tasks: None, first_task, first_skill };
        for (path, own) in &files.modules {
            let (d_in, d_out) = (own.d_in(), own.d_out());
            if d_in % config.n_splits != 0 || d_out % config.n_splits != 0 {
                return Err(Error::Usage(format!(
                    "the adapters cut {path} ({d_in} -> {d_out}) into {} splits together, which do not divide it",
                    config.n_splits
                )));
            }
            let module = modules.entry(path.clone()).or_insert_with(|| empty(&config, d_in, d_out));
            if (module.d_in(), module.d_out()) != (d_in, d_out) {
                return Err(Error::Tensors {
                    path: files.dir.clone(),
                    detail: format!("{path} has other widths than in the first adapter"),
                });
            }
            place(&config, &member, first_rank, own, module);
        }
        first_task += member.config.n_tasks;
        first_skill += member.config.n_skills;
        first_rank += member.config.r;
        let tasks = files.tasks.unwrap_or_else(|| TaskNames::unnamed(member.config.n_tasks));
        members.push(Member { tasks: Some(tasks), ..member });
    }
    let all = AdapterFiles { dir, config, modules, tasks: None, ignored: Vec::new() };
    Ok((all, members))
}

/// Zeros, and no task uses any skill.
fn empty(config: &PolyConfig, d_in: usize, d_out: usize) -> AdapterModule {
    let &PolyConfig { r, n_tasks, n_skills, n_splits, .. } = config;
    AdapterModule {
        lora_a: Bank {
            shape: [n_splits, n_skills, d_in / n_splits, r],
            values: vec![0.0; n_skills * d_in * r],
        },
        lora_b: Bank {
            shape: [n_splits, n_skills, r, d_out / n_splits],
            values: vec![0.0; n_skills * d_out * r],
        },
        router_logits: vec![-ON as f32; n_tasks * n_splits * n_skills],
    }
}

/// Puts a member's skills, rank and tasks where they belong.
fn place(
    all: &PolyConfig,
    member: &Member,
    first_rank: usize,
    own: &AdapterModule,
    module: &mut AdapterModule,
) {
    let (d_in, d_out) = (own.d_in(), own.d_out());
    let PolyConfig { r, n_tasks, n_skills, n_splits, .. } = member.config;
    let finer = all.n_splits / n_splits;
    let (part_in, part_out) = (d_in / all.n_splits, d_out / all.n_splits);
    let scale = all.r as f64 / r as f64;
    for q in 0..all.n_splits {
        // The member's own split, and where this one begins in it.
        let (own_q, at) = (q / finer, q % finer);
        for s in 0..n_skills {
            let skill = q * all.n_skills + member.first_skill + s;
            let own_skill = own_q * n_skills + s;
            for i in 0..part_in {
                let from = (own_skill * part_in * finer + at * part_in + i) * r;
                let to = (skill * part_in + i) * all.r + first_rank;
                module.lora_a.values[to..to + r]
                    .copy_from_slice(&own.lora_a.values[from..from + r]);
            }
            for k in 0..r {
                let from = (own_skill * r + k) * part_out * finer + at * part_out;
                let to = (skill * all.r + first_rank + k) * part_out;
                for o in 0..part_out {
                    let value = f64::from(own.lora_b.values[from + o]);
                    module.lora_b.values[to + o] = (scale * value) as f32;
                }
            }
            for task in 0..n_tasks {
                let width = all.n_splits * all.n_skills;
                module.router_logits[(member.first_task + task) * width + skill] =
                    own.router_logits[task * n_splits * n_skills + own_skill];
            }
        }
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    a / gcd(a, b) * b
}
