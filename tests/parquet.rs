//! Rows of Parquet files that pyarrow wrote (tests/data/record_parquet.py).
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use polytape::{
    Result,
    formats::{
        parquet::read_parquet,
        rows::{Columns, Row, Sequence, Targets},
    },
};
use serde_json::json;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn read(path: &Path) -> Result<Vec<Row>> {
    let columns =
        Columns { input: Some("question".to_owned()), target: None, task: Some("set".to_owned()) };
    read_parquet(path, Targets::Required, &columns)
}

#[test]
fn rows_are_what_their_json_would_be() {
    let rows = read(&path("rows.parquet")).unwrap();
    let of = |row: &Row| (row.line, row.task.clone().unwrap(), row.task_id, row.references.clone());
    let texts = |texts: &[&str]| Some(texts.iter().map(|&text| text.to_owned()).collect());
    assert_eq!(of(&rows[0]), (1, "qnli".to_owned(), Some(0), texts(&["yes", "Yes"])));
    assert_eq!(of(&rows[1]), (2, "sst2".to_owned(), None, None));
    assert_eq!(of(&rows[2]), (3, "qnli".to_owned(), Some(0), texts(&["no"])), "the second group");
    assert_eq!(rows[0].input, Sequence::Text("Is é 🙂?".to_owned()));
    assert_eq!(rows[2].input, Sequence::Text("Is it, \"so\"?".to_owned()));
    assert_eq!(rows[1].target, Some(Sequence::Text("positive".to_owned())));
    assert!(rows[0].raw["day"].as_str().unwrap().starts_with("2024-05-01"));
    assert!(!rows[1].raw.contains_key("day"), "a null is an absent field");

    let plain = Columns::default();
    let ids = read_parquet(&path("bad.parquet"), Targets::Optional, &plain).unwrap();
    assert_eq!(ids[0].input, Sequence::Ids(vec![5, 6]));
    assert_eq!(ids[0].target, Some(Sequence::Ids(vec![9, 1])));
    assert_eq!(ids[0].raw["label_ids"], json!([9, 1]));
}

#[test]
fn what_is_wrong_names_file_and_row() {
    let plain = Columns::default();
    let error = read_parquet(&path("bad.parquet"), Targets::Required, &plain).unwrap_err();
    assert!(error.to_string().contains("bad.parquet:3: the row has neither target"), "{error}");
    let error = read_parquet(&path("rows.parquet"), Targets::Required, &plain).unwrap_err();
    assert!(error.to_string().contains("rows.parquet:1: the row has neither input"), "{error}");
    let error = read(&path("none.parquet")).unwrap_err();
    assert!(error.to_string().contains("none.parquet"), "{error}");
}

/// Cut or changed anywhere, a file gives rows or an error, never a panic.
#[test]
fn damaged_files_are_errors() {
    let whole = fs::read(path("rows.parquet")).unwrap();
    let file = std::env::temp_dir().join(format!("polytape-{}.parquet", std::process::id()));
    std::panic::set_hook(Box::new(|_| {})); // Those that are caught say nothing.
    let mut n_refused = 0;
    for i in 0..whole.len() {
        let mut changed = whole.clone();
        changed[i] ^= 0xff;
        for bytes in [&whole[..i], &changed] {
            fs::write(&file, bytes).unwrap();
            n_refused += usize::from(read(&file).is_err());
        }
    }
    fs::remove_file(file).unwrap();
    assert!(n_refused > whole.len(), "{n_refused} of {}", 2 * whole.len());
}
