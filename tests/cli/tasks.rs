//! Tasks that rows do not name: `NAME=FILE`, the file's name, or the only one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use crate::{fails, fixture, lines, ok, rows, scratch, str, text, train};

/// Rows that name no task.
fn untold(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let named = rows(6);
    let rows = named.lines().map(|line| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row.as_object_mut().unwrap().remove("task");
        format!("{row}\n")
    });
    let rows: String = rows.collect();
    fs::write(&path, rows).unwrap();
    path
}

fn eval<'a>(base: &'a Path, adapter: &'a Path, data: &[&'a str]) -> Vec<&'a str> {
    let flags = ["eval", "--model", str(base), "--adapter", str(adapter), "--generate", "off"];
    [&flags[..], &["--data"], data].concat()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&text(path)).unwrap()
}

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn files_are_tasks() {
    let dir = scratch("tasks-files");
    let (base, out, other) = (fixture("base"), dir.join("out"), untold(&dir, "other.jsonl"));
    let named = format!("qnli={}", str(&other));
    let (b, val_b) = (untold(&dir, "b.jsonl"), untold(&dir, "val/b.jsonl"));
    let val = format!("qnli={}", str(&untold(&dir, "other/b.jsonl")));
    let more = ["--data", str(&b), "--max-steps", "2", "--eval-data", &val, str(&val_b)];
    ok(&train(Path::new(&named), &out, &more));
    assert_eq!(json(&out.join("tasks.json")), json!({"tasks": ["qnli", "b"]}));
    let config = json(&out.join("config.json"));
    assert_eq!(config["data"], json!([named, str(&b)]));
    assert_eq!(config["eval_data"], json!([val, str(&val_b)]));
    let log = lines(&out.join("log.jsonl"));
    assert_eq!(keys(&log.last().unwrap()["eval_task_loss"]), ["b", "qnli"]);

    // Of one file its name counts where the adapter knows it.
    let qnli = untold(&dir, "qnli.jsonl");
    let (of_name, of_other) = (str(&qnli), format!("b={}", str(&qnli)));
    for (data, task) in [(of_name, "qnli"), (of_other.as_str(), "b")] {
        let said: Value = serde_json::from_str(ok(&eval(&base, &out, &[data])).trim()).unwrap();
        assert_eq!(keys(&said["tasks"]), [task], "{data}");
    }
    let neither = "other.jsonl:1: the row has neither task nor task_id, but the adapter needs one: give it either, or name the task of all such rows of a file with NAME=FILE";
    fails(&eval(&base, &out, &[str(&other)]), 3, neither);
    let unknown = format!("x={}", str(&other));
    let message = "other.jsonl:1: task \"x\" is not known; known: \"qnli\", \"b\"";
    fails(&eval(&base, &out, &[&unknown]), 3, message);
    fails(&eval(&base, &out, &["x=none.jsonl"]), 3, "none.jsonl");
}

/// A file that is called so is no NAME=FILE.
#[test]
fn a_file_that_is_there_is_no_name() {
    let dir = scratch("tasks-equals");
    let base = fixture("base");
    untold(&dir, "c.jsonl");
    let previewed = |data: &str| -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_polytape"));
        command.args(["preview", "--json", "--model", str(&base), "--data", data]);
        let output = command.current_dir(&dir).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        serde_json::from_str(said.lines().next().unwrap()).unwrap()
    };
    assert_eq!(previewed("b=c.jsonl")["task"], "b");
    untold(&dir, "b=c.jsonl");
    assert_eq!(previewed("b=c.jsonl")["task"], Value::Null);
}

#[test]
fn one_file_without_tasks_is_one_task() {
    let dir = scratch("tasks-one");
    let (base, out) = (fixture("base"), dir.join("out"));
    let (data, other) = (untold(&dir, "rows.jsonl"), untold(&dir, "other.jsonl"));
    ok(&train(&data, &out, &["--max-steps", "2", "--eval-data", str(&other)]));
    assert_eq!(json(&out.join("adapter_config.json"))["n_tasks"], 1);
    assert!(!out.join("tasks.json").exists(), "it has no name");
    let said: Value = serde_json::from_str(ok(&eval(&base, &out, &[str(&other)])).trim()).unwrap();
    assert_eq!(keys(&said["tasks"]), ["0"]);
    let message = "rows.jsonl:1: the row has neither task nor task_id";
    fails(&train(&data, &dir.join("two"), &["--n-tasks", "2"]), 3, message);
}
