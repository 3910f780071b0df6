//! Flags that `train` and `adapt` share: how much and how fast it learns, what is evaluated, what is
//! kept.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{
    super::{
        OnOff,
        data::{DataFile, NamedFile},
        eval::Outputs,
    },
    folder,
};
use crate::{
    error::{Error, Result},
    formats::{disk, poly_config, rows::Row},
    model::dataset::Dataset,
    report::tensorboard::EventWriter,
    train::{
        Optimizer, RouterSampling, Schedule, TrainConfig,
        adafactor::Adafactor,
        checkpoint::{self, BEST_DIR, STATE_FILE, TrainerState},
        evaluate::Evaluation,
        order::{self, Batches, Sampling},
        recipe::{Length, Recipe},
    },
    weighting::Weighting,
};

/// How much and how fast it learns. What is not given is the verb's own choice.
#[derive(Args)]
pub(in crate::cli) struct Learning {
    /// Optimiser steps; wins over epochs.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    max_steps: Option<u64>,
    /// Passes over the data [default: 3, where no number of steps is given].
    #[arg(long)]
    num_train_epochs: Option<f64>,
    /// Examples of a micro-batch [default: 8].
    #[arg(
        long, visible_alias = "per-device-train-batch-size",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    batch_size: Option<u32>,
    /// Micro-batches of a step [default: 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    gradient_accumulation_steps: Option<u32>,
    /// Learning rate of the skills (A and B) [default: 1e-3].
    #[arg(long, visible_alias = "adapters-learning-rate")]
    learning_rate: Option<f64>,
    /// Learning rate of the router [default: 0.1].
    #[arg(long, visible_alias = "module-logits-learning-rate")]
    router_learning_rate: Option<f64>,
    /// Decoupled weight decay of the skills [default: 0.01].
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Decoupled weight decay of the router [default: 0].
    #[arg(long)]
    router_weight_decay: Option<f64>,
    /// Clip gradients to this global norm; 0: never [default: 1].
    #[arg(long)]
    max_grad_norm: Option<f64>,
    /// The share of a label's probability that goes to all ids [default: 0].
    #[arg(long)]
    label_smoothing_factor: Option<f64>,
    /// What is learned: the targets, or T-Few's three losses on rows with choices.
    #[arg(long, default_value = "lm")]
    pub(in crate::cli) loss: LossFlag,
    /// How gradients become steps [default: adamw].
    #[arg(long)]
    optim: Option<OptimizerFlag>,
    /// Whether Adafactor multiplies a tensor's rate by the root mean square of its values
    /// [default: off].
    #[arg(long)]
    scale_parameter: Option<OnOff>,
    /// How the learning rates change after warm-up; as in transformers, constant has none
    /// [default: linear].
    #[arg(long)]
    lr_scheduler_type: Option<Scheduler>,
    /// Steps in which the learning rates rise from zero; below 1 a share of all steps [default: 0].
    #[arg(long, visible_alias = "warmup-ratio")]
    warmup_steps: Option<f64>,
    /// What the router does in training: draw relaxed Bernoulli samples, take the sigmoid, draw samples
    /// and round them, or round the sigmoid (then in inference, too) [default: on].
    #[arg(long)]
    router_sampling: Option<RouterSamplingFlag>,
    /// Whether rows are shuffled each epoch.
    #[arg(long, default_value = "on")]
    pub(in crate::cli) shuffle: OnOff,
    /// How often a task is seen: as often as it has rows, by n_rows^(1/T), or all alike.
    #[arg(long, default_value = "proportional")]
    task_sampling: SamplingFlag,
    /// T of --task-sampling temperature [default: 2].
    #[arg(long)]
    sampling_temperature: Option<f64>,
    /// Different tasks in a step at most [default: any number].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    num_tasks_per_batch: Option<u32>,
    /// Rows of a task at most, drawn by --seed [default: all].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_examples_per_task: Option<u32>,
    /// Whether activations are computed again in the backward instead of kept.
    #[arg(
        long, visible_aliases = ["gradient-checkpointing", "activation-checkpointing"],
        default_value = "off", num_args = 0..=1, default_missing_value = "on"
    )]
    checkpointing: OnOff,
    /// Dropout of the base [default: its configuration's dropout_rate].
    #[arg(long)]
    dropout: Option<f32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RouterSamplingFlag {
    On,
    Off,
    Hard,
    StraightThrough,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SamplingFlag {
    Proportional,
    Temperature,
    Uniform,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum LossFlag {
    Lm,
    TFew,
}

#[derive(Clone, Copy, ValueEnum)]
enum OptimizerFlag {
    #[value(aliases = ["adamw_torch", "adamw_torch_fused"])]
    Adamw,
    Adafactor,
}

#[derive(Clone, Copy, ValueEnum)]
enum Scheduler {
    Linear,
    Cosine,
    Constant,
    #[value(name = "constant_with_warmup", alias = "constant-with-warmup")]
    ConstantWithWarmup,
}

impl Learning {
    /// Whether blocks run again in the backward.
    pub(in crate::cli) fn checkpointing(&self) -> bool {
        self.checkpointing.is_on()
    }

    fn optimizer(&self, default: Optimizer) -> Result<Optimizer> {
        let optimizer = match self.optim {
            None => default,
            Some(OptimizerFlag::Adamw) => Optimizer::AdamW,
            Some(OptimizerFlag::Adafactor) => {
                Optimizer::Adafactor(Adafactor { scale_parameter: false })
            }
        };
        match (optimizer, self.scale_parameter) {
            (Optimizer::Adafactor(_), Some(scale)) => {
                Ok(Optimizer::Adafactor(Adafactor { scale_parameter: scale.is_on() }))
            }
            (Optimizer::AdamW, Some(_)) => {
                Err(Error::Usage("--scale-parameter is for --optim adafactor".into()))
            }
            (optimizer, None) => Ok(optimizer),
        }
    }

    /// Examples of a micro-batch.
    pub(in crate::cli) fn batch_size(&self, recipe: &Recipe) -> usize {
        self.batch_size.map_or(recipe.train.batch_size, |n| n as usize)
    }

    /// Examples of a step.
    pub(in crate::cli) fn per_step(&self, recipe: &Recipe) -> usize {
        let micro = self.gradient_accumulation_steps.unwrap_or(recipe.gradient_accumulation_steps);
        self.batch_size(recipe) * micro as usize
    }

    /// The batches of a run, over as much of the data as is asked for.
    pub(in crate::cli) fn batches(
        &self,
        data: &mut Dataset,
        recipe: &Recipe,
        seed: u64,
    ) -> Result<Batches> {
        let tasks = |data: &Dataset| -> Vec<u32> { data.examples.iter().map(|e| e.task).collect() };
        if let Some(cap) = self.max_examples_per_task {
            let n = data.examples.len();
            data.keep(&order::capped(&tasks(data), cap as usize, seed));
            tracing::info!(
                "{} of {n} rows are used (--max-examples-per-task)",
                data.examples.len()
            );
        }
        let temperature = self.temperature();
        let sampling = match self.task_sampling {
            SamplingFlag::Proportional | SamplingFlag::Uniform
                if self.sampling_temperature.is_some() =>
            {
                return Err(Error::Usage(
                    "--sampling-temperature is for --task-sampling temperature".into(),
                ));
            }
            SamplingFlag::Proportional => Sampling::Proportional,
            SamplingFlag::Uniform => Sampling::Uniform,
            SamplingFlag::Temperature if temperature.is_finite() && temperature > 0.0 => {
                Sampling::Temperature(temperature)
            }
            SamplingFlag::Temperature => {
                return Err(Error::Usage(format!(
                    "--sampling-temperature must be above 0, not {temperature}"
                )));
            }
        };
        let (n, shuffle) = (data.examples.len(), self.shuffle.is_on());
        let per_step = self.num_tasks_per_batch.map(|n| n as usize);
        let batches = Batches::new(n, self.per_step(recipe), shuffle, seed);
        Ok(batches.drawing(sampling, &tasks(data), per_step))
    }

    fn temperature(&self) -> f64 {
        self.sampling_temperature.unwrap_or(2.0)
    }

    /// The first flag that was given about how a router learns or samples, where none does.
    pub(in crate::cli) fn of_the_router(&self) -> Option<&'static str> {
        let off = [None, Some(RouterSamplingFlag::Off)].contains(&self.router_sampling);
        [
            ("--router-sampling", !off),
            ("--router-learning-rate", self.router_learning_rate.is_some()),
            ("--router-weight-decay", self.router_weight_decay.is_some()),
        ]
        .into_iter()
        .find_map(|(flag, is_given)| is_given.then_some(flag))
    }

    /// How rows are drawn, for the settings.
    pub(in crate::cli) fn sampling(&self) -> Value {
        let temperature =
            (self.task_sampling == SamplingFlag::Temperature).then_some(self.temperature());
        json!({
            "task_sampling": spelling(self.task_sampling), "sampling_temperature": temperature,
            "num_tasks_per_batch": self.num_tasks_per_batch,
        })
    }

    /// Steps in all.
    pub(in crate::cli) fn n_steps(&self, per_epoch: u64, default: Length) -> Result<u64> {
        let epochs = match (self.max_steps, self.num_train_epochs, default) {
            (Some(steps), ..) | (None, None, Length::Steps(steps)) => return Ok(steps),
            (None, Some(epochs), _) | (None, None, Length::Epochs(epochs)) => epochs,
        };
        if !epochs.is_finite() || epochs <= 0.0 {
            return Err(Error::Usage(format!("--num-train-epochs must be above 0, not {epochs}")));
        }
        Ok((epochs * per_epoch as f64).ceil() as u64)
    }

    /// Whether a fresh adapter's router is to round.
    pub(in crate::cli) fn straight_through(&self) -> bool {
        self.router_sampling == Some(RouterSamplingFlag::StraightThrough)
    }

    /// What the router of an adapter does in training.
    fn router_sampling(&self, recipe: &Recipe, weighting: Weighting) -> Result<RouterSampling> {
        let Some(given) = self.router_sampling else {
            let rounds = weighting.straight_through;
            return Ok(if rounds { RouterSampling::Off } else { recipe.train.router_sampling });
        };
        match (given, weighting.straight_through) {
            (RouterSamplingFlag::On, false) => Ok(RouterSampling::On),
            (RouterSamplingFlag::Hard, false) => Ok(RouterSampling::Hard),
            (RouterSamplingFlag::Off, false) | (RouterSamplingFlag::StraightThrough, true) => {
                Ok(RouterSampling::Off)
            }
            (_, rounds) => Err(Error::Usage(format!(
                "--router-sampling is otherwise than the adapter's, which is {}straight-through: leave it out",
                if rounds { "" } else { "not " }
            ))),
        }
    }

    /// The settings: what was given, else the recipe's. `weighting` is the adapter's.
    ///
    /// # Errors
    /// If the adapter cannot be trained so.
    pub(in crate::cli) fn config(
        &self,
        recipe: &Recipe,
        weighting: Weighting,
        seed: u64,
        max_steps: u64,
    ) -> Result<TrainConfig> {
        let defaults = recipe.train.clone();
        let warmup = self.warmup_steps.unwrap_or(recipe.warmup_steps);
        if !(warmup >= 0.0 && warmup.is_finite()) {
            return Err(Error::Usage(format!("--warmup-steps must be at least 0, not {warmup}")));
        }
        // As transformers: below 1 it is a share, rounded up.
        let warmup = if warmup < 1.0 { (warmup * max_steps as f64).ceil() } else { warmup };
        Ok(TrainConfig {
            learning_rate: self.learning_rate.unwrap_or(defaults.learning_rate),
            router_learning_rate: self
                .router_learning_rate
                .unwrap_or(defaults.router_learning_rate),
            weight_decay: self.weight_decay.unwrap_or(defaults.weight_decay),
            router_weight_decay: self.router_weight_decay.unwrap_or(defaults.router_weight_decay),
            max_grad_norm: self.max_grad_norm.unwrap_or(defaults.max_grad_norm),
            schedule: match self.lr_scheduler_type {
                Some(Scheduler::Linear) => Schedule::Linear,
                Some(Scheduler::Cosine) => Schedule::Cosine,
                Some(Scheduler::Constant) => Schedule::Constant,
                Some(Scheduler::ConstantWithWarmup) => Schedule::ConstantWithWarmup,
                None => defaults.schedule,
            },
            warmup_steps: warmup as u64,
            max_steps,
            label_smoothing: self.label_smoothing_factor.unwrap_or(defaults.label_smoothing),
            optimizer: self.optimizer(defaults.optimizer)?,
            batch_size: self.batch_size(recipe),
            router_sampling: self.router_sampling(recipe, weighting)?,
            dropout: self.dropout.or(defaults.dropout),
            checkpointing: self.checkpointing.is_on(),
            seed,
            ..defaults
        })
    }
}

/// A choice as its flag has it, for the settings.
pub(in crate::cli) fn spelling(choice: impl ValueEnum) -> Option<String> {
    choice.to_possible_value().map(|choice| choice.get_name().to_owned())
}

/// What is evaluated, and what follows from it.
#[derive(Args)]
pub(in crate::cli) struct Evaluating {
    /// Rows to evaluate on, in files as those of --data.
    #[arg(long, num_args = 1.., value_name = "[NAME=]FILE")]
    pub(in crate::cli) eval_data: Vec<NamedFile>,
    /// Evaluate every so many steps [default: at the end].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(in crate::cli) eval_steps: Option<u64>,
    /// Rows that are evaluated together [default: --batch-size].
    #[arg(
        long, visible_alias = "per-device-eval-batch-size",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    eval_batch_size: Option<u32>,
    /// Evaluate on this share of each task's rows instead, drawn by --seed, and train on the rest.
    #[arg(long, conflicts_with = "eval_data")]
    pub(in crate::cli) validation_split: Option<f64>,
    /// Whether the best adapter is what the run leaves, instead of the last.
    #[arg(long, default_value = "off", num_args = 0..=1, default_missing_value = "on")]
    pub(in crate::cli) load_best_model_at_end: OnOff,
    /// What decides which adapter is best [default: loss].
    #[arg(long, visible_alias = "metric-for-best-model")]
    metric_for_best: Option<Metric>,
    #[command(flatten)]
    pub(in crate::cli) outputs: Outputs,
    /// Stop after so many evaluations in a row that are not better than the best.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(in crate::cli) early_stopping_patience: Option<u64>,
    /// By how much an evaluation must be better to count for early stopping [default: 0].
    #[arg(long, requires = "early_stopping_patience")]
    early_stopping_threshold: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Metric {
    #[value(alias = "eval_loss")]
    Loss,
    #[value(name = "exact_match", aliases = ["exact-match", "eval_exact_match"])]
    ExactMatch,
    #[value(name = "rouge_l", aliases = ["rouge-l", "eval_rouge_l"])]
    RougeL,
    #[value(name = "rank_accuracy", aliases = ["rank-accuracy", "eval_rank_accuracy"])]
    RankAccuracy,
}

impl Evaluating {
    /// Rows that are evaluated together, where `batch_size` are learned from together.
    pub(in crate::cli) fn batch_size(&self, batch_size: usize) -> usize {
        self.eval_batch_size.map_or(batch_size, |n| n as usize)
    }

    /// What decides which adapter is best.
    pub(in crate::cli) fn metric(&self) -> Metric {
        self.metric_for_best.unwrap_or(Metric::Loss)
    }

    /// By how much an evaluation must be better to count for early stopping.
    pub(in crate::cli) fn threshold(&self) -> f64 {
        self.early_stopping_threshold.unwrap_or(0.0)
    }

    /// Rows to train on, and the rows that `--validation-split` holds out.
    pub(in crate::cli) fn split(
        &self,
        files: Vec<DataFile>,
        seed: u64,
    ) -> Result<(Vec<DataFile>, Option<Vec<DataFile>>)> {
        if self.eval_data.is_empty() && self.validation_split.is_none() {
            let asked = [
                ("--eval-steps", self.eval_steps.is_some()),
                ("--early-stopping-patience", self.early_stopping_patience.is_some()),
                ("--load-best-model-at-end", self.load_best_model_at_end.is_on()),
                ("--metric-for-best", self.metric_for_best.is_some()),
            ];
            if let Some((flag, _)) = asked.into_iter().find(|(_, is_given)| *is_given) {
                return Err(Error::Usage(format!(
                    "{flag} needs rows to evaluate on: --eval-data FILE or --validation-split SHARE"
                )));
            }
        }
        if let Some(flag) = self.outputs.given().filter(|_| !self.metric().is_generated()) {
            return Err(Error::Usage(format!(
                "{flag} is for evaluations that generate: give --metric-for-best exact_match or rouge_l"
            )));
        }
        if !self.threshold().is_finite() {
            let found = self.threshold();
            return Err(Error::Usage(format!(
                "--early-stopping-threshold must be a number, not {found}"
            )));
        }
        let Some(share) = self.validation_split else { return Ok((files, None)) };
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::Usage(format!("--validation-split must be in 0..1, not {share}")));
        }
        let (mut training, mut validation) = (Vec::new(), Vec::new());
        for DataFile { path, rows } in files {
            let held_out = held_out(&rows, share, seed);
            let (out, kept): (Vec<_>, Vec<_>) =
                rows.into_iter().zip(held_out).partition(|(_, out)| *out);
            for (part, rows) in [(&mut training, kept), (&mut validation, out)] {
                if !rows.is_empty() {
                    let rows = rows.into_iter().map(|(row, _)| row).collect();
                    part.push(DataFile { path: path.clone(), rows });
                }
            }
        }
        if validation.is_empty() {
            return Err(Error::Usage(format!(
                "--validation-split {share} is less than a row of any task"
            )));
        }
        let n: usize = validation.iter().map(|file| file.rows.len()).sum();
        tracing::info!("{n} rows are held out for evaluation");
        Ok((training, Some(validation)))
    }
}

