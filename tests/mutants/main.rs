//! Does the suite notice when the code is wrong? Deliberate faults in the real code, each of which a
//! named test must catch.
//!
//! `every_fault_is_caught` copies the crate, puts all faults of [`FAULTS`] into the copy, each behind a
//! switch, builds its tests once, and runs them: without a fault they pass, and with each fault on the
//! test beside it fails. The sources themselves have no trace of this; `every_fault_has_its_place` fails
//! when they have moved on.
//!
//! ```text
//! cargo test --test mutants -- --ignored --nocapture      # some minutes: another build of the crate
//! POLYTAPE_FAULT=row-of-the-first-segment cargo test --test mutants -- --ignored --nocapture
//! ```
#![allow(clippy::unwrap_used, missing_docs)]

mod faults;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use faults::{FAULTS, Fault, LIBRARY};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A source with the faults that lie in it.
fn with_faults(file: &str, source: &str) -> String {
    let mut faulty = source.to_owned();
    for fault in FAULTS.iter().filter(|fault| fault.file == file) {
        let n = source.matches(fault.right).count();
        assert_eq!(n, 1, "{file} has {n} of what {} replaces:\n{}", fault.name, fault.right);
        let switch = format!("crate::faults::on({:?})", fault.name);
        let wrong = fault.wrong.replace("ON", &switch);
        assert_ne!(wrong, fault.wrong, "{} has no switch", fault.name);
        // Faults of one file may touch: what an earlier one put there is still found.
        assert_eq!(faulty.matches(fault.right).count(), 1, "{} overlaps another", fault.name);
        faulty = faulty.replace(fault.right, &wrong);
    }
    faulty
}

#[test]
fn every_fault_has_its_place() {
    assert!(FAULTS.len() >= 30);
    let mut seen = BTreeMap::new();
    for fault in FAULTS {
        assert!(seen.insert(fault.name, ()).is_none(), "{} comes twice", fault.name);
        let source = fs::read_to_string(root().join(fault.file)).unwrap();
        with_faults(fault.file, &source);
        let test = fs::read_to_string(root().join(test_file(fault))).unwrap();
        let name = fault.test.rsplit("::").next().unwrap();
        assert!(test.contains(&format!("fn {name}()")), "{}: no test {}", fault.name, fault.test);
    }
}

/// Where a fault's test is: "kernels" has modules, and the library's tests are in its files.
fn test_file(fault: &Fault) -> String {
    match (fault.suite, fault.test.split_once("::")) {
        (LIBRARY, _) => fault.file.to_owned(),
        (suite, Some((module, _))) => format!("tests/{suite}/{module}.rs"),
        (suite, None) => format!("tests/{suite}.rs"),
    }
}

/// Whether a fault is on: what the copy's `src/faults.rs` says.
const SWITCH: &str = r#"//! Deliberate faults.

/// Whether this one is on.
pub(crate) fn on(name: &str) -> bool {
    static ON: std::sync::LazyLock<String> =
        std::sync::LazyLock::new(|| std::env::var("POLYTAPE_FAULT").unwrap_or_default());
    *ON == name
}
"#;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}

/// The crate with all faults, built; the test programs by suite.
fn build() -> (PathBuf, BTreeMap<String, PathBuf>) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let tree = target.join("crate");
    let _ = fs::remove_dir_all(&tree);
    for dir in [
        "src",
        "tests",
        "cuda",
        "fuzz/src",
        "fuzz/corpus",
        "examples",
        "benches",
        "assets",
        "include",
    ] {
        copy(&root().join(dir), &tree.join(dir));
    }
    for file in ["Cargo.toml", "Cargo.lock"] {
        fs::copy(root().join(file), tree.join(file)).unwrap();
    }
    let files: Vec<&str> = FAULTS.iter().map(|fault| fault.file).collect();
    for file in files {
        let source = fs::read_to_string(root().join(file)).unwrap();
        fs::write(tree.join(file), with_faults(file, &source)).unwrap();
    }
    fs::write(tree.join("src/faults.rs"), SWITCH).unwrap();
    let lib = tree.join("src/lib.rs");
    let source = fs::read_to_string(&lib).unwrap();
    fs::write(&lib, source.replace("pub mod activation;", "mod faults;\npub mod activation;"))
        .unwrap();

    let suites: BTreeMap<&str, ()> = FAULTS.iter().map(|fault| (fault.suite, ())).collect();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&tree).env("CARGO_TARGET_DIR", target.join("target"));
    cargo.args(["test", "--no-run", "--no-default-features", "--message-format", "json"]);
    for &suite in suites.keys() {
        match suite {
            LIBRARY => cargo.arg("--lib"),
            suite => cargo.args(["--test", suite]),
        };
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut programs = BTreeMap::new();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        let message: serde_json::Value = serde_json::from_str(line).unwrap();
        if let (Some(path), Some(name)) =
            (message["executable"].as_str(), message["target"]["name"].as_str())
        {
            programs.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    (tree, programs)
}

/// Runs a test of the copy; whether it passed, and what it said.
fn passes(tree: &Path, program: &Path, fault: &Fault, switch: &str) -> (bool, String) {
    let test = fault.test;
    let output = Command::new(program)
        .current_dir(tree)
        .args(["--exact", test])
        .env("POLYTAPE_FAULT", switch)
        .env("POLYTAPE_BACKENDS", fault.backends())
        .env("CARGO_MANIFEST_DIR", tree)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("running 1 test"), "{test} is not there:\n{said}");
    // A fault may also end the process; not by the clock, so nothing is caught by chance.
    (output.status.success(), said + &String::from_utf8_lossy(&output.stderr))
}

#[test]
#[ignore = "some minutes: builds the crate once more"]
fn every_fault_is_caught() {
    let only = env::var("POLYTAPE_FAULT").ok();
    let is_asked_for = |fault: &&Fault| {
        only.as_ref().is_none_or(|only| only.split(',').any(|name| name == fault.name))
    };
    let (tree, programs) = build();
    let mut sound = BTreeMap::new();
    let mut missed = Vec::new();
    let mut n = 0;
    for fault in FAULTS.iter().filter(is_asked_for) {
        let program = &programs[fault.suite];
        if sound.insert((fault.suite, fault.test, fault.backends()), ()).is_none() {
            let (passed, said) = passes(&tree, program, fault, "");
            assert!(passed, "{} fails without a fault:\n{said}", fault.test);
        }
        let (passed, said) = passes(&tree, program, fault, fault.name);
        let how = said.lines().find(|line| line.contains(" is ") || line.contains("panicked"));
        let how = if passed { "NOT CAUGHT" } else { how.unwrap_or_default().trim() };
        println!("{} ({}): {}::{}: {how:.100}", fault.name, fault.file, fault.suite, fault.test);
        n += 1;
        if passed {
            missed.push(fault.name);
        }
    }
    assert!(missed.is_empty(), "of {n} faults these are not caught: {missed:?}");
    println!("{n} of {n} faults are caught");
}
