//! `adapt`: an adapter and a few rows of a new task in, an adapter with one more task out.

use std::{collections::BTreeSet, path::PathBuf};

use clap::{Args, Command, ValueEnum};
use serde_json::{Value, json};

use super::{
    Common, Described, check_apart,
    data::{self, DataFile},
    print, print_json, run_on_device, shown,
    train::{
        flags::{Evaluating, Learning, LossFlag, Saving},
        folder::OutputFolder,
        run::{self, Evaluator, Plan, Run},
        settings,
    },
};
use crate::{
    error::{Error, Result},
    formats::{adapter::AdapterFiles, json::list_names, rows::Targets, tasks::TaskNames},
    model::{
        Adapter, Model,
        dataset::{Dataset, Routes},
    },
    train::{
        RouterSampling, Trainer,
        adapt::{self, Tune},
        evaluate::Decode,
        order,
        recipe::{Length, Recipe},
    },
};

#[derive(Args)]
#[command(args_override_self = true)]
pub(super) struct Adapt {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    /// The trained adapter's folder; it stays as it is.
    #[arg(long)]
    adapter: PathBuf,
    #[command(flatten)]
    data: data::DataFlags,
    /// The new task's name. Of a file with several tasks its rows are used.
    #[arg(long)]
    task: String,
    /// What learns: its routing rows, these with the skills, or the skills under a uniform mixture.
    #[arg(long, default_value = "router")]
    tune: TuneFlag,
    /// Use so many of the rows, drawn by --seed [default: all].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    num_shots: Option<u32>,
    /// Where the new adapter, the log and the settings go.
    #[arg(long)]
    output_dir: PathBuf,
    /// Flags from a TOML file; those of the command line win.
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    learning: Learning,
    #[command(flatten)]
    evaluating: Evaluating,
    #[command(flatten)]
    saving: Saving,
}

/// What the flags that training has, too, are here where they are not given.
pub(super) fn with_own_defaults(command: Command) -> Command {
    let help = |command: Command, flag: &'static str, help: &'static str| {
        command.mut_arg(flag, |flag| flag.help(help))
    };
    let command = help(command, "num_train_epochs", "Passes over the data [default: 1000 steps]");
    let command = help(
        command,
        "warmup_steps",
        "Steps in which the learning rate rises from 0; below 1 a share of all [default: 0.06]",
    );
    let command = help(
        command,
        "eval_steps",
        "Evaluate every so many steps [default: a twentieth of all, and before the first]",
    );
    help(
        command,
        "load_best_model_at_end",
        "Of no effect: with rows to evaluate on, the best adapter is what is left",
    )
}

#[derive(Clone, Copy, ValueEnum)]
enum TuneFlag {
    Router,
    All,
    Average,
}

impl Adapt {
    fn tune(&self) -> Tune {
        match self.tune {
            TuneFlag::Router => Tune::Router,
            TuneFlag::All => Tune::All,
            TuneFlag::Average => Tune::Average,
        }
    }

