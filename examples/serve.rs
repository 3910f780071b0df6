//! Serves requests of different tasks in one batch, and streams their tokens as they come.
//!
//!     cargo run --release --example serve -- MODEL_DIR ADAPTER_DIR < requests.jsonl
//!
//! A request is a row, `{"task": "qnli", "input_ids": [21, 7, 9, 1]}`; for each token a line
//! `REQUEST ID` comes out, and `REQUEST end` after the last one. What a request gets does not depend
//! on the requests beside it, to the last bit.

use std::{
    env,
    io::{self, BufReader, Write},
    path::Path,
    process::ExitCode,
};

use polytape::{
    Result,
    formats::rows::{RowReader, Sequence, Targets},
    generate::{Engine, GenerateOptions},
    model::{Adapter, Example, Model, Options},
};

/// Requests that are decoded together.
const CAPACITY: usize = 8;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [model, adapter] = &args[..] else {
        eprintln!("usage: serve MODEL_DIR ADAPTER_DIR < requests.jsonl");
        return ExitCode::from(2);
    };
    match serve(model, adapter) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn serve(model: &str, adapter: &str) -> Result<()> {
    let model = Model::open(model, &Options::default())?;
    let adapter = Adapter::open(&model, adapter)?;
    let (tasks, n_tasks) = (adapter.task_names(), adapter.config().n_tasks);
    // The mixtures of all tasks are formed once, here.
    let engine = Engine::new(&model, Some(&adapter), 0..n_tasks as u32, CAPACITY);

    let stdin = Path::new("standard input");
    let mut requests = Vec::new();
    for row in RowReader::new(BufReader::new(io::stdin()), stdin, Targets::Optional) {
        let row = row?;
        let fail = |detail: &str| polytape::Error::Line {
            path: stdin.into(),
            line: row.line,
            detail: detail.into(),
        };
        let task = tasks.resolve(&row, stdin)?.ok_or_else(|| fail("the request has no task"))?;
        let Sequence::Ids(input) = row.input else {
            return Err(fail("the request has text; this example has no tokenizer"));
        };
        let request = Example { input, labels: Vec::new(), task, mixing: None };
        model.check_example(&request, Some(adapter.config()))?;
        requests.push(request);
    }

    let options = GenerateOptions { max_new_tokens: 16, ..GenerateOptions::default() };
    for (i, batch) in requests.chunks(CAPACITY).enumerate() {
        let batch: Vec<&Example> = batch.iter().collect();
        let outputs = engine.generate(&batch, &options, |row, id| {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{} {id}", i * CAPACITY + row).and_then(|()| out.flush());
        });
        for row in 0..outputs.len() {
            println!("{} end", i * CAPACITY + row);
        }
    }
    Ok(())
}
