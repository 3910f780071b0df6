//! Arbitrary bytes as the files of a checkpoint that a run is to go on from.
//!
//! ```text
//! bytes   trainer_state.json, a zero byte, training_args.json, a zero byte, optimizer.safetensors
//! ```
//!
//! A part that begins with "=" is the file as a run has left it. Each file is refused by its name, or
//! the next step is made: after it parameters and moments are finite, or the step says why not
//! and has changed nothing.

use std::{cell::OnceCell, fs, path::PathBuf, sync::OnceLock};

use polytape::{
    Dtype, Error,
    formats::poly_config::PolyConfig,
    kernels::{Backend, cpu::Cpu},
    model::{Adapter, Example, Model},
    train::{
        TrainConfig, Trainer,
        checkpoint::{self, TrainerState},
    },
};

use crate::messages::assert_presentable;

const FILES: [&str; 3] =
    [checkpoint::STATE_FILE, checkpoint::ARGUMENTS_FILE, checkpoint::OPTIMIZER_FILE];

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let crate_dir = env!("CARGO_MANIFEST_DIR").trim_end_matches("/fuzz");
        let base = PathBuf::from(crate_dir).join("tests/data/parity/tiny/base");
        let cpu = Cpu::new(Dtype::F32, 1).expect("a CPU");
        Model::open_on(cpu, base).expect("the fixture")
    })
}

fn trainer() -> Trainer<'static, Cpu> {
    let config = PolyConfig { n_tasks: 2, n_skills: 2, r: 1, ..PolyConfig::default() };
    let adapter = Adapter::new(model(), &config, 1).expect("a valid configuration");
    let config = TrainConfig { max_steps: 10, ..TrainConfig::default() };
    Trainer::new(model(), adapter, config).expect("valid settings")
}

fn arguments() -> serde_json::Map<String, serde_json::Value> {
    serde_json::Map::from_iter([("seed".to_owned(), 1.into())])
}

/// What a run leaves behind after a step.
struct Left {
    dir: PathBuf,
    files: [Vec<u8>; 3],
}

thread_local! {
    static LEFT: OnceCell<Left> = const { OnceCell::new() };
}

fn leave() -> Left {
    let thread = format!("{:?}", std::thread::current().id()).replace(['(', ')'], "-");
    let name = format!("polytape-fuzz-resume-{}-{thread}", std::process::id());
    let out = std::env::temp_dir().join(name);
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(&out).expect("a scratch folder");
    let mut trainer = trainer();
    trainer.step(&[&example()]).expect("a step");
    let state = TrainerState { global_step: 1, ..TrainerState::default() };
    let dir = checkpoint::save(&out, &trainer, &state, &arguments()).expect("a checkpoint");
    let files = FILES.map(|file| fs::read(dir.join(file)).expect("it was saved"));
    Left { dir, files }
}

fn example() -> Example {
    Example { input: vec![5, 6, 1], labels: vec![7, 1], task: 1, mixing: None }
}

/// A checkpoint with these files.
pub fn check(data: &[u8]) {
    LEFT.with(|left| check_with(left.get_or_init(leave), data));
}

fn check_with(left: &Left, data: &[u8]) {
    let mut parts = data.splitn(3, |&byte| byte == 0);
    for (file, own) in FILES.into_iter().zip(&left.files) {
        let part = parts.next().unwrap_or_default();
        let bytes = if part.starts_with(b"=") { &own[..] } else { part };
        fs::write(left.dir.join(file), bytes).expect("the scratch folder is writable");
    }
    let state = match checkpoint::read_state(&left.dir) {
        Ok(state) => state,
        Err(error) => return assert_presentable(&error, FILES[0]),
    };
    let _ = state.patience_used();
    if let Err(error) = checkpoint::check_arguments(&left.dir, &arguments()) {
        return assert_presentable(&error, FILES[1]);
    }
    let mut trainer = trainer();
    if let Err(error) = trainer.restore(&left.dir, state.global_step) {
        return assert_presentable(&error, "");
    }
    assert_eq!(trainer.steps_done(), state.global_step);
    let backend = model().backend();
    let before = backend.download(trainer.adapter().params());
    match trainer.step(&[&example()]) {
        Ok(report) => {
            assert_eq!(report.step, state.global_step + 1);
            let after = backend.download(trainer.adapter().params());
            assert!(after.iter().all(|value| value.is_finite()), "not finite after a step");
        }
        Err(Error::NotFinite(_)) => {
            assert_eq!(backend.download(trainer.adapter().params()), before);
        }
        Err(error) => panic!("{error}"),
    }
}
