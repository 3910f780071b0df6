//! Checkpoints: a run that was stopped, in whatever way, ends with the bits of one that was not.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use polytape::{formats::safetensors::SafetensorsFile, train::checkpoint};
use serde_json::{Value, json};

use crate::{data, fails, lines, ok, scratch, str, text, text_or_empty, train};

const FILES: [&str; 5] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "tasks.json",
    "optimizer.safetensors",
    "trainer_state.json",
];

fn bytes(dir: &Path, file: &str) -> Vec<u8> {
    fs::read(dir.join(file)).unwrap()
}

/// (step, loss or evaluation loss) of every line.
fn losses(out: &Path) -> Vec<(u64, u64)> {
    lines(&out.join("log.jsonl"))
        .iter()
        .map(|line| {
            let loss = line.get("loss").unwrap_or(&line["eval_loss"]).as_f64().unwrap();
            (line["step"].as_u64().unwrap(), loss.to_bits())
        })
        .collect()
}

fn steps(out: &Path) -> Vec<u64> {
    checkpoint::list(out).unwrap().iter().map(|found| found.step).collect()
}

/// From every kind of place: inside an epoch, at its end, after an evaluation, with accumulation, by
/// another number of threads, with activations computed again.
#[test]
fn a_resumed_run_ends_with_the_same_bits() {
    let dir = scratch("resume");
    let rows = data(&dir, 20); // 6 rows a step: steps of 6, 6, 6 and 2, four an epoch.
    let common = [
        "--batch-size",
        "2",
        "--gradient-accumulation-steps",
        "3",
        "--max-steps",
        "11",
        "--warmup-steps",
        "3",
        "--dropout",
        "0.1",
        "--eval-data",
        str(&rows),
        "--eval-steps",
        "4",
        "--save-steps",
        "1",
        "--learning-rate",
        "0.02",
    ];
    let full = dir.join("full");
    ok(&train(&rows, &full, &[&common[..], &["--threads", "1"]].concat()));
    assert_eq!(steps(&full), (1..=11).collect::<Vec<_>>());
    for (step, more) in [
        (1, ["--threads", "2"]),
        (3, ["--threads", "1"]),
        (4, ["--threads", "3"]),
        (6, ["--checkpointing", "on"]),
        (10, ["--threads", "2"]),
    ] {
        let out = dir.join(format!("from-{step}"));
        let from = full.join(format!("checkpoint-{step}"));
        let resume = ["--resume_from_checkpoint", str(&from)];
        ok(&train(&rows, &out, &[&common[..], &resume, &more].concat()));
        for file in ["adapter_model.safetensors", "best/adapter_model.safetensors", "tasks.json"] {
            assert!(bytes(&out, file) == bytes(&full, file), "{file} from step {step}");
        }
        assert_eq!(losses(&out), losses(&full), "from step {step}");
        for later in step + 1..=11 {
            let name = format!("checkpoint-{later}");
            for file in &FILES[..4] {
                let (a, b) = (bytes(&out.join(&name), file), bytes(&full.join(&name), file));
                assert!(a == b, "{name}/{file} from step {step}");
            }
        }
    }
}

/// Adafactor's moments, and batches whose tasks are drawn.
#[test]
fn other_optimisers_and_samplings_resume_as_well() {
    let dir = scratch("resume-others");
    let rows = data(&dir, 20);
    let runs: [&[&str]; 3] = [
        &["--optim", "adafactor", "--scale-parameter", "on"],
        &["--optim", "adafactor", "--task-sampling", "uniform", "--num-tasks-per-batch", "2"],
        &[
            "--task-sampling",
            "temperature",
            "--max-examples-per-task",
            "3",
            "--router-updates",
            "lazy",
        ],
    ];
    for (i, flags) in runs.into_iter().enumerate() {
        let common = ["--max-steps", "6", "--save-steps", "2", "--batch-size", "4"];
        let (full, part) = (dir.join(format!("full-{i}")), dir.join(format!("part-{i}")));
        ok(&train(&rows, &full, &[&common[..], flags].concat()));
        let from = full.join("checkpoint-2");
        ok(&train(&rows, &part, &[&common[..], flags, &["--resume", str(&from)]].concat()));
        let file = "adapter_model.safetensors";
        assert!(bytes(&full, file) == bytes(&part, file), "{flags:?}");
        assert_eq!(losses(&full), losses(&part), "{flags:?}");
        let (first, last) = (losses(&full)[0].1, losses(&full)[5].1);
        assert_ne!(first, last);
    }
    let lazy = ["--optim", "adafactor", "--router-updates", "lazy"];
    fails(&train(&rows, &dir.join("no"), &lazy), 2, "lazy router updates are for AdamW");
}

