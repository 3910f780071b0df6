//! `generate`: its choices, against `tests/data/generation.json`.

use std::{fs, path::Path};

use safetensors::{SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::{fails, fixture, lines, ok, scratch, str};

/// A base without its tokenizer, whose `generation_config.json` says this as well.
fn base_that_asks_for(dir: &Path, wish: &Value) {
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("base").join(file), dir.join(file)).unwrap();
    }
    let path = fixture("base/generation_config.json");
    let mut config: Value =
        fs::read(path).map_or_else(|_| json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    config.as_object_mut().unwrap().extend(wish.as_object().unwrap().clone());
    fs::write(dir.join("generation_config.json"), config.to_string()).unwrap();
}

fn rows() -> Vec<Value> {
    let expected: Value =
        serde_json::from_slice(&fs::read(fixture("expected.json")).unwrap()).unwrap();
    expected["rows"].as_array().unwrap().clone()
}

/// The recorded outputs of a run with so many beams and sequences for each row.
fn recorded(n_beams: u64, n_sequences: u64, length_penalty: f64) -> Vec<Vec<Vec<u32>>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/generation.json");
    let recorded: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let tiny = recorded["cases"].as_array().unwrap().iter().find(|case| case["case"] == "tiny");
    let run = tiny.unwrap()["runs"].as_array().unwrap().iter().find(|run| {
        let options = &run["options"];
        options["num_beams"] == n_beams
            && options["num_return_sequences"].as_u64().unwrap_or(1) == n_sequences
            && options["length_penalty"].as_f64().unwrap_or(1.0) == length_penalty
            && options.get("early_stopping").is_none()
    });
    serde_json::from_value(run.unwrap()["outputs"].clone()).unwrap()
}

#[test]
fn generate_searches_as_told() {
    let dir = scratch("generate-beams");
    let data = dir.join("rows.jsonl");
    let rows: String = rows().iter().map(|row| format!("{row}\n")).collect();
    fs::write(&data, rows).unwrap();
    let (base, adapter, output) = (fixture("base"), fixture("adapter"), dir.join("out.jsonl"));
    let adapter = ["--adapter", str(&adapter), "--data", str(&data), "--output", str(&output)];
    let generate = |base: &Path, more: &str| {
        let more: Vec<&str> = more.split_whitespace().collect();
        let flags = ["generate", "--dtype", "f32", "--overwrite", "--model", str(base)];
        ok(&[&flags, &adapter[..], &more].concat());
        lines(&output)
    };

    let found = generate(
        &base,
        "--max-new-tokens 9 --num-beams 3 --num-return-sequences 3 --length-penalty 0",
    );
    for (row, want) in found.iter().zip(recorded(3, 3, 0.0)) {
        assert_eq!(row["output_ids"], json!(want[0]));
        let sequences = row["sequences"].as_array().unwrap();
        let ids: Vec<&Value> = sequences.iter().map(|sequence| &sequence["output_ids"]).collect();
        assert_eq!(json!(ids), json!(want));
        let scores: Vec<f64> = sequences.iter().map(|s| s["score"].as_f64().unwrap()).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    }

    // What the model's folder asks for holds until a flag says otherwise.
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    base_that_asks_for(&model, &json!({"num_beams": 4, "max_new_tokens": 9, "top_k": 3}));
    for (row, want) in generate(&model, "").iter().zip(recorded(4, 1, 1.0)) {
        assert_eq!(row["output_ids"], json!(want[0]));
        assert!(row.get("sequences").is_none());
    }
    let greedy = generate(&base, "--max-new-tokens 9");
    assert_eq!(generate(&model, "--num-beams 1"), greedy);
    assert_ne!(generate(&model, "--num-beams 1 --do-sample --temperature 2 --seed 3"), greedy);

    // Of a choice that nobody gave the file is named, and the flag that wins over it.
    let file = model.join("generation_config.json");
    for (wish, flags, origin) in [
        (
            json!({"do_sample": true}),
            "--num-beams 4",
            "do_sample comes from FILE, and --do-sample off wins",
        ),
        (
            json!({"num_beams": 4}),
            "--do-sample",
            "num_beams comes from FILE, and --num-beams 1 wins",
        ),
        (
            json!({"min_length": 30, "max_new_tokens": 9}),
            "",
            "min_new_tokens or min_length comes from FILE, and --min-new-tokens 0 wins",
        ),
        (json!({"top_p": 1.5}), "--do-sample", "top_p comes from FILE, and --top-p 1 wins"),
    ] {
        base_that_asks_for(&model, &wish);
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let command = ["generate", "--overwrite", "--model", str(&model)];
        let origin = origin.replace("FILE", str(&file));
        fails(&[&command, &adapter[..], &flags].concat(), 2, &origin);
    }
    base_that_asks_for(&model, &json!({"do_sample": true}));
    generate(&model, "--num-beams 4 --do-sample off --max-new-tokens 3");

    base_that_asks_for(&model, &json!({"guidance_scale": 1.5}));
    let command = [&["generate", "--overwrite", "--model", str(&model)], &adapter[..]].concat();
    fails(&command, 3, "generation_config.json: field guidance_scale");
}

