//! A run in progress: steps, evaluations, checkpoints.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::{
    super::{Common, Described, eval::task_name, print, tell},
    flags::{Evaluating, Metric, ReportTo, Resumed, Saving, folder_of, remove_earlier},
    log::Log,
};
use crate::{
    error::{Error, Result},
    formats::tasks::TaskNames,
    generate::{Engine, GenerateOptions},
    kernels::{Backend, cuda::catch_faults},
    model::{Adapter, Example, Model, dataset::Dataset},
    process::Memory,
    report::{
        routing::{Sharpness, sharpness},
        tensorboard::EventWriter,
    },
    train::{
        StepReport, Trainer,
        checkpoint::{self, BEST_DIR, TrainerState},
        choices::Choices,
        evaluate::{Decode, Evaluation, evaluate},
        memory::{StepBytes, longest, step_bytes},
        order::Batches,
    },
};

/// With more tasks the log has their mean alone.
const MAX_TASKS_IN_LOG: usize = 256;

/// Evaluation rows and what scores them.
pub(in crate::cli) struct Evaluator<'a, B: Backend> {
    pub(in crate::cli) model: &'a Model<B>,
    pub(in crate::cli) data: Dataset,
    /// The wrong choices of the rows that have choices.
    pub(in crate::cli) choices: Choices,
    pub(in crate::cli) decoder: Option<&'a dyn Decode>,
    pub(in crate::cli) tasks: &'a TaskNames,
    pub(in crate::cli) batch_size: usize,
    pub(in crate::cli) metric: Metric,
    /// How outputs are generated where the metric is of some.
    pub(in crate::cli) options: GenerateOptions,
}

impl<'a, B: Backend> Evaluator<'a, B> {
    /// As the flags say, of these rows and their choices; `batch_size` rows are learned from together.
    pub(in crate::cli) fn new(
        flags: &Evaluating,
        model: &'a Model<B>,
        (data, choices): (Dataset, Choices),
        decoder: Option<&'a dyn Decode>,
        tasks: &'a TaskNames,
        batch_size: usize,
    ) -> Result<Self> {
        let metric = flags.metric();
        if metric == Metric::RankAccuracy && choices.is_empty() {
            return Err(Error::Usage(
                "--metric-for-best rank_accuracy needs rows to evaluate on that have choices or choice_ids beside their target"
                    .into(),
            ));
        }
        let (batch_size, options) = (flags.batch_size(batch_size), flags.outputs.options());
        Ok(Self { model, data, choices, decoder, tasks, batch_size, metric, options })
    }

    fn run(&self, adapter: &Adapter<B>) -> Result<Evaluation> {
        let present = self.data.examples.iter().map(|example| example.task);
        let engine = Engine::new(self.model, Some(adapter), present, self.batch_size);
        let generate = self.metric.is_generated().then_some(&self.options);
        let choices = Some(&self.choices);
        evaluate(&engine, &self.data, generate, self.decoder, choices, |_, example| {
            task_name(Some(self.tasks), example.task)
        })
    }
}

/// What a run is made of.
pub(in crate::cli) struct Plan<'a, B: Backend> {
    pub(in crate::cli) common: &'a Common,
    pub(in crate::cli) evaluating: &'a Evaluating,
    /// Steps between evaluations.
    pub(in crate::cli) eval_steps: Option<u64>,
    /// Whether the adapter is evaluated before the first step.
    pub(in crate::cli) evaluate_first: bool,
    /// Whether the best adapter is left behind, instead of the last.
    pub(in crate::cli) keep_best: bool,
    pub(in crate::cli) saving: &'a Saving,
    pub(in crate::cli) output_dir: &'a Path,
    pub(in crate::cli) trainer: Trainer<'a, B>,
    pub(in crate::cli) data: &'a Dataset,
    /// The wrong choices of the rows, where T-Few's losses are learned.
    pub(in crate::cli) choices: Option<&'a Choices>,
    pub(in crate::cli) batches: Batches,
    pub(in crate::cli) evaluator: Option<Evaluator<'a, B>>,
    /// Steps in all.
    pub(in crate::cli) n_steps: u64,
    /// What a resumed run must share.
    pub(in crate::cli) arguments: Map<String, Value>,
}

/// What became of a run.
pub(in crate::cli) struct Outcome<'a, B: Backend> {
    pub(in crate::cli) trainer: Trainer<'a, B>,
    /// The last step, if any was left to do.
    pub(in crate::cli) last: Option<StepReport>,
    /// The last evaluation.
    pub(in crate::cli) evaluation: Option<Evaluation>,
    pub(in crate::cli) state: TrainerState,
}