#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    let dir = scratch("resume-interrupted");
    let (rows, out, whole) = (data(&dir, 30), dir.join("out"), dir.join("whole"));
    let endless = ["--max-steps", "1000000", "--lr-scheduler-type", "constant", "-q"];
    for signal in ["-INT", "-TERM"] {
        let before = losses_or_none(&out).len();
        let endless = train(&rows, &out, &[&endless[..], &["--resume"]].concat());
        let mut child = spawn(&endless);
        wait_for_lines(&out, before + 3);
        fails(&endless, 2, "another run is writing to");
        let pid = child.0.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        assert_eq!(child.0.wait().unwrap().code(), Some(130), "{signal}");
        let last = losses(&out).last().unwrap().0;
        assert_eq!(steps(&out).last(), Some(&last), "a checkpoint of the last step");
    }
    let total = (losses(&out).last().unwrap().0 + 5).to_string();
    let short = ["--max-steps", &total, "--lr-scheduler-type", "constant"];
    ok(&train(&rows, &out, &[&short[..], &["--resume"]].concat()));
    ok(&train(&rows, &whole, &short));
    assert_eq!(losses(&out), losses(&whole));
    let file = "adapter_model.safetensors";
    assert!(bytes(&out, file) == bytes(&whole, file));
    // Once more, with a checkpoint of the last step: there is nothing left to do.
    let resume = [&short[..], &["--resume", "--save-steps", "1000"]].concat();
    ok(&train(&rows, &out, &resume));
    assert_eq!(steps(&out).last().unwrap().to_string(), total);
    let said = ok(&train(&rows, &out, &resume));
    assert!(said.contains("nothing was left to do"), "{said}");
}

fn losses_or_none(out: &Path) -> Vec<(u64, u64)> {
    if out.join("log.jsonl").exists() { losses(out) } else { Vec::new() }
}

/// A run that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(arguments: &[&str]) -> Running {
    let mut run = Command::new(env!("CARGO_BIN_EXE_polytape"));
    run.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    Running(run.spawn().unwrap())
}

