//! `adapt`: what is promised to stay stays bit by bit, what is to learn does.

use std::{fs, path::Path};

use polytape::formats::adapter::AdapterFiles;
use serde_json::{Value, json};

use crate::{fails, fixture, lines, ok, rows, scratch, str, text};

/// Rows of a new task among those of others.
fn data(dir: &Path, n: usize) -> std::path::PathBuf {
    let mut all = rows(6);
    for (i, line) in rows(n).lines().enumerate() {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["task"] = json!("new");
        row["task_id"] = json!(77); // The file's own numbers.
        row["own"] = json!(i);
        all += &format!("{row}\n");
    }
    let path = dir.join("few.jsonl");
    fs::write(&path, all.replace("\"own\"", "\"x\"")).unwrap();
    path
}

fn adapt<'a>(data: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let leak =
        |path: &str| -> &'static str { Box::leak(str(&fixture(path)).to_owned().into_boxed_str()) };
    let mut arguments = vec![
        "adapt",
        "--model",
        leak("base"),
        "--adapter",
        leak("adapter"),
        "--data",
        str(data),
        "--task",
        "new",
        "--output-dir",
        str(out),
    ];
    arguments.extend(more);
    arguments
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn only_what_is_to_learn_changes() {
    let dir = scratch("adapt");
    let rows = data(&dir, 12);
    let before = AdapterFiles::open(fixture("adapter")).unwrap();
    let n = before.config.n_tasks;
    for tune in ["router", "all", "average"] {
        let out = dir.join(tune);
        let said = ok(&adapt(&rows, &out, &["--tune", tune, "--max-steps", "5", "--json"]));
        let said: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert_eq!((said["task_id"].as_u64(), said["steps"].as_u64()), (Some(n as u64), Some(5)));
        assert_eq!(said["other_rows"]["n_changed"], 0);
        assert_eq!(said["other_rows"]["before"], said["other_rows"]["after"]);
        assert_eq!(said["bank"]["n_changed"] == 0, tune == "router", "{said}");
        assert_eq!(said["bank"]["before"] == said["bank"]["after"], tune == "router");

        let after = AdapterFiles::open(&out).unwrap();
        assert_eq!(after.config.n_tasks, n + 1);
        assert_eq!(after.tasks.as_ref().unwrap().id("new"), Some(n as u32));
        for (path, old) in &before.modules {
            let new = &after.modules[path];
            let same = bits(&old.lora_a.values) == bits(&new.lora_a.values)
                && bits(&old.lora_b.values) == bits(&new.lora_b.values);
            assert_eq!(same, tune == "router", "{tune} {path}");
            let (kept, row) = new.router_logits.split_at(old.router_logits.len());
            assert_eq!(bits(kept), bits(&old.router_logits), "{tune} {path}");
            match tune {
                "average" => assert!(row.iter().all(|z| z.to_bits() == 0), "{path}: {row:?}"),
                _ => assert!(row.iter().any(|z| z.abs() > 2e-3), "{path} learned nothing: {row:?}"),
            }
        }
    }
    let plain = ok(&adapt(&rows, &dir.join("plain"), &["--max-steps", "1"]));
    assert!(plain.starts_with("bit-identical: A and B, "), "{plain}");
    assert!(plain.contains("bit-identical: routing rows of the other tasks, "), "{plain}");
}

/// The old tasks compute the same bits under the new adapter.
#[test]
fn the_other_tasks_do_not_notice() {
    let dir = scratch("adapt-others");
    let (rows, out) = (data(&dir, 8), dir.join("out"));
    ok(&adapt(&rows, &out, &["--max-steps", "4", "--router-learning-rate", "1"]));
    let old = dir.join("old.jsonl");
    let line = |task: usize| {
        json!({"task_id": task, "input_ids": [5, 6, 7, 9], "label_ids": [4, 8, 1]}).to_string()
    };
    fs::write(&old, (0..3).map(|task| line(task) + "\n").collect::<String>()).unwrap();
    let nll = |adapter: &Path, name: &str| {
        let file = dir.join(name);
        let base = fixture("base");
        ok(&[
            "eval",
            "--model",
            str(&base),
            "--adapter",
            str(adapter),
            "--data",
            str(&old),
            "--generate",
            "off",
            "--per-example",
            str(&file),
        ]);
        text(&file)
    };
    assert_eq!(nll(&fixture("adapter"), "before"), nll(&out, "after"));
}

