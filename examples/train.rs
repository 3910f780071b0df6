//! Trains an adapter on rows of ids, evaluates it, and saves it as PEFT does.
//!
//!     cargo run --release --example train -- MODEL_DIR DATA.jsonl OUTPUT_DIR
//!
//! A row is `{"task": "qnli", "input_ids": [21, 7, 9, 1], "label_ids": [4, 1]}`. For text there is
//! `polytape train`, or `formats::tokenizer` with the feature `cli`.

use std::{env, path::Path, process::ExitCode};

use polytape::{
    Result,
    formats::{poly_config::PolyConfig, rows::Targets, tasks::TaskNames},
    generate::Engine,
    model::{
        Adapter, Example, Model, Options,
        dataset::{Dataset, Encoding, Overlong, Routes, read_rows},
    },
    train::{TrainConfig, Trainer},
};

const BATCH_SIZE: usize = 8;
const N_EPOCHS: usize = 3;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [model, data, output] = &args[..] else {
        eprintln!("usage: train MODEL_DIR DATA.jsonl OUTPUT_DIR");
        return ExitCode::from(2);
    };
    match train(model, Path::new(data), output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn train(model: &str, data: &Path, output: &str) -> Result<()> {
    // The base is mapped: its weights are read where they are when they are needed.
    let model = Model::open(model, &Options::default())?;

    // Rows become examples; the tasks' names become ids in order of first appearance.
    let rows = read_rows(data, Targets::Required)?;
    let tasks = TaskNames::from_rows(rows.iter().map(|row| (data, row)))?;
    let encoding = Encoding {
        tokenizer: None,
        chat: None,
        vocab_size: model.vocab_size(),
        layout: model.layout(),
        max_positions: model.config().max_positions(),
        eos_token_ids: &model.generation().eos_token_ids,
        end: None,
        max_source_length: None,
        max_target_length: 128,
        overlong: Overlong::Error,
        routes: Some(Routes::tasks(&tasks)),
        targets: true,
    };
    let examples = Dataset::encode(rows, data, &encoding)?.examples;
    let examples: Vec<&Example> = examples.iter().collect();

    // A bank of four skills, mixed per task and split; the linears are the architecture's default.
    let config = PolyConfig {
        task_type: Some(model.task_type().to_owned()),
        n_tasks: tasks.n_tasks(),
        n_skills: 4,
        n_splits: 2,
        r: 8,
        ..PolyConfig::default()
    };
    let mut adapter = Adapter::new(&model, &config, 42)?;
    adapter.set_tasks(Some(tasks));
    let max_steps = (N_EPOCHS * examples.len().div_ceil(BATCH_SIZE)) as u64;
    let settings = TrainConfig { max_steps, batch_size: BATCH_SIZE, ..TrainConfig::default() };
    let mut trainer = Trainer::new(&model, adapter, settings)?;
    for _ in 0..N_EPOCHS {
        for batch in examples.chunks(BATCH_SIZE) {
            // An error, too, where the loss is not finite: then nothing is saved.
            let report = trainer.step(batch)?;
            println!("step {} loss {:.6}", report.step, report.loss);
        }
        model.verify_unchanged()?; // Nobody wrote into the mapped files meanwhile.
    }

    let adapter = trainer.into_adapter();
    let all_tasks = 0..adapter.config().n_tasks as u32;
    let engine = Engine::new(&model, Some(&adapter), all_tasks, BATCH_SIZE);
    let nll: Vec<f64> = engine.nll(&examples).into_iter().flatten().collect();
    println!("evaluation {:.6}", nll.iter().sum::<f64>() / nll.len() as f64);
    adapter.save_peft(model.backend(), output)
}
