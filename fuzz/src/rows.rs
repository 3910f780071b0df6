//! Arbitrary bytes as a file of rows.
//!
//! An error ends the reading and names a line of the file. An accepted row is what a plain JSON
//! parser sees on that line, and written out again it is read as the same row. How the bytes arrive
//! changes nothing.

use std::io::BufReader;

use polytape::{
    Error, Result,
    formats::rows::{Row, RowReader, Targets},
};
use serde_json::Value;

use crate::messages::assert_presentable;

const NAME: &str = "rows.jsonl";

/// The rows of a file, with and without targets.
pub fn check(data: &[u8]) {
    let lines = lines(data);
    for targets in [Targets::Required, Targets::Optional] {
        let items: Vec<Result<Row>> = RowReader::new(data, NAME, targets).collect();
        let slow = BufReader::with_capacity(3, data);
        let again: Vec<Result<Row>> = RowReader::new(slow, NAME, targets).collect();
        assert_eq!(format!("{items:?}"), format!("{again:?}"));

        let (mut last_line, mut failed) = (0, false);
        for item in &items {
            assert!(!failed, "reading goes on after an error");
            match item {
                Ok(row) => {
                    assert!(last_line < row.line && row.line <= lines.len(), "line {}", row.line);
                    last_line = row.line;
                    check_row(row, lines[row.line - 1], targets);
                }
                Err(error) => {
                    assert_presentable(error, NAME);
                    failed = true;
                    match error {
                        Error::Line { line, .. } => {
                            assert!(last_line < *line && *line <= lines.len(), "{error}");
                        }
                        _ => assert_eq!(items.len(), 1, "{error}"),
                    }
                }
            }
        }
        if !failed {
            let blank = |line: &&[u8]| line.trim_ascii().is_empty();
            assert_eq!(items.len(), lines.iter().filter(|line| !blank(line)).count());
        }
    }
}

/// The file's lines without their ends and without a byte order mark.
fn lines(data: &[u8]) -> Vec<&[u8]> {
    let data = data.strip_prefix(b"\xef\xbb\xbf").unwrap_or(data);
    let without_end = |line: &'_ [u8]| line.len() - usize::from(line.ends_with(b"\r"));
    data.split(|&byte| byte == b'\n').map(|line| &line[..without_end(line)]).collect()
}

fn check_row(row: &Row, line: &[u8], targets: Targets) {
    let raw = Value::Object(row.raw.clone());
    assert_eq!(serde_json::from_slice::<Value>(line).expect("it is JSON"), raw);
    let written = serde_json::to_string(&raw).expect("a value can be written");
    let mut reader = RowReader::new(written.as_bytes(), NAME, targets);
    let read = reader.next().expect("one row").expect("a row that was accepted");
    assert_eq!(Row { line: row.line, ..read }, *row);
    assert!(reader.next().is_none());
}
