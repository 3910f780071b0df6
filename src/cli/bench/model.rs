//! `bench train|eval|generate`: how long a training step, an evaluation or a generation takes, on random
//! rows.
//!
//! Row i has task i mod n_tasks; ids are random and lengths full; a causal model is trained on all of
//! `--src` and has no `--tgt`. `train` is forward, backward and
//! AdamW step; with `--adapter none` it is forward, and backward through the activations down to both
//! embeddings: the floor that an adapter is compared with.

use std::{path::PathBuf, time::Instant};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::{
    cli::{Common, Described, OnOff, print_json, run_on_device},
    error::{Error, Result},
    formats::poly_config::PolyConfig,
    generate::{Engine, GenerateOptions},
    kernels::{
        Backend, Precision,
        cpu::{Cpu, Entry, Peaks, Profile},
        philox::{Key, Purpose},
    },
    model::{Adapter, Batch, Example, Layout, Model, network::Sides, routed_lora::parse_targets},
    process::{Memory, huge_mib},
    tape::{Gradients, Tape},
    train::{Schedule, TrainConfig, Trainer},
};

#[derive(Args)]
pub(super) struct ModelBench {
    #[command(flatten)]
    pub(super) common: Common,
    #[arg(skip)]
    pub(super) what: What,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    /// Rows.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=MOST))]
    batch: u32,
    /// Source tokens of a row.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=MOST))]
    src: u32,
    /// Label tokens of a row; ignored by causal models.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=MOST))]
    tgt: u32,
    /// Tokens to generate.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=MOST))]
    new: u32,
    /// Generate by draws, of the 50 most probable tokens up to 0.95 of their probability, instead of greedily.
    #[arg(long)]
    do_sample: bool,
    /// With a Poly adapter, or the base alone.
    #[arg(long, default_value = "poly")]
    adapter: AdapterFlag,
    /// Rank.
    #[arg(long, default_value_t = 8)]
    r: usize,
    /// Skills.
    #[arg(long, default_value_t = 4)]
    n_skills: usize,
    /// Splits.
    #[arg(long, default_value_t = 4)]
    n_splits: usize,
    /// Tasks.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    n_tasks: u32,
    /// Names, a regular expression, or all-linear [default: the architecture's].
    #[arg(long)]
    target_modules: Option<String>,
    /// Whether activations are computed again instead of kept.
    #[arg(long, default_value = "off")]
    checkpointing: OnOff,
    /// Dropout of the base.
    #[arg(long, default_value_t = 0.0)]
    dropout: f32,
    /// Also what each operation takes, beside its limit on this machine: a table on stderr, and
    /// `profile` in the result. On the CPU.
    #[arg(long)]
    profile: bool,
    /// Timed steps, after two that are not.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
}

/// What is timed: the subcommand.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum What {
    #[default]
    Train,
    Eval,
    Generate,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AdapterFlag {
    Poly,
    None,
}

const WARM_UP: u32 = 2;

/// Rows, or tokens of a row, at most.
const MOST: i64 = 1 << 20;

