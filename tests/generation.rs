//! Beam search and what changes scores, token for token as transformers does it on the fixtures'
//! models (`tests/data/generation.json`, made by `tests/data/record_generation.py`); draws, by their
//! own rules.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use polytape::{
    Dtype,
    generate::{EarlyStopping, Engine, GenerateOptions, Generated},
    kernels::{
        Backend,
        cpu::{Cpu, isa::Isa},
        oracle::Oracle,
    },
    model::{Adapter, Example, Model},
};
use serde_json::Value;

/// Scores are recorded as transformers keeps them, in f32.
const SCORE_TOLERANCE: f64 = 1e-5;

fn data() -> PathBuf {
    let root = std::env::var_os("POLYTAPE_ROOT");
    root.map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from).join("tests/data")
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn rows(folder: &Path) -> Vec<Example> {
    let ids = |v: &Value| serde_json::from_value(v.clone()).unwrap();
    let row = |row: &Value| Example {
        input: ids(&row["input_ids"]),
        labels: ids(&row["label_ids"]),
        task: row["task_id"].as_u64().unwrap() as u32,
        mixing: None,
    };
    read(&folder.join("expected.json"))["rows"].as_array().unwrap().iter().map(row).collect()
}

fn options(recorded: &Value) -> GenerateOptions {
    let mut options = GenerateOptions::default();
    for (name, value) in recorded.as_object().unwrap() {
        let size = || value.as_u64().unwrap() as usize;
        let real = || value.as_f64().unwrap();
        match name.as_str() {
            "max_new_tokens" => options.max_new_tokens = size(),
            "min_new_tokens" => options.min_new_tokens = size(),
            "num_beams" => options.num_beams = size(),
            "num_return_sequences" => options.num_return_sequences = size(),
            "no_repeat_ngram_size" => options.no_repeat_ngram_size = size(),
            "length_penalty" => options.length_penalty = real(),
            "repetition_penalty" => options.repetition_penalty = real(),
            "early_stopping" if value == "never" => options.early_stopping = EarlyStopping::Never,
            "early_stopping" if value == true => options.early_stopping = EarlyStopping::Yes,
            _ => panic!("{name}: {value}"),
        }
    }
    options
}

/// Every recorded run of every model, all rows of all tasks beside each other.
fn check<B: Backend>(backend: impl Fn() -> B, capacities: &[usize], what: &str) {
    let recorded = read(&data().join("generation.json"));
    for case in recorded["cases"].as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        let folder = data().join("parity").join(name);
        let rows = rows(&folder);
        let model = Model::open_on(backend(), folder.join("base")).unwrap();
        let adapter = Adapter::open(&model, folder.join("adapter")).unwrap();
        let examples: Vec<&Example> = rows.iter().collect();
        for &capacity in capacities {
            let tasks = rows.iter().map(|row| row.task);
            let engine = Engine::new(&model, Some(&adapter), tasks, capacity);
            for run in case["runs"].as_array().unwrap() {
                let what = format!("{what} {name}, capacity {capacity}, {}", run["options"]);
                let options = options(&run["options"]);
                let got = engine.generate_sequences(&examples, &options, |_, _| ());
                assert_sequences(&got, run, &what);
            }
        }
    }
}

fn assert_sequences(got: &[Vec<Generated>], run: &Value, what: &str) {
    let outputs = run["outputs"].as_array().unwrap();
    assert_eq!(got.len(), outputs.len(), "{what}: rows");
    for (row, (got, want)) in got.iter().zip(outputs).enumerate() {
        let want: Vec<Vec<u32>> = serde_json::from_value(want.clone()).unwrap();
        let ids: Vec<&Vec<u32>> = got.iter().map(|sequence| &sequence.ids).collect();
        assert_eq!(ids, want.iter().collect::<Vec<_>>(), "{what}, row {row}");
        for (i, sequence) in got.iter().enumerate() {
            // Recorded of beam searches alone.
            let Some(want) = run["scores"].get(row).map(|scores| scores[i].as_f64().unwrap())
            else {
                assert_eq!(sequence.score, None, "{what}, row {row}");
                continue;
            };
            let score = sequence.score.unwrap();
            assert!(
                (score - want).abs() <= SCORE_TOLERANCE * want.abs(),
                "{what}, row {row}, sequence {i}: score {score}, not {want}"
            );
        }
    }
}

