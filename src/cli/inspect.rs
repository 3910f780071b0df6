//! `inspect`: what is in a model or adapter folder.

use std::{collections::BTreeMap, io::Write, path::PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{Common, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::{AdapterFiles, AdapterModule},
        checkpoint::Fate,
        lora::{LoraFiles, is_lora},
        poly_config::PolyConfig,
        safetensors::write_atomically,
    },
    report::{
        dendrogram::dendrogram_svg,
        routing::{
            Sharpness, agreement, effective_skills, mixing_weights, mixing_weights_svg, sharpness,
            skill_similarity, skill_similarity_svg,
        },
    },
};

#[derive(Args)]
pub(super) struct Inspect {
    #[command(flatten)]
    pub(super) common: Common,
    /// A model or adapter folder.
    dir: PathBuf,
    /// Of an adapter: writes the task-skill heat map.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Of an adapter: writes the tree of tasks by the skills that they share.
    #[arg(long)]
    dendrogram: Option<PathBuf>,
    /// Of an adapter: writes how alike its skills are.
    #[arg(long)]
    skills: Option<PathBuf>,
    /// Of an adapter: the mixing weights of every linear, too (--json has them always).
    #[arg(long)]
    layers: bool,
}

impl Inspect {
    pub(super) fn run(&self) -> Result<()> {
        if self.dir.join("adapter_config.json").exists() {
            return if is_lora(&self.dir) { self.lora() } else { self.adapter() };
        }
        if self.dir.join("config.json").exists() {
            return self.model();
        }
        Err(Error::file(
            &self.dir,
            "neither a model folder (config.json) nor an adapter folder (adapter_config.json)",
        ))
    }

    fn model(&self) -> Result<()> {
        self.no_pictures("adapter folders")?;
        self.common.cpu_only("inspect")?;
        let model = self.common.open_model(&self.dir)?;
        let mut by_dtype: BTreeMap<String, (usize, u64, u64)> = BTreeMap::new();
        for tensor in model.tensors() {
            let entry = by_dtype.entry(tensor.info.dtype.name().to_owned()).or_default();
            entry.0 += 1;
            entry.1 += tensor.info.shape.iter().product::<usize>() as u64;
            entry.2 += tensor.info.range.len() as u64;
        }
        let ignored: Vec<String> = model
            .tensors()
            .iter()
            .filter_map(|tensor| match tensor.fate {
                Fate::Ignored(reason) => Some(format!("{} ({reason})", tensor.name)),
                Fate::Used => None,
            })
            .collect();
        let n_params: u64 = by_dtype.values().map(|(_, n, _)| n).sum();
        if self.common.json {
            return print_json(&json!({
                "kind": "model", "parameters": n_params, "config": format!("{:?}", model.config()),
                "linears": model.n_linears(), "default_targets": model.default_targets(),
                "dtypes": by_dtype.iter().map(|(k, (t, n, b))| json!({"dtype": k, "tensors": t, "parameters": n, "bytes": b})).collect::<Vec<_>>(),
                "ignored": ignored,
            }));
        }
        print(&format!("model      {:#?}", model.config()))?;
        print(&format!("parameters {n_params}"))?;
        for (dtype, (tensors, n, bytes)) in by_dtype {
            print(&format!("{dtype:<10} {tensors} tensors, {n} parameters, {} MiB", bytes >> 20))?;
        }
        print(&format!(
            "linears    {} (default targets: {})",
            model.n_linears(),
            model.default_targets().join(", ")
        ))?;
        ignored.iter().try_for_each(|name| print(&format!("ignored    {name}")))
    }

    /// A plain LoRA folder.
    fn lora(&self) -> Result<()> {
        self.no_pictures("Poly adapters")?;
        let LoraFiles { config, modules, .. } = LoraFiles::open(&self.dir)?;
        let n_params: usize = modules.values().map(|pair| pair.a.len() + pair.b.len()).sum();
        if self.common.json {
            return print_json(&json!({
                "kind": "lora", "parameters": n_params, "linears": modules.len(), "r": config.r,
                "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora,
                "modules": modules.keys().collect::<Vec<_>>(),
            }));
        }
        print(&format!(
            "plain LoRA: {} linears, {n_params} parameters, r {}, lora_alpha {}{}",
            modules.len(),
            config.r,
            config.lora_alpha,
            if config.use_rslora { ", rank-stabilised" } else { "" }
        ))
    }

    /// Refuses the flags of pictures for what has none.
    fn no_pictures(&self, whose: &str) -> Result<()> {
        let pictures =
            [("--svg", &self.svg), ("--dendrogram", &self.dendrogram), ("--skills", &self.skills)];
        match pictures.iter().find(|(_, path)| path.is_some()) {
            Some((flag, _)) => Err(Error::Usage(format!("{flag} is for {whose}"))),
            None => Ok(()),
        }
    }