/// Evaluations generate as `generate` does, and a resumed run's as before.
#[test]
fn evaluations_search_as_told() {
    let dir = scratch("eval-beams");
    let (base, adapter, output) = (fixture("base"), fixture("adapter"), dir.join("out.jsonl"));
    let data = dir.join("rows.jsonl");
    let common = ["--dtype", "f32", "--model", str(&base), "--data", str(&data)];
    let adapted = [&common[..], &["--adapter", str(&adapter)]].concat();
    let choice = ["--max-new-tokens", "9", "--num-beams", "4"];
    let write = |rows: Vec<Value>| {
        fs::write(&data, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    };
    write(rows());
    let generated = [&["generate", "--output", str(&output)], &adapted[..], &choice].concat();
    ok(&generated);
    // What a search finds, as targets: the same search gets all of them right, another one does not.
    let found = lines(&output);
    write(
        rows()
            .into_iter()
            .zip(found)
            .map(|(mut row, found)| {
                row["label_ids"] = found["output_ids"].clone();
                row
            })
            .collect(),
    );
    let exact_match = |choice: &[&str]| {
        let said = ok(&[&["eval"], &adapted[..], choice].concat());
        let said: Value = serde_json::from_str(said.trim()).unwrap();
        said["exact_match"].as_f64().unwrap()
    };
    assert_eq!(exact_match(&choice), 1.0);
    assert!(exact_match(&["--max-new-tokens", "9"]) < 1.0);
    assert!(exact_match(&["--max-new-tokens", "1"]) < 1.0);

    // In training: an adapter that does not learn is evaluated as `eval` does it.
    let out = dir.join("trained");
    let still = "--max-steps 1 --learning-rate 0 --router-learning-rate 0 --save-steps 1";
    let judged = "--metric-for-best exact_match --generation_max_length 9";
    let still: Vec<&str> = still.split(' ').chain(judged.split(' ')).collect();
    let begun = ["--adapter-init", str(&adapter), "--eval-data", str(&data)];
    let run = [&["train", "--output-dir", str(&out)], &common[..], &still, &begun].concat();
    ok(&[&run[..], &["--generation_num_beams", "4"]].concat());
    let log = lines(&out.join("log.jsonl"));
    assert_eq!(log.last().unwrap()["eval_exact_match"], 1.0);
    let state = out.join("checkpoint-1/trainer_state.json");
    assert!(super::text(&state).contains("eval_exact_match"));
    fails(&[&run[..], &["--resume"]].concat(), 3, "num_beams was 4 in the run that is to be");
}

/// Of a causal model a whole length counts the prompt.
#[test]
fn whole_lengths_end_rows_by_their_prompts() {
    let dir = scratch("generate-lengths");
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parity/llama/base");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(base.join(file), model.join(file)).unwrap();
    }
    let data = dir.join("rows.jsonl");
    let row = |n: usize| format!("{}\n", json!({"input_ids": vec![7; n]}));
    fs::write(&data, row(3) + &row(6) + &row(12)).unwrap();
    let lens = |wish: Value, flags: &[&str]| -> Vec<usize> {
        fs::write(model.join("generation_config.json"), wish.to_string()).unwrap();
        let output = dir.join("out.jsonl");
        let common = ["--model", str(&model), "--data", str(&data), "--output", str(&output)];
        ok(&[&["generate", "--overwrite"], &common[..], flags].concat());
        lines(&output).iter().map(|row| row["output_ids"].as_array().unwrap().len()).collect()
    };
    let wish = || json!({"eos_token_id": null, "max_length": 10});
    assert_eq!(lens(wish(), &[]), [7, 4, 1]);
    assert_eq!(lens(wish(), &["--num-beams", "2"]), [7, 4, 1]);
    assert_eq!(lens(wish(), &["--max-new-tokens", "5"]), [5, 5, 5]);
}