#[test]
fn the_oracle_generates_as_transformers() {
    check(|| Oracle, &[5], "oracle");
}

#[test]
fn the_cpu_generates_as_transformers() {
    for isa in Isa::available() {
        let cpu = || Cpu::with_isa(isa, Dtype::F32, 2).unwrap().poisoned();
        // One example at a time, some of them, dot products, panels.
        check(cpu, &[1, 7, 40], isa.name());
    }
}

/// Rows that end make room for rows that wait, and a long prompt is read in pieces: a row's tokens are
/// those that it has alone, in the same engine. What `on_token` hears is what is returned.
#[test]
fn rows_enter_where_others_left() {
    for (name, longest) in
        [("tiny", 700), ("bart", 20), ("llama", 1300), ("mistral", 700), ("gemma3", 40)]
    {
        let folder = data().join("parity").join(name);
        let given = rows(&folder);
        let model =
            Model::open_on(Cpu::new(Dtype::F32, 2).unwrap().poisoned(), folder.join("base"));
        let model = model.unwrap();
        let adapter = Adapter::open(&model, folder.join("adapter")).unwrap();
        // Prompts of very different lengths, and more rows than the engine has room for.
        let rows: Vec<Example> = (0..13)
            .map(|i| {
                let Example { input, task, .. } = &given[i % given.len()];
                let len = [3, 1, longest, 17][i % 4].min(longest);
                let input = input.iter().cycle().skip(i).take(len).copied().collect();
                Example { input, labels: Vec::new(), task: *task, mixing: None }
            })
            .collect();
        let examples: Vec<&Example> = rows.iter().collect();
        let engine = Engine::new(&model, Some(&adapter), rows.iter().map(|row| row.task), 4);
        for num_beams in [1, 2] {
            let options = GenerateOptions { max_new_tokens: 7, num_beams, ..Default::default() };
            let mut heard = vec![Vec::new(); rows.len()];
            let together = engine.generate(&examples, &options, |row, id| heard[row].push(id));
            assert_eq!(together, heard, "{name}, {num_beams} beams");
            for (i, (example, together)) in examples.iter().zip(&together).enumerate() {
                let alone = engine.generate(&[example], &options, |_, _| ());
                assert_eq!(together, &alone[0], "{name}, {num_beams} beams, row {i}");
            }
        }
    }
}

/// What a row draws depends on the seed and its place among the rows, on nothing beside it.
#[test]
fn a_draw_does_not_depend_on_neighbours() {
    let folder = data().join("parity/tiny");
    let rows = rows(&folder);
    let model = Model::open_on(Cpu::new(Dtype::F32, 2).unwrap(), folder.join("base")).unwrap();
    let adapter = Adapter::open(&model, folder.join("adapter")).unwrap();
    let examples: Vec<&Example> = rows.iter().collect();
    let engine = Engine::new(&model, Some(&adapter), rows.iter().map(|row| row.task), 4);
    let draw = |examples: &[&Example], seed, n| {
        let options = GenerateOptions {
            max_new_tokens: 12,
            do_sample: true,
            temperature: 1.5,
            num_return_sequences: n,
            seed,
            ..Default::default()
        };
        engine.generate_sequences(examples, &options, |_, _| ())
    };
    let all = draw(&examples, 1, 3);
    assert_eq!(all, draw(&examples, 1, 3), "the same seed");
    assert_ne!(all, draw(&examples, 2, 3), "another seed");
    assert!(all.iter().all(|sequences| sequences.len() == 3));
    assert!(all.iter().any(|sequences| sequences[0] != sequences[1]), "sequences of a row differ");
    let few = draw(&examples[..2], 1, 1);
    for (few, all) in few.iter().zip(&all) {
        assert_eq!(few[0], all[0], "with fewer rows beside it and fewer sequences");
    }
    let twins = draw(&[examples[0], examples[0]], 1, 1);
    assert_ne!(twins[0], twins[1], "equal rows draw by themselves");
}