/// A run in progress.
pub(in crate::cli) struct Run<'a, B: Backend> {
    plan: Plan<'a, B>,
    log: Log,
    events: Option<EventWriter>,
    state: TrainerState,
}

/// Set by the first SIGINT or SIGTERM; the second ends the process.
pub(in crate::cli) fn interruption() -> Arc<AtomicBool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    // A second run in one process keeps the first one's handler; there is none here.
    let _ = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        tell("interrupted: saving after this step (again: exit at once)");
    });
    interrupted
}

impl<'a, B: Described> Run<'a, B> {
    /// Begins anew, or where a checkpoint stood.
    pub(in crate::cli) fn start(mut plan: Plan<'a, B>, resumed: Option<&Resumed>) -> Result<Self> {
        let out = plan.output_dir;
        let events = |from| match plan.saving.report_to {
            ReportTo::Tensorboard => EventWriter::create(&out.join("runs"), from).map(Some),
            ReportTo::None => Ok(None),
        };
        let Some(Resumed { dir, state, is_elsewhere }) = resumed else {
            // Nothing of an earlier run goes before all that this one reads is known to be good.
            remove_earlier(out)?;
            let (log, events) = (Log::open(out, None)?, events(None)?);
            return Ok(Self { log, events, state: TrainerState::default(), plan });
        };
        checkpoint::check_arguments(dir, &plan.arguments)?;
        plan.trainer.restore(dir, state.global_step)?;
        if state.max_steps != plan.n_steps {
            tracing::warn!(
                "{} steps in all instead of {}: the learning rates change accordingly, so this is not the run that would have been",
                plan.n_steps,
                state.max_steps
            );
        }
        // A run may go on in another folder.
        if *is_elsewhere {
            remove_earlier(out)?;
        }
        let log = Log::open(out, Some((folder_of(dir), state.global_step)))?;
        let events = events(Some(state.global_step + 1))?;
        let mut state = state.clone();
        checkpoint::restore_best(dir, &out.join(BEST_DIR), &mut state)?;
        tracing::info!("going on from {} at step {}", dir.display(), state.global_step);
        Ok(Self { log, events, state, plan })
    }

    /// Where `best/` is.
    fn best_dir(&self) -> PathBuf {
        self.plan.output_dir.join(BEST_DIR)
    }

