//! The demo: routed adapters against the alternatives, in less than a minute, out of the box.
//!
//! ```text
//! base (in the binary) ┐                      ┌> table: exact match on trained and on new tasks
//! suite (generated)    ┴> 4 methods: train,   ┼> adapters in PEFT's format
//!                          then adapt         └> heat maps of the routing
//! ```
//!
//! The question is the papers': when tasks are built from a few skills, does an adapter that learns
//! the skills once and mixes them per task beat one adapter for all tasks and one adapter for each?
//! [`suite`] has the tasks, [`methods`] the adapters and their settings, `assets/demo/make_base.py`
//! made the base. Everything goes through the same doors as a user's own model: the embedded base is
//! written to the output folder and opened from there, as are the rows, so all of it can be inspected
//! and run again by hand.

pub mod methods;
mod report;
pub mod suite;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

pub use report::{AdaptationScore, DemoReport, MethodReport, Score};

use crate::{
    dtype::Dtype,
    error::{Error, Result},
    formats::{folder::check_free, safetensors::write_atomically, tasks::TaskNames},
    generate::{Engine, GenerateOptions},
    kernels::cpu::Cpu,
    model::{Adapter, Example, Model, Options},
    report::routing::{agreement_svg, mixing_weights_svg},
    train::{RouterRows, TrainConfig, Trainable, Trainer, order},
};
use methods::{Fit, Method, Plan};
use suite::{Suite, Task};

/// The base's files, as they lie in a model folder.
const BASE: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../assets/demo/base/config.json")),
    ("generation_config.json", include_bytes!("../../assets/demo/base/generation_config.json")),
    ("model.safetensors", include_bytes!("../../assets/demo/base/model.safetensors")),
];

/// No task makes words longer than this, with the end.
const MAX_NEW_TOKENS: usize = 10;
/// Rows that are judged together.
const CAPACITY: usize = 64;

/// What to run.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// Where everything is written.
    pub output_dir: PathBuf,
    /// What rows, initial values and sampling are derived from.
    pub seed: u64,
    /// Threads; 0: one a core.
    pub n_threads: usize,
    /// How much of it.
    pub plan: Plan,
}

/// Where the demo is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The method at work.
    pub method: Method,
    /// The held-out task that it adapts to, or none while it trains.
    pub adapts_to: Option<&'a str>,
    /// Steps done.
    pub step: u64,
    /// Steps in all.
    pub n_steps: u64,
    /// The loss of the last step.
    pub loss: f64,
}

/// What the demo tells of its progress; an error ends it.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress<'_>) -> Result<()>;

/// Runs the demo.
///
/// # Errors
/// If the output folder cannot be written or has what no demo wrote, or `progress` says so.
pub fn run(options: &DemoOptions, progress: OnProgress<'_>) -> Result<DemoReport> {
    let start = Instant::now();
    let DemoOptions { output_dir, seed, n_threads, plan } = options;
    check_replaceable(output_dir)?;
    let base_dir = output_dir.join("base");
    write_files(&base_dir, &BASE)?;
    let base = Model::open(
        &base_dir,
        &Options { dtype: Some(Dtype::F32), n_threads: *n_threads, ..Options::default() },
    )?;
    let suite = Suite::new(*seed, plan.n_rows);
    write_rows(&output_dir.join("data"), &suite)?;
    let names: Vec<String> = suite.train.iter().map(|task| task.recipe.name()).collect();

    let mut demo = Demo { base: &base, suite: &suite, plan, seed: *seed, progress };
    let alone = score(&base, None, &suite.test_rows());
    let mut methods = Vec::new();
    for method in Method::ALL {
        let (mut adapter, report) = demo.method(method)?;
        let tasks = TaskNames::from_list(&names).map_err(Error::Config)?;
        adapter.set_tasks(Some(tasks));
        let dir = output_dir.join(method.name());
        adapter.save_peft(base.backend(), &dir)?;
        if method.learns_routing() {
            let modules = adapter.modules(base.backend());
            let (mixing, shared) = (
                mixing_weights_svg(adapter.config(), &modules, &names),
                agreement_svg(adapter.config(), &modules, &names),
            );
            let files = [("heatmap.svg", mixing.as_bytes()), ("agreement.svg", shared.as_bytes())];
            write_files(&dir, &files)?;
        }
        methods.push(report);
    }
    Ok(DemoReport {
        base: alone,
        methods,
        trained_on: names,
        held_out: suite.held_out.iter().map(|task| task.recipe.name()).collect(),
        n_steps: plan.training.n_steps,
        n_shots: plan.n_rows.few,
        seconds: start.elapsed().as_secs_f64(),
        output_dir: output_dir.clone(),
    })
}

/// What all methods have in common.
struct Demo<'d> {
    base: &'d Model,
    suite: &'d Suite,
    plan: &'d Plan,
    seed: u64,
    progress: OnProgress<'d>,
}

