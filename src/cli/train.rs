//! `train`: rows in, an adapter folder out.
//!
//! ```text
//! OUTPUT_DIR/adapter_config.json, adapter_model.safetensors, tasks.json   the last adapter
//! OUTPUT_DIR/best/                                                        the best by evaluation
//! OUTPUT_DIR/log.jsonl                                                    a line a step
//! OUTPUT_DIR/config.json                                                  resolved settings, versions
//! ```

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{Common, OnOff, data, eval::task_name, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        poly_config::PolyConfig, rows::Targets, safetensors::write_atomically, tasks::TaskNames,
    },
    generate::{Engine, GenerateOptions},
    kernels::cpu::Cpu,
    model::{
        Adapter, Example, Model,
        dataset::{Dataset, read_rows},
        routed_lora::parse_targets,
        targets::resolve,
    },
    process::Memory,
    train::{
        Schedule, StepReport, TrainConfig, Trainer,
        evaluate::{Decode, Evaluation, evaluate},
        order,
    },
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
    /// Rows to evaluate on.
    #[arg(long)]
    eval_data: Option<PathBuf>,
    /// Evaluate every so many steps [default: at the end].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    eval_steps: Option<u64>,
    /// What decides which adapter is best.
    #[arg(long, default_value = "loss")]
    metric_for_best: Metric,
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
    /// Optimiser steps; wins over epochs.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    max_steps: Option<u64>,
    /// Passes over the data.
    #[arg(long, default_value_t = 3.0)]
    num_train_epochs: f64,
    /// Examples of a micro-batch.
    #[arg(
        long, visible_alias = "per-device-train-batch-size", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    batch_size: u32,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    gradient_accumulation_steps: u32,
    /// Learning rate of the skills (A and B).
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// Learning rate of the router.
    #[arg(long, default_value_t = 1e-1)]
    router_learning_rate: f64,
    /// Decoupled weight decay of the skills.
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f64,
    /// Decoupled weight decay of the router.
    #[arg(long, default_value_t = 0.0)]
    router_weight_decay: f64,
    /// Clip gradients to this global norm; 0: never.
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f64,
    /// How the learning rates change after warm-up.
    #[arg(long, default_value = "linear")]
    lr_scheduler_type: Scheduler,
    /// Steps in which the learning rates rise from zero.
    #[arg(long, default_value_t = 0)]
    warmup_steps: u64,
    /// Whether the router samples in training.
    #[arg(long, default_value = "on")]
    router_sampling: OnOff,
    /// Whether rows are shuffled each epoch.
    #[arg(long, default_value = "on")]
    shuffle: OnOff,
    /// Whether activations are computed again in the backward instead of kept.
    #[arg(long, default_value = "off")]
    checkpointing: OnOff,
    /// Dropout of the base [default: its configuration's dropout_rate].
    #[arg(long)]
    dropout: Option<f32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Metric {
    Loss,
    #[value(name = "exact_match", alias = "exact-match")]
    ExactMatch,
    #[value(name = "rouge_l", alias = "rouge-l")]
    RougeL,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scheduler {
    Linear,
    Cosine,
    Constant,
}

impl Metric {
    /// Larger is better.
    fn value(self, evaluation: &Evaluation) -> f64 {
        let scores = &evaluation.overall;
        match self {
            Self::Loss => -scores.loss,
            Self::ExactMatch => scores.exact_match.unwrap_or(0.0),
            Self::RougeL => scores.rouge_l.unwrap_or(0.0),
        }
    }
}

/// Evaluation rows and what scores them.
struct Evaluator<'a> {
    model: &'a Model,
    data: Dataset,
    decoder: Option<&'a dyn Decode>,
    tasks: &'a TaskNames,
    batch_size: usize,
    metric: Metric,
}