fn wait_for_lines(out: &Path, n: usize) {
    let started = Instant::now();
    while text_or_empty(&out.join("log.jsonl")).lines().count() < n {
        assert!(started.elapsed() < Duration::from_secs(120), "no step was logged");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills a run `n_kills` times, and resumes it each time.
fn kill_and_resume(name: &str, n_kills: u64) {
    const EVERY: u64 = 3;
    let dir = scratch(name);
    let (rows, out, whole) = (data(&dir, 30), dir.join("out"), dir.join("whole"));
    let common = ["--lr-scheduler-type", "constant", "--batch-size", "4", "--dropout", "0.1", "-q"];
    let endless = ["--max-steps", "1000000", "--save-steps", "3", "--save-total-limit", "2"];
    let mut random = 12345_u64;
    for kill in 0..n_kills {
        let before = text_or_empty(&out.join("log.jsonl")).lines().count();
        let child = spawn(&train(&rows, &out, &[&common[..], &endless, &["--resume"]].concat()));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // One in four at any time at all, the others while it trains and saves.
        if kill % 4 != 3 {
            wait_for_lines(&out, before + 1 + (random >> 40) as usize % 5);
        }
        std::thread::sleep(Duration::from_micros((random >> 33) % 20_000));
        drop(child);
        check_checkpoints(&out, EVERY);
    }
    let last = steps(&out).last().copied().unwrap_or(0);
    assert!(last > 0, "nothing was ever saved");
    let total = (last + 4).to_string();
    let rest = [&common[..], &["--max-steps", &total]].concat();
    ok(&train(&rows, &out, &[&rest[..], &["--resume"]].concat()));
    ok(&train(&rows, &whole, &rest));
    let file = "adapter_model.safetensors";
    assert!(bytes(&out, file) == bytes(&whole, file), "after {n_kills} kills");
    assert_eq!(losses(&out), losses(&whole));
    let leftovers = fs::read_dir(&out).unwrap().filter(|entry| {
        entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".checkpoint")
    });
    assert_eq!(leftovers.count(), 0);
}

/// Every folder that is called a checkpoint is a whole one, and the log is not further ahead of the
/// last than the steps between two.
fn check_checkpoints(out: &Path, every: u64) {
    let found = checkpoint::list(out).unwrap();
    for checkpoint in &found {
        let state = checkpoint::read_state(&checkpoint.path).unwrap();
        assert_eq!(state.global_step, checkpoint.step);
        for file in FILES {
            assert!(checkpoint.path.join(file).exists(), "{}/{file}", checkpoint.path.display());
        }
        let file = SafetensorsFile::open(checkpoint.path.join("optimizer.safetensors")).unwrap();
        assert!(file.tensor("exp_avg_sq").unwrap().is_some());
        polytape::formats::adapter::AdapterFiles::open(&checkpoint.path).unwrap();
    }
    let logged = text_or_empty(&out.join("log.jsonl"))
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter_map(|line| line["step"].as_u64())
        .next_back();
    let (logged, saved) = (logged.unwrap_or(0), found.last().map_or(0, |last| last.step));
    assert!(logged <= saved + every, "step {logged} is logged, {saved} is saved");
}

/// `POLYTAPE_KILLS` asks for more.
#[test]
fn kill_9_loses_no_more_than_the_steps_since_the_last_checkpoint() {
    let n = std::env::var("POLYTAPE_KILLS").map_or(200, |n| n.parse().unwrap());
    kill_and_resume("kill-9", n);
}

/// A limit of the process stands for a full disk: an error, no signal, and what is there stays.
#[test]
#[cfg(unix)]
fn a_file_that_may_not_grow_is_an_error() {
    let dir = scratch("file-size");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let run = |limit: &str, n_steps: &str| {
        let more = ["--max-steps", n_steps, "--save-steps", "1", "--resume", "-q"];
        // In blocks of 512 bytes.
        let script = format!("ulimit -f {limit}; exec \"$@\"");
        Command::new("sh")
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_polytape")])
            .args(train(&rows, &out, &more))
            .output()
            .unwrap()
    };
    assert!(run("unlimited", "2").status.success());
    let before: Vec<_> = FILES.map(|file| bytes(&out.join("checkpoint-2"), file)).into();
    let output = run("4", "4");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write") && said.contains("too large"), "{said}");
    assert_eq!(steps(&out), [1, 2]);
    let after: Vec<_> = FILES.map(|file| bytes(&out.join("checkpoint-2"), file)).into();
    assert!(before == after);
    assert!(run("unlimited", "4").status.success());
    assert_eq!(steps(&out), [1, 2, 3, 4]);
}

#[test]
fn only_the_last_checkpoints_are_kept() {
    let dir = scratch("save-total-limit");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    ok(&train(&rows, &out, &["--max-steps", "7", "--save-steps", "2", "--save_total_limit", "2"]));
    assert_eq!(steps(&out), [6, 7]);
    let state: Value =
        serde_json::from_str(&text(&out.join("checkpoint-7/trainer_state.json"))).unwrap();
    assert_eq!((state["global_step"].as_u64(), state["max_steps"].as_u64()), (Some(7), Some(7)));
    assert_eq!(state["epoch"], 7.0 / 2.0);
}

/// The settings are spelled as the flags are, and what an earlier version wrote otherwise means the same.
#[test]
fn settings_are_spelled_as_flags() {
    let dir = scratch("spelling");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let flags = ["--max-steps", "2", "--save-steps", "1", "--router-updates", "lazy", "--resume"];
    ok(&train(&rows, &out, &[&flags[..], &["--overlong", "skip", "--init", "authors"]].concat()));
    let config: Value = serde_json::from_str(&text(&out.join("config.json"))).unwrap();
    for (key, value) in [
        ("loss", "lm"),
        ("optim", "adamw"),
        ("router_updates", "lazy"),
        ("overlong", "skip"),
        ("init", "authors"),
        ("report_to", "none"),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(
        (&config["max_target_length"], &config["init_weights"]),
        (&json!(128), &json!(true))
    );
    assert_eq!(
        (&config["load_best_model_at_end"], &config["logging_steps"]),
        (&json!(false), &json!(10))
    );
    assert!(config["scale_parameter"].is_null() && config["max_source_length"].is_null());

    let path = out.join("checkpoint-2/training_args.json");
    let mut known: Value = serde_json::from_str(&text(&path)).unwrap();
    let arguments = known.as_object_mut().unwrap();
    for key in ["scale_parameter", "router_updates", "max_new_tokens", "num_beams"] {
        arguments.remove(key).unwrap();
    }
    arguments.insert("loss".into(), "Lm".into());
    arguments.insert("optim".into(), "AdamW".into());
    arguments.insert("trainable".into(), "Trainable { bank: true, router: Present }".into());
    fs::write(&path, known.to_string()).unwrap();
    ok(&train(&rows, &out, &flags));
    let dense = ["--max-steps", "2", "--resume"];
    fails(&train(&rows, &out, &dense), 3, "router_updates was \"lazy\" in the run");
}

/// Losses are noted as often as told, at checkpoints, and once each in a run that was resumed.
#[test]
fn the_state_has_the_losses_of_the_run() {
    let dir = scratch("log-history");
    let (rows, out, again) = (data(&dir, 9), dir.join("out"), dir.join("again"));
    let common = ["--max-steps", "9", "--save-steps", "5", "--eval-data", str(&rows)];
    let flags = [&common[..], &["--eval-steps", "4", "--logging_steps", "2"]].concat();
    ok(&train(&rows, &out, &flags));
    let state = |out: &Path| -> Value {
        serde_json::from_str(&text(&out.join("checkpoint-9/trainer_state.json"))).unwrap()
    };
    let found = state(&out);
    assert_eq!(found["logging_steps"], 2);
    let history = |state: &Value, field: &str| -> Vec<(u64, u64)> {
        let lines = state["log_history"].as_array().unwrap().iter();
        let value = |line: &Value| Some((line["step"].as_u64()?, line[field].as_f64()?.to_bits()));
        lines.filter_map(value).collect()
    };
    let logged = |steps: &[u64]| -> Vec<(u64, u64)> {
        let lines = lines(&out.join("log.jsonl"));
        let lines = lines.iter().filter(|line| line["loss"].is_number());
        let losses = lines
            .map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap().to_bits()));
        losses.filter(|(step, _)| steps.contains(step)).collect()
    };
    assert_eq!(history(&found, "loss"), logged(&[2, 4, 5, 6, 8, 9]));
    let evaluated: Vec<u64> = history(&found, "eval_loss").iter().map(|(step, _)| *step).collect();
    assert_eq!(evaluated, [4, 8, 9]);
    let from = out.join("checkpoint-5");
    ok(&train(&rows, &again, &[&flags[..], &["--resume", str(&from)]].concat()));
    assert_eq!(state(&again)["log_history"], found["log_history"]);
    // Every tenth, if nothing is said; the log has a line a step either way.
    let plain = dir.join("plain");
    ok(&train(&rows, &plain, &["--max-steps", "11", "--save-steps", "11"]));
    let path = plain.join("checkpoint-11/trainer_state.json");
    let steps: Vec<u64> = history(&serde_json::from_str(&text(&path)).unwrap(), "loss")
        .iter()
        .map(|(step, _)| *step)
        .collect();
    assert_eq!((steps, lines(&plain.join("log.jsonl")).len()), (vec![10, 11], 11));
}

