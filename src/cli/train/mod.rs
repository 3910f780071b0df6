//! `train`: rows in, an adapter folder out.
//!
//! ```text
//! OUTPUT_DIR/adapter_config.json, adapter_model.safetensors, tasks.json   the last adapter
//! OUTPUT_DIR/best/                                                        the best by evaluation
//! OUTPUT_DIR/checkpoint-<step>/                                           to go on from there
//! OUTPUT_DIR/log.jsonl                                                    a line a step
//! OUTPUT_DIR/config.json                                                  resolved settings, versions
//! ```

pub(super) mod flags;
mod log;
pub(super) mod run;

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::{Map, Value, json};

use self::{
    flags::{Evaluating, Learning, Resumed, Saving},
    run::{Evaluator, Outcome, Plan, Run},
};
use super::{Common, OnOff, data, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        poly_config::PolyConfig, rows::Targets, safetensors::write_atomically, tasks::TaskNames,
    },
    kernels::cpu::Cpu,
    model::{
        Adapter, Model,
        dataset::{Dataset, read_rows},
        routed_lora::parse_targets,
        targets::resolve,
    },
    train::{TrainConfig, Trainer, evaluate::Decode, order::Batches},
};

#[derive(Args)]
pub(super) struct Train {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: data::DataFlags,
    /// Where the adapter, the log and the settings go.
    #[arg(long)]
    output_dir: PathBuf,
    /// Start from this adapter, with its configuration and task names.
    #[arg(long)]
    adapter_init: Option<PathBuf>,
    /// Rank of a skill [default: 8].
    #[arg(long)]
    r: Option<usize>,
    /// Tasks [default: the largest id in the data + 1].
    #[arg(long)]
    n_tasks: Option<usize>,
    /// Skills in the bank [default: 4].
    #[arg(long)]
    n_skills: Option<usize>,
    /// Splits of the feature axis: 1 is Poly, more is MHR [default: 1].
    #[arg(long)]
    n_splits: Option<usize>,
    /// Names (q,v), a regular expression, or all-linear [default: the architecture's].
    #[arg(long)]
    target_modules: Option<String>,
    /// Whether B starts at zero.
    #[arg(long)]
    init_weights: Option<OnOff>,
    #[command(flatten)]
    learning: Learning,
    #[command(flatten)]
    evaluating: Evaluating,
    #[command(flatten)]
    saving: Saving,
}

impl Train {
    pub(super) fn run(&self) -> Result<()> {
        if let (Ok(model), Ok(out)) = (self.model.canonicalize(), self.output_dir.canonicalize())
            && model == out
        {
            return Err(Error::Usage(
                "--output-dir is the model's own folder: its config.json would be replaced".into(),
            ));
        }
        let model = self.common.open_model(&self.model)?;
        let resumed = self.saving.resumed(&self.output_dir)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let rows = read_rows(&self.data.data, Targets::Required)?;
        let mut adapter = self
            .adapter(&model, resumed.as_ref(), || TaskNames::from_rows(&rows, &self.data.data))?;
        let tasks = match adapter.tasks() {
            Some(tasks) => tasks.clone(),
            None => {
                let found = TaskNames::from_rows(&rows, &self.data.data)?;
                named(&found, adapter.config().n_tasks)
            }
        };
        let encode = |rows, path: &Path| {
            let limits = &self.data.limits;
            limits.encode(rows, path, &model, tokenizer.as_ref(), Some(&tasks), Targets::Required)
        };
        let data = encode(rows, &self.data.data)?;
        if tasks.to_list().is_some() {
            adapter.set_tasks(Some(tasks.clone()));
        }
        let evaluator = match &self.evaluating.eval_data {
            Some(path) => Some(Evaluator {
                model: &model,
                data: encode(read_rows(path, Targets::Required)?, path)?,
                decoder: tokenizer.as_ref().map(|t| t as &dyn Decode),
                tasks: &tasks,
                batch_size: self.learning.batch_size as usize,
                metric: self.evaluating.metric_for_best,
            }),
            None => None,
        };

        let per_step = self.learning.per_step();
        let shuffle = self.learning.shuffle.is_on();
        let batches = Batches::new(data.examples.len(), per_step, shuffle, self.common.seed);
        let n_steps = self.learning.n_steps(batches.steps_per_epoch(), None)?;
        let config = self.learning.config(TrainConfig::default(), self.common.seed, n_steps);
        tracing::info!(
            "{} linears adapted, {} trainable parameters, {n_steps} steps of {per_step} rows",
            adapter.targets().len(),
            adapter.n_params(),
        );
        let trainer = Trainer::new(&model, adapter, config)?;
        let interrupted = run::interruption();
        let arguments = self.arguments(&trainer, &data, evaluator.as_ref().map(|e| &e.data));
        let plan = Plan {
            common: &self.common,
            evaluating: &self.evaluating,
            saving: &self.saving,
            output_dir: &self.output_dir,
            trainer,
            data: &data,
            batches,
            evaluator,
            n_steps,
            arguments: arguments.clone(),
        };
        let run = Run::start(plan, resumed.as_ref())?;
        self.write_settings(&model, n_steps, arguments)?;
        let outcome = run.go(&interrupted)?;
        self.report(&outcome, &data)
    }