    /// All steps that are left; then the adapter is saved.
    pub(in crate::cli) fn go(mut self, interrupted: &AtomicBool) -> Result<Outcome<'a, B>> {
        let memory = self.plan_memory()?;
        let bar = self.plan.common.progress(self.plan.n_steps);
        bar.set_position(self.plan.trainer.steps_done());
        let done = self.learn(&bar, interrupted);
        bar.finish_and_clear();
        let (last, evaluation) = match done {
            Ok(done) => done,
            Err(error) => {
                // As it was after the last whole step; if that cannot be saved, the first error is
                // still the one to report.
                if let Err(second) = catch_faults(|| self.save_adapter()) {
                    tracing::error!("{second}");
                }
                return Err(error);
            }
        };
        let taken = self.plan.trainer.model().backend().peak_bytes() as u64;
        tracing::info!("memory: {} MiB taken at the peak, {} planned", mib(taken), mib(memory));
        match &self.state.best_model_checkpoint {
            Some(best) if self.plan.keep_best && !interrupted.load(Ordering::Relaxed) => {
                let model = self.plan.trainer.model();
                match Adapter::open(model, best) {
                    Ok(best) => best.save_peft(model.backend(), self.plan.output_dir)?,
                    Err(error) => {
                        self.save_adapter()?;
                        return Err(error);
                    }
                }
            }
            _ => self.save_adapter()?,
        }
        self.plan.trainer.model().verify_unchanged()?;
        if interrupted.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(Outcome { trainer: self.plan.trainer, last, evaluation, state: self.state })
    }

    /// The steps that are left; the last one and the last evaluation.
    fn learn(
        &mut self,
        bar: &ProgressBar,
        interrupted: &AtomicBool,
    ) -> Result<(Option<StepReport>, Option<Evaluation>)> {
        let (mut last, mut evaluation) = (None, None);
        if self.plan.evaluate_first && self.plan.trainer.steps_done() == 0 {
            evaluation = self.evaluate()?;
        }
        while self.plan.trainer.steps_done() < self.plan.n_steps && !self.out_of_patience() {
            let (report, seconds) = self.step()?;
            last = Some(report);
            self.log_step(&report, seconds)?;
            if due(Some(self.plan.saving.logging_steps), report.step) {
                self.note_loss(&report);
            }
            let speed = report.n_tokens as f64 / seconds;
            bar.set_message(format!("loss {:.4} {speed:.0} tokens/s", report.loss));
            bar.inc(1);
            let is_last = report.step == self.plan.n_steps;
            if is_last || due(self.plan.eval_steps, report.step) {
                evaluation = self.evaluate()?;
            }
            let stop = interrupted.load(Ordering::Relaxed);
            let saving = self.plan.saving.save_steps;
            if stop || due(saving, report.step) || (is_last && saving.is_some()) {
                self.checkpoint(&report)?;
            }
            if stop {
                break;
            }
        }
        Ok((last, evaluation))
    }

    /// What the step of the longest rows will take, in bytes.
    fn plan_memory(&self) -> Result<u64> {
        let Plan { trainer, data, choices, .. } = &self.plan;
        let places = longest(&data.examples, *choices, trainer.config().batch_size);
        let examples: Vec<&Example> = places.iter().map(|&i| &data.examples[i]).collect();
        let wrong = choices.map(|choices| -> Vec<&[Example]> {
            places.iter().map(|&i| &choices.wrong[i][..]).collect()
        });
        let StepBytes { held, peak: bytes } = step_bytes(trainer, &examples, wrong.as_deref())?;
        tracing::info!("memory: {} MiB for the longest rows, beside the base", mib(bytes));
        let (backend, more) = (trainer.model().backend(), bytes - held);
        let Some(free) = backend.free_bytes().filter(|&free| free < more) else {
            return Ok(bytes);
        };
        let told = format!(
            "the longest rows take {} MiB more, and {} MiB are free: a smaller --batch-size with more --gradient-accumulation-steps, --checkpointing on, or a lower --max-source-length need less",
            mib(more),
            mib(free)
        );
        if backend.cpu().is_none() {
            return Err(Error::Device(told));
        }
        tracing::warn!("{told}"); // The system may swap.
        Ok(bytes)
    }

    fn step(&mut self) -> Result<(StepReport, f64)> {
        let Plan { trainer, batches, data, choices, .. } = &mut self.plan;
        let rows = batches.of_step(trainer.steps_done() + 1);
        let examples: Vec<&Example> = rows.iter().map(|&i| &data.examples[i]).collect();
        let started = Instant::now();
        let report = catch_faults(|| match choices {
            None => trainer.step(&examples),
            Some(choices) => {
                let wrong: Vec<&[Example]> = rows.iter().map(|&i| &choices.wrong[i][..]).collect();
                trainer.step_on_choices(&examples, &wrong)
            }
        })?;
        Ok((report, started.elapsed().as_secs_f64()))
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
        if self.plan.common.json {
            print(&line.to_string())?;
        }
        self.event("train", report.step, &line)?;
        self.log.line(&line)
    }

    /// The numbers of a line of the log, for TensorBoard.
    fn event(&mut self, group: &str, step: u64, line: &Value) -> Result<()> {
        let (Some(events), Some(fields)) = (&mut self.events, line.as_object()) else {
            return Ok(());
        };
        let name = |key: &str| format!("{group}/{}", key.strip_prefix("eval_").unwrap_or(key));
        let values: Vec<(String, f64)> = fields
            .iter()
            .filter(|(key, _)| *key != "step")
            .filter_map(|(key, value)| Some((name(key), value.as_f64()?)))
            .collect();
        let values: Vec<_> = values.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        events.scalars(step, &values)
    }

    /// A step's loss, as transformers notes it.
    fn note_loss(&mut self, report: &StepReport) {
        let line = json!({
            "step": report.step, "epoch": self.epoch(), "loss": report.loss,
            "learning_rate": report.lr, "router_learning_rate": report.router_lr,
            "grad_norm": report.grad_norm,
        });
        self.state.note_loss(line);
    }

    fn epoch(&self) -> f64 {
        self.plan.trainer.steps_done() as f64 / self.plan.batches.steps_per_epoch() as f64
    }

    fn evaluate(&mut self) -> Result<Option<Evaluation>> {
        let Some(evaluator) = &self.plan.evaluator else { return Ok(None) };
        let step = self.plan.trainer.steps_done();
        let evaluation = evaluator.run(self.plan.trainer.adapter())?;
        evaluator.model.verify_unchanged()?;
        let scores = &evaluation.overall;
        let mut line = json!({
            "step": step, "eval_loss": scores.loss, "eval_n_rows": scores.n_rows,
            "eval_n_tokens": scores.n_tokens,
        });
        if let (Some(exact), Some(rouge)) = (scores.exact_match, scores.rouge_l) {
            line["eval_exact_match"] = json!(exact);
            line["eval_rouge_l"] = json!(rouge);
        }
        if let Some(ranked) = scores.rank_accuracy {
            line["eval_rank_accuracy"] = json!(ranked);
        }
        let modules = self.plan.trainer.adapter().modules(evaluator.model.backend());
        let Sharpness { discreteness, sparsity, usage } =
            sharpness(self.plan.trainer.adapter().config(), modules.values());
        line["router_discreteness"] = json!(discreteness);
        line["router_sparsity"] = json!(sparsity);
        line["router_usage"] = json!(usage);
        if evaluation.tasks.len() <= MAX_TASKS_IN_LOG {
            let losses =
                evaluation.tasks.iter().map(|(name, task)| (name.clone(), json!(task.loss)));
            line["eval_task_loss"] = Value::Object(losses.collect());
        }
        if self.plan.common.json {
            print(&line.to_string())?;
        } else {
            tracing::info!("step {step}: evaluation loss {:.4}", scores.loss);
        }
        let judged = evaluator_metric(evaluator, &evaluation);
        self.event("eval", step, &line)?;
        self.log.line(&line)?;
        line["epoch"] = json!(self.epoch());
        self.state.log_history.push(line);
        self.judge(judged, step)?;
        Ok(Some(evaluation))
    }

    /// Keeps the adapter if it is the best so far, and counts the patience that is left.
    fn judge(&mut self, (metric, value): (Metric, f64), step: u64) -> Result<()> {
        let best = self.state.best_metric;
        let threshold = self.plan.evaluating.threshold();
        if let Some(patience) = self.plan.evaluating.early_stopping_patience {
            let is_better =
                best.is_none_or(|best| value.is_finite() && metric.gain(value, best) > threshold);
            let used = if is_better { 0 } else { self.state.patience_used() + 1 };
            self.state.set_patience_used(used, patience, threshold);
        }
        if value.is_finite() && best.is_none_or(|best| metric.gain(value, best) > 0.0) {
            let dir = self.best_dir();
            let trainer = &self.plan.trainer;
            trainer.adapter().save_peft(trainer.model().backend(), &dir)?;
            self.state.best_metric = Some(value);
            self.state.best_global_step = Some(step);
            self.state.best_model_checkpoint = Some(dir);
        }
        Ok(())
    }

    fn out_of_patience(&self) -> bool {
        let used = self.state.patience_used();
        self.plan.evaluating.early_stopping_patience.is_some_and(|patience| used >= patience)
    }

    fn checkpoint(&mut self, report: &StepReport) -> Result<()> {
        self.log.sync()?;
        if !due(Some(self.plan.saving.logging_steps), report.step) {
            self.note_loss(report);
        }
        let Plan { saving, eval_steps, n_steps, trainer, output_dir, .. } = &self.plan;
        let per_epoch = self.plan.batches.steps_per_epoch();
        self.state = TrainerState {
            epoch: self.epoch(),
            eval_steps: eval_steps.unwrap_or(0),
            global_step: report.step,
            logging_steps: saving.logging_steps,
            max_steps: *n_steps,
            num_train_epochs: n_steps.div_ceil(per_epoch),
            save_steps: saving.save_steps.unwrap_or(0),
            train_batch_size: trainer.config().batch_size,
            ..std::mem::take(&mut self.state)
        };
        checkpoint::save(output_dir, trainer, &self.state, &self.plan.arguments)?;
        match saving.save_total_limit {
            Some(limit) => checkpoint::rotate(output_dir, limit as usize),
            None => Ok(()),
        }
    }

    fn save_adapter(&self) -> Result<()> {
        let trainer = &self.plan.trainer;
        trainer.adapter().save_peft(trainer.model().backend(), self.plan.output_dir)
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn evaluator_metric<B: Backend>(
    evaluator: &Evaluator<'_, B>,
    evaluation: &Evaluation,
) -> (Metric, f64) {
    (evaluator.metric, evaluator.metric.value(evaluation))
}

fn due(every: Option<u64>, step: u64) -> bool {
    every.is_some_and(|n| step.is_multiple_of(n))
}