impl Evaluator<'_> {
    fn run(&self, adapter: &Adapter<Cpu>) -> Result<Evaluation> {
        let present = self.data.examples.iter().map(|example| example.task);
        let engine = Engine::new(self.model, Some(adapter), present, self.batch_size);
        let options = GenerateOptions::default();
        let generate = (self.metric != Metric::Loss).then_some(&options);
        evaluate(&engine, &self.data, generate, self.decoder, |_, example| {
            task_name(Some(self.tasks), example.task)
        })
    }
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
        let tokenizer = data::open_tokenizer(&model)?;
        let rows = read_rows(&self.data.data, Targets::Required)?;
        let mut adapter = self.adapter(&model, || TaskNames::from_rows(&rows, &self.data.data))?;
        let tasks = match adapter.tasks() {
            Some(tasks) => tasks.clone(),
            None => {
                let found = TaskNames::from_rows(&rows, &self.data.data)?;
                named(&found, adapter.config().n_tasks)
            }
        };
        let data = self.data.limits.encode(
            rows,
            &self.data.data,
            &model,
            tokenizer.as_ref(),
            Some(&tasks),
            Targets::Required,
        )?;
        if tasks.to_list().is_some() {
            adapter.set_tasks(Some(tasks.clone()));
        }
        let evaluator = match &self.eval_data {
            Some(path) => Some(Evaluator {
                model: &model,
                data: {
                    let rows = read_rows(path, Targets::Required)?;
                    let limits = &self.data.limits;
                    limits.encode(
                        rows,
                        path,
                        &model,
                        tokenizer.as_ref(),
                        Some(&tasks),
                        Targets::Required,
                    )?
                },
                decoder: tokenizer.as_ref().map(|t| t as &dyn Decode),
                tasks: &tasks,
                batch_size: self.batch_size as usize,
                metric: self.metric_for_best,
            }),
            None => None,
        };

        let per_step = self.batch_size as usize * self.gradient_accumulation_steps as usize;
        let steps_an_epoch = data.examples.len().div_ceil(per_step) as u64;
        let total = match self.max_steps {
            Some(steps) => steps,
            None if self.num_train_epochs.is_finite() && self.num_train_epochs > 0.0 => {
                (self.num_train_epochs * steps_an_epoch as f64).ceil() as u64
            }
            None => {
                return Err(Error::Usage(format!(
                    "--num-train-epochs must be above 0, not {}",
                    self.num_train_epochs
                )));
            }
        };
        let config = self.config(total);
        let n_params = adapter.n_params();
        tracing::info!(
            "{} linears adapted, {n_params} trainable parameters, {total} steps of {per_step} rows",
            adapter.targets().len()
        );
        let trainer = Trainer::new(&model, adapter, config)?;
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        // A second run in one process keeps the first one's handler; there is none here.
        let _ = ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("interrupted: saving after this step (again: exit at once)");
        });

        let mut run = Run {
            train: self,
            model: &model,
            trainer,
            data: &data,
            evaluator,
            log: Log::create(&self.output_dir)?,
            best: None,
        };
        run.remove_best()?;
        run.write_settings(total)?;
        run.steps(total, per_step, &interrupted)
    }

    /// The adapter to start from.
    fn adapter(
        &self,
        model: &Model,
        tasks: impl FnOnce() -> Result<TaskNames>,
    ) -> Result<Adapter<Cpu>> {
        if let Some(dir) = &self.adapter_init {
            let adapter = Adapter::open(model, dir)?;
            self.check_repeated(model, &adapter)?;
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

    /// `--adapter-init` brings the configuration; a flag that says otherwise is an error.
    fn check_repeated(&self, model: &Model, adapter: &Adapter<Cpu>) -> Result<()> {
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
                    "{flag} {given} differs from the {has} of --adapter-init: leave it out"
                )));
            }
        }
        if let Some(given) = &self.target_modules {
            let asked = PolyConfig { target_modules: Some(parse_targets(given)), ..config.clone() };
            let (targets, _) = resolve(&asked, model.modules(), model.default_targets())?;
            if targets != adapter.targets() {
                return Err(Error::Usage(format!(
                    "--target-modules {given} differs from that of --adapter-init: leave it out"
                )));
            }
        }
        if self.init_weights.is_some() {
            return Err(Error::Usage(
                "--init-weights is for a fresh adapter, not for --adapter-init".into(),
            ));
        }
        Ok(())
    }

    fn config(&self, max_steps: u64) -> TrainConfig {
        TrainConfig {
            learning_rate: self.learning_rate,
            router_learning_rate: self.router_learning_rate,
            weight_decay: self.weight_decay,
            router_weight_decay: self.router_weight_decay,
            max_grad_norm: self.max_grad_norm,
            schedule: match self.lr_scheduler_type {
                Scheduler::Linear => Schedule::Linear,
                Scheduler::Cosine => Schedule::Cosine,
                Scheduler::Constant => Schedule::Constant,
            },
            warmup_steps: self.warmup_steps,
            max_steps,
            batch_size: self.batch_size as usize,
            router_sampling: self.router_sampling.is_on(),
            dropout: self.dropout,
            checkpointing: self.checkpointing.is_on(),
            seed: self.common.seed,
        }
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

/// `log.jsonl`.
struct Log {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Log {
    fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let path = dir.join("log.jsonl");
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}")
            .and_then(|()| self.file.flush())
            .map_err(Error::io("write", &self.path))
    }
}

