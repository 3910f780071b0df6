//! Real checkpoints against what an independent implementation recorded of them (`reference.json`
//! beside each): logits, greedy tokens and text. They are not part of this repository: set
//! `POLYTAPE_SHARED` to a folder that has `models/<name>`, or these tests skip with a line.
#![allow(clippy::unwrap_used)]

#[path = "common/skipped.rs"]
mod skipped;

use std::path::{Path, PathBuf};

use polytape::{
    Dtype,
    generate::{Engine, GenerateOptions},
    kernels::{cpu::Cpu, cpu::isa::Isa, ops::Order},
    model::{Batch, Example, Model, network::Sides},
    tape::Tape,
};
use serde_json::Value;

/// A checkpoint's folder, if it is there.
fn folder(name: &str) -> Option<PathBuf> {
    let shared = std::env::var_os("POLYTAPE_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let folder = shared.join("models").join(name);
    if folder.exists() {
        return Some(folder);
    }
    let folder = folder.display();
    skipped::skipped(format_args!("{folder} is not there (set POLYTAPE_SHARED)"));
    None
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A causal checkpoint on every instruction set, in f32.
fn check_causal(name: &str) {
    let Some(folder) = folder(name) else { return };
    let reference = std::fs::read(folder.join("reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&reference).unwrap();
    let (prompt, greedy) = (ids(&reference["prompt_ids"]), ids(&reference["greedy_ids"]));
    let new = &greedy[prompt.len()..];
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa, Dtype::F32, 2).unwrap().poisoned();
        let model = Model::open_on(cpu, &folder).unwrap();
        let example = Example { input: prompt.clone(), labels: vec![0], task: 0, mixing: None };

        let batch = Batch::new([&example], model.layout(), 0);
        let sides = Sides::new(&batch, &batch.rows_by_task(), None);
        let mut tape = Tape::inference(model.backend(), None, Order::Panel);
        let logits = model.network().logits(&mut tape, &batch, &sides);
        let want: Vec<f64> =
            serde_json::from_value(reference["last_prompt_logits_first16"].clone()).unwrap();
        for (got, want) in logits.iter().zip(&want) {
            // Printed with five digits.
            assert!((got - want).abs() < 2e-5 + 2e-6 * want.abs(), "{name}: {got}, not {want}");
        }

        let options = GenerateOptions { max_new_tokens: new.len(), ..Default::default() };
        for capacity in [1, 20] {
            let engine = Engine::new(&model, None, [], capacity);
            let tokens = engine.generate(&[&example, &example], &options, |_, _| ());
            assert_eq!(tokens, [new, new], "{name} {}", isa.name());
        }
    }
    #[cfg(feature = "cli")]
    {
        let vocabulary = Model::open(&folder, &polytape::model::Options::default());
        let vocabulary = vocabulary.unwrap().vocab_size();
        let tokenizer = polytape::formats::tokenizer::Tokenizer::open(&folder, vocabulary).unwrap();
        let text = reference["prompt"].as_str().unwrap();
        if !text.is_empty() {
            assert_eq!(tokenizer.encode(text, true).unwrap(), prompt);
        }
        assert_eq!(tokenizer.end_token().unwrap(), Some(2));
        assert_eq!(tokenizer.decode(&greedy, true).unwrap(), reference["greedy_text"]);
    }
}

/// Words to phonemes: every greedy output that was recorded, one by one and together.
fn check_bart(name: &str) {
    let Some(folder) = folder(name) else { return };
    let reference = std::fs::read(folder.join("reference.json")).unwrap();
    let reference: Value = serde_json::from_slice(&reference).unwrap();
    let (mut examples, mut want) = (Vec::new(), Vec::new());
    for word in reference["examples"].as_array().unwrap() {
        examples.push(Example {
            input: ids(&word["encoder_ids"]),
            labels: vec![],
            task: 0,
            mixing: None,
        });
        let mut output = ids(&word["decoder_ids"]).split_off(1); // Without the start id.
        output.push(2);
        want.push(output);
    }
    assert!(want.len() > 3);
    let examples: Vec<&Example> = examples.iter().collect();
    for isa in Isa::available() {
        let cpu = Cpu::with_isa(isa, Dtype::F32, 2).unwrap().poisoned();
        let model = Model::open_on(cpu, &folder).unwrap();
        let options = GenerateOptions { max_new_tokens: 40, ..Default::default() };
        for capacity in [1, 64] {
            let engine = Engine::new(&model, None, [], capacity);
            let tokens = engine.generate(&examples, &options, |_, _| ());
            assert_eq!(tokens, want, "{name} {}", isa.name());
        }
    }
}

#[test]
fn misaki_bart() {
    check_bart("misaki-g2p-bart-us");
    check_bart("misaki-g2p-bart-gb");
}

#[test]
fn stories260k() {
    check_causal("stories260K");
}

#[test]
fn babyllama() {
    check_causal("babyllama-char105");
}
