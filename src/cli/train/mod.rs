//! `train`: rows in, an adapter folder out.
//!
//! ```text
//! OUTPUT_DIR/adapter_config.json, adapter_model.safetensors, tasks.json   the last adapter
//! OUTPUT_DIR/best/                                                        the best by evaluation
//! OUTPUT_DIR/checkpoint-<step>/                                           to go on from there
//! OUTPUT_DIR/log.jsonl                                                    a line a step
//! OUTPUT_DIR/config.json                                                  resolved settings, versions
//! ```

mod adapter;
pub(super) mod flags;
pub(super) mod folder;
mod log;
pub(super) mod run;
pub(super) mod settings;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use self::{
    adapter::AdapterFlags,
    flags::{Evaluating, Learning, LossFlag, Saving, spelling},
    folder::OutputFolder,
    run::{Evaluator, Outcome, Plan, Run},
};
use super::{
    Common, Described, check_apart,
    data::{self, DataFile},
    print, print_json, run_on_device, shown,
};
use crate::{
    error::{Error, Result},
    formats::{adapter::AdapterFiles, rows::Targets, tasks::TaskNames},
    kernels::Backend,
    model::{
        Model,
        dataset::{Dataset, Routes},
    },
    train::{
        RouterRows, RouterSampling, Trainer,
        adapt::{self, Kept},
        evaluate::Decode,
        recipe::Recipe,
    },
};