/// A run in progress.
struct Run<'a> {
    train: &'a Train,
    model: &'a Model,
    trainer: Trainer<'a, Cpu>,
    data: &'a Dataset,
    evaluator: Option<Evaluator<'a>>,
    log: Log,
    /// Metric and step of the best evaluation so far.
    best: Option<(f64, u64)>,
}

impl Run<'_> {
    fn steps(&mut self, total: u64, per_step: usize, interrupted: &AtomicBool) -> Result<()> {
        let bar = self.train.common.progress(total);
        let shuffle = self.train.shuffle.is_on();
        let mut last: Option<StepReport> = None;
        let mut evaluation = None;
        'run: for epoch in 0.. {
            let order =
                order::epoch(self.data.examples.len(), shuffle, self.train.common.seed, epoch);
            for rows in order.chunks(per_step) {
                let examples: Vec<&Example> =
                    rows.iter().map(|&i| &self.data.examples[i]).collect();
                let started = Instant::now();
                let report = match self.trainer.step(&examples) {
                    Ok(report) => report,
                    Err(error) => {
                        bar.finish_and_clear();
                        // As it was before the step; if that cannot be saved, the first error is still
                        // the one to report.
                        if let Err(second) = self.save() {
                            tracing::error!("{second}");
                        }
                        return Err(error);
                    }
                };
                let seconds = started.elapsed().as_secs_f64();
                last = Some(report);
                self.log_step(&report, seconds)?;
                bar.set_message(format!(
                    "loss {:.4} {:.0} tokens/s",
                    report.loss,
                    report.n_tokens as f64 / seconds
                ));
                bar.inc(1);
                let is_last = report.step == total;
                let due = self.train.eval_steps.is_some_and(|n| report.step.is_multiple_of(n));
                if due || is_last {
                    evaluation = self.evaluate(report.step)?;
                }
                if is_last || interrupted.load(Ordering::Relaxed) {
                    break 'run;
                }
            }
        }
        bar.finish_and_clear();
        self.save()?;
        self.model.verify_unchanged()?;
        if interrupted.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        self.report(last, evaluation)
    }

    fn log_step(&mut self, report: &StepReport, seconds: f64) -> Result<()> {
        let line = json!({
            "step": report.step,
            "loss": report.loss,
            "lr": report.lr,
            "router_lr": report.router_lr,
            "grad_norm": report.grad_norm,
            "tokens_per_s": (report.n_tokens as f64 / seconds).round(),
            "rss_mib": Memory::now().peak_rss_mib,
        });
        if self.train.common.json {
            print(&line.to_string())?;
        }
        self.log.line(&line)
    }

    fn evaluate(&mut self, step: u64) -> Result<Option<Evaluation>> {
        let Some(evaluator) = &self.evaluator else { return Ok(None) };
        let evaluation = evaluator.run(self.trainer.adapter())?;
        let scores = &evaluation.overall;
        let mut line = json!({
            "step": step, "eval_loss": scores.loss, "eval_n_rows": scores.n_rows,
            "eval_n_tokens": scores.n_tokens,
        });
        if let (Some(exact), Some(rouge)) = (scores.exact_match, scores.rouge_l) {
            line["eval_exact_match"] = json!(exact);
            line["eval_rouge_l"] = json!(rouge);
        }
        if self.train.common.json {
            print(&line.to_string())?;
        } else {
            tracing::info!("step {step}: evaluation loss {:.4}", scores.loss);
        }
        self.log.line(&line)?;
        let value = evaluator.metric.value(&evaluation);
        if value.is_finite() && self.best.is_none_or(|(best, _)| value > best) {
            self.best = Some((value, step));
            let dir = self.train.output_dir.join("best");
            self.trainer.adapter().save_peft(self.model.backend(), dir)?;
        }
        Ok(Some(evaluation))
    }

    /// The best adapter of an earlier run in this folder is not this run's.
    fn remove_best(&self) -> Result<()> {
        let best = self.train.output_dir.join("best");
        if best.join("adapter_config.json").exists() {
            fs::remove_dir_all(&best).map_err(Error::io("remove", best))?;
        }
        Ok(())
    }

    fn save(&self) -> Result<()> {
        self.trainer.adapter().save_peft(self.model.backend(), &self.train.output_dir)
    }

    fn write_settings(&self, total: u64) -> Result<()> {
        let (train, config) = (self.train, self.trainer.config());
        let backend = self.model.backend();
        let adapter: Value =
            serde_json::from_str(&self.trainer.adapter().config().to_json()).unwrap_or_default();
        let settings = json!({
            "polytape_version": env!("CARGO_PKG_VERSION"),
            "isa": backend.isa().name(),
            "dtype": backend.compute_dtype().to_string(),
            "threads": backend.n_threads(),
            "model": train.model,
            "data": train.data.data,
            "eval_data": train.eval_data,
            "adapter_init": train.adapter_init,
            "adapter": adapter,
            "max_steps": total,
            "batch_size": config.batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "learning_rate": config.learning_rate,
            "router_learning_rate": config.router_learning_rate,
            "weight_decay": config.weight_decay,
            "router_weight_decay": config.router_weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "lr_scheduler_type": format!("{:?}", config.schedule).to_lowercase(),
            "warmup_steps": config.warmup_steps,
            "router_sampling": config.router_sampling,
            "shuffle": train.shuffle.is_on(),
            "checkpointing": config.checkpointing,
            "dropout": config.dropout.unwrap_or(self.model.dropout_rate()),
            "seed": config.seed,
        });
        let path = train.output_dir.join("config.json");
        write_atomically(&path, |file| writeln!(file, "{settings:#}"))
    }

    fn report(&self, last: Option<StepReport>, evaluation: Option<Evaluation>) -> Result<()> {
        let Some(last) = last else { return Ok(()) };
        let out = &self.train.output_dir;
        if self.train.common.json {
            return print_json(&json!({
                "steps": last.step, "final_loss": last.loss,
                "eval_loss": evaluation.map(|e| e.overall.loss),
                "best_step": self.best.map(|(_, step)| step), "output_dir": out,
                "n_truncated": self.data.n_truncated, "n_skipped": self.data.n_skipped,
            }));
        }
        let evaluated = match (evaluation, self.best) {
            (Some(evaluation), Some((_, step))) => {
                format!(", evaluation loss {:.4} (best at step {step})", evaluation.overall.loss)
            }
            _ => String::new(),
        };
        print(&format!(
            "{} steps, loss {:.4}{evaluated}: adapter in {}",
            last.step,
            last.loss,
            out.display()
        ))
    }
}