/// Evaluations pick the steps: what is left behind is the best, the untrained row included.
#[test]
fn validation_picks_the_steps() {
    let dir = scratch("adapt-validation");
    let (rows, out) = (data(&dir, 20), dir.join("out"));
    let more = [
        "--tune",
        "all",
        "--validation-split",
        "0.25",
        "--max-steps",
        "12",
        "--eval-steps",
        "2",
        "--learning-rate",
        "0.3",
        "--lr-scheduler-type",
        "constant",
        "--warmup-steps",
        "0",
        "--json",
    ];
    let said = ok(&adapt(&rows, &out, &more));
    let said: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let evaluations: Vec<(u64, f64)> = lines(&out.join("log.jsonl"))
        .iter()
        .filter_map(|line| Some((line["step"].as_u64()?, line["eval_loss"].as_f64()?)))
        .collect();
    assert_eq!(
        evaluations.iter().map(|(step, _)| *step).collect::<Vec<_>>(),
        [0, 2, 4, 6, 8, 10, 12]
    );
    let best = evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(
        (said["steps"].as_u64(), said["best_metric"].as_f64()),
        (Some(best.0), Some(best.1))
    );
    let file = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(file(&out) == file(&out.join("best")));
    let config: Value = serde_json::from_str(&text(&out.join("config.json"))).unwrap();
    assert_eq!(
        (config["validation_split"].as_f64(), config["task"].as_str()),
        (Some(0.25), Some("new"))
    );
}

#[test]
fn an_adaptation_repeats_and_resumes() {
    let dir = scratch("adapt-resume");
    let (rows, whole, part) = (data(&dir, 9), dir.join("whole"), dir.join("part"));
    let more = ["--max-steps", "8", "--save-steps", "3", "--num-shots", "7"];
    ok(&adapt(&rows, &whole, &more));
    let from = whole.join("checkpoint-3");
    ok(&adapt(&rows, &part, &[&more[..], &["--resume", str(&from), "--threads", "2"]].concat()));
    let file = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(file(&whole) == file(&part));

    // Begun from another adapter it is another run, though the checkpoint has all that it needs.
    let other = dir.join("other");
    copy_adapter(&other, |value| value + 1.0);
    let again = dir.join("again");
    let mut run = adapt(&rows, &again, &more);
    run.extend(["--resume", str(&from)]);
    run[4] = str(&other);
    fails(&run, 3, "adapter_fingerprint was");
}

/// The fixture's adapter with other values in its weights.
fn copy_adapter(dir: &Path, change: fn(f32) -> f32) {
    fs::create_dir_all(dir).unwrap();
    let source = fixture("adapter");
    fs::copy(source.join("adapter_config.json"), dir.join("adapter_config.json")).unwrap();
    let name = "adapter_model.safetensors";
    let bytes = fs::read(source.join(name)).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, values) = bytes.split_at(header);
    let values =
        values.as_chunks().0.iter().flat_map(|v| change(f32::from_le_bytes(*v)).to_le_bytes());
    fs::write(dir.join(name), [header, &values.collect::<Vec<u8>>()].concat()).unwrap();
}

#[test]
fn what_cannot_be_adapted_is_refused() {
    let dir = scratch("adapt-refused");
    let (rows, out) = (data(&dir, 4), dir.join("out"));
    let other = ["--max-steps", "1", "--num-shots", "9"];
    fails(&adapt(&rows, &out, &other), 2, "--num-shots 9, but task \"new\" has 4 rows");
    let mut wrong = adapt(&rows, &out, &[]);
    wrong[8] = "absent";
    fails(&wrong, 3, "no row is of task \"absent\": there are \"new\", \"task-0\"");
    ok(&adapt(&rows, &out, &["--max-steps", "1"]));
    let (again, adapter) = (dir.join("again"), str(&out).to_owned());
    let mut twice = adapt(&rows, &again, &["--max-steps", "1"]);
    twice[4] = &adapter;
    fails(&twice, 2, "the adapter has a task \"new\" already, with id 3");
    let mut onto = adapt(&rows, &out, &[]);
    onto[4] = &adapter;
    fails(&onto, 2, "lies in --output-dir");
}

