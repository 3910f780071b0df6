//! The same inputs give the same bits: for any number of threads, again, from any step on, and in
//! inference whoever else is in the batch.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/folder.rs"]
mod folder;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use folder::Folder;
use polytape::{
    Dtype,
    formats::poly_config::PolyConfig,
    generate::{Engine, GenerateOptions},
    kernels::{Backend, cpu::Cpu},
    model::{Adapter, Example, Model, Options},
    train::{Schedule, TrainConfig, Trainer, checkpoint::OPTIMIZER_FILE},
};

const THREADS: [usize; 5] = [1, 2, 3, 7, 33];
const N_STEPS: u64 = 24;
const N_TASKS: usize = 3;

/// One of each kind: encoder-decoder with a bias of positions, causal with shared heads, with a
/// window, with normed heads, with learned positions.
const BASES: [&str; 5] = ["tiny", "llama", "mistral", "qwen3", "bart"];

fn open(name: &str, dtype: Dtype, n_threads: usize) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity").join(name);
    let options = Options { dtype: Some(dtype), n_threads, ..Options::default() };
    Model::open(dir.join("base"), &options).unwrap()
}

/// Numbers that look random.
fn random(n: usize) -> impl FnMut(usize) -> usize {
    let mut state = n as u64;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize % below
    }
}

/// Examples of all tasks, of different lengths.
fn examples(n: usize) -> Vec<Example> {
    let mut random = random(n);
    let mut ids = |n: usize| -> Vec<u32> { (0..n).map(|_| 4 + random(60) as u32).collect() };
    let lens = [3, 1, 9, 17, 2, 6, 30];
    (0..n)
        .map(|i| Example {
            input: ids(lens[i % lens.len()]),
            labels: ids(1 + i % 4),
            task: (i % N_TASKS) as u32,
            mixing: None,
        })
        .collect()
}

/// Everything that draws, accumulates and is scheduled.
fn config(n: usize) -> (PolyConfig, TrainConfig) {
    let config =
        PolyConfig { n_tasks: N_TASKS, n_skills: 3, n_splits: 2, r: 4, ..PolyConfig::default() };
    let train = TrainConfig {
        batch_size: 4,
        max_steps: N_STEPS,
        warmup_steps: 3,
        learning_rate: 1e-2,
        dropout: Some(0.1),
        checkpointing: n % 2 == 1,
        schedule: Schedule::Cosine,
        seed: 7,
        ..TrainConfig::default()
    };
    (config, train)
}

