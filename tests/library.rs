//! The crate as a library: the examples run, what should be shared by threads can be, and two engines
//! in one process do not disturb each other.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/examples.rs"]
mod examples;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
    thread,
};

use polytape::{
    Dtype, Error,
    formats::{poly_config::PolyConfig, tokenizer::Tokenizer},
    generate::{Engine, GenerateOptions},
    kernels::{Backend, cpu::Cpu, cuda::Cuda, oracle::Oracle},
    model::{Adapter, Example, Mixing, Model, Options},
    tensor::{Frozen, Tensor},
    train::{TrainConfig, Trainer},
};

/// Fails to compile where a type cannot go to, or be used by, several threads.
#[test]
fn engines_are_send_and_sync() {
    const fn shared<T: Send + Sync>() {}
    const {
        shared::<Model<Cpu>>();
        shared::<Adapter<Cpu>>();
        shared::<Engine<'static, Cpu>>();
        shared::<Trainer<'static, Cpu>>();
        shared::<Tensor<Cpu>>();
        shared::<Frozen>();
        shared::<Cpu>();
        shared::<Oracle>();
        shared::<Cuda>();
        shared::<Model<Cuda>>();
        shared::<Tokenizer>();
        shared::<Error>();
    }
}

fn base(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity").join(name).join("base")
}