/// Without learning no evaluation is better than the first.
#[test]
fn patience_ends_a_run() {
    let dir = scratch("patience");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let common = [
        "--max-steps",
        "50",
        "--eval-data",
        str(&rows),
        "--eval-steps",
        "2",
        "--save-steps",
        "3",
        "--learning-rate",
        "0",
        "--router-learning-rate",
        "0",
        "--early-stopping-patience",
        "3",
    ];
    ok(&train(&rows, &out, &common));
    let last = losses(&out).last().unwrap().0;
    assert_eq!(last, 8, "the first evaluation at step 2, then three that are not better");
    // The patience used is part of the checkpoint.
    let again = dir.join("again");
    let from = out.join("checkpoint-6");
    ok(&train(&rows, &again, &[&common[..], &["--resume", str(&from)]].concat()));
    assert_eq!(losses(&again), losses(&out));
}

#[test]
fn what_cannot_be_resumed_is_refused() {
    let dir = scratch("resume-refused");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let run = |more: &[&'static str]| {
        let rows: &'static PathBuf = Box::leak(Box::new(rows.clone()));
        let out: &'static PathBuf = Box::leak(Box::new(out.clone()));
        train(rows, out, &[&["--max-steps", "4", "--save-steps", "2"], more].concat())
    };
    ok(&run(&[]));
    fails(&run(&[]), 2, "checkpoint-4 is of an earlier run");
    fails(&run(&["--resume", "--seed", "7"]), 3, "seed was 42 in the run that is to be resumed");
    fails(&run(&["--resume", "--batch-size", "4"]), 3, "batch_size was 8");
    fails(&run(&["--resume", "--r", "5"]), 2, "--r 5 differs from the 8 of the checkpoint");
    let early: &'static str = Box::leak(str(&out.join("checkpoint-2")).to_owned().into_boxed_str());
    fails(&run(&["--resume", early]), 2, "checkpoint-4 is later than");
    fails(&run(&["--resume", "/nowhere/checkpoint-1"]), 3, "there is no trainer_state.json");
    let more = dir.join("more.jsonl");
    fs::write(&more, crate::rows(10)).unwrap();
    fails(&train(&more, &out, &["--max-steps", "4", "--resume"]), 3, "data_fingerprint was");
    // Moments of another adapter.
    let moments = out.join("checkpoint-4/optimizer.safetensors");
    polytape::formats::safetensors::write_safetensors(
        &moments,
        &[("exp_avg", &[2], &[0.0, 0.0]), ("exp_avg_sq", &[2], &[0.0, 0.0])],
    )
    .unwrap();
    fails(&run(&["--resume"]), 3, "tensor exp_avg has shape [2]");
    ok(&run(&["--overwrite-output-dir"]));
    assert_eq!(steps(&out), [2, 4]);
}

