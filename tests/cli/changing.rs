//! The base changes while it is in use: an error that names the file, or nothing at all. Never a wrong
//! number.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use polytape::{
    formats::{
        mmap::{Access, MappedFile},
        signals,
    },
    tensor::Bytes as _,
};

use crate::{data, fixture, lines, ok, rows, scratch, str, text, text_or_empty};

const WEIGHTS: &str = "model.safetensors";

/// A copy of the tiny base, to be damaged.
fn base(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    fs::create_dir_all(&base).unwrap();
    for entry in fs::read_dir(fixture("base")).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, base.join(from.file_name().unwrap())).unwrap();
    }
    // So that a later write shows in its time, however coarse the clock of the file system is.
    let weights = File::options().write(true).open(base.join(WEIGHTS)).unwrap();
    weights.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
    base
}

fn open_to_write(base: &Path) -> File {
    File::options().write(true).open(base.join(WEIGHTS)).unwrap()
}

fn truncate(base: &Path, len: u64) {
    open_to_write(base).set_len(len).unwrap();
}

/// What may happen to the weights, and what is then said of them.
type Change = (&'static str, fn(&Path), &'static str);

const CHANGES: [Change; 4] = [
    // All pages but the first are gone: reading one of them is a SIGBUS.
    ("truncated", |base| truncate(base, 4096), "was mapped"),
    // The rest of the last page reads as zeros, without a signal.
    (
        "cut within a page",
        |base| truncate(base, fs::metadata(base.join(WEIGHTS)).unwrap().len() - 1),
        "bytes when it was mapped, now it has",
    ),
    (
        "written to",
        |base| {
            use std::io::{Seek as _, SeekFrom, Write as _};
            let mut file = open_to_write(base);
            file.seek(SeekFrom::End(-4)).unwrap();
            file.write_all(&[0; 4]).unwrap();
        },
        "was written to while it was mapped",
    ),
    ("longer", |base| truncate(base, 10_000_000), "bytes when it was mapped, now it has"),
];