/// Which rows are held out: so many of each task, one is always left.
fn held_out(rows: &[Row], share: f64, seed: u64) -> Vec<bool> {
    let mut by_task: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (i, row) in rows.iter().enumerate() {
        by_task.entry((row.task.clone(), row.task_id)).or_default().push(i);
    }
    let mut held_out = vec![false; rows.len()];
    for indices in by_task.values() {
        let n = ((share * indices.len() as f64).round() as usize).min(indices.len() - 1);
        for &drawn in &order::epoch(indices.len(), true, seed, u64::MAX)[..n] {
            held_out[indices[drawn]] = true;
        }
    }
    held_out
}

impl Metric {
    /// Its name, as the flag has it.
    pub(in crate::cli) fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::ExactMatch => "exact_match",
            Self::RougeL => "rouge_l",
            Self::RankAccuracy => "rank_accuracy",
        }
    }

    /// Whether it is of generated outputs.
    pub(in crate::cli) fn is_generated(self) -> bool {
        matches!(self, Self::ExactMatch | Self::RougeL)
    }

    /// Its value.
    pub(in crate::cli) fn value(self, evaluation: &Evaluation) -> f64 {
        let scores = &evaluation.overall;
        match self {
            Self::Loss => scores.loss,
            Self::ExactMatch => scores.exact_match.unwrap_or(0.0),
            Self::RougeL => scores.rouge_l.unwrap_or(0.0),
            Self::RankAccuracy => scores.rank_accuracy.unwrap_or(0.0),
        }
    }

    /// By how much `value` is better than `than`.
    pub(in crate::cli) fn gain(self, value: f64, than: f64) -> f64 {
        if self == Self::Loss { than - value } else { value - than }
    }
}