/// Embeddings of its own for a stack would be lost.
#[test]
fn a_stacks_own_embeddings_are_refused() {
    let dir = scratch("own-embeddings");
    let (base, model) = (fixture("base"), dir.join("model"));
    fs::create_dir(&model).unwrap();
    fs::copy(base.join("config.json"), model.join("config.json")).unwrap();
    let bytes = fs::read(base.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let shared = file.tensor("shared.weight").unwrap();
    let data = dir.join("rows.jsonl");
    fs::write(&data, "{\"input_ids\": [7], \"label_ids\": [8, 1], \"task_id\": 0}\n").unwrap();
    let mut copy = shared.data().to_vec();
    for is_same in [true, false] {
        if !is_same {
            copy[5] ^= 1;
        }
        let own = TensorView::new(shared.dtype(), shared.shape().to_vec(), &copy).unwrap();
        let tensors = file.iter().chain([("encoder.embed_tokens.weight", own)]);
        let bytes = safetensors::serialize(tensors, None).unwrap();
        fs::write(model.join("model.safetensors"), bytes).unwrap();
        let flags = ["eval", "--model", str(&model), "--data", str(&data)];
        match is_same {
            true => _ = ok(&flags),
            false => {
                fails(&flags, 3, "encoder.embed_tokens.weight is not the same as shared.weight")
            }
        }
    }
}

#[test]
fn generate_says_which_choice_is_wrong() {
    let dir = scratch("generate-choices");
    let data = dir.join("rows.jsonl");
    fs::write(&data, r#"{"input_ids": [1], "task_id": 0}"#).unwrap();
    let (base, output) = (fixture("base"), dir.join("out.jsonl"));
    let common = ["--model", str(&base), "--data", str(&data), "--output", str(&output)];
    for (flags, message) in [
        ("--temperature 0", "--temperature must be more than 0, not 0"),
        ("--top-p 1.5", "--top-p must be at most 1"),
        ("--min-p -0.5", "--min-p must be from 0 to 1"),
        ("--num-beams 0", "--num-beams"),
        ("--num-return-sequences 2", "--num-return-sequences 2 needs --do-sample, or as many"),
        ("--num-beams 2 --do-sample", "exclude each other"),
        ("--min-new-tokens 3 --max-new-tokens 2", "--min-new-tokens 3 is more"),
        ("--early-stopping maybe", "false, true, never"),
    ] {
        let flags: Vec<&str> = flags.split_whitespace().collect();
        fails(&[&["generate"], &common[..], &flags].concat(), 2, message);
    }
    assert!(!output.exists());
}

/// Another file is replaced when that is asked for, and what is read never; a device has nothing to lose.
#[test]
fn results_replace_nothing_unasked() {
    let dir = scratch("results");
    let (model, adapter) = (dir.join("model"), dir.join("adapter"));
    for (from, to, file) in [
        ("base", &model, "config.json"),
        ("base", &model, "model.safetensors"),
        ("adapter", &adapter, "adapter_config.json"),
        ("adapter", &adapter, "adapter_model.safetensors"),
    ] {
        fs::create_dir_all(to).unwrap();
        fs::copy(fixture(from).join(file), to.join(file)).unwrap();
    }
    let (data, kept) = (dir.join("rows.jsonl"), dir.join("kept"));
    let row = "{\"input_ids\": [7], \"label_ids\": [8, 1], \"task_id\": 0}\n";
    fs::write(&data, row).unwrap();
    fs::write(&kept, "mine").unwrap();
    let common = ["--model", str(&model), "--adapter", str(&adapter), "--data", str(&data)];
    let (config, tensors) = (model.join("config.json"), adapter.join("adapter_model.safetensors"));
    let same = dir.join("model/../rows.jsonl");
    for (verb, flag) in
        [("generate", "--output"), ("eval", "--per-example"), ("eval", "--markdown")]
    {
        let to = |path: &Path, more: &[&str]| -> Vec<String> {
            let flags = [&[verb], &common[..], &[flag, str(path)], more].concat();
            flags.into_iter().map(str::to_owned).collect()
        };
        let refused = |path: &Path, more: &[&str], message: &str| {
            let before = fs::read(path).unwrap();
            let flags = to(path, more);
            fails(&flags.iter().map(String::as_str).collect::<Vec<_>>(), 2, message);
            assert!(fs::read(path).unwrap() == before, "{}", path.display());
        };
        refused(&kept, &[], "kept is there already: replace it with --overwrite");
        for more in [&[][..], &["--overwrite"]] {
            refused(&same, more, "is given twice: as an output and as --data");
            refused(&config, more, "config.json is a file of --model");
            refused(&tensors, more, "adapter_model.safetensors is a file of --adapter");
        }
        let short = ["--max-new-tokens", "2"];
        let run = |path: &Path, more: &[&str]| {
            let flags = to(path, &[&short[..], more].concat());
            ok(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        };
        run(Path::new("/dev/null"), &[]);
        run(&kept, &["--overwrite"]);
        assert_ne!(fs::read(&kept).unwrap(), b"mine");
        fs::write(&kept, "mine").unwrap();
    }
}

/// A line a row, also of what is left out.
#[test]
fn rows_that_are_left_out_have_a_line() {
    let dir = scratch("left-out");
    let (base, data) = (fixture("base"), dir.join("rows.jsonl"));
    let is_long = |i: usize| i.is_multiple_of(2);
    let rows = (0..5).map(|i| {
        let ids = vec![7 + i; if is_long(i) { 4 } else { 2 }];
        format!("{}\n", json!({"input_ids": ids, "label_ids": [8, 1], "own": i}))
    });
    fs::write(&data, rows.collect::<String>()).unwrap();
    let (out, nll) = (dir.join("out.jsonl"), dir.join("nll.jsonl"));
    let common = ["--model", str(&base), "--data", str(&data), "--overwrite"];
    let limit = ["--max-source-length", "3", "--max-new-tokens", "3", "--overlong"];
    let run = |overlong: &str| -> (Value, Vec<Value>) {
        let generate = ["generate", "--json", "--output", str(&out)];
        let said = ok(&[&generate, &common[..], &limit, &[overlong]].concat());
        (serde_json::from_str(said.lines().last().unwrap()).unwrap(), lines(&out))
    };
    let counts = |said: &Value| ["n_rows", "n_truncated", "n_skipped"].map(|key| said[key].clone());
    let (said, cut) = run("truncate");
    assert_eq!(counts(&said), [5, 3, 0].map(Value::from));
    let (said, left) = run("skip");
    assert_eq!(counts(&said), [2, 0, 3].map(Value::from));
    assert_eq!(left.len(), 5);
    for (i, row) in left.iter().enumerate() {
        assert_eq!(row["own"], i);
        match is_long(i) {
            true => assert_eq!(row.get("output_ids"), Some(&Value::Null)),
            false => assert_eq!(row, &cut[i]),
        }
    }
    let eval = ["eval", "--generate", "off", "--per-example", str(&nll)];
    ok(&[&eval, &common[..], &limit, &["skip"]].concat());
    for (i, row) in lines(&nll).iter().enumerate() {
        assert_eq!((row["nll"].is_null(), row["n_tokens"].is_null()), (is_long(i), is_long(i)));
    }
}
