//! `inspect`: what is in a model or adapter folder.

use std::{collections::BTreeMap, io::Write, path::PathBuf};

use clap::Args;
use serde_json::json;

use super::{Common, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::AdapterFiles, checkpoint::Fate, poly_config::PolyConfig,
        safetensors::write_atomically,
    },
    report::routing::{mixing_weights, mixing_weights_svg},
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
}

impl Inspect {
    pub(super) fn run(&self) -> Result<()> {
        if self.dir.join("adapter_config.json").exists() {
            return self.adapter();
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
        if self.svg.is_some() {
            return Err(Error::Usage("--svg is for adapter folders".into()));
        }
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

    fn adapter(&self) -> Result<()> {
        let files = AdapterFiles::open(&self.dir)?;
        let PolyConfig { r, n_tasks, n_skills, n_splits, .. } = files.config;
        let n_params: usize = files
            .modules
            .values()
            .map(|m| m.lora_a.values.len() + m.lora_b.values.len() + m.router_logits.len())
            .sum();
        let name = |task: usize| {
            let known = files.tasks.as_ref().and_then(|tasks| tasks.name(task as u32));
            known.map_or_else(|| task.to_string(), str::to_owned)
        };
        let mixing = mixing_weights(&files.config, &files.modules);
        if let Some(path) = &self.svg {
            let rows: Vec<String> = (0..n_tasks).map(name).collect();
            let svg = mixing_weights_svg(&files.config, &files.modules, &rows);
            write_atomically(path, |file| file.write_all(svg.as_bytes()))?;
        }
        if self.common.json {
            let tasks: BTreeMap<String, &[f64]> = (0..n_tasks)
                .map(|t| (name(t), &mixing[t * n_splits * n_skills..(t + 1) * n_splits * n_skills]))
                .collect();
            return print_json(&json!({
                "kind": "adapter", "parameters": n_params, "linears": files.modules.len(), "r": r,
                "n_tasks": n_tasks, "n_skills": n_skills, "n_splits": n_splits,
                "modules": files.modules.keys().collect::<Vec<_>>(), "mixing_weights": tasks,
            }));
        }
        print(&format!(
            "Poly adapter: {} linears, {n_params} parameters, r {r}, {n_skills} skills, {n_splits} splits, {n_tasks} tasks",
            files.modules.len()
        ))?;
        print("mixing weights, mean over the linears (a line a task, a group a split):")?;
        for task in 0..n_tasks {
            let row = &mixing[task * n_splits * n_skills..(task + 1) * n_splits * n_skills];
            let groups: Vec<String> = row
                .chunks(n_skills)
                .map(|g| g.iter().map(|w| format!("{w:.2}")).collect::<Vec<_>>().join(" "))
                .collect();
            print(&format!("  {:<24} {}", name(task), groups.join(" | ")))?;
        }
        Ok(())
    }
}
