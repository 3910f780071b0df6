//! A short run of the demo: everything is written, and what is written is read again.
#![allow(clippy::unwrap_used)]

use std::fs;

use polytape::{
    Error,
    demo::{
        DemoOptions,
        methods::{Method, Plan},
        run,
        suite::RowCounts,
    },
    formats::tasks::TaskNames,
    model::{Adapter, Model, Options},
    train::adapt::Tune,
};

fn short(name: &str) -> DemoOptions {
    let mut plan = Plan { n_skills: 2, rank: 2, ..Plan::default() };
    plan.n_rows = RowCounts { train: 4, few: 2, test: 2 };
    (plan.training.n_steps, plan.training.batch_size) = (3, 5);
    (plan.adaptation.n_steps, plan.adaptation.batch_size) = (2, 2);
    let output_dir = std::env::temp_dir().join(format!("polytape-{name}-{}", std::process::id()));
    DemoOptions { output_dir, seed: 3, n_threads: 1, plan }
}

#[test]
fn a_short_run_leaves_everything_behind() {
    let options = short("demo");
    let mut n_steps = 0;
    let report = run(&options, &mut |progress| {
        n_steps += 1;
        assert!(progress.loss.is_finite());
        Ok(())
    })
    .unwrap();
    // Training of four methods; three held-out tasks for shared and private, twice for the routed.
    assert_eq!(n_steps, 4 * 3 + (1 + 1 + 2 + 2) * 3 * 2);

    let dir = &options.output_dir;
    let base = Model::open(dir.join("base"), &Options::default()).unwrap();
    for (method, report) in Method::ALL.iter().zip(&report.methods) {
        assert_eq!(*method, report.method);
        let adapter = Adapter::open(&base, dir.join(method.name())).unwrap();
        assert_eq!(adapter.config().n_tasks, 9);
        assert_eq!(
            adapter.tasks().and_then(|tasks: &TaskNames| tasks.name(0)),
            Some("reverse-next")
        );
        assert_eq!(report.held_out(Tune::Router).is_some(), method.learns_routing());
        assert_eq!(dir.join(method.name()).join("heatmap.svg").exists(), method.learns_routing());
    }
    for (file, n_lines) in [
        ("train.jsonl", 9 * 4),
        ("test.jsonl", 9 * 2),
        ("held-out-train.jsonl", 3 * 2),
        ("held-out-test.jsonl", 3 * 2),
    ] {
        let text = fs::read_to_string(dir.join("data").join(file)).unwrap();
        assert_eq!(text.lines().count(), n_lines, "{file}");
    }
    let table = report.to_string();
    assert!(Method::ALL.iter().all(|method| table.contains(method.name())), "{table}");

    // The same seed, the same numbers.
    let again = run(&options, &mut |_| Ok(())).unwrap();
    for (a, b) in report.methods.iter().zip(&again.methods) {
        assert_eq!(a.trained_on.loss.to_bits(), b.trained_on.loss.to_bits());
    }
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn progress_can_end_it() {
    let options = short("demo-interrupted");
    let ended = run(&options, &mut |_| Err(Error::Interrupted));
    assert!(matches!(ended, Err(Error::Interrupted)));
    fs::remove_dir_all(&options.output_dir).unwrap();
}

#[test]
fn what_no_demo_wrote_stays() {
    let options = short("demo-taken");
    let dir = &options.output_dir;
    let refused = |path: &str| {
        let error = run(&options, &mut |_| Ok(())).unwrap_err();
        let message = error.to_string();
        assert!(error.exit_code() == 2 && message.contains("no demo wrote it"), "{message}");
        assert_eq!(fs::read(dir.join(path)).unwrap(), b"mine");
    };
    for path in ["data/train.jsonl", "mhr/adapter_config.json", "base/config.json"] {
        fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        fs::write(dir.join(path), "mine").unwrap();
        refused(path);
        fs::remove_file(dir.join(path)).unwrap();
    }
    // Beside other files it finds room; and one that was interrupted is replaced, but for a base that has changed.
    fs::write(dir.join("notes"), "mine").unwrap();
    for _ in 0..2 {
        let ended = run(&options, &mut |_| Err(Error::Interrupted));
        assert!(matches!(ended, Err(Error::Interrupted)));
    }
    fs::write(dir.join("base/model.safetensors"), "mine").unwrap();
    refused("base/model.safetensors");
    fs::remove_dir_all(dir).unwrap();
}
