//! Serves requests of different tasks in one batch, and streams their tokens as they come.
//!
//!     cargo run --release --example serve -- MODEL_DIR ADAPTER_DIR < requests.jsonl
//!
//! A request is a row, `{"task": "qnli", "input_ids": [21, 7, 9, 1]}`; for each token a line
//! `REQUEST ID` comes out, and `REQUEST end` when its call is done and the base's files were the same
//! all along. Requests that come during a call wait for the next one. What a request gets does not depend
//! on the requests beside it, to the last bit.

use std::{
    env,
    io::{self, BufReader, Write},
    iter,
    path::Path,
    process::ExitCode,
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use polytape::{
    Result,
    formats::rows::{Row, RowReader, Sequence, Targets},
    generate::{Engine, GenerateOptions},
    model::{Adapter, Example, Model, Options},
};

/// Requests that are decoded together.
const CAPACITY: usize = 8;
/// Requests of a call at most: those that come later wait for its end.
const MAX_ROWS: usize = 8 * CAPACITY;
/// What messages call the input.
const STDIN: &str = "standard input";

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

    let rows = rows();
    let options = GenerateOptions { max_new_tokens: 16, ..GenerateOptions::default() };
    let mut n_served = 0;
    // What has come by now is one call, in which a request that ends makes room for one that waits.
    while let Ok(first) = rows.recv() {
        let mut requests = Vec::new();
        for row in iter::once(first).chain(rows.try_iter()).take(MAX_ROWS) {
            let row = row?;
            let fail = |detail: &str| polytape::Error::Line {
                path: STDIN.into(),
                line: row.line,
                detail: detail.into(),
            };
            let task = tasks.resolve(&row, Path::new(STDIN))?;
            let task = task.ok_or_else(|| fail("the request has no task"))?;
            let Sequence::Ids(input) = row.input else {
                return Err(fail("the request has text; this example has no tokenizer"));
            };
            let request = Example { input, labels: Vec::new(), task, mixing: None };
            model.check_example(&request, Some(adapter.config()))?;
            requests.push(request);
        }
        let batch: Vec<&Example> = requests.iter().collect();
        let outputs = engine.generate(&batch, &options, |row, id| {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{} {id}", n_served + row).and_then(|()| out.flush());
        });
        // Tokens are not to be relied on before: the base may have changed under the call.
        model.verify_unchanged()?;
        for row in 0..outputs.len() {
            println!("{} end", n_served + row);
        }
        n_served += outputs.len();
    }
    Ok(())
}

/// Reads rows in a thread of its own, ahead of those that are served.
fn rows() -> Receiver<Result<Row>> {
    let (sender, receiver) = sync_channel(MAX_ROWS);
    thread::spawn(move || {
        let rows = RowReader::new(BufReader::new(io::stdin()), STDIN, Targets::Optional);
        for row in rows {
            if sender.send(row).is_err() {
                break; // Nobody receives any more after an error.
            }
        }
    });
    receiver
}