/// What is kept of a run, and where it begins.
#[derive(Args)]
pub(in crate::cli) struct Saving {
    /// Make a checkpoint every so many steps, and at the end [default: on SIGINT and SIGTERM only].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub(in crate::cli) save_steps: Option<u64>,
    /// Keep so many checkpoints, the latest [default: all].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) save_total_limit: Option<u32>,
    /// Go on from this checkpoint, or from the last one in --output-dir (from the start where there
    /// is none).
    #[arg(long, visible_alias = "resume", value_name = "DIR", num_args = 0..=1)]
    resume_from_checkpoint: Option<Option<PathBuf>>,
    /// Note every so many steps' loss in a checkpoint's trainer_state.json; log.jsonl has every step.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub(in crate::cli) logging_steps: u64,
    /// Also write TensorBoard event files, to runs/ in --output-dir.
    #[arg(long, default_value = "none")]
    pub(in crate::cli) report_to: ReportTo,
    /// Replace an earlier run in --output-dir that has checkpoints, or an adapter that no run left there: they go when this
    /// one begins.
    #[arg(long)]
    overwrite_output_dir: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum ReportTo {
    None,
    Tensorboard,
}

/// A run that goes on.
pub(in crate::cli) struct Resumed {
    /// The checkpoint's folder.
    pub(in crate::cli) dir: PathBuf,
    /// Where it stood.
    pub(in crate::cli) state: TrainerState,
    /// Whether it lies in another folder than the run goes on in.
    pub(in crate::cli) is_elsewhere: bool,
}

/// The folder of the run that a checkpoint is of.
pub(in crate::cli) fn folder_of(checkpoint_dir: &Path) -> &Path {
    checkpoint_dir.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Saving {
    /// Refuses a folder of files that no run made, and that this one would replace.
    pub(in crate::cli) fn check_replaceable(&self, output_dir: &Path) -> Result<()> {
        folder::check_replaceable(output_dir, self.overwrite_output_dir)
    }

    /// The checkpoint to go on from, if that was asked for and there is one.
    pub(in crate::cli) fn resumed(&self, output_dir: &Path) -> Result<Option<Resumed>> {
        checkpoint::remove_leftovers(output_dir)?;
        let found = checkpoint::list(output_dir)?;
        let dir = match &self.resume_from_checkpoint {
            None => {
                if let Some(last) = found.last().filter(|_| !self.overwrite_output_dir) {
                    return Err(Error::Usage(format!(
                        "{} is of an earlier run: go on from there with --resume, replace that run with --overwrite-output-dir, or name another --output-dir",
                        last.path.display()
                    )));
                }
                return Ok(None);
            }
            // What people type from habit: --resume_from_checkpoint True.
            Some(given) => match given
                .as_ref()
                .filter(|dir| !dir.as_os_str().eq_ignore_ascii_case("true"))
            {
                Some(dir) => dir.clone(),
                None => match found.last() {
                    Some(last) => last.path.clone(),
                    None if output_dir.join(poly_config::FILE_NAME).exists() => {
                        return Err(Error::Usage(format!(
                            "{} has an adapter, but no checkpoint to go on from: leave --resume out to replace it, or name another --output-dir",
                            output_dir.display()
                        )));
                    }
                    None => {
                        tracing::info!("no checkpoint in {}: starting anew", output_dir.display());
                        return Ok(None);
                    }
                },
            },
        };
        if !dir.join(STATE_FILE).exists() {
            return Err(Error::file(&dir, format!("no checkpoint: there is no {STATE_FILE}")));
        }
        let state = checkpoint::read_state(&dir)?;
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        if real(folder_of(&dir)) != real(output_dir) {
            if let Some(last) = found.last().filter(|_| !self.overwrite_output_dir) {
                return Err(Error::Usage(format!(
                    "{} is of another run than {}: replace that run with --overwrite-output-dir, or name another --output-dir",
                    last.path.display(),
                    dir.display()
                )));
            }
            return Ok(Some(Resumed { dir, state, is_elsewhere: true }));
        }
        if let Some(later) = found.iter().find(|other| other.step > state.global_step) {
            return Err(Error::Usage(format!(
                "{} is later than {}: go on from the last one, remove the later ones, or name another --output-dir",
                later.path.display(),
                dir.display()
            )));
        }
        Ok(Some(Resumed { dir, state, is_elsewhere: false }))
    }
}

/// Removes what an earlier run left in the folder and somebody could take for this run's: checkpoints, the best
/// adapter, event files, and what makes the folder an adapter, whose tensors stay until there are new ones.
pub(in crate::cli) fn remove_earlier(output_dir: &Path) -> Result<()> {
    checkpoint::list(output_dir)?.iter().try_for_each(|old| checkpoint::remove(&old.path))?;
    let best = output_dir.join(BEST_DIR);
    if best.join(poly_config::FILE_NAME).exists() {
        disk::remove_dir_all(&best).map_err(Error::io("remove", best))?;
    }
    EventWriter::remove_all(&output_dir.join("runs"))?;
    let config = output_dir.join(poly_config::FILE_NAME);
    if config.exists() {
        tracing::warn!("the adapter of an earlier run in {} is replaced", output_dir.display());
        disk::remove_file(&config).map_err(Error::io("remove", config))?;
    }
    Ok(())
}
