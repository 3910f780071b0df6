//! What a user looks at: rows before a run, event files and pages after it, tables; and data in other
//! forms.

use std::fs;

use serde_json::{Value, json};

use crate::{data, fails, fixture, lines, ok, scratch, str, text, train};

#[test]
fn a_report_is_one_page() {
    let dir = scratch("report");
    let (rows, out) = (data(&dir, 12), dir.join("out"));
    let flags = [
        "--max-steps",
        "6",
        "--eval-data",
        str(&rows),
        "--eval-steps",
        "2",
        "--report-to",
        "tensorboard",
    ];
    ok(&train(&rows, &out, &flags));
    let page = out.join("report.html");
    assert_eq!(ok(&["report", str(&out)]).trim(), str(&page));
    let page = text(&page);
    for shown in [
        "Loss, nats a label token",
        "Evaluation loss of each task",
        "Routers over time",
        "average linkage",
        "task-2",
        "polytape_version",
        "learning_rate",
    ] {
        assert!(page.contains(shown), "{shown}");
    }
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="));
    // A cut last line, as kill -9 leaves it, is no reason to fail; another one is.
    let log = out.join("log.jsonl");
    let whole = text(&log);
    fs::write(&log, format!("{whole}{{\"step\": 7, \"lo")).unwrap();
    ok(&["report", str(&out), "--output", str(&dir.join("other.html"))]);
    fs::write(&log, format!("{{\"step\n{whole}")).unwrap();
    fails(&["report", str(&out)], 3, "log.jsonl:1");

    // The event files: six steps and three evaluations behind the version.
    let events: Vec<_> =
        fs::read_dir(out.join("runs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(events.len(), 1);
    let bytes = fs::read(&events[0]).unwrap();
    let (mut at, mut n) = (0, 0);
    while at < bytes.len() {
        at += 16 + u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        n += 1;
    }
    assert_eq!((at, n), (bytes.len(), 1 + 6 + 3));
    let count = |tag: &str| bytes.windows(tag.len()).filter(|part| *part == tag.as_bytes()).count();
    assert_eq!((count("train/loss"), count("eval/loss"), count("eval/router_usage")), (6, 3, 3));
}

#[test]
fn rows_are_shown_as_the_model_sees_them() {
    let dir = scratch("preview");
    let (rows, base) = (data(&dir, 5), fixture("base"));
    let said = ok(&["preview", "--model", str(&base), "--data", str(&rows), "-n", "2"]);
    assert!(said.contains("line 2, task task-1 (id 1)"), "{said}");
    assert!(!said.contains("line 3") && said.contains("5 rows, 3 tasks"), "{said}");
    let said = ok(&["preview", "--model", str(&base), "--data", str(&rows), "-n", "1", "--json"]);
    let shown: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(shown[0]["input_ids"], lines(&rows)[0]["input_ids"]);
    assert_eq!(shown[0]["label_ids"], lines(&rows)[0]["label_ids"]);
    assert_eq!(shown[1]["n_rows"], 5);
    // Rows that generate would answer.
    fs::write(&rows, "{\"input_ids\": [7, 8]}\n{\"input_ids\": [9], \"label_ids\": []}\n").unwrap();
    let said = ok(&["preview", "--model", str(&base), "--data", str(&rows)]);
    assert!(said.contains("input, 2 tokens") && !said.contains("labels"), "{said}");
    assert_eq!(said.matches("no target: a prompt for generate").count(), 2, "{said}");
    let said = ok(&["preview", "--model", str(&base), "--data", str(&rows), "--json"]);
    let first: Value = serde_json::from_str(said.lines().next().unwrap()).unwrap();
    assert_eq!((&first["input_ids"], &first["label_ids"]), (&json!([7, 8]), &json!([])));
}

#[test]
fn scores_are_a_table() {
    let dir = scratch("markdown");
    let (rows, base, table) = (data(&dir, 6), fixture("base"), dir.join("scores.md"));
    ok(&[
        "eval",
        "--model",
        str(&base),
        "--data",
        str(&rows),
        "--generate",
        "off",
        "--markdown",
        str(&table),
    ]);
    let table = text(&table);
    assert_eq!(table.lines().count(), 2 + 3 + 1);
    assert!(
        table.contains("| task-1 | 2 | 6 | ") && table.contains("| **all** | 6 | 18 | "),
        "{table}"
    );
}

/// Several files are several tasks; columns may have other names.
#[test]
fn files_are_tasks() {
    let dir = scratch("files");
    let row = |i: usize| json!({"in": [5 + i, 6, 7], "label_ids": [4 + i, 1]});
    let (a, b, all) = (dir.join("first.jsonl"), dir.join("second.jsonl"), dir.join("all.jsonl"));
    let with = |row: Value, task: &str| {
        let mut row = row;
        row["input_ids"] = row["in"].clone();
        if !task.is_empty() {
            row["task"] = json!(task);
        }
        format!("{row}\n")
    };
    fs::write(&a, (0..3).map(|i| with(row(i), "")).collect::<String>()).unwrap();
    fs::write(&b, (3..6).map(|i| with(row(i), "")).collect::<String>()).unwrap();
    let lines = (0..6).map(|i| with(row(i), if i < 3 { "first" } else { "second" }));
    fs::write(&all, lines.collect::<String>()).unwrap();
    let (two, one) = (dir.join("two"), dir.join("one"));
    ok(&train(&a, &two, &["--data", str(&b), "--max-steps", "3"]));
    ok(&train(&all, &one, &["--max-steps", "3"]));
    assert_eq!(text(&two.join("tasks.json")), text(&one.join("tasks.json")));
    let model = |dir: &std::path::Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(model(&two) == model(&one));
    // An error names its own file.
    fs::write(&b, "{\"input_ids\": [500], \"label_ids\": [4]}\n").unwrap();
    fails(&train(&a, &two, &["--data", str(&b)]), 3, "second.jsonl:1: token id 500");
    fails(
        &train(&a, &two, &["--target-column", "answer"]),
        3,
        "first.jsonl:1: there is no field \"answer\"",
    );
    // The tiny base has no tokenizer, so text in CSV is refused, by line.
    let csv = dir.join("rows.csv");
    fs::write(&csv, "task,input,target\nt,x,y\n").unwrap();
    fails(
        &train(&csv, &two, &[]),
        3,
        "rows.csv:2: the row has text, but the model folder has no tokenizer.json",
    );
}

/// A row with three choices.
fn line(i: usize) -> Value {
    let choices = [vec![10, 11, 1], vec![20, 1], vec![30, 31, 32, 1]];
    let answer = &choices[i % 3];
    json!({"task": "t", "input_ids": [40 + i % 3, 50 + i, 7], "label_ids": answer, "choice_ids": choices})
}

/// What makes the ranking of nine such rows right.
const RANKING: [&str; 16] = [
    "--max-steps",
    "60",
    "--loss",
    "t-few",
    "--learning-rate",
    "0.03",
    "--dropout",
    "0",
    "--router-sampling",
    "off",
    "--target-modules",
    "all-linear",
    "--batch-size",
    "9",
    "--lr-scheduler-type",
    "constant",
];

/// Rows with choices: their ranking is scored, and T-Few's losses make it right.
#[test]
fn choices_are_ranked_and_learned() {
    let dir = scratch("choices");
    let (path, base, out) = (dir.join("choices.jsonl"), fixture("base"), dir.join("out"));
    fs::write(&path, (0..9).map(|i| format!("{}\n", line(i))).collect::<String>()).unwrap();
    let flags = RANKING;
    ok(&train(&path, &out, &flags));
    let accuracy = |adapter: Option<&str>| {
        let mut flags =
            vec!["eval", "--model", str(&base), "--data", str(&path), "--generate", "off"];
        flags.extend(adapter.iter().flat_map(|dir| ["--adapter", dir]));
        let said: Value = serde_json::from_str(ok(&flags).trim()).unwrap();
        assert_eq!(said["tasks"]["t"]["rank_accuracy"], said["rank_accuracy"]);
        said["rank_accuracy"].as_f64().unwrap()
    };
    let (before, after) = (accuracy(None), accuracy(Some(str(&out))));
    assert!(before < 0.7 && after == 1.0, "{before} -> {after}");
    // The same bits in micro-batches of another resume, and for other threads.
    let again = dir.join("again");
    ok(&train(&path, &again, &[&flags[..], &["--threads", "2"]].concat()));
    let model = |dir: &std::path::Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(model(&out) == model(&again));
    let with = |value: Value| {
        let mut row = line(0);
        row["choice_ids"] = value;
        fs::write(&path, format!("{row}\n")).unwrap();
    };
    with(json!([[5], [6]]));
    fails(&train(&path, &out, &flags), 3, "choices.jsonl:1: the target is none of the choices");
    // The file that has it is named, whichever it is; and an evaluation does not need the field.
    let fine = dir.join("fine.jsonl");
    fs::write(&fine, format!("{}\n", line(0))).unwrap();
    let two = [&flags[..], &["--data", str(&fine), str(&path)]].concat();
    let two: Vec<&str> = two.into_iter().collect();
    fails(&train(&fine, &out, &two), 3, "choices.jsonl:1: the target is none of the choices");
    let eval = ["eval", "--model", str(&base), "--generate", "off", "--data", str(&path)];
    let said: Value = serde_json::from_str(ok(&eval).trim()).unwrap();
    assert!(said["rank_accuracy"].is_null() && said["n_rows"] == 1, "{said}");
    // What is as long as it may be can be the answer: it is left out.
    let cut = ["--max-target-length", "1", "--overlong", "truncate"];
    fs::write(&path, format!("{}\n", json!({"task": "t", "input_ids": [5], "label_ids": [10], "choice_ids": [[10], [10, 7], [20]]}))).unwrap();
    let said: Value = serde_json::from_str(ok(&[&eval[..], &cut].concat()).trim()).unwrap();
    assert!(said["rank_accuracy"].is_number(), "{said}");
    let strict = [&eval[..], &["--max-target-length", "1", "--overlong", "error"]].concat();
    fails(&strict, 3, "choices.jsonl:1: the row has 2 tokens where 1 are allowed");
    with(json!([[5], []]));
    fails(&train(&path, &out, &flags), 3, "choices.jsonl:1: a choice is empty");
    with(json!("x"));
    fails(&train(&path, &out, &flags), 3, "choices.jsonl:1: field choice_ids: expected a list");
}

/// How well choices are ranked is evaluated in training, and may decide which adapter is best.
#[test]
fn the_best_adapter_may_be_the_one_that_ranks_best() {
    let dir = scratch("rank-accuracy");
    let (path, out) = (dir.join("choices.jsonl"), dir.join("out"));
    fs::write(&path, (0..9).map(|i| format!("{}\n", line(i))).collect::<String>()).unwrap();
    let held_out = dir.join("held-out.jsonl");
    fs::copy(&path, &held_out).unwrap();
    let judged = ["--eval-data", str(&held_out), "--metric-for-best-model", "rank_accuracy"];
    let flags = [&RANKING[..], &judged, &["--eval-steps", "20", "--save-steps", "20"]].concat();
    ok(&train(&path, &out, &[&flags[..], &["--report-to", "tensorboard"]].concat()));
    let log = lines(&out.join("log.jsonl"));
    let ranked: Vec<f64> =
        log.iter().filter_map(|line| line["eval_rank_accuracy"].as_f64()).collect();
    assert!(ranked.len() == 3 && ranked[2] == 1.0, "{ranked:?}");
    assert!(log.iter().all(|line| line.get("eval_rouge_l").is_none()), "nothing was generated");
    let state: Value =
        serde_json::from_str(&text(&out.join("checkpoint-60/trainer_state.json"))).unwrap();
    let best = ranked.iter().position(|&accuracy| accuracy == 1.0).unwrap();
    assert_eq!(
        (&state["best_metric"], &state["best_global_step"]),
        (&json!(1.0), &json!(20 * (best + 1)))
    );
    let history = state["log_history"].as_array().unwrap();
    assert_eq!(history.iter().filter(|entry| entry["eval_rank_accuracy"].is_number()).count(), 3);
    let events = fs::read_dir(out.join("runs")).unwrap().next().unwrap().unwrap().path();
    let (bytes, tag) = (fs::read(events).unwrap(), b"eval/rank_accuracy");
    assert_eq!(bytes.windows(tag.len()).filter(|part| part == tag).count(), 3);

    // Other choices would be another run; an earlier version noted nothing of them.
    let other: String = (0..9)
        .map(|i| {
            let mut row = line(i);
            row["choice_ids"][(i + 1) % 3] = json!([77, 1]);
            format!("{row}\n")
        })
        .collect();
    fs::write(&held_out, other).unwrap();
    let resume = train(&path, &out, &[&flags[..], &["--resume"]].concat());
    fails(&resume, 3, "eval_choices_fingerprint was");
    let arguments = out.join("checkpoint-60/training_args.json");
    let mut known: Value = serde_json::from_str(&text(&arguments)).unwrap();
    known.as_object_mut().unwrap().remove("eval_choices_fingerprint").unwrap();
    fs::write(&arguments, known.to_string()).unwrap();
    ok(&resume);

    // Without choices there is nothing to judge by, which is said before anything is written.
    let (none, plain) = (dir.join("none"), data(&dir, 6));
    let judged = ["--eval-data", str(&plain), "--metric-for-best", "rank_accuracy"];
    fails(&train(&plain, &none, &judged), 2, "rank_accuracy needs rows to evaluate on that have");
    assert!(!none.join("log.jsonl").exists());
}

/// What is learned is smoothed, what is reported is not. (That the gradient is right is tested with
/// the tape.)
#[test]
fn label_smoothing_is_learned_and_not_reported() {
    let dir = scratch("smoothing");
    let rows = data(&dir, 6);
    let losses = |name: &str, factor: &str| -> Vec<f64> {
        let out = dir.join(name);
        let flags = ["--max-steps", "9", "--batch-size", "6", "--label-smoothing-factor", factor];
        ok(&train(&rows, &out, &flags));
        lines(&out.join("log.jsonl")).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let (plain, smooth) = (losses("plain", "0"), losses("smooth", "0.3"));
    assert_eq!(plain[0], smooth[0], "nothing is learned yet");
    assert_ne!(plain[8], smooth[8]);
    let one = ["--label-smoothing-factor", "1"];
    fails(&train(&rows, &dir, &one), 2, "label_smoothing must be in 0..1");
}