fn spawn(arguments: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_polytape"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait_for_lines(log: &Path, n: usize) {
    let started = Instant::now();
    while text_or_empty(log).lines().count() < n {
        assert!(started.elapsed() < Duration::from_secs(120), "no step was logged");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn train<'a>(base: &'a Path, data: &'a Path, out: &'a Path, n_steps: &'a str) -> Vec<&'a str> {
    let common = ["--max-steps", n_steps, "--lr-scheduler-type", "constant", "-q"];
    let paths = ["train", "--model", str(base), "--data", str(data), "--output-dir", str(out)];
    [&paths[..], &common].concat()
}

/// Trains until `n` steps are logged, changes the base, and gives exit code and stderr.
fn change_during(run: &[&str], base: &Path, log: &Path, n: usize, change: fn(&Path)) -> String {
    let child = spawn(run);
    wait_for_lines(log, n);
    change(base);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(str(&base.join(WEIGHTS))), "{said}");
    assert!(said.contains("--no-mmap"), "{said}");
    said
}

/// At different moments of a step (`POLYTAPE_CHANGES` asks for more), and every loss that was logged is that of a run that nothing happened to.
#[test]
fn training_stops_with_an_error_that_names_the_file() {
    let dir = scratch("changing-train");
    let rows = data(&dir, 9);
    let whole = dir.join("whole");
    let base_of_whole = fixture("base");
    ok(&train(&base_of_whole, &rows, &whole, "60"));
    let n_changes = std::env::var("POLYTAPE_CHANGES").map_or(12, |n| n.parse().unwrap());
    let losses = |out: &Path| -> Vec<f64> {
        lines(&out.join("log.jsonl")).iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let expected = losses(&whole);
    for (i, (what, change, message)) in CHANGES.iter().cycle().take(n_changes).enumerate() {
        let (base, out) = (base(&dir), dir.join(format!("out-{i}")));
        let log = out.join("log.jsonl");
        let said =
            change_during(&train(&base, &rows, &out, "1000000"), &base, &log, 1 + i % 5, *change);
        assert!(said.contains(message), "{what}: {said}");
        let found = losses(&out);
        let n = found.len().min(expected.len());
        assert_eq!(found[..n], expected[..n], "{what}");
    }
}

/// `eval` and `generate` give no result.
#[test]
fn nothing_is_written_from_a_base_that_changed() {
    let dir = scratch("changing-generate");
    let path = dir.join("rows.jsonl");
    fs::write(&path, rows(1_500)).unwrap();
    for (i, (what, change, _)) in CHANGES.iter().enumerate() {
        let (base, out) = (base(&dir), dir.join("answers.jsonl"));
        let common = ["--model", str(&base), "--data", str(&path)];
        let verb =
            [&["generate", "--max-new-tokens", "20", "--min-new-tokens", "20"][..], &["eval"]]
                [i % 2];
        let mut run = [verb, &common].concat();
        if i % 2 == 0 {
            run.extend(["--output", str(&out)]);
        }
        let child = spawn(&run);
        let maps = PathBuf::from(format!("/proc/{}/maps", child.id()));
        let started = Instant::now();
        while !text_or_empty(&maps).contains(WEIGHTS) {
            assert!(started.elapsed() < Duration::from_secs(120), "the base is not mapped");
            std::thread::sleep(Duration::from_millis(2));
        }
        change(&base);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{what}: {said}");
        assert!(said.contains(WEIGHTS) && output.stdout.is_empty(), "{what}: {said}");
        assert!(!out.exists(), "{what}");
    }
}

/// Replacing by renaming, and anything at all with `--no-mmap`: the same bits as if nothing had happened.
#[test]
fn what_is_harmless_changes_nothing() {
    let dir = scratch("changing-harmless");
    let rows = data(&dir, 9);
    let whole = dir.join("whole");
    let replace: fn(&Path) = |base| {
        fs::write(base.join("new"), "not a model").unwrap();
        fs::rename(base.join("new"), base.join(WEIGHTS)).unwrap();
    };
    let unchanged = fixture("base");
    ok(&train(&unchanged, &rows, &whole, "300"));
    for (i, (flag, change)) in
        [(None, replace), (Some("--no-mmap"), CHANGES[0].1), (Some("--no-mmap"), CHANGES[2].1)]
            .into_iter()
            .enumerate()
    {
        let (base, out) = (base(&dir), dir.join(format!("out-{i}")));
        let mut run = train(&base, &rows, &out, "300");
        run.extend(flag);
        let child = spawn(&run);
        wait_for_lines(&out.join("log.jsonl"), 2);
        change(&base);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let file = "adapter_model.safetensors";
        assert!(
            fs::read(out.join(file)).unwrap() == fs::read(whole.join(file)).unwrap(),
            "{flag:?}"
        );
    }
}

/// The signal itself, without luck: this test again, in a process of its own.
#[test]
fn a_lost_page_ends_the_process_with_a_message() {
    let dir = scratch("lost-page");
    let child = |what: &str| {
        let path = dir.join(format!("{what}-file"));
        fs::write(&path, vec![7; 3 * 4096]).unwrap();
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "--ignored", "changing::reads_a_lost_page"])
            .env("POLYTAPE_LOST_PAGE", format!("{what}:{}", str(&path)))
            .output()
            .unwrap()
    };
    let output = child("mapped");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    let line = said.lines().find(|line| line.starts_with("ERROR ")).unwrap();
    assert!(line.contains("mapped-file: a part of the file was gone when it was read"), "{line}");
    let output = child("memory");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Of a file that is closed, or that nobody watches: as it always was.
    for what in ["closed", "foreign", "sent"] {
        use std::os::unix::process::ExitStatusExt as _;
        let output = child(what);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{what}: {said}");
        assert!(!said.contains("a part of the file"), "{what}: {said}");
    }
}