fn temporary(name: &str) -> PathBuf {
    let dir = env::temp_dir().join(format!("polytape-library-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// An example's program.
fn example(name: &str) -> Command {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    Command::new(DIR.get_or_init(|| examples::built(&["--examples"])).join(name))
}

/// What a program prints, which must succeed.
fn printed(command: &mut Command, input: &str) -> String {
    let mut child = (command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The numbers behind a word, line by line.
fn numbers(printed: &str, word: &str) -> Vec<f64> {
    let number = |line: &str| line.split(word).nth(1).and_then(|rest| rest.trim().parse().ok());
    printed.lines().filter_map(number).collect()
}

#[test]
fn the_examples_train_save_and_serve() {
    let dir = temporary("examples");
    let (data, adapter) = (dir.join("rows.jsonl"), dir.join("adapter"));
    let row = |i: usize| {
        let (task, label) = [("first", 7), ("second", 9)][i % 2];
        let input = [5 + i % 11, 4 + i % 7, 1];
        format!(r#"{{"task":"{task}","input_ids":{input:?},"label_ids":[{label},1]}}"#) + "\n"
    };
    fs::write(&data, (0..48).map(row).collect::<String>()).unwrap();
    let trained = printed(example("train").arg(base("tiny")).arg(&data).arg(&adapter), "");
    let losses = numbers(&trained, "loss");
    assert_eq!(losses.len(), 18, "{trained}");
    // Three epochs over the same six batches.
    assert!((0..12).all(|i| losses[i + 6] < losses[i]), "{trained}");
    assert!(numbers(&trained, "evaluation")[0].is_finite(), "{trained}");

    // Alone and among others a request gets the same tokens.
    let requests: Vec<String> = (0..10)
        .map(|i| {
            let task = ["first", "second"][i % 2];
            format!(r#"{{"task":"{task}","input_ids":[{},6,1]}}"#, 5 + i) + "\n"
        })
        .collect();
    let serve = |input: &str| printed(example("serve").arg(base("tiny")).arg(&adapter), input);
    let all = serve(&requests.concat());
    let of = |printed: &str, request: usize| -> Vec<String> {
        let mine = |line: &str| line.strip_prefix(&format!("{request} ")).map(str::to_owned);
        printed.lines().filter_map(mine).collect()
    };
    for request in [0, 3, 9] {
        let (alone, among) = (of(&serve(&requests[request]), 0), of(&all, request));
        assert_eq!(alone, among);
        assert!(among.len() >= 2 && among.last().unwrap() == "end", "{among:?}");
    }
    // A request that is wrong is refused by its line.
    let mut wrong = example("serve");
    wrong.arg(base("tiny")).arg(&adapter).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = wrong.stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(br#"{"task":"third","input_ids":[5,1]}"#).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("standard input:1") && error.contains("third"), "{error}");
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn the_example_of_a_routed_linear_learns_both_tasks() {
    let losses = numbers(&printed(&mut example("routed_linear"), ""), "loss");
    assert_eq!(losses.len(), 5);
    assert!(losses[0] > 0.6, "two classes by chance: {losses:?}");
    assert!(losses[4] < 0.2, "{losses:?}");
}

/// Everything that an engine and a trainer on their own base compute: a fingerprint of the bits.
fn work(name: &str, dtype: Dtype, n_threads: usize) -> Vec<u64> {
    let model =
        Model::open(base(name), &Options { dtype: Some(dtype), n_threads, ..Options::default() })
            .unwrap();
    let config = PolyConfig { n_tasks: 2, n_skills: 2, r: 4, ..PolyConfig::default() };
    let adapter = Adapter::new(&model, &config, 3).unwrap();
    let examples: Vec<_> = (0..6)
        .map(|i| Example {
            input: vec![5 + i, 4, 1],
            labels: vec![7 + i % 3, 1],
            task: i % 2,
            mixing: None,
        })
        .collect();
    let examples: Vec<_> = examples.iter().collect();
    let mut trainer = Trainer::new(&model, adapter, TrainConfig::default()).unwrap();
    let mut bits: Vec<u64> =
        (0..4).map(|_| trainer.step(&examples).unwrap().loss.to_bits()).collect();
    let adapter = trainer.into_adapter();
    let engine = Engine::new(&model, Some(&adapter), [0, 1], 4);
    bits.extend(engine.nll(&examples).into_iter().flatten().map(f64::to_bits));
    let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
    let tokens = engine.generate(&examples, &options, |_, _| ());
    bits.extend(tokens.into_iter().flatten().map(u64::from));
    bits
}

/// A mixing is for inference: a step that would not heed it refuses, and nothing has moved.
#[test]
fn a_trainer_refuses_examples_with_a_mixing() {
    let model = Model::open(base("tiny"), &Options::default()).unwrap();
    let config = PolyConfig { n_tasks: 2, n_skills: 2, r: 4, ..PolyConfig::default() };
    let adapter = Adapter::new(&model, &config, 3).unwrap();
    let before = model.backend().download(adapter.params());
    let plain = Example { input: vec![5, 4, 1], labels: vec![7, 1], task: 0, mixing: None };
    let mixed = Example { mixing: Some(Mixing::Average), ..plain.clone() };
    let mut trainer = Trainer::new(&model, adapter, TrainConfig::default()).unwrap();
    for refused in [
        trainer.step(&[&plain, &mixed]),
        trainer.step_on_choices(&[&plain], &[std::slice::from_ref(&mixed)]),
    ] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("has a mixing") && error.contains("by its task"), "{error}");
    }
    assert_eq!(trainer.steps_done(), 0);
    assert_eq!(model.backend().download(trainer.adapter().params()), before);
    trainer.step(&[&plain, &plain]).unwrap();
}

#[test]
fn engines_in_one_process_do_not_disturb_each_other() {
    let cases = [("tiny", Dtype::F32, 2), ("llama", Dtype::Bf16, 1), ("tiny", Dtype::Bf16, 3)];
    let alone = cases.map(|(name, dtype, n)| work(name, dtype, n));
    for _ in 0..3 {
        thread::scope(|scope| {
            let together = cases.map(|(name, dtype, n)| scope.spawn(move || work(name, dtype, n)));
            for (found, expected) in together.into_iter().zip(&alone) {
                assert_eq!(&found.join().unwrap(), expected);
            }
        });
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let one = work("tiny", dtype, 1);
        for n_threads in [2, 3, 7, 33, 1] {
            assert_eq!(work("tiny", dtype, n_threads), one, "{dtype}, {n_threads} threads");
        }
    }
}