    pub(super) fn run(&self) -> Result<()> {
        check_apart("--adapter", &self.adapter, &self.output_dir)?;
        self.saving.check_replaceable(&self.output_dir)?;
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        // The papers' few-shot protocol.
        let recipe =
            Recipe { length: Length::Steps(1000), warmup_steps: 0.06, ..Recipe::default() };
        let tune = self.tune();
        let _folder = OutputFolder::take(&self.output_dir)?;
        let resumed = self.saving.resumed(&self.output_dir)?;
        let trained = Adapter::open(&model, &self.adapter)?;
        let mut adapter =
            adapt::add_task(&model, &trained, Some(&self.task), tune, self.common.seed)?;
        let task = trained.config().n_tasks as u32;
        let source = {
            let files = AdapterFiles::open(&self.adapter)?;
            let (bank, rows) = adapt::compare(&files.modules, &files.modules);
            [bank.before, rows.before]
        };
        drop(trained);
        if let Some(resumed) = &resumed {
            adapter = Adapter::open(&model, &resumed.dir)?;
        }
        let tasks = adapter.task_names();

        let tokenizer = data::open_tokenizer(&model)?;
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
        let files = self.draw(self.of_task(self.data.read(Targets::Required)?, &tasks)?)?;
        let (files, held_out) = self.evaluating.split(files, self.common.seed)?;
        let mut data = encode(files)?;
        let eval_data = match (&self.evaluating.eval_data[..], held_out) {
            ([], None) => None,
            ([], Some(files)) => Some(encode(files)?),
            (files, _) => {
                let files = self.data.read_files(files, Targets::Required)?;
                Some(encode(self.of_task(files, &tasks)?)?)
            }
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
        config.trainable = tune.trainable(task);
        if tune == Tune::Average {
            if let Some(flag) = self.learning.of_the_router() {
                return Err(Error::Usage(format!(
                    "{flag} is for a router that learns, and --tune average is a uniform mixture: leave it out"
                )));
            }
            config.router_sampling = RouterSampling::Off;
        }
        let trainer = Trainer::new(&model, adapter, config)?;
        let mut arguments = settings::arguments(
            &trainer,
            per_step,
            &self.learning,
            &data,
            choices.as_ref(),
            evaluator.as_ref(),
        );
        arguments.insert("adapter_fingerprint".into(), json!(source));
        arguments.insert("tune".into(), json!(tune));
        arguments.insert("task".into(), json!(self.task));
        let validated = evaluator.is_some();
        let interrupted = run::interruption();
        let plan = Plan {
            common: &self.common,
            evaluating: &self.evaluating,
            // Often enough to pick the steps, seldom enough to cost little.
            eval_steps: self.evaluating.eval_steps.or(Some((n_steps / 20).max(1))),
            evaluate_first: true,
            keep_best: validated,
            saving: &self.saving,
            output_dir: &self.output_dir,
            trainer,
            data: &data,
            choices: choices.as_ref(),
            batches,
            evaluator,
            n_steps,
            arguments: arguments.clone(),
        };
        let run = Run::start(plan, resumed.as_ref())?;
        let mut known = settings::settings(&model, &self.evaluating, &self.saving, &self.learning);
        known.extend([
            ("model".to_owned(), shown(&self.model)),
            ("adapter".to_owned(), shown(&self.adapter)),
            ("data".to_owned(), self.data.shown()),
            ("max_steps".to_owned(), json!(n_steps)),
        ]);
        known.extend(self.data.settings(&recipe));
        settings::write(&self.output_dir, known, arguments)?;
        let outcome = run.go(&interrupted)?;
        let steps = match outcome.state.best_global_step {
            Some(best) if validated => best,
            _ => outcome.trainer.steps_done(),
        };
        self.prove(tune, task, steps, outcome.state.best_metric)
    }

    /// The rows of the task, renamed to it where they have no name.
    fn of_task(&self, mut files: Vec<DataFile>, tasks: &TaskNames) -> Result<Vec<DataFile>> {
        let first = files[0].path.clone();
        let mut others: BTreeSet<String> = BTreeSet::new();
        let mut n_left_out = 0;
        for DataFile { path, rows } in &mut files {
            let n = rows.len();
            rows.retain(|row| match &row.task {
                Some(name) if *name != self.task => {
                    others.insert(name.clone());
                    false
                }
                _ => true,
            });
            n_left_out += n - rows.len();
            let unnamed: BTreeSet<u32> = rows
                .iter()
                .filter(|row| row.task.is_none())
                .filter_map(|row| row.task_id)
                .collect();
            if unnamed.len() > 1 {
                return Err(Error::file(
                    &*path,
                    format!(
                        "the rows without a field task have {} different task_ids, so not all are of task {:?}: leave the others out",
                        unnamed.len(),
                        self.task
                    ),
                ));
            }
            for row in rows {
                // The ids of a file count its own tasks, not the adapter's.
                row.task_id = tasks.id(&self.task);
                row.task = Some(self.task.clone());
            }
        }
        files.retain(|file| !file.rows.is_empty());
        if files.is_empty() {
            return Err(Error::file(
                first,
                format!(
                    "no row is of task {:?}: there are {}",
                    self.task,
                    list_names(others.iter().map(String::as_str))
                ),
            ));
        }
        if n_left_out > 0 {
            tracing::info!("{}: {n_left_out} rows are of other tasks", first.display());
        }
        Ok(files)
    }

    /// `--num-shots` of the rows, in their order.
    fn draw(&self, mut files: Vec<DataFile>) -> Result<Vec<DataFile>> {
        let Some(n) = self.num_shots.map(|n| n as usize) else { return Ok(files) };
        let n_rows = files.iter().map(|file| file.rows.len()).sum();
        if n > n_rows {
            return Err(Error::Usage(format!(
                "--num-shots {n}, but task {:?} has {n_rows} rows",
                self.task
            )));
        }
        let mut is_drawn = vec![false; n_rows];
        for &row in &order::epoch(n_rows, true, self.common.seed, u64::MAX)[..n] {
            is_drawn[row] = true;
        }
        let mut is_drawn = is_drawn.into_iter();
        for file in &mut files {
            file.rows.retain(|_| is_drawn.next().unwrap_or(false));
        }
        files.retain(|file| !file.rows.is_empty());
        Ok(files)
    }

    /// Compares what was saved with what there was, and says what is the same.
    fn prove(&self, tune: Tune, task: u32, steps: u64, metric: Option<f64>) -> Result<()> {
        let (before, after) =
            (AdapterFiles::open(&self.adapter)?, AdapterFiles::open(&self.output_dir)?);
        let (bank, rows) = adapt::compare(&before.modules, &after.modules);
        if tune == Tune::Router {
            bank.check("A and B")?;
        }
        rows.check("the other tasks' routing rows")?;
        if self.common.json {
            return print_json(&json!({
                "task": self.task, "task_id": task, "tune": tune, "steps": steps,
                "best_metric": metric, "output_dir": shown(&self.output_dir),
                "bank": bank, "other_rows": rows,
            }));
        }
        print(&bank.line("A and B"))?;
        print(&rows.line("routing rows of the other tasks"))?;
        if tune != Tune::Router {
            print("the other tasks' outputs change with A and B; --tune router keeps them")?;
        }
        print(&format!(
            "task {} has id {task}, {steps} steps: adapter in {}",
            Value::from(self.task.as_str()),
            self.output_dir.display()
        ))
    }
}