/// The examples of a step.
fn of_step(all: &[Example], step: u64) -> Vec<&Example> {
    (0..6).map(|i| &all[(step as usize * 5 + i * 3) % all.len()]).collect()
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Losses and norms of the steps from `from` on, then all parameters.
fn train(
    trainer: &mut Trainer<'_, Cpu>,
    all: &[Example],
    mut each: impl FnMut(&Trainer<'_, Cpu>),
) -> Vec<u64> {
    let mut found = Vec::new();
    while trainer.steps_done() < N_STEPS {
        let report = trainer.step(&of_step(all, trainer.steps_done())).unwrap();
        found.extend([report.loss.to_bits(), report.grad_norm.to_bits()]);
        each(trainer);
    }
    let model = trainer.model();
    found.extend(bits(&model.backend().download(trainer.adapter().params())));
    found
}

impl Folder {
    fn of_step(&self, step: u64) -> PathBuf {
        let path = self.0.join(step.to_string());
        fs::create_dir_all(&path).unwrap();
        path
    }
}

#[test]
fn training_gives_the_same_bits_on_any_number_of_threads_and_again() {
    let all = examples(23);
    for (n, name) in BASES.into_iter().enumerate() {
        let dtype = [Dtype::F32, Dtype::Bf16][n % 2];
        let mut first = None;
        for n_threads in THREADS.into_iter().chain([2]) {
            let model = open(name, dtype, n_threads);
            let (poly, config) = config(n);
            let adapter = Adapter::new(&model, &poly, 5).unwrap();
            let mut trainer = Trainer::new(&model, adapter, config).unwrap();
            let found = train(&mut trainer, &all, |_| ());
            let first = first.get_or_insert_with(|| found.clone());
            assert!(*first == found, "{name} in {dtype} on {n_threads} threads");
        }
    }
}

/// At twenty steps of a run, each on another number of threads than the run.
#[test]
fn a_run_resumed_anywhere_ends_with_the_same_bits() {
    let all = examples(23);
    for (n, name) in ["tiny", "llama"].into_iter().enumerate() {
        let dtype = [Dtype::F32, Dtype::Bf16][n % 2];
        let folder = Folder::new(&format!("resumed-{name}"));
        let model = open(name, dtype, 2);
        let (poly, config) = config(n);
        let adapter = Adapter::new(&model, &poly, 5).unwrap();
        let mut trainer = Trainer::new(&model, adapter, config.clone()).unwrap();
        let whole = train(&mut trainer, &all, |trainer| {
            let dir = folder.of_step(trainer.steps_done());
            trainer.adapter().save_peft(model.backend(), &dir).unwrap();
            trainer.save_optimizer(&dir.join(OPTIMIZER_FILE)).unwrap();
        });
        let mut random = random(n);
        let mut points: Vec<u64> = (1..N_STEPS).collect();
        while points.len() > 20 {
            points.remove(random(points.len()));
        }
        for (i, step) in points.into_iter().enumerate() {
            let n_threads = [1, 3, 7, 33][i % 4];
            let model = open(name, dtype, n_threads);
            let dir = folder.of_step(step);
            let adapter = Adapter::open(&model, &dir).unwrap();
            let mut trainer = Trainer::new(&model, adapter, config.clone()).unwrap();
            trainer.restore(&dir, step).unwrap();
            let rest = train(&mut trainer, &all, |_| ());
            let expected = &whole[2 * step as usize..];
            assert!(rest == expected, "{name} in {dtype} from step {step} on {n_threads} threads");
        }
    }
}

/// Alone, in other places of other batches, and on any number of threads; in an engine of few rows, whose tokens are decoded
/// by dot products, and of many.
#[test]
fn an_example_has_the_same_bits_whoever_is_beside_it() {
    let all = examples(21);
    for (capacity, (n, name)) in
        [9, 32].into_iter().flat_map(|c| BASES.into_iter().enumerate().map(move |base| (c, base)))
    {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut random = random(n);
            let mut expected: Vec<Option<(Vec<u64>, Vec<u32>)>> = vec![None; all.len()];
            for (round, n_threads) in THREADS.into_iter().chain([1, 2]).enumerate() {
                let model = open(name, dtype, n_threads);
                let (poly, _) = config(n);
                let adapter = Adapter::new(&model, &poly, 5).unwrap();
                let engine = Engine::new(&model, Some(&adapter), 0..N_TASKS as u32, capacity);
                // All alone first, then any number of them in any order.
                let mut order: Vec<usize> = (0..all.len()).collect();
                for i in (1..order.len()).rev() {
                    order.swap(i, random(i + 1));
                }
                let mut rest = &order[..];
                while !rest.is_empty() {
                    let len = if round == 0 { 1 } else { 1 + random(rest.len().min(2 * capacity)) };
                    let (now, later) = rest.split_at(len);
                    rest = later;
                    let batch: Vec<&Example> = now.iter().map(|&i| &all[i]).collect();
                    let nll = engine.nll(&batch);
                    let options = GenerateOptions { max_new_tokens: 4, ..Default::default() };
                    let tokens = engine.generate(&batch, &options, |_, _| ());
                    for ((&i, nll), tokens) in now.iter().zip(nll).zip(tokens) {
                        let found = (bits(&nll), tokens);
                        let expected = expected[i].get_or_insert_with(|| found.clone());
                        assert!(
                            *expected == found,
                            "{name} in {dtype} of {capacity}: example {i} among {now:?} on {n_threads} threads"
                        );
                    }
                }
            }
        }
    }
}