    /// The adapter to start from.
    fn adapter(
        &self,
        model: &Model,
        resumed: Option<&Resumed>,
        tasks: impl FnOnce() -> Result<TaskNames>,
    ) -> Result<Adapter<Cpu>> {
        if let Some(Resumed { dir, .. }) = resumed {
            let adapter = Adapter::open(model, dir)?;
            self.check_repeated(model, &adapter, "the checkpoint")?;
            return Ok(adapter);
        }
        if let Some(dir) = &self.adapter_init {
            let adapter = Adapter::open(model, dir)?;
            self.check_repeated(model, &adapter, "--adapter-init")?;
            if self.init_weights.is_some() {
                return Err(Error::Usage(
                    "--init-weights is for a fresh adapter, not for --adapter-init".into(),
                ));
            }
            return Ok(adapter);
        }
        let tasks = tasks()?;
        if tasks.n_tasks() == 0 {
            return Err(Error::file(
                &self.data.data,
                "no row has a task or task_id: add one (0 everywhere for a single task)",
            ));
        }
        let n_tasks = self.n_tasks.unwrap_or(tasks.n_tasks());
        if n_tasks < tasks.n_tasks() {
            return Err(Error::Usage(format!(
                "--n-tasks {n_tasks} is less than the {} tasks of {}",
                tasks.n_tasks(),
                self.data.data.display()
            )));
        }
        let default = PolyConfig::default();
        let config = PolyConfig {
            task_type: Some("SEQ_2_SEQ_LM".into()),
            base_model_name_or_path: Some(self.model.display().to_string()),
            target_modules: self.target_modules.as_deref().map(parse_targets),
            init_weights: self.init_weights.is_none_or(OnOff::is_on),
            r: self.r.unwrap_or(default.r),
            n_tasks,
            n_skills: self.n_skills.unwrap_or(default.n_skills),
            n_splits: self.n_splits.unwrap_or(default.n_splits),
            ..default
        };
        Adapter::new(model, &config, self.common.seed)
    }

    /// An adapter brings its configuration; a flag that says otherwise is an error.
    fn check_repeated(&self, model: &Model, adapter: &Adapter<Cpu>, whose: &str) -> Result<()> {
        let config = adapter.config();
        let numbers = [
            ("--r", self.r, config.r),
            ("--n-tasks", self.n_tasks, config.n_tasks),
            ("--n-skills", self.n_skills, config.n_skills),
            ("--n-splits", self.n_splits, config.n_splits),
        ];
        for (flag, given, has) in numbers {
            if let Some(given) = given.filter(|&given| given != has) {
                return Err(Error::Usage(format!(
                    "{flag} {given} differs from the {has} of {whose}: leave it out"
                )));
            }
        }
        if let Some(given) = &self.target_modules {
            let asked = PolyConfig { target_modules: Some(parse_targets(given)), ..config.clone() };
            let (targets, _) = resolve(&asked, model.modules(), model.default_targets())?;
            if targets != adapter.targets() {
                return Err(Error::Usage(format!(
                    "--target-modules {given} differs from that of {whose}: leave it out"
                )));
            }
        }
        Ok(())
    }