impl ModelBench {
    pub(super) fn run(mut self, what: What) -> Result<()> {
        self.what = what;
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::Usage(format!("dropout must be in 0..1, not {}", self.dropout)));
        }
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        self.check_positions(&model)?;
        let adapter = match self.adapter {
            AdapterFlag::Poly => Some(self.adapter(&model)?),
            AdapterFlag::None => None,
        };
        let examples = self.examples(&model);
        let examples: Vec<&Example> = examples.iter().collect();
        let profile = match (self.profile, model.backend().cpu()) {
            (true, None) => {
                return Err(Error::Usage("--profile is of the CPU: leave --device out".into()));
            }
            (is_wanted, cpu) => cpu.filter(|_| is_wanted),
        };
        let mut timer = Timer { profile: profile.map(Cpu::profile), ..Timer::default() };
        let loss = match (self.what, adapter) {
            (What::Train, Some(adapter)) => self.train(&model, adapter, &examples, &mut timer)?,
            (What::Train, None) => self.floor(&model, &examples, &mut timer),
            (_, adapter) => self.infer(&model, adapter.as_ref(), &examples, &mut timer),
        };
        let row_tokens = match self.what {
            What::Generate => self.new,
            What::Train | What::Eval => match model.layout() {
                Layout::EncoderDecoder { .. } => self.src + self.tgt,
                Layout::Causal => self.src,
            },
        };
        let (median, min) = timer.summary();
        let entries = profile.map(|cpu| (cpu.peaks(), cpu.profile().finish()));
        let backend = model.backend();
        print_json(&json!({
            "median_s": median,
            "min_s": min,
            "tok_per_s": f64::from(self.batch) * f64::from(row_tokens) / median,
            "rss_mib": Memory::now().peak_rss_mib,
            "anon_mib": timer.anon_mib,
            "huge_mib": huge_mib(),
            "device_mib": backend.cpu().is_none().then(|| backend.peak_bytes() >> 20),
            "isa": backend.hardware(),
            "threads": backend.host_threads(),
            "loss": loss,
            "what": match self.what {
                What::Train => "train",
                What::Eval => "eval",
                What::Generate => "generate",
            },
            "model": self.model,
            "dtype": backend.compute().to_string(),
            "adapter": if self.adapter == AdapterFlag::Poly { "poly" } else { "none" },
            "batch": self.batch,
            "src": self.src,
            "tgt": self.tgt,
            "new": self.new,
            "r": self.r,
            "n_skills": self.n_skills,
            "n_splits": self.n_splits,
            "n_tasks": self.n_tasks,
            "target_modules":
                self.target_modules.clone().unwrap_or_else(|| model.default_targets().join(",")),
            "checkpointing": self.checkpointing.is_on(),
            "dropout": self.dropout,
            "steps": self.steps,
            "profile": entries.map(|(peaks, entries)| self.profile(&peaks, &entries, &timer)),
        }))
    }

    /// Refuses rows longer than the model has positions, which a generation would end before `--new`.
    fn check_positions(&self, model: &Model<impl Backend>) -> Result<()> {
        let (flags, longest) = match (self.what, model.layout()) {
            // The last token is said, not read.
            (What::Generate, Layout::Causal) => ("--src and --new", self.src + self.new - 1),
            (What::Generate, _) => ("--src or --new", self.src.max(self.new)),
            (_, Layout::Causal) => ("--src", self.src),
            (_, Layout::EncoderDecoder { .. }) => ("--src or --tgt", self.src.max(self.tgt)),
        };
        match model.config().max_positions() {
            Some(max) if longest as usize > max => Err(Error::Usage(format!(
                "a row of {longest} tokens ({flags}) is too long: the model has positions for {max}"
            ))),
            _ => Ok(()),
        }
    }

    /// Prints what operations took, the longest first.
    fn profile(&self, peaks: &Peaks, entries: &[Entry], timer: &Timer<'_>) -> Vec<Value> {
        let steps = f64::from(self.steps);
        let total: f64 = timer.seconds[WARM_UP as usize..].iter().sum();
        let inside: f64 = entries.iter().map(|entry| entry.seconds).sum();
        eprintln!(
            "peaks: f32 FMA {:.0} GFLOP/s{}, reading {:.1} GB/s ({:.1} by one thread)",
            peaks.fma / 1e9,
            peaks.amx.map_or_else(String::new, |amx| format!(", AMX {:.0} GFLOP/s", amx / 1e9)),
            peaks.read / 1e9,
            peaks.read_by_one / 1e9,
        );
        eprintln!(
            "{:<18} {:<34} {:>6} {:>9} {:>6} {:>8} {:>7} {:>9} {:>6}",
            "operation", "shape", "calls", "ms", "share", "GFLOP/s", "GB/s", "limit ms", "of it"
        );
        let line = |name: &str, shape: &str, calls: f64, entry: [f64; 4]| {
            let [seconds, flops, bytes, limit] = entry;
            eprintln!(
                "{name:<18} {shape:<34} {calls:>6} {:>9.2} {:>5.1}% {:>8.1} {:>7.2} {:>9.2} {:>5.0}%",
                1e3 * seconds / steps,
                100.0 * seconds / total,
                flops / seconds / 1e9,
                bytes / seconds / 1e9,
                1e3 * limit / steps,
                100.0 * limit / seconds,
            );
        };
        let limit = |entry: &Entry| {
            let peak = peaks.amx.filter(|_| entry.on_tiles).unwrap_or(peaks.fma);
            (entry.flops / peak).max(entry.bytes / peaks.read)
        };
        let all: Vec<Value> = entries
            .iter()
            .map(|entry| {
                let Entry { operation, shape, calls, seconds, flops, bytes, on_tiles } = entry;
                let calls = *calls as f64 / steps;
                line(operation, shape, calls, [*seconds, *flops, *bytes, limit(entry)]);
                json!({
                    "operation": operation, "shape": shape, "calls": calls,
                    "seconds": seconds / steps, "flops": flops / steps, "bytes": bytes / steps,
                    "limit_s": limit(entry) / steps, "on_tiles": on_tiles,
                })
            })
            .collect();
        let sum = |of: fn(&Entry) -> f64| entries.iter().map(of).sum::<f64>();
        let limits: f64 = entries.iter().map(limit).sum();
        line("all of them", "", 1.0, [inside, sum(|e| e.flops), sum(|e| e.bytes), limits]);
        line("between them", "", 1.0, [total - inside, 0.0, 0.0, 0.0]);
        all
    }

    fn adapter<B: Backend>(&self, model: &Model<B>) -> Result<Adapter<B>> {
        let config = PolyConfig {
            r: self.r,
            n_tasks: self.n_tasks as usize,
            n_skills: self.n_skills,
            n_splits: self.n_splits,
            target_modules: self.target_modules.as_deref().map(parse_targets),
            ..PolyConfig::default()
        };
        Adapter::new(model, &config, self.common.seed)
    }

    fn examples(&self, model: &Model<impl Backend>) -> Vec<Example> {
        let key = Key::new(self.common.seed, Purpose::Data, 1);
        let n_ids = model.vocab_size().saturating_sub(3).max(1) as u64;
        let mut draw = 0;
        let mut ids = |n: u32| -> Vec<u32> {
            (0..n)
                .map(|_| {
                    draw += 1;
                    let first = if model.vocab_size() > 3 { 3 } else { 0 };
                    first + ((u64::from(key.word(draw)) * n_ids) >> 32) as u32
                })
                .collect()
        };
        (0..self.batch)
            .map(|i| {
                // All of a causal row is predicted: from one id on.
                let (n_input, n_labels) = match (model.layout(), self.what) {
                    (Layout::Causal, What::Train | What::Eval) => (1, self.src),
                    (Layout::Causal, What::Generate) => (self.src, 0),
                    (Layout::EncoderDecoder { .. }, _) => (self.src, self.tgt),
                };
                Example {
                    input: ids(n_input),
                    labels: ids(n_labels),
                    task: i % self.n_tasks,
                    mixing: None,
                }
            })
            .collect()
    }

    fn train<B: Backend>(
        &self,
        model: &Model<B>,
        adapter: Adapter<B>,
        examples: &[&Example],
        timer: &mut Timer<'_>,
    ) -> Result<f64> {
        let config = TrainConfig {
            learning_rate: 1e-4,
            router_learning_rate: 1e-4,
            max_grad_norm: 0.0,
            schedule: Schedule::Constant,
            batch_size: examples.len(),
            dropout: Some(self.dropout),
            checkpointing: self.checkpointing.is_on(),
            seed: self.common.seed,
            ..TrainConfig::default()
        };
        let mut trainer = Trainer::new(model, adapter, config)?;
        let mut loss = 0.0;
        for _ in 0..WARM_UP + self.steps {
            timer.time(|| trainer.step(examples).map(|report| loss = report.loss))?;
        }
        Ok(loss)
    }

    /// The frozen base: forward, and backward to both embeddings.
    fn floor<B: Backend>(
        &self,
        model: &Model<B>,
        examples: &[&Example],
        timer: &mut Timer<'_>,
    ) -> f64 {
        let backend = model.backend();
        let batch = Batch::new(examples.iter().copied(), model.layout(), 0);
        let n_labels = batch.labels.len();
        let dropout = (self.dropout, Key::new(self.common.seed, Purpose::Dropout, 1));
        let mut sides = Sides::new(&batch, &batch.own_rows(), Some(dropout));
        for side in [&mut sides.source, &mut sides.target] {
            side.keep = !self.checkpointing.is_on();
            side.watch = true;
        }
        let mut loss = 0.0;
        for _ in 0..WARM_UP + self.steps {
            timer.time(|| {
                backend.scope(|| {
                    let none = || backend.zeros(0, 0, Precision::Full);
                    let mut gradients = Gradients { params: none(), weights: none() };
                    let mut tape = Tape::recording(backend, None);
                    let d_nll = 1.0 / n_labels as f32;
                    let nll = model.network().loss(&mut tape, &batch, &sides, d_nll);
                    tape.backward(Vec::new(), &mut gradients);
                    // At the end: a device is waited for here.
                    loss = backend.numbers(&nll).iter().sum::<f64>() / n_labels as f64;
                });
            });
        }
        loss
    }

    fn infer<B: Backend>(
        &self,
        model: &Model<B>,
        adapter: Option<&Adapter<B>>,
        examples: &[&Example],
        timer: &mut Timer<'_>,
    ) -> f64 {
        let tasks = examples.iter().map(|example| example.task);
        let engine = Engine::new(model, adapter, tasks, examples.len());
        let new = self.new as usize;
        let (top_k, top_p) = if self.do_sample { (50, 0.95) } else { (0, 1.0) };
        let options = GenerateOptions {
            max_new_tokens: new,
            min_new_tokens: new,
            do_sample: self.do_sample,
            top_k,
            top_p,
            ..Default::default()
        };
        let mut loss = 0.0;
        for _ in 0..WARM_UP + self.steps {
            timer.time(|| match self.what {
                What::Generate => drop(engine.generate(examples, &options, |_, _| ())),
                What::Train | What::Eval => {
                    let nll = engine.nll(examples);
                    let n: usize = nll.iter().map(Vec::len).sum();
                    loss = nll.iter().flatten().sum::<f64>() / n as f64;
                }
            });
        }
        loss
    }
}

#[derive(Default)]
struct Timer<'a> {
    seconds: Vec<f64>,
    anon_mib: u64,
    profile: Option<&'a Profile>,
}

impl Timer<'_> {
    fn time<R>(&mut self, work: impl FnOnce() -> R) -> R {
        if self.seconds.len() == WARM_UP as usize {
            self.profile.inspect(|profile| profile.start());
        }
        let started = Instant::now();
        let result = work();
        self.seconds.push(started.elapsed().as_secs_f64());
        // Buffers are kept for reuse, so what is resident after a step is the step's peak.
        self.anon_mib = self.anon_mib.max(Memory::now().anon_mib);
        result
    }

    /// Median and minimum of the timed steps.
    fn summary(&self) -> (f64, f64) {
        let mut timed = self.seconds[WARM_UP as usize..].to_vec();
        timed.sort_by(f64::total_cmp);
        let middle = timed.len() / 2;
        let median = if timed.len() % 2 == 1 {
            timed[middle]
        } else {
            (timed[middle - 1] + timed[middle]) / 2.0
        };
        (median, timed[0])
    }
}