#[derive(Args)]
#[command(args_override_self = true)]
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
    /// Flags from a TOML file; those of the command line win.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Defaults from a paper or from PEFT.
    #[arg(long, value_parser = Recipe::NAMES)]
    preset: Option<String>,
    #[command(flatten)]
    adapter: AdapterFlags,
    /// What learns: the skills and the router, or the router alone, as with skills that were imported.
    #[arg(long, default_value = "all")]
    tune: TuneFlag,
    /// Which routing rows a step moves: all (as PyTorch's AdamW does), or those of its own tasks.
    #[arg(long, default_value = "dense")]
    router_updates: RouterUpdates,
    /// Weight of the Indian-buffet prior of the routing; 0: none.
    #[arg(long, default_value_t = 0.0)]
    ibp_prior: f64,
    #[command(flatten)]
    learning: Learning,
    #[command(flatten)]
    evaluating: Evaluating,
    #[command(flatten)]
    saving: Saving,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TuneFlag {
    All,
    Router,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RouterUpdates {
    Dense,
    Lazy,
}

impl Train {
    pub(super) fn run(&self) -> Result<()> {
        if let Some(source) = &self.adapter.adapter_init {
            check_apart("--adapter-init", source, &self.output_dir)?;
        }
        self.saving.check_replaceable(&self.output_dir)?;
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        let _folder = OutputFolder::take(&self.output_dir)?;
        let resumed = self.saving.resumed(&self.output_dir)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let files = self.data.read(Targets::Required)?;
        let recipe = match &self.preset {
            Some(name) => Recipe::named(name).unwrap_or_default(), // clap knows the names.
            None => Recipe::default(),
        };
        let found = || TaskNames::from_rows(files.iter().flat_map(DataFile::located));
        let source = adapter::Data {
            path: self.data.first(),
            model_dir: &self.model,
            seed: self.common.seed,
            straight_through: self.learning.straight_through(),
        };
        let mut adapter =
            self.adapter.adapter(&model, resumed.as_ref(), &recipe, &source, found)?;
        let tasks = match adapter.tasks() {
            Some(tasks) => tasks.clone(),
            None => named(&found()?, adapter.config().n_tasks),
        };
        if tasks.to_list().is_some() {
            adapter.set_tasks(Some(tasks.clone()));
        }
        let encode = |files| {
            let tokenizer = tokenizer.as_ref();
            self.data.encode(
                files,
                &recipe,
                &model,
                tokenizer,
                Some(Routes::tasks(&tasks)),
                Targets::Required,
            )
        };
        let rank = |data: &Dataset, evaluating| {
            let routes = Some(Routes::tasks(&tasks));
            self.data.choices(data, &recipe, &model, tokenizer.as_ref(), routes, evaluating)
        };
        let (files, held_out) = self.evaluating.split(files, self.common.seed)?;
        let mut data = encode(files)?;
        let eval_data = match (&self.evaluating.eval_data[..], held_out) {
            ([], None) => None,
            ([], Some(files)) => Some(encode(files)?),
            (files, _) => Some(encode(self.data.read_files(files, Targets::Required)?)?),
        };
        let evaluator = eval_data
            .map(|data| {
                let of_data = rank(&data, true)?;
                let decoder = tokenizer.as_ref().map(|t| t as &dyn Decode);
                let batch_size = self.learning.batch_size(&recipe);
                let evaluating = &self.evaluating;
                Evaluator::new(evaluating, &model, (data, of_data), decoder, &tasks, batch_size)
            })
            .transpose()?;

        let per_step = self.learning.per_step(&recipe);
        let batches = self.learning.batches(&mut data, &recipe, self.common.seed)?;
        let choices = match self.learning.loss {
            LossFlag::Lm => None,
            LossFlag::TFew => Some(rank(&data, false)?),
        };
        let n_steps = self.learning.n_steps(batches.steps_per_epoch(), recipe.length)?;
        let weighting = adapter.config().weighting;
        let mut config = self.learning.config(&recipe, weighting, self.common.seed, n_steps)?;
        config.ibp_prior = self.ibp_prior;
        if self.router_updates == RouterUpdates::Lazy {
            config.trainable.router = RouterRows::Present;
        }
        if adapter.routing().fixed {
            let lazy = self.router_updates == RouterUpdates::Lazy;
            let given = [
                (self.tune == TuneFlag::Router, "--tune router"),
                (lazy, "--router-updates lazy"),
                (self.ibp_prior != 0.0, "--ibp-prior"),
            ];
            let given = given.into_iter().find_map(|(is_given, flag)| is_given.then_some(flag));
            if let Some(flag) = given.or_else(|| self.learning.of_the_router()) {
                return Err(Error::Usage(format!(
                    "{flag} is for a router that learns, and this routing is fixed: leave it out"
                )));
            }
            config.trainable.router = RouterRows::None;
            config.router_sampling = RouterSampling::Off;
        }
        config.trainable.bank = self.tune == TuneFlag::All;
        let n_trainable = match self.tune {
            TuneFlag::All => adapter.n_params(),
            TuneFlag::Router => {
                let tasks: Vec<u32> = (0..adapter.config().n_tasks as u32).collect();
                adapter.router_rows(&tasks).iter().map(|row| row.len()).sum()
            }
        };
        tracing::info!(
            "{} linears adapted, {n_trainable} trainable parameters, {n_steps} steps of {per_step} rows",
            adapter.targets().len(),
        );
        let begun_with = (self.tune == TuneFlag::Router).then(|| adapter.modules(model.backend()));
        if let Some(modules) = &begun_with
            && modules.values().all(|module| module.lora_b.values.iter().all(|&b| b == 0.0))
        {
            tracing::warn!(
                "B is zero, so the router has nothing to mix and learns nothing: begin with --adapter-init, or with --init-weights off"
            );
        }
        let trainer = Trainer::new(&model, adapter, config)?;
        let interrupted = run::interruption();
        let choices = choices.as_ref();
        let mut arguments = settings::arguments(
            &trainer,
            per_step,
            &self.learning,
            &data,
            choices,
            evaluator.as_ref(),
        );
        arguments.insert("tune".into(), json!(spelling(self.tune)));
        let plan = Plan {
            common: &self.common,
            evaluating: &self.evaluating,
            eval_steps: self.evaluating.eval_steps,
            evaluate_first: false,
            keep_best: self.evaluating.load_best_model_at_end.is_on(),
            saving: &self.saving,
            output_dir: &self.output_dir,
            trainer,
            data: &data,
            choices,
            batches,
            evaluator,
            n_steps,
            arguments: arguments.clone(),
        };
        let run = Run::start(plan, resumed.as_ref())?;
        let mut known = settings::settings(&model, &self.evaluating, &self.saving, &self.learning);
        known.extend([
            ("model".to_owned(), shown(&self.model)),
            ("data".to_owned(), self.data.shown()),
            (
                "adapter_init".to_owned(),
                self.adapter.adapter_init.as_deref().map_or(Value::Null, shown),
            ),
            ("preset".to_owned(), json!(self.preset)),
            ("max_steps".to_owned(), json!(n_steps)),
        ]);
        known.extend(self.data.settings(&recipe));
        known.extend(self.adapter.settings(&recipe));
        settings::write(&self.output_dir, known, arguments)?;
        let outcome = run.go(&interrupted)?;
        let kept = match begun_with {
            Some(before) => {
                let after = AdapterFiles::open(&self.output_dir)?;
                let (bank, rows) = adapt::compare(&before, &after.modules);
                bank.check("A and B")?;
                Some([bank, rows])
            }
            None => None,
        };
        self.report(&outcome, &data, kept)
    }

    /// `kept` is what the router alone was to learn beside: A and B, and what became of the router.
    fn report(
        &self,
        outcome: &Outcome<'_, impl Backend>,
        data: &Dataset,
        kept: Option<[Kept; 2]>,
    ) -> Result<()> {
        let out = &self.output_dir;
        let state = &outcome.state;
        let eval_loss = outcome.evaluation.as_ref().map(|e| e.overall.loss);
        let steps = outcome.trainer.steps_done();
        let final_loss = outcome.last.map(|last| last.loss);
        if self.common.json {
            let mut said = json!({
                "steps": steps, "final_loss": final_loss, "eval_loss": eval_loss,
                "best_step": state.best_global_step, "output_dir": shown(out),
                "n_truncated": data.n_truncated, "n_skipped": data.n_skipped,
            });
            if let Some([bank, router]) = kept {
                (said["bank"], said["router"]) = (json!(bank), json!(router));
            }
            return print_json(&said);
        }
        if let Some([bank, router]) = kept {
            print(&bank.line("A and B"))?;
            print(&router.line("routing rows"))?;
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
    let names = found.filled(n_tasks);
    TaskNames::from_list(&names).unwrap_or_else(|_| TaskNames::unnamed(n_tasks))
}