/// Wrong choices and references are not in the examples, but what a run learns from and picks its best by.
#[test]
fn other_choices_and_references_are_another_run() {
    let dir = scratch("resume-choices");
    let (path, out) = (dir.join("rows.jsonl"), dir.join("out"));
    let write = |wrong: u32, reference: &str| {
        let row = serde_json::json!({
            "task": "t", "input_ids": [40, 50, 7], "label_ids": [10, 1], "choice_ids": [[10, 1], [wrong, 1]],
            "references": [reference],
        });
        fs::write(&path, format!("{row}\n{row}\n")).unwrap();
    };
    let flags = ["--loss", "t-few", "--max-steps", "4", "--save-steps", "2", "--batch-size", "2"];
    write(20, "a b");
    ok(&train(&path, &out, &flags));
    let resume = [&flags[..], &["--resume"]].concat();
    write(21, "a b");
    fails(&train(&path, &out, &resume), 3, "choices_fingerprint was");
    write(20, "a c");
    fails(&train(&path, &out, &resume), 3, "data_fingerprint was");
    write(20, "a b");
    ok(&train(&path, &out, &resume));
}

/// Nothing of an earlier run is lost to a mistake, and nothing of it is taken for the new one's.
#[test]
fn an_earlier_run_stays_until_a_new_one_begins() {
    let dir = scratch("earlier");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let saving = ["--max-steps", "2", "--save-steps", "1", "--eval-data", str(&rows)];
    ok(&train(&rows, &out, &saving));
    let typo = dir.join("typo.jsonl");
    let overwrite = ["--max-steps", "2", "--overwrite-output-dir"];
    fails(&train(&typo, &out, &overwrite), 3, "typo.jsonl");
    assert!(out.join("checkpoint-2").exists() && out.join("best/adapter_config.json").exists());

    // Killed in its middle, the new run leaves no adapter of the old one.
    let endless = ["--max-steps", "100000", "--overwrite-output-dir"];
    let mut run = Command::new(env!("CARGO_BIN_EXE_polytape"))
        .args(train(&rows, &out, &endless))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while text_or_empty(&out.join("log.jsonl")).lines().count() < 10 {
        std::thread::sleep(Duration::from_millis(5));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    for gone in ["checkpoint-2", "best", "adapter_config.json"] {
        assert!(!out.join(gone).exists(), "{gone}");
    }

    let done = dir.join("done");
    ok(&train(&rows, &done, &["--max-steps", "2"]));
    fails(
        &train(&rows, &done, &["--max-steps", "4", "--resume"]),
        2,
        "no checkpoint to go on from",
    );
}

/// The best adapter by a checkpoint's step is with the checkpoint: what came later, or lies beside it, is not taken for it.
#[test]
fn a_checkpoint_has_its_best_adapter() {
    let dir = scratch("best-of-checkpoint");
    let (rows, out, alone) = (data(&dir, 9), dir.join("out"), dir.join("alone"));
    let run = ["--eval-data", str(&rows), "--eval-steps", "2", "--max-steps", "8"];
    let saving = ["--save-steps", "4", "--report-to", "tensorboard"];
    ok(&train(&rows, &out, &[&run[..], &saving].concat()));
    let weights = "adapter_model.safetensors";
    let kept = bytes(&out.join("checkpoint-4/best"), weights);
    assert!(bytes(&out.join("best"), weights) != kept, "this base gets better for eight steps");

    // As if the power had gone after the evaluation of step 8; and, of this checkpoint, nothing is left to do.
    fs::remove_dir_all(out.join("checkpoint-8")).unwrap();
    let short = ["--eval-data", str(&rows), "--eval-steps", "2", "--max-steps", "4", "--resume"];
    let best = ["--load-best-model-at-end"];
    ok(&train(&rows, &out, &[&short[..], &best].concat()));
    assert!(bytes(&out, weights) == kept && bytes(&out.join("best"), weights) == kept);

    // A checkpoint that somebody copied goes on elsewhere, but not over another run.
    let copy = dir.join("copy/checkpoint-4");
    fs::create_dir_all(copy.join("best")).unwrap();
    for part in ["", "best"] {
        for entry in fs::read_dir(out.join("checkpoint-4").join(part)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, copy.join(part).join(path.file_name().unwrap())).unwrap();
            }
        }
    }
    let resume = [&run[..], &["--resume", str(&copy)]].concat();
    fails(&train(&rows, &out, &resume), 2, "is of another run than");
    assert!(out.join("checkpoint-4").exists());
    ok(&train(&rows, &alone, &[&resume[..], &best].concat()));
    ok(&train(&rows, &out, &[&resume[..], &["--overwrite-output-dir"], &best].concat()));
    assert!(bytes(&alone, weights) == bytes(&out, weights));
    assert!(!out.join("checkpoint-4").exists());
    assert!(fs::read_dir(out.join("runs")).unwrap().next().is_none(), "events of the run before");
    fs::remove_dir_all(copy.join("best")).unwrap();
    ok(&train(&rows, &dir.join("none"), &[&resume[..], &best].concat()));

    // Another metric is another run.
    let other = ["--metric-for-best", "exact_match", "--resume", str(&copy)];
    fails(
        &train(&rows, &dir.join("other"), &[&run[..], &other].concat()),
        3,
        "metric_for_best was",
    );
}

/// Somebody who stops reading a log, as `head` does, does not end the run.
#[cfg(unix)]
#[test]
fn a_closed_log_ends_no_run() {
    let dir = scratch("closed-log");
    let (rows, out) = (data(&dir, 9), dir.join("out"));
    let flags = ["--max-steps", "4", "--eval-data", str(&rows), "--eval-steps", "1"];
    let mut run = Command::new(env!("CARGO_BIN_EXE_polytape"))
        .args(train(&rows, &out, &flags))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(run.stderr.take());
    assert!(run.wait().unwrap().success());
    assert!(out.join("adapter_config.json").exists());
}
