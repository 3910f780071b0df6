//! Data rows as CSV: what a spreadsheet writes, RFC 4180 with a header.
//!
//! ```text
//! task,input,target          ->   {"task": "qnli", "input": "Is ... ?", "target": "yes"}
//! qnli,"Is ... ?",yes
//! ```
//!
//! A row is what the JSON object of its cells would be; empty cells are absent fields. Quotes may hold
//! line breaks, so a row is named by the line that it begins on. `.tsv` has tabs for commas. A cell of `references` or
//! `choices` is a JSON array of texts where it begins with `[`, else a text alone.

use std::path::Path;

use csv_core::{ReadRecordResult, ReaderBuilder};
use serde_json::{Map, Value};

use super::{
    json::{excerpt, read_capped, reason},
    rows::{Columns, Row, Targets, parse_row},
};
use crate::error::{Error, Result};

/// The most bytes of a file: it is read whole.
const MAX_BYTES: u64 = 8 << 30;

/// Whether a path has the name of such a file.
pub fn is_csv(path: &Path) -> bool {
    delimiter(path).is_some()
}

fn delimiter(path: &Path) -> Option<u8> {
    let extension = path.extension()?.to_str()?;
    match extension.to_ascii_lowercase().as_str() {
        "csv" => Some(b','),
        "tsv" => Some(b'\t'),
        _ => None,
    }
}

/// All rows of a file.
///
/// # Errors
/// If the file cannot be read, has no header or no row, or a row is malformed: the message names the
/// line.
pub fn read_csv(path: &Path, targets: Targets, columns: &Columns) -> Result<Vec<Row>> {
    let bytes = read_capped(path, MAX_BYTES)?;
    parse(&bytes, path, targets, columns)
}

fn parse(bytes: &[u8], path: &Path, targets: Targets, columns: &Columns) -> Result<Vec<Row>> {
    let fail = |line: usize, detail: String| Error::Line { path: path.to_path_buf(), line, detail };
    let delimiter = delimiter(path).unwrap_or(b',');
    let used = [&columns.input, &columns.target, &columns.task].map(Option::as_ref);
    let mut reader = ReaderBuilder::new().delimiter(delimiter).build();
    let mut input = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let (mut text, mut ends) = (vec![0; 1 << 12], vec![0; 64]);
    let (mut header, mut rows): (Option<Vec<String>>, Vec<Row>) = (None, Vec::new());
    let n_lines = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count();
    let mut line = 1;
    loop {
        // Ends of lines before a record belong to none.
        let n_ended = input.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        line += n_lines(&input[..n_ended]);
        input = &input[n_ended..];
        let record = input;
        let (mut n_text, mut n_ends) = (0, 0);
        loop {
            let (result, n_in, n_out, n_end) =
                reader.read_record(input, &mut text[n_text..], &mut ends[n_ends..]);
            input = &input[n_in..];
            (n_text, n_ends) = (n_text + n_out, n_ends + n_end);
            match result {
                // The end of the file ends the last record, too.
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => text.resize(2 * text.len(), 0),
                ReadRecordResult::OutputEndsFull => ends.resize(2 * ends.len(), 0),
                ReadRecordResult::Record => break,
                ReadRecordResult::End => {
                    if rows.is_empty() {
                        return Err(Error::file(path, "there are no rows in the file"));
                    }
                    return Ok(rows);
                }
            }
        }
        let taken = &record[..record.len() - input.len()];
        if let Some(at) = open_quote(taken, delimiter) {
            let line = line + n_lines(&taken[..at]);
            return Err(fail(line, "a quote is opened and never closed".to_owned()));
        }
        let next_line = line + n_lines(taken);
        let mut start = 0;
        let mut cells = Vec::with_capacity(n_ends);
        for &end in &ends[..n_ends] {
            let cell = std::str::from_utf8(&text[start..end])
                .map_err(|_| fail(line, format!("column {}: not UTF-8", cells.len() + 1)))?;
            cells.push(cell.to_owned());
            start = end;
        }
        let Some(names) = &header else {
            if let Some((i, name)) =
                cells.iter().enumerate().find(|(i, name)| cells[..*i].contains(name))
            {
                let detail = format!("column {} has the name {} again", i + 1, excerpt(name));
                return Err(fail(line, detail));
            }
            header = Some(cells);
            line = next_line;
            continue;
        };
        if cells.len() != names.len() {
            let detail = format!(
                "{} cells, but the header has {} columns; text with commas must be in quotes",
                cells.len(),
                names.len()
            );
            return Err(fail(line, detail));
        }
        let mut raw = Map::new();
        for (name, cell) in names.iter().zip(cells) {
            if cell.is_empty() {
                continue;
            }
            let value = match name.as_str() {
                "task_id" => cell.parse::<u32>().map_or(Value::String(cell), Value::from),
                "references" if !used.contains(&Some(name)) => {
                    texts(&cell).map_err(|detail| fail(line, format!("column {name}: {detail}")))?
                }
                // Something else may have this name: `eval` passes over it, with a warning.
                "choices" if !used.contains(&Some(name)) => {
                    texts(&cell).unwrap_or(Value::String(cell))
                }
                _ => Value::String(cell),
            };
            raw.insert(name.clone(), value);
        }
        rows.push(parse_row(raw, line, targets, columns).map_err(|detail| fail(line, detail))?);
        line = next_line;
    }
}

/// The texts that a cell lists.
fn texts(cell: &str) -> Result<Value, String> {
    if !cell.trim_start().starts_with('[') {
        return Ok(Value::from(vec![cell]));
    }
    serde_json::from_str::<Vec<String>>(cell).map(Value::from).map_err(|error| {
        format!("begins with [, but is no JSON array of strings: {}", reason(&error))
    })
}