impl Demo<'_> {
    /// Trains on all tasks at once, then adapts to each held-out task from there.
    fn method(&mut self, method: Method) -> Result<(Adapter<Cpu>, MethodReport)> {
        let start = Instant::now();
        let (base, suite, plan) = (self.base, self.suite, self.plan);
        let fresh = method.adapter(base, plan, suite.train.len(), self.seed)?;
        let n_params = method.n_trainable(&fresh);
        let (rows, fit) = (suite.train_rows(), method.training(plan));
        let trained = self.fit(method, None, fresh, &rows, &fit, method.trainable())?;
        let train_seconds = start.elapsed().as_secs_f64();
        let trained_on = score(base, Some(&trained), &suite.test_rows());
        let mut adaptations = Vec::new();
        for tune in method.adaptations() {
            let start = Instant::now();
            let fit = method.adaptation(plan);
            let mut scores = Vec::new();
            for task in &suite.held_out {
                let from = method.for_new_task(base, plan, &trained, tune, self.seed)?;
                let mut learns = tune.trainable(suite.train.len() as u32);
                if !method.learns_routing() {
                    learns.router = RouterRows::None;
                }
                let adapted = self.fit(method, Some(task), from, &task.train, &fit, learns)?;
                scores.push(score(base, Some(&adapted), &task.test));
            }
            let seconds = start.elapsed().as_secs_f64();
            adaptations.push(AdaptationScore { tune, scores, seconds });
        }
        let report = MethodReport { method, n_params, train_seconds, trained_on, adaptations };
        Ok((trained, report))
    }

    fn fit(
        &mut self,
        method: Method,
        task: Option<&Task>,
        adapter: Adapter<Cpu>,
        rows: &[Example],
        fit: &Fit,
        trainable: Trainable,
    ) -> Result<Adapter<Cpu>> {
        let config = TrainConfig {
            learning_rate: fit.learning_rate,
            router_learning_rate: fit.router_learning_rate,
            weight_decay: 0.0,
            warmup_steps: fit.n_steps / 16,
            max_steps: fit.n_steps,
            batch_size: fit.batch_size,
            trainable,
            router_sampling: fit.router_sampling,
            dropout: Some(0.0),
            seed: self.seed,
            ..TrainConfig::default()
        };
        let name = task.map(|task| task.recipe.name());
        let mut trainer = Trainer::new(self.base, adapter, config)?;
        let mut queue: Vec<usize> = Vec::new();
        let mut epoch = 0;
        for _ in 0..fit.n_steps {
            while queue.len() < fit.batch_size {
                queue.extend(order::epoch(rows.len(), true, self.seed, epoch));
                epoch += 1;
            }
            let batch: Vec<_> = queue.drain(..fit.batch_size).map(|i| &rows[i]).collect();
            let report = trainer.step(&batch)?;
            (self.progress)(Progress {
                method,
                adapts_to: name.as_deref(),
                step: report.step,
                n_steps: fit.n_steps,
                loss: report.loss,
            })?;
        }
        Ok(trainer.into_adapter())
    }
}

/// Loss and exact match of greedy decoding.
fn score(base: &Model, adapter: Option<&Adapter<Cpu>>, rows: &[Example]) -> Score {
    let engine = Engine::new(base, adapter, rows.iter().map(|row| row.task), CAPACITY);
    let rows: Vec<_> = rows.iter().collect();
    let nll: f64 = engine.nll(&rows).iter().flatten().sum();
    let n_labels: usize = rows.iter().map(|row| row.labels.len()).sum();
    let options = GenerateOptions { max_new_tokens: MAX_NEW_TOKENS, ..Default::default() };
    let outputs = engine.generate(&rows, &options, |_, _| ());
    let n_right = outputs.iter().zip(&rows).filter(|(output, row)| **output == row.labels).count();
    Score { loss: nll / n_labels as f64, exact_match: n_right as f64 / rows.len() as f64 }
}

/// Refuses a folder whose files the demo would replace, unless a demo wrote them: then its base is there, or the first file of
/// it where it was interrupted.
fn check_replaceable(dir: &Path) -> Result<()> {
    let base = dir.join("base");
    let is_own = |(name, bytes): &(&str, &[u8])| {
        let path = base.join(name);
        fs::metadata(&path).is_ok_and(|found| found.len() == bytes.len() as u64)
            && fs::read(&path).is_ok_and(|found| found == *bytes)
    };
    let is_demo =
        is_own(&BASE[0]) && BASE.iter().all(|file| is_own(file) || !base.join(file.0).exists());
    let names = ["base", "data"].into_iter().chain(Method::ALL.iter().map(|method| method.name()));
    match names.map(|name| dir.join(name)).find(|path| !is_demo && check_free(path).is_err()) {
        None => Ok(()),
        Some(taken) => Err(Error::Usage(format!(
            "{} is there, and no demo wrote it: nothing is overwritten; remove it or name another --output-dir",
            taken.display()
        ))),
    }
}

fn write_files(dir: &Path, files: &[(&str, &[u8])]) -> Result<()> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    files.iter().try_for_each(|(name, bytes)| {
        let path = dir.join(name);
        write_atomically(&path, |file| file.write_all(bytes))
    })
}

/// The rows as data files: what the other verbs read, with the text beside the ids.
fn write_rows(dir: &Path, suite: &Suite) -> Result<()> {
    let lines = |tasks: &[Task], rows: fn(&Task) -> &[Example]| -> String {
        tasks
            .iter()
            .flat_map(|task| rows(task).iter().map(|row| (task.recipe.name(), row)))
            .map(|(task, row)| {
                let text = format!("{} -> {}", suite::text(&row.input), suite::text(&row.labels));
                let line = serde_json::json!({
                    "task": task, "input_ids": row.input, "label_ids": row.labels, "text": text
                });
                format!("{line}\n")
            })
            .collect()
    };
    let train = lines(&suite.train, |task| &task.train);
    let test = lines(&suite.train, |task| &task.test);
    let few = lines(&suite.held_out, |task| &task.train);
    let new = lines(&suite.held_out, |task| &task.test);
    let files = [
        ("train.jsonl", train.as_bytes()),
        ("test.jsonl", test.as_bytes()),
        ("held-out-train.jsonl", few.as_bytes()),
        ("held-out-test.jsonl", new.as_bytes()),
    ];
    write_files(dir, &files)
}