    fn adapter(&self) -> Result<()> {
        let files = AdapterFiles::open(&self.dir)?;
        let (config, modules) = (&files.config, &files.modules);
        let &PolyConfig { r, n_tasks, n_skills, n_splits, .. } = config;
        let n_params: usize = modules
            .values()
            .map(|m| m.lora_a.values.len() + m.lora_b.values.len() + m.router_logits.len())
            .sum();
        let name = |task: usize| {
            let known = files.tasks.as_ref().and_then(|tasks| tasks.name(task as u32));
            known.map_or_else(|| task.to_string(), str::to_owned)
        };
        let names: Vec<String> = (0..n_tasks).map(name).collect();
        let mixing = mixing_weights(config, modules);
        let has_pairs = n_tasks <= MAX_PAIRED_TASKS;
        for (path, needs_pairs, picture) in [
            (
                &self.svg,
                false,
                &(|| mixing_weights_svg(config, modules, &names)) as &dyn Fn() -> String,
            ),
            (&self.dendrogram, true, &|| dendrogram_svg(&agreement(config, modules), &names)),
            (&self.skills, false, &|| skill_similarity_svg(config, modules)),
        ] {
            let Some(path) = path else { continue };
            if needs_pairs && !(2..=MAX_PAIRED_TASKS).contains(&n_tasks) {
                return Err(Error::Usage(format!(
                    "--dendrogram: {n_tasks} tasks; a tree has from 2 to {MAX_PAIRED_TASKS}"
                )));
            }
            let svg = picture();
            write_atomically(path, |file| file.write_all(svg.as_bytes()))?;
        }
        // Of a task in one linear: its weights, and how many skills that is.
        let in_linear = |module: &AdapterModule, task: usize| {
            let weights = module.mixing_weights(task, config.weighting);
            let effective = effective_skills(config, &weights);
            (weights, effective)
        };
        let effective = |task: usize| {
            modules.values().map(|module| in_linear(module, task).1).sum::<f64>()
                / modules.len() as f64
        };
        let sharp = |Sharpness { discreteness, sparsity, usage }| json!({"discreteness": discreteness, "sparsity": sparsity, "usage": usage});
        if self.common.json {
            let width = n_splits * n_skills;
            let tasks: BTreeMap<&str, &[f64]> = (0..n_tasks)
                .map(|t| (names[t].as_str(), &mixing[t * width..(t + 1) * width]))
                .collect();
            let used: BTreeMap<&str, f64> =
                (0..n_tasks).map(|t| (names[t].as_str(), effective(t))).collect();
            let layers: Vec<Value> = modules
                .iter()
                .map(|(path, module)| {
                    let tasks: BTreeMap<&str, Value> = (0..n_tasks)
                        .map(|t| {
                            let (weights, effective) = in_linear(module, t);
                            let said =
                                json!({"mixing_weights": weights, "effective_skills": effective});
                            (names[t].as_str(), said)
                        })
                        .collect();
                    json!({"module": path, "router": sharp(sharpness(config, [module])), "tasks": tasks})
                })
                .collect();
            let square = |values: Vec<f64>, n: usize| -> Vec<Vec<f64>> {
                values.chunks(n).map(<[f64]>::to_vec).collect()
            };
            return print_json(&json!({
                "kind": "adapter", "parameters": n_params, "linears": modules.len(), "r": r,
                "n_tasks": n_tasks, "n_skills": n_skills, "n_splits": n_splits, "tasks": names,
                "modules": modules.keys().collect::<Vec<_>>(), "mixing_weights": tasks,
                "effective_skills": used, "router": sharp(sharpness(config, modules.values())),
                "task_similarity": has_pairs.then(|| square(agreement(config, modules), n_tasks)),
                "skill_similarity": square(skill_similarity(config, modules), n_skills),
                "layers": layers,
            }));
        }
        print(&format!(
            "Poly adapter: {} linears, {n_params} parameters, r {r}, {n_skills} skills, {n_splits} splits, {n_tasks} tasks",
            modules.len()
        ))?;
        let Sharpness { discreteness, sparsity, usage } = sharpness(config, modules.values());
        print(&format!(
            "routers: mean Bernoulli entropy {discreteness:.3} bits (0: decided), {:.1} % of the skills on, usage {usage:.3} (1: all alike)",
            100.0 * sparsity
        ))?;
        let line = |name: &str, weights: &[f64], effective: f64| {
            let groups: Vec<String> = weights
                .chunks(n_skills)
                .map(|g| g.iter().map(|w| format!("{w:.2}")).collect::<Vec<_>>().join(" "))
                .collect();
            print(&format!("  {name:<24} {}   {effective:.2}", groups.join(" | ")))
        };
        print(
            "mixing weights, mean over the linears (a line a task, a group a split), and the effective number of skills:",
        )?;
        for (task, row) in mixing.chunks(n_splits * n_skills).enumerate() {
            line(&names[task], row, effective(task))?;
        }
        if self.layers {
            for (path, module) in modules {
                let Sharpness { discreteness, .. } = sharpness(config, [module]);
                print(&format!("{path}, entropy {discreteness:.3} bits:"))?;
                for (task, name) in names.iter().enumerate() {
                    let (weights, effective) = in_linear(module, task);
                    line(name, &weights, effective)?;
                }
            }
        }
        if (2..=12).contains(&n_tasks) {
            print("share of their skills that tasks have in common:")?;
            for (row, name) in agreement(config, modules).chunks(n_tasks).zip(&names) {
                let row: Vec<String> = row.iter().map(|shared| format!("{shared:.2}")).collect();
                print(&format!("  {name:<24} {}", row.join(" ")))?;
            }
        }
        Ok(())
    }
}

/// More tasks than this are not compared with each other.
const MAX_PAIRED_TASKS: usize = 1000;