/// Where a record has a quote that opens a cell and is not closed: the cell would have all that follows in the file.
fn open_quote(record: &[u8], delimiter: u8) -> Option<usize> {
    #[derive(Clone, Copy)]
    enum Place {
        Start,
        Plain,
        Quoted(usize),
        /// Behind a quote in a quoted cell: its end, or the first of two.
        Behind(usize),
    }
    let mut place = Place::Start;
    for (i, &byte) in record.iter().enumerate() {
        place = match place {
            Place::Start if byte == b'"' => Place::Quoted(i),
            Place::Quoted(start) if byte == b'"' => Place::Behind(start),
            Place::Behind(start) if byte == b'"' => Place::Quoted(start),
            Place::Quoted(start) => Place::Quoted(start),
            _ if byte == delimiter => Place::Start,
            _ => Place::Plain,
        };
    }
    match place {
        Place::Quoted(start) => Some(start),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::rows::Sequence;

    fn read(text: &str, columns: &Columns) -> Result<Vec<Row>, String> {
        let path = Path::new("rows.csv");
        parse(text.as_bytes(), path, Targets::Required, columns).map_err(|error| error.to_string())
    }

    #[test]
    fn a_quote_that_is_never_closed_hides_no_rows() {
        let columns = Columns::default();
        for text in ["x,a,\"b\nx,c,d\nx,e,f\n", "x,\"a\"\"\n,b\nx,c,d", "x,a,\""] {
            let error = read(&format!("task,input,target\nx,5\" disk,3\"\n{text}"), &columns);
            assert_eq!(error.unwrap_err(), "rows.csv:3: a quote is opened and never closed");
        }
        let rows = read("input,target\n\"a \"\"b\"\"\",\"\"\"\"\nx,3\"", &columns).unwrap();
        assert_eq!(rows[0].target, Some(Sequence::Text("\"".into())));
        assert_eq!(rows[1].target, Some(Sequence::Text("3\"".into())));
    }

    #[test]
    fn rows_are_what_their_json_would_be() {
        let text = "\u{feff}task,input,target,task_id,note\r\nqnli,\"a, \"\"b\"\"\nc\",yes,3,\nsst2,x,y,,n";
        let rows = read(text, &Columns::default()).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(
            (rows[0].line, rows[0].task.as_deref(), rows[0].task_id),
            (2, Some("qnli"), Some(3))
        );
        assert_eq!(rows[0].input, Sequence::Text("a, \"b\"\nc".to_owned()));
        assert_eq!((rows[1].line, rows[1].task_id), (4, None));
        assert_eq!(rows[1].raw["note"], "n");
        let renamed = Columns {
            input: Some("question".to_owned()),
            target: Some("answer".to_owned()),
            task: Some("set".to_owned()),
        };
        let rows = read("set,question,answer\nt,q,a\n", &renamed).unwrap();
        assert_eq!(
            (rows[0].task.as_deref(), &rows[0].input),
            (Some("t"), &Sequence::Text("q".to_owned()))
        );
        // Longer than the buffers that it begins with.
        let long = format!("input,target\n{},y\n", "x".repeat(50_000));
        assert_eq!(
            read(&long, &Columns::default()).unwrap()[0].input,
            Sequence::Text("x".repeat(50_000))
        );
    }

    #[test]
    fn cells_may_list_texts() {
        let text = "input,target,references,choices\nx,a,\"[\"\"a\"\", \"\"b, c\"\"]\",\" [\"\"a\"\"]\"\nx,a,\"a, b\",a\n";
        let rows = read(text, &Columns::default()).unwrap();
        assert_eq!(rows[0].references, Some(vec!["a".to_owned(), "b, c".to_owned()]));
        assert_eq!(rows[0].raw["choices"], serde_json::json!(["a"]));
        assert_eq!(rows[1].references, Some(vec!["a, b".to_owned()]));
        assert_eq!(rows[1].raw["choices"], serde_json::json!(["a"]));
        // What is something else is a text.
        let rows = read("input,target,choices\nx,a,['a']\n", &Columns::default()).unwrap();
        assert_eq!(rows[0].raw["choices"], serde_json::json!("['a']"));
        let target = Columns { target: Some("choices".to_owned()), ..Columns::default() };
        let rows = read("input,choices\nx,[a\n", &target).unwrap();
        assert_eq!(rows[0].target, Some(Sequence::Text("[a".to_owned())));
    }

    #[test]
    fn what_is_wrong_names_its_line() {
        let columns = Columns::default();
        for (text, reason) in [
            ("input,target\nx,y\nx\n", "rows.csv:3: 1 cells, but the header has 2 columns"),
            (
                "input,target\n\"x\ny\",y\nx,\n",
                "rows.csv:4: the row has neither target nor label_ids",
            ),
            (
                "input,target,references\nx,y,[1]\n",
                "rows.csv:2: column references: begins with [, but is no JSON array of strings: invalid type",
            ),
            ("input,input\nx,y\n", "rows.csv:1: column 2 has the name \"input\" again"),
            ("input,target\n", "rows.csv: there are no rows"),
            ("", "rows.csv: there are no rows"),
        ] {
            let error = read(text, &columns).unwrap_err();
            assert!(error.contains(reason), "{error}\nnot: {reason}");
        }
        let columns = Columns { input: Some("q".to_owned()), ..columns };
        let error = read("input,target\nx,y\n", &columns).unwrap_err();
        assert!(error.contains("rows.csv:2: there is no field \"q\""), "{error}");
    }
}