/// The average is the uniform mixture in training, too: nothing is drawn.
#[test]
fn the_average_draws_nothing() {
    let dir = scratch("adapt-average");
    let rows = data(&dir, 12);
    let flags = ["--tune", "average", "--max-steps", "3"];
    let loss = |name: &str, more: &[&str]| -> Vec<Value> {
        let out = dir.join(name);
        ok(&adapt(&rows, &out, &[&flags[..], more].concat()));
        crate::lines(&out.join("log.jsonl")).into_iter().map(|line| line["loss"].clone()).collect()
    };
    assert_eq!(loss("default", &[]), loss("off", &["--router-sampling", "off"]));
    let on = [&flags[..], &["--router-sampling", "on"]].concat();
    fails(&adapt(&rows, &dir.join("on"), &on), 2, "--router-sampling is for a router that learns");
}

/// A run replaces the adapters in its folder, so none of them can be what it begins with.
#[test]
fn what_a_run_begins_with_is_not_in_its_folder() {
    let dir = scratch("adapt-inside");
    let rows = data(&dir, 12);
    let (out, best) = (dir.join("out"), dir.join("out/best"));
    fs::create_dir_all(&best).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(fixture("adapter").join(file), best.join(file)).unwrap();
    }
    let base = fixture("base");
    let mut flags = vec!["adapt", "--model", str(&base), "--adapter", str(&best)];
    flags.extend(["--data", str(&rows), "--task", "new", "--output-dir", str(&out)]);
    fails(&flags, 2, "lies in --output-dir");
    let inside = ["--adapter-init", str(&best), "--max-steps", "2"];
    fails(&crate::train(&rows, &out, &inside), 2, "lies in --output-dir");
    assert!(best.join("adapter_config.json").exists());

    // Rows without names, of more than one id.
    let few = dir.join("ids.jsonl");
    let row =
        |id: usize| format!("{}\n", json!({"task_id": id, "input_ids": [5], "label_ids": [6, 1]}));
    fs::write(&few, row(0) + &row(1)).unwrap();
    fails(&adapt(&few, &dir.join("none"), &[]), 3, "have 2 different task_ids");
}

/// What no run made stays: a model always, an adapter unless it may go.
#[test]
fn what_no_run_made_is_not_replaced() {
    let dir = scratch("adapt-replaces");
    let (rows, of_all) = (data(&dir, 9), crate::data(&dir, 9));
    let copied = |to: &str, from: &str, files: &[&str]| {
        let to = dir.join(to);
        fs::create_dir_all(&to).unwrap();
        for file in files {
            fs::copy(fixture(from).join(file), to.join(file)).unwrap();
        }
        to
    };
    let config = copied("config", "base", &["config.json"]);
    let weights = copied("weights", "base", &["model.safetensors"]);
    let adapter = ["adapter_config.json", "adapter_model.safetensors"];
    let (foreign, best) = (copied("foreign", "adapter", &adapter), dir.join("other"));
    copied("other/best", "adapter", &adapter);
    let pickled = dir.join("pickled");
    fs::create_dir(&pickled).unwrap();
    fs::write(pickled.join("pytorch_model-00001-of-00002.bin"), "x").unwrap();
    for (out, message) in [
        (&config, "is a model folder (it has config.json with model_type)"),
        (&weights, "is a model folder (it has model.safetensors)"),
        (&pickled, "is a model folder (it has pytorch_model-00001-of-00002.bin)"),
        (&foreign, "has an adapter, but no log.jsonl of a run that made it"),
        (&best, "has an adapter, but no log.jsonl of a run that made it"),
    ] {
        fails(&adapt(&rows, out, &["--max-steps", "1"]), 2, message);
        fails(&crate::train(&of_all, out, &["--max-steps", "1", "--resume"]), 2, message);
    }
    let over = ["--max-steps", "1", "--overwrite-output-dir"];
    fails(&crate::train(&of_all, &config, &over), 2, "is a model folder");
    assert!(weights.join("model.safetensors").exists() && foreign.join(adapter[0]).exists());
    ok(&crate::train(&of_all, &foreign, &over));
    ok(&adapt(&rows, &foreign, &["--max-steps", "1"])); // Now it is a run's.
    ok(&adapt(&rows, &best, &over));
}
