//! A long run takes no more memory, files or threads than a short one.
//!
//! `POLYTAPE_SOAK=10000 cargo test --release --test soak -- --nocapture` is the long one.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::{fs, path::Path, thread, time::Duration};

use polytape::{
    Dtype,
    formats::poly_config::PolyConfig,
    generate::{Engine, GenerateOptions},
    kernels::cpu::Cpu,
    model::{Adapter, Example, Model},
    train::{Schedule, TrainConfig, Trainer},
};

/// What this process holds now.
#[derive(Clone, Copy, Debug)]
struct Held {
    resident_kib: i64,
    files: usize,
    threads: usize,
}

impl Held {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| -> i64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let files = fs::read_dir("/proc/self/fd").unwrap().count();
        Self { resident_kib: field("VmRSS:"), files, threads: field("Threads:") as usize }
    }
}

/// What is held once threads that were told to end have ended.
fn settled(most_threads: usize) -> Held {
    for _ in 0..100 {
        thread::sleep(Duration::from_millis(20));
        if Held::now().threads <= most_threads {
            break;
        }
    }
    Held::now()
}

/// Does something `n` times, and compares what is held after it with what is held after the first
/// fifth: at most 1 MiB more, and not a file or thread.
fn soak(what: &str, n: usize, mut work: impl FnMut(usize)) {
    let warm_up = (n / 5).max(50);
    (0..warm_up).for_each(&mut work);
    let before = settled(usize::MAX);
    (warm_up..warm_up + n).for_each(&mut work);
    let after = settled(before.threads);
    println!("{what}: {n} times after {warm_up}: {before:?}, then {after:?}");
    assert!(after.resident_kib - before.resident_kib <= 1024, "{what}: {before:?}, then {after:?}");
    assert_eq!((after.files, after.threads), (before.files, before.threads), "{what}");
}

/// One test, as what a process holds is everybody's.
#[test]
fn a_long_run_takes_no_more_than_a_short_one() {
    let n = std::env::var("POLYTAPE_SOAK").map_or(300, |n| n.parse().unwrap());
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity/tiny/base");
    let open = || Model::open_on(Cpu::new(Dtype::F32, 2).unwrap(), &base).unwrap();
    let model = open();
    let config = PolyConfig { n_tasks: 3, n_skills: 2, r: 4, ..PolyConfig::default() };
    let adapter = || Adapter::new(&model, &config, 1).unwrap();

    // Ragged: a new number of tokens in nearly every step.
    let example = |i: usize, k: usize| Example {
        input: (0..1 + (i * 7 + k * 3) % 29).map(|j| 4 + (j % 60) as u32).collect(),
        labels: (0..1 + (i + k) % 5).map(|j| 4 + j as u32).collect(),
        task: (k % 3) as u32,
        mixing: None,
    };
    let train = TrainConfig {
        schedule: Schedule::Constant,
        learning_rate: 1e-4,
        router_learning_rate: 1e-4,
        dropout: Some(0.1),
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(&model, adapter(), train).unwrap();
    soak("training steps", n, |i| {
        let examples: Vec<Example> = (0..3 + i % 4).map(|k| example(i, k)).collect();
        trainer.step(&examples.iter().collect::<Vec<_>>()).unwrap();
    });

    let dir = std::env::temp_dir().join(format!("polytape-soak-{}", std::process::id()));
    trainer.adapter().save_peft(model.backend(), &dir).unwrap();
    soak("adapters loaded, used and dropped", n / 10, |i| {
        let adapter = Adapter::open(&model, &dir).unwrap();
        let engine = Engine::new(&model, Some(&adapter), [0, 1, 2], 4);
        let examples: Vec<Example> = (0..2).map(|k| example(i, k)).collect();
        let examples: Vec<&Example> = examples.iter().collect();
        let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
        assert_eq!(engine.generate(&examples, &options, |_, _| ()).len(), 2);
    });
    soak("adapters saved", n / 10, |_| {
        trainer.adapter().save_peft(model.backend(), &dir).unwrap();
    });
    soak("bases opened and closed", n / 10, |_| drop(open()));
    fs::remove_dir_all(dir).unwrap();
}
