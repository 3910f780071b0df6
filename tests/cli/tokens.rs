//! Texts become ids once, on all threads, and in the rows' order.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    chat::{base, written},
    fails, lines, polytape, scratch, str,
};

const N_ROWS: usize = 24;

fn rows() -> Vec<Value> {
    let text = |i: usize, n: usize| {
        (0..n).map(|j| if (i >> j) & 1 == 1 { "yes" } else { "hi" }).collect::<Vec<_>>().join(" ")
    };
    (0..N_ROWS)
        .map(|i| json!({"task_id": i % 2, "input": text(i, 5), "target": text(i, 1 + i % 3)}))
        .collect()
}

/// The nll of each row, and what was said.
fn evaluated(dir: &Path, base: &Path, data: &Path, more: &[&str]) -> (Vec<Value>, String) {
    let out = dir.join("nll.jsonl");
    let flags = ["eval", "--model", str(base), "--data", str(data), "--generate", "off"];
    let output =
        polytape(&[&flags[..], &["--per-example", str(&out), "--overwrite"], more].concat());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    (lines(&out), said)
}

#[test]
fn a_cache_changes_no_result() {
    let dir = scratch("tokens");
    let base = base(&dir);
    let data = written(&dir, "rows.jsonl", &rows());
    let cache = dir.join("cache");
    let (plain, _) = evaluated(&dir, &base, &data, &["--threads", "1"]);
    assert_eq!(plain.len(), N_ROWS);
    let cached = |n_threads: &str, says: &str| {
        let (found, said) =
            evaluated(&dir, &base, &data, &["--threads", n_threads, "--cache-dir", str(&cache)]);
        assert_eq!(found, plain);
        assert!(said.contains(says), "{said}\nnot: {says}");
    };
    let files =
        || -> Vec<_> { fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect() };
    // A target of one word is asked for in several rows.
    cached("3", "new");
    cached("2", "48 texts found, 0 new");
    let [file] = &files()[..] else { panic!("{:?}", files()) };

    // Half a file, as a full disk may leave it elsewhere, is no cache.
    let bytes = fs::read(file).unwrap();
    fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    cached("2", "not a whole cache, made anew");
    assert_eq!(fs::read(file).unwrap(), bytes);

    // Another tokenizer gives other ids, which are not those kept.
    let tokenizer = fs::read_to_string(base.join("tokenizer.json")).unwrap();
    let swapped = tokenizer.replace("\"hi\":5", "\"hi\":6").replace("\"yes\":6", "\"yes\":5");
    assert_ne!(swapped, tokenizer);
    fs::write(base.join("tokenizer.json"), swapped).unwrap();
    let (other, said) = evaluated(&dir, &base, &data, &["--cache-dir", str(&cache)]);
    assert_ne!(other, plain);
    assert!(!said.contains(" 0 new"), "{said}");
    assert_eq!(files().len(), 2);
}

/// Of several bad rows the first is named, whichever thread came first.
#[test]
fn the_first_bad_row_is_named() {
    let dir = scratch("tokens-bad");
    let base = base(&dir);
    let mut rows = rows();
    for i in [7, 20] {
        rows[i]["input"] = json!("  ");
    }
    let data = written(&dir, "rows.jsonl", &rows);
    let flags = ["eval", "--model", str(&base), "--data", str(&data), "--threads", "3"];
    fails(&flags, 3, "rows.jsonl:8: the text has no tokens");
    let blocked = dir.join("file");
    fs::write(&blocked, "").unwrap();
    fails(&[&flags[..], &["--cache-dir", str(&blocked)]].concat(), 1, "file");
}