#[test]
#[ignore = "a part of the test above"]
#[allow(unsafe_code)]
fn reads_a_lost_page() {
    let Ok(task) = std::env::var("POLYTAPE_LOST_PAGE") else { return };
    let (what, path) = task.split_once(':').unwrap();
    signals::handle();
    let access = if what == "memory" { Access::InMemory } else { Access::Mapped };
    // Many files, so that the right one must be found; closed ones give their place back.
    let others: Vec<_> = (0..10).map(|_| MappedFile::open(path).unwrap()).collect();
    drop(others);
    let file = MappedFile::open_with(path, access).unwrap();
    let bytes = match what {
        "mapped" | "memory" => file.bytes(),
        _ => {
            // A mapping of somebody else's, while the file above is closed or another one.
            let own = File::open(path).unwrap();
            // SAFETY: The mapping is leaked; that its pages go is what is tested.
            let bytes = unsafe {
                let at = libc::mmap(
                    std::ptr::null_mut(),
                    3 * 4096,
                    libc::PROT_READ,
                    libc::MAP_SHARED,
                    std::os::fd::AsRawFd::as_raw_fd(&own),
                    0,
                );
                assert_ne!(at, libc::MAP_FAILED);
                std::slice::from_raw_parts(at.cast::<u8>(), 3 * 4096)
            };
            if what == "closed" {
                drop(file);
            } else if what == "sent" {
                // SAFETY: Sends a signal to this thread.
                unsafe { libc::raise(libc::SIGBUS) };
            }
            bytes
        }
    };
    assert_eq!(bytes[2 * 4096], 7);
    File::options().write(true).open(path).unwrap().set_len(100).unwrap();
    assert_eq!(std::hint::black_box(bytes)[2 * 4096], 7);
    assert_eq!(what, "memory", "a page that is gone was read");
}

/// Every verb that opens a base takes the flag.
#[test]
fn every_verb_reads_a_base_into_memory() {
    let dir = scratch("no-mmap");
    let (rows, few) = (data(&dir, 9), dir.join("few.jsonl"));
    fs::write(&few, crate::rows(6).replace("task-1", "new")).unwrap();
    let run = |command: &str, more: &[&str]| {
        let paths = [
            ("BASE", fixture("base")),
            ("ADAPTER", dir.join("adapter")),
            ("ROWS", rows.clone()),
            ("FEW", few.clone()),
            ("DIR", dir.clone()),
        ];
        let mut words: Vec<String> = command.split(' ').map(str::to_owned).collect();
        for word in &mut words {
            paths.iter().for_each(|(name, path)| *word = word.replace(name, str(path)));
        }
        let words: Vec<&str> =
            words.iter().map(String::as_str).chain(more.iter().copied()).collect();
        ok(&words)
    };
    let memory = ["--no-mmap"];
    run("train --model BASE --data ROWS --output-dir ADAPTER --max-steps 2", &memory);
    for same in [
        "eval --model BASE --adapter ADAPTER --data ROWS --generate off",
        "preview --model BASE --data ROWS",
    ] {
        assert_eq!(run(same, &memory), run(same, &[]));
    }
    let generate =
        "generate --model BASE --adapter ADAPTER --data ROWS --max-new-tokens 3 --output";
    run(&format!("{generate} DIR/mapped"), &[]);
    run(&format!("{generate} DIR/memory"), &memory);
    assert_eq!(text(&dir.join("mapped")), text(&dir.join("memory")));
    let adapt = "adapt --model BASE --adapter ADAPTER --data FEW --task new --tune router";
    run(&format!("{adapt} --max-steps 1 --output-dir DIR/adapted"), &memory);
    let export = "export --model BASE --adapter ADAPTER --task task-1 --merged --output-dir";
    run(&format!("{export} DIR/mapped-base"), &[]);
    run(&format!("{export} DIR/memory-base"), &memory);
    let weights = |base: &str| fs::read(dir.join(base).join(WEIGHTS)).unwrap();
    assert!(weights("mapped-base") == weights("memory-base"));
    run("inspect BASE", &memory);
    run("bench eval --model BASE --batch 2 --src 5 --tgt 2 --steps 1", &["--no_mmap"]);
}