    /// What a resumed run must share, so that it is the same run.
    fn arguments(
        &self,
        trainer: &Trainer<'_, Cpu>,
        data: &Dataset,
        eval_data: Option<&Dataset>,
    ) -> Map<String, Value> {
        let (model, config) = (trainer.model(), trainer.config());
        let backend = model.backend();
        let adapter: Value =
            serde_json::from_str(&trainer.adapter().config().to_json()).unwrap_or_default();
        let arguments = json!({
            "model_fingerprint": model.fingerprint().to_string(),
            "data_fingerprint": data.fingerprint().to_string(),
            "eval_data_fingerprint": eval_data.map(|data| data.fingerprint().to_string()),
            "isa": backend.isa().name(),
            "dtype": backend.compute_dtype().to_string(),
            "adapter": adapter,
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": self.learning.gradient_accumulation_steps,
            "learning_rate": config.learning_rate,
            "router_learning_rate": config.router_learning_rate,
            "weight_decay": config.weight_decay,
            "router_weight_decay": config.router_weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "lr_scheduler_type": format!("{:?}", config.schedule).to_lowercase(),
            "warmup_steps": config.warmup_steps,
            "router_sampling": config.router_sampling,
            "shuffle": self.learning.shuffle.is_on(),
            "dropout": config.dropout.unwrap_or(model.dropout_rate()),
            "seed": config.seed,
        });
        match arguments {
            Value::Object(arguments) => arguments,
            _ => Map::new(),
        }
    }

    /// `config.json`: the resolved settings.
    fn write_settings(
        &self,
        model: &Model,
        n_steps: u64,
        arguments: Map<String, Value>,
    ) -> Result<()> {
        let mut settings = json!({
            "polytape_version": env!("CARGO_PKG_VERSION"),
            "threads": model.backend().n_threads(),
            "model": self.model,
            "data": self.data.data,
            "eval_data": self.evaluating.eval_data,
            "adapter_init": self.adapter_init,
            "max_steps": n_steps,
            "eval_steps": self.evaluating.eval_steps,
            "metric_for_best": format!("{:?}", self.evaluating.metric_for_best),
            "early_stopping_patience": self.evaluating.early_stopping_patience,
            "early_stopping_threshold": self.evaluating.early_stopping_threshold,
            "save_steps": self.saving.save_steps,
            "save_total_limit": self.saving.save_total_limit,
            "checkpointing": self.learning.checkpointing(),
        });
        if let Value::Object(settings) = &mut settings {
            settings.extend(arguments);
        }
        let path = self.output_dir.join("config.json");
        write_atomically(&path, |file| writeln!(file, "{settings:#}"))
    }

    fn report(&self, outcome: &Outcome<'_, Cpu>, data: &Dataset) -> Result<()> {
        let out = &self.output_dir;
        let state = &outcome.state;
        let eval_loss = outcome.evaluation.as_ref().map(|e| e.overall.loss);
        let steps = outcome.trainer.steps_done();
        let final_loss = outcome.last.map(|last| last.loss);
        if self.common.json {
            return print_json(&json!({
                "steps": steps, "final_loss": final_loss, "eval_loss": eval_loss,
                "best_step": state.best_global_step, "output_dir": out,
                "n_truncated": data.n_truncated, "n_skipped": data.n_skipped,
            }));
        }
        let Some(loss) = final_loss else {
            return print(&format!(
                "nothing was left to do after step {steps}: adapter in {}",
                out.display()
            ));
        };
        let evaluated = match (eval_loss, state.best_global_step) {
            (Some(loss), Some(step)) => {
                format!(", evaluation loss {loss:.4} (best at step {step})")
            }
            _ => String::new(),
        };
        print(&format!("{steps} steps, loss {loss:.4}{evaluated}: adapter in {}", out.display()))
    }
}

/// Names for all `n_tasks` ids: those found, and an id's number where it has none. Without any name
/// the tasks stay unnamed.
fn named(found: &TaskNames, n_tasks: usize) -> TaskNames {
    if (0..n_tasks).all(|id| found.name(id as u32).is_none()) {
        return TaskNames::unnamed(n_tasks);
    }
    let filler = |id: usize| {
        let mut name = id.to_string();
        while found.id(&name).is_some() {
            name.insert(0, '_');
        }
        name
    };
    let names: Vec<String> = (0..n_tasks)
        .map(|id| found.name(id as u32).map_or_else(|| filler(id), str::to_owned))
        .collect();
    TaskNames::from_list(&names).unwrap_or_else(|_| TaskNames::unnamed(n_tasks))
}
