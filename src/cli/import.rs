//! `import`: plain LoRAs, or the authors' checkpoint, as an adapter.

use std::{collections::BTreeSet, path::PathBuf};

use clap::{ArgGroup, Args};
use serde_json::json;

use super::{Common, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::{open_authors, save_with_routing},
        folder::{check_free, write_folder},
        lora::LoraFiles,
        poly_config::PolyConfig,
        tasks::TaskNames,
    },
    model::{
        Adapter,
        lora::{self, Import as Plan},
        routing::{ON, Routing},
        targets,
    },
    weighting::Weighting,
};

#[derive(Args)]
#[command(group(ArgGroup::new("source").required(true).args(["lora", "authors"])))]
pub(super) struct Import {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    /// PEFT LoRA folders of this base; each becomes a skill, in this order.
    #[arg(long, num_args = 1..)]
    lora: Vec<PathBuf>,
    /// A checkpoint of the authors' code (mttl) as safetensors; scripts/convert_pickled.py makes one of a .ckpt.
    #[arg(long, conflicts_with_all = ["n_tasks", "n_splits", "one_hot"])]
    authors: Option<PathBuf>,
    /// The checkpoint was trained with module_logits_straight_through (its hyper_parameters say so).
    #[arg(long, requires = "authors", visible_alias = "module-logits-straight-through")]
    straight_through: bool,
    /// The checkpoint was trained with poly_average_correction.
    #[arg(long, requires = "authors", visible_alias = "poly-average-correction")]
    average_correction: bool,
    /// Tasks [default: as many as LoRAs].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    n_tasks: Option<u32>,
    /// Splits of the feature axis, with a mixture each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    n_splits: u32,
    /// Task i begins at LoRA i: its logit for it is this, for the others minus this. Without a number 200:
    /// that LoRA alone, and the router does not learn; 4 leaves room [default: all logits are 0, the
    /// uniform mixture].
    #[arg(long, num_args = 0..=1, default_missing_value = "200")]
    one_hot: Option<f32>,
    /// Where the adapter goes; nothing is overwritten.
    #[arg(long)]
    output_dir: PathBuf,
}

impl Import {
    pub(super) fn run(&self) -> Result<()> {
        self.common.cpu_only("import")?;
        check_free(&self.output_dir)?;
        if let Some(logit) = self.one_hot
            && !(logit > 0.0 && logit <= ON as f32)
        {
            return Err(Error::Usage(format!("--one-hot {logit}: above 0 and at most {ON}")));
        }
        let model = self.common.open_model(&self.model)?;
        let (config, modules, names, n_filled) = match &self.authors {
            Some(path) => {
                let (config, modules) = open_authors(path)?;
                let named = PolyConfig {
                    task_type: Some(model.task_type().to_owned()),
                    target_modules: Some(targets::named(modules.keys(), model.modules())),
                    weighting: Weighting {
                        straight_through: self.straight_through,
                        average_correction: self.average_correction,
                    },
                    ..config
                };
                (named, modules, None, 0)
            }
            None => {
                let loras: Vec<LoraFiles> =
                    self.lora.iter().map(LoraFiles::open).collect::<Result<_>>()?;
                let plan = Plan {
                    n_tasks: self.n_tasks.map_or(loras.len(), |n| n as usize),
                    n_splits: self.n_splits as usize,
                    one_hot: self.one_hot,
                };
                let (config, modules) = lora::imported(&model, &loras, &plan)?;
                let n_filled = loras.iter().map(|lora| modules.len() - lora.modules.len()).sum();
                let names = (self.one_hot.is_some() && plan.n_tasks == loras.len())
                    .then(|| self.folder_names())
                    .flatten();
                (config, modules, names, n_filled)
            }
        };
        let routing = Routing {
            fixed: self.one_hot.is_some_and(|logit| logit >= ON as f32),
            ..Routing::default()
        };
        write_folder(&self.output_dir, |dir| {
            save_with_routing(dir, &config, &modules, names.as_ref(), routing.to_json())?;
            // What was written is read again: of this base, whole, and all of it finite.
            Adapter::open(&model, dir).map(|_| ())
        })?;
        let PolyConfig { r, n_tasks, n_skills, n_splits, .. } = config;
        if self.common.json {
            return print_json(&json!({
                "output_dir": self.output_dir, "linears": modules.len(), "r": r, "n_tasks": n_tasks,
                "n_skills": n_skills, "n_splits": n_splits, "filled_with_zeros": n_filled,
                "tasks": names.as_ref().and_then(TaskNames::to_list),
            }));
        }
        if n_filled > 0 {
            print(&format!(
                "{n_filled} times a LoRA does not adapt a linear that another one does: zeros, so it adds nothing there"
            ))?;
        }
        print(&format!(
            "{}: {} linears, r {r}, {n_skills} skills, {n_splits} splits, {n_tasks} tasks",
            self.output_dir.display(),
            modules.len()
        ))
    }

    /// The LoRAs' folder names as names of tasks, if they differ.
    fn folder_names(&self) -> Option<TaskNames> {
        let names: Vec<String> = self
            .lora
            .iter()
            .map(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()))
            .collect::<Option<_>>()?;
        let all_differ = names.iter().collect::<BTreeSet<_>>().len() == names.len();
        all_differ.then(|| TaskNames::from_list(&names).ok()).flatten()
    }
}
