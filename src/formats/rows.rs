//! Data rows: JSON Lines, one object a line, each checked as it is read.
//!
//! ```text
//! {"task": "qnli", "input": "Is ... ?", "target": "yes", "references": ["yes", "Yes"]}
//! {"task_id": 3, "input_ids": [21, 7, 9], "label_ids": [4, 1]}
//! {"task": "qa", "messages": [{"role": "user", "content": "Is ... ?"}, {"role": "assistant", "content": "yes"}]}
//! ```
//!
//! Ids may come padded from a collator: what `attention_mask` has a 0 for, and labels of -100, are left out
//! on either side.
//!
//! A byte order mark may open the file, lines may end in CRLF, blank lines are passed over but
//! counted, so that a line number here is the editor's. A null field is an absent one. The first bad
//! line ends the reading with an error of its number; nothing is guessed or dropped. One line at a
//! time is in memory, and at most [`MAX_LINE_BYTES`] of it.
//!
//! A [`Row`] has an input that is not empty; a target that is there is not empty either when targets
//! are required. Ids are u32, not yet checked against a vocabulary (that is the model's to know).

use std::{
    borrow::Cow,
    fs::File,
    io::{BufRead, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    formats::json::{UniqueObject, excerpt, open_regular, reason, type_name},
};

/// The longest line that is read, without its end.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// Text for the tokenizer, or ids that are used as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// Text.
    Text(String),
    /// Token ids; nothing is added to them.
    Ids(Vec<u32>),
    /// A conversation for the model's chat template: objects with a role.
    Messages(Vec<Value>),
}

impl Sequence {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Ids(ids) => ids.is_empty(),
            Self::Messages(messages) => messages.is_empty(),
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its line in the file, counted from 1.
    pub line: usize,
    /// The name of its task, if given.
    pub task: Option<String>,
    /// The id of its task, if given.
    pub task_id: Option<u32>,
    /// `input` or `input_ids`, or `messages` before the assistant's last.
    pub input: Sequence,
    /// `target` or `label_ids`, in the same form as the input; of `messages` the assistant's last.
    pub target: Option<Sequence>,
    /// Answers that count as right.
    pub references: Option<Vec<String>>,
    /// All of the row's fields in their order, to be carried through to an output.
    pub raw: Map<String, Value>,
}

/// Whether rows must have a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Targets {
    /// For training and evaluation: a missing or empty target is an error.
    Required,
    /// For generation.
    Optional,
}

/// Fields that have other names in a file than here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// The field that is `input`.
    pub input: Option<String>,
    /// The field that is `target`.
    pub target: Option<String>,
    /// The field that is `task`.
    pub task: Option<String>,
}

impl Columns {
    /// The fields under the names that they have here.
    fn renamed<'a>(
        &self,
        raw: &'a Map<String, Value>,
    ) -> Result<Cow<'a, Map<String, Value>>, String> {
        let mut renamed = Cow::Borrowed(raw);
        for (name, column) in
            [("input", &self.input), ("target", &self.target), ("task", &self.task)]
        {
            let Some(column) = column else { continue };
            let Some(value) = raw.get(column) else {
                return Err(format!("there is no field {}", excerpt(column)));
            };
            renamed.to_mut().insert(name.to_owned(), value.clone());
        }
        Ok(renamed)
    }
}

/// Reads rows one by one. Ends after the first error.
#[derive(Debug)]
pub struct RowReader<R> {
    reader: R,
    path: PathBuf,
    targets: Targets,
    columns: Columns,
    /// The line read last, and where it begins in the file.
    buffer: Vec<u8>,
    line: usize,
    offset_bytes: u64,
    next_offset_bytes: u64,
    n_rows: usize,
    is_done: bool,
}

impl RowReader<BufReader<File>> {
    /// Opens a data file.
    pub fn open(path: impl AsRef<Path>, targets: Targets) -> Result<Self> {
        let path = path.as_ref();
        let reader = BufReader::with_capacity(1 << 16, open_regular(path)?);
        Ok(Self::new(reader, path, targets))
    }
}

impl<R: BufRead> RowReader<R> {
    /// Reads rows from anywhere. `path` is for the messages.
    pub fn new(reader: R, path: impl Into<PathBuf>, targets: Targets) -> Self {
        Self {
            reader,
            path: path.into(),
            targets,
            columns: Columns::default(),
            buffer: Vec::new(),
            line: 0,
            offset_bytes: 0,
            next_offset_bytes: 0,
            n_rows: 0,
            is_done: false,
        }
    }

    /// With other names for some fields.
    pub fn with_columns(mut self, columns: Columns) -> Self {
        self.columns = columns;
        self
    }

    /// Fills `buffer` with the next line without its end. False at the end of the file.
    fn read_line(&mut self) -> Result<bool> {
        self.buffer.clear();
        // The line, its two bytes of end, and one to see that it goes on.
        let limit = MAX_LINE_BYTES as u64 + 3;
        let n_bytes = self
            .reader
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut self.buffer)
            .map_err(Error::io("read", &self.path))?;
        self.line += 1;
        self.offset_bytes = self.next_offset_bytes;
        self.next_offset_bytes += n_bytes as u64;
        if self.buffer.last() == Some(&b'\n') {
            self.buffer.pop();
            if self.buffer.last() == Some(&b'\r') {
                self.buffer.pop();
            }
        }
        if self.buffer.len() > MAX_LINE_BYTES {
            return Err(self.error(format!("the line is longer than {MAX_LINE_BYTES} bytes")));
        }
        Ok(n_bytes > 0)
    }

    /// The next row, `None` at the end.
    fn read_row(&mut self) -> Result<Option<Row>> {
        while self.read_line()? {
            let mut line = self.buffer.as_slice();
            if self.line == 1 {
                line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let row = self.parse(line)?;
            self.n_rows += 1;
            return Ok(Some(row));
        }
        if self.n_rows == 0 {
            return Err(Error::file(&self.path, "there are no rows in the file"));
        }
        Ok(None)
    }

    fn parse(&self, line: &[u8]) -> Result<Row> {
        let text = std::str::from_utf8(line).map_err(|error| {
            let skipped = self.buffer.len() - line.len(); // A byte order mark.
            let column = skipped + error.valid_up_to();
            let in_file = self.offset_bytes + column as u64;
            self.error(format!("column {}: not UTF-8 (byte {in_file} of the file)", column + 1))
        })?;
        // serde_json would echo what it finds instead, at any length.
        if !text.trim_start().starts_with('{') {
            return Err(self.error(format!("expected a JSON object, found {}", excerpt(text))));
        }
        let UniqueObject(raw) = serde_json::from_str(text).map_err(|error| {
            self.error(format!("column {}: malformed JSON: {}", error.column(), reason(&error)))
        })?;
        parse_row(raw, self.line, self.targets, &self.columns).map_err(|detail| self.error(detail))
    }

    fn error(&self, detail: String) -> Error {
        Error::Line { path: self.path.clone(), line: self.line, detail }
    }
}

impl<R: BufRead> Iterator for RowReader<R> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_done {
            return None;
        }
        let next = self.read_row().transpose();
        self.is_done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// A row from its fields; what is wrong with it otherwise.
pub(crate) fn parse_row(
    raw: Map<String, Value>,
    line: usize,
    targets: Targets,
    columns: &Columns,
) -> Result<Row, String> {
    let named = columns.renamed(&raw)?;
    let (input, target) = match conversation(&named)? {
        Some(conversation) => conversation,
        None => {
            let input = sequence(&named, "input", "input_ids", unmasked(&named)?)?
                .ok_or("the row has neither input nor input_ids nor messages")?;
            (input, sequence(&named, "target", "label_ids", labelled(&named)?)?)
        }
    };
    if input.is_empty() {
        return Err("the input is empty".to_owned());
    }
    match (&input, &target) {
        (Sequence::Text(_), Some(Sequence::Ids(_))) => {
            return Err(
                "input is text, but label_ids are ids: give both as text or both as ids".to_owned()
            );
        }
        (Sequence::Ids(_), Some(Sequence::Text(_))) => {
            return Err("input_ids are ids, but target is text: give both as text or both as ids"
                .to_owned());
        }
        _ => {}
    }
    if targets == Targets::Required {
        match &target {
            None if matches!(input, Sequence::Messages(_)) => {
                return Err("field messages: the last one must be the assistant's".to_owned());
            }
            None => return Err("the row has neither target nor label_ids".to_owned()),
            Some(target) if target.is_empty() => return Err("the target is empty".to_owned()),
            Some(_) => {}
        }
    }
    let task = text(&named, "task")?;
    if task.as_ref().is_some_and(String::is_empty) {
        return Err("field task: the name is empty".to_owned());
    }
    let task_id = match field(&named, "task_id") {
        None => None,
        Some(value) => Some(id(value, || "field task_id".to_owned())?),
    };
    let references = match field(&named, "references") {
        None => None,
        Some(Value::Array(items)) => {
            let texts = items.iter().map(|item| match item {
                Value::String(text) => Ok(text.clone()),
                other => Err(format!(
                    "field references: expected an array of strings, found {} in it",
                    type_name(other)
                )),
            });
            Some(texts.collect::<Result<_, _>>()?)
        }
        Some(other) => {
            let found = type_name(other);
            return Err(format!("field references: expected an array of strings, found {found}"));
        }
    };
    Ok(Row { line, task, task_id, input, target, references, raw })
}

/// A field that is there and not null.
fn field<'a>(raw: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    raw.get(key).filter(|value| !value.is_null())
}

fn text(raw: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match field(raw, key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("field {key}: expected a string, found {}", type_name(other))),
    }
}

/// The field `messages`, if the row has one: what comes before the assistant's last word, and this, if
/// the conversation ends with it.
fn conversation(raw: &Map<String, Value>) -> Result<Option<(Sequence, Option<Sequence>)>, String> {
    let Some(messages) = field(raw, "messages") else { return Ok(None) };
    let twice = ["input", "input_ids", "target", "label_ids"];
    if let Some(other) = twice.into_iter().find(|key| field(raw, key).is_some()) {
        return Err(format!("the row has both messages and {other}; give one of them"));
    }
    let Value::Array(messages) = messages else {
        let found = type_name(messages);
        return Err(format!("field messages: expected an array of messages, found {found}"));
    };
    for (i, message) in messages.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            return Err(format!("field messages[{i}]: expected an object with role and content"));
        }
    }
    let (messages, target) = match messages.split_last() {
        Some((last, before)) if last.get("role").and_then(Value::as_str) == Some("assistant") => {
            let content = last.get("content").and_then(Value::as_str).ok_or_else(|| {
                format!("field messages[{}].content: expected a string", before.len())
            })?;
            (before, Some(Sequence::Text(content.to_owned())))
        }
        _ => (&messages[..], None),
    };
    Ok(Some((Sequence::Messages(messages.to_vec()), target)))
}

/// The part of `input_ids` that `attention_mask` does not call padding. Rows are not padded here, so a mask
/// that came along from a collator may only cut both ends.
fn unmasked(raw: &Map<String, Value>) -> Result<Range<usize>, String> {
    let Some(mask) = field(raw, "attention_mask") else { return Ok(0..usize::MAX) };
    let n_ids = field(raw, "input_ids").and_then(Value::as_array).map_or(0, Vec::len);
    let mask = mask.as_array().filter(|mask| mask.len() == n_ids).ok_or_else(|| {
        format!("field attention_mask: expected an array as long as input_ids ({n_ids})")
    })?;
    kept("attention_mask", mask, |value| match value.as_u64() {
        Some(bit @ 0..=1) => Ok(bit == 1),
        _ => Err("expected 0 or 1"),
    })
}

/// The part of `label_ids` that is not -100, PyTorch's mark of what is left out of the loss.
fn labelled(raw: &Map<String, Value>) -> Result<Range<usize>, String> {
    let Some(Value::Array(labels)) = field(raw, "label_ids") else { return Ok(0..usize::MAX) };
    kept("label_ids", labels, |value| Ok(value.as_i64() != Some(-100)))
}

/// The range of the values that are kept, which must be one after the other.
fn kept(
    key: &str,
    values: &[Value],
    is_kept: impl Fn(&Value) -> Result<bool, &'static str>,
) -> Result<Range<usize>, String> {
    let (mut start, mut end) = (0, 0);
    for (i, value) in values.iter().enumerate() {
        if !is_kept(value).map_err(|expected| format!("field {key}[{i}]: {expected}"))? {
            continue;
        }
        if start == end {
            start = i;
        } else if end != i {
            return Err(format!(
                "field {key}[{end}]: padding between tokens; it may be at the ends"
            ));
        }
        end = i + 1;
    }
    Ok(start..end)
}

/// Text under one name or ids under another, not both; of ids those in the range.
fn sequence(
    raw: &Map<String, Value>,
    text_key: &str,
    ids_key: &str,
    range: Range<usize>,
) -> Result<Option<Sequence>, String> {
    let text = text(raw, text_key)?;
    let Some(ids) = field(raw, ids_key) else { return Ok(text.map(Sequence::Text)) };
    if text.is_some() {
        return Err(format!("the row has both {text_key} and {ids_key}; give one of them"));
    }
    let Value::Array(ids) = ids else {
        return Err(format!(
            "field {ids_key}: expected an array of token ids, found {}",
            type_name(ids)
        ));
    };
    let ids = ids
        .iter()
        .enumerate()
        .filter(|(i, _)| range.contains(i))
        .map(|(i, value)| id(value, || format!("field {ids_key}[{i}]")));
    Ok(Some(Sequence::Ids(ids.collect::<Result<_, _>>()?)))
}

fn id(value: &Value, place: impl FnOnce() -> String) -> Result<u32, String> {
    value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
        let found = match value {
            Value::Number(number) => number.to_string(),
            other => type_name(other).to_owned(),
        };
        format!("{}: expected an integer from 0 to {}, found {found}", place(), u32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], targets: Targets) -> Vec<Result<Row>> {
        let path = "rows.jsonl";
        let rows: Vec<Result<Row>> = RowReader::new(bytes, path, targets).collect();
        // The same through a buffer of three bytes: reading does not depend on how bytes arrive.
        let slow = BufReader::with_capacity(3, bytes);
        let again: Vec<Result<Row>> = RowReader::new(slow, path, targets).collect();
        let show = |rows: &[Result<Row>]| format!("{rows:?}");
        assert_eq!(show(&rows), show(&again));
        rows
    }

    fn good(bytes: &[u8]) -> Vec<Row> {
        read(bytes, Targets::Required).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn columns_may_be_swapped_and_rows_stay_as_they_are() {
        let named = |name: &str| Some(name.to_owned());
        let columns = Columns { input: named("target"), target: named("input"), task: None };
        let text = r#"{"input":"dog","target":"Hund"}"#;
        let reader = RowReader::new(text.as_bytes(), "d.jsonl", Targets::Required);
        let row = reader.with_columns(columns).next().unwrap().unwrap();
        let text = |text: &str| Sequence::Text(text.to_owned());
        assert_eq!((row.input, row.target), (text("Hund"), Some(text("dog"))));
        assert_eq!((&row.raw["input"], &row.raw["target"]), (&"dog".into(), &"Hund".into()));
    }

    #[test]
    fn rows_of_both_forms_are_read_with_their_fields() {
        let bytes = "\u{feff}{\"task\":\"a\",\"input\":\"x\",\"target\":\"y\",\"references\":[\"y\",\"Y\"],\"z\":1.50,\"b\":null}\r\n\r\n  \n{\"task_id\":3,\"input_ids\":[21,7],\"label_ids\":[4294967295]}";
        let rows = good(bytes.as_bytes());
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].line, rows[0].task.as_deref(), rows[0].task_id), (1, Some("a"), None));
        assert_eq!(rows[0].input, Sequence::Text("x".to_owned()));
        assert_eq!(rows[0].target, Some(Sequence::Text("y".to_owned())));
        assert_eq!(rows[0].references, Some(vec!["y".to_owned(), "Y".to_owned()]));
        let keys: Vec<&str> = rows[0].raw.keys().map(String::as_str).collect();
        assert_eq!(keys, ["task", "input", "target", "references", "z", "b"]);
        assert_eq!((rows[1].line, rows[1].task_id), (4, Some(3)));
        assert_eq!(rows[1].target, Some(Sequence::Ids(vec![u32::MAX])));

        for target in ["", r#","target":null"#, r#","target":"""#] {
            let row = format!(r#"{{"input":"x"{target}}}"#);
            read(row.as_bytes(), Targets::Optional).pop().unwrap().unwrap();
        }
    }

    #[test]
    fn padding_on_either_side_is_left_out() {
        for (row, input, labels) in [
            (
                r#"{"input_ids":[0,0,7,8],"attention_mask":[0,0,1,1],"label_ids":[4,1,-100]}"#,
                vec![7, 8],
                vec![4, 1],
            ),
            (
                r#"{"input_ids":[7,0],"attention_mask":[1,0],"label_ids":[-100,-100,4]}"#,
                vec![7],
                vec![4],
            ),
            (r#"{"input_ids":[7,0],"attention_mask":[1,1],"label_ids":[0]}"#, vec![7, 0], vec![0]),
        ] {
            let rows = good(row.as_bytes());
            assert_eq!(rows[0].input, Sequence::Ids(input));
            assert_eq!(rows[0].target, Some(Sequence::Ids(labels)));
        }
    }

    #[test]
    fn every_bad_row_is_refused_with_its_line() {
        let cases: &[(&[u8], &str)] = &[
            (b"{\"input\":\"x\",", "column 13: malformed JSON: EOF while parsing"),
            (b"{\"input\":\"x\" \"target\":1}", "column 14: malformed JSON: expected `,` or `}`"),
            (b"{\"input\":\"x\"} x", "column 15: malformed JSON: trailing characters"),
            (b"{\"input\":\"\\ud800\"}", "malformed JSON"),
            (b"{\"input\":\"x\",\"input\":\"y\"}", "\"input\" comes twice"),
            (b"[1]", "expected a JSON object, found \"[1]\""),
            (b"\"text\"", "expected a JSON object"),
            (b"{\"input\":\"\xff\"}", "column 11: not UTF-8 (byte 50 of the file)"),
            (b"{}", "neither input nor input_ids"),
            (b"{\"input\":null}", "neither input nor input_ids"),
            (b"{\"input\":\"x\",\"input_ids\":[1]}", "both input and input_ids"),
            (b"{\"input\":\"\",\"target\":\"y\"}", "the input is empty"),
            (b"{\"input_ids\":[],\"label_ids\":[1]}", "the input is empty"),
            (b"{\"input\":\"x\"}", "neither target nor label_ids"),
            (b"{\"input\":\"x\",\"target\":\"\"}", "the target is empty"),
            (b"{\"input_ids\":[1],\"label_ids\":[]}", "the target is empty"),
            (b"{\"input\":\"x\",\"label_ids\":[1]}", "give both as text or both as ids"),
            (b"{\"input_ids\":[1],\"target\":\"y\"}", "give both as text or both as ids"),
            (b"{\"input\":\"x\",\"target\":\"y\",\"label_ids\":[1]}", "both target and label_ids"),
            (b"{\"input\":7}", "field input: expected a string, found a number"),
            (
                b"{\"input_ids\":\"1 2\"}",
                "field input_ids: expected an array of token ids, found a string",
            ),
            (
                b"{\"input_ids\":[1,-2]}",
                "field input_ids[1]: expected an integer from 0 to 4294967295, found -2",
            ),
            (b"{\"input_ids\":[4294967296]}", "found 4294967296"),
            (b"{\"input_ids\":[1.0]}", "found 1.0"),
            (b"{\"input_ids\":[1],\"label_ids\":[-100]}", "the target is empty"),
            (
                b"{\"input_ids\":[1],\"label_ids\":[1,-100,2]}",
                "label_ids[1]: padding between tokens",
            ),
            (b"{\"input_ids\":[1],\"label_ids\":[-1]}", "label_ids[0]: expected an integer from 0"),
            (b"{\"input_ids\":[1,2],\"attention_mask\":[1]}", "as long as input_ids (2)"),
            (b"{\"input\":\"x\",\"attention_mask\":[1]}", "as long as input_ids (0)"),
            (
                b"{\"input_ids\":[1,2],\"attention_mask\":[1,2]}",
                "attention_mask[1]: expected 0 or 1",
            ),
            (
                b"{\"input_ids\":[1,2,3],\"attention_mask\":[1,0,1]}",
                "attention_mask[1]: padding between",
            ),
            (b"{\"input_ids\":[1,2],\"attention_mask\":[0,0]}", "the input is empty"),
            (
                b"{\"input\":\"x\",\"target\":\"y\",\"task_id\":-1}",
                "field task_id: expected an integer from 0 to 4294967295, found -1",
            ),
            (b"{\"input\":\"x\",\"target\":\"y\",\"task_id\":\"3\"}", "field task_id"),
            (b"{\"input\":\"x\",\"target\":\"y\",\"task\":3}", "field task: expected a string"),
            (b"{\"input\":\"x\",\"target\":\"y\",\"task\":\"\"}", "field task: the name is empty"),
            (
                b"{\"input\":\"x\",\"target\":\"y\",\"references\":\"y\"}",
                "field references: expected an array of strings, found a string",
            ),
            (b"{\"input\":\"x\",\"target\":\"y\",\"references\":[1]}", "found a number in it"),
        ];
        // Three lines, 40 bytes.
        let before = "\u{feff}{\"input\":\"x\",\"target\":\"y\"}\r\n\n       \n".as_bytes();
        for (bytes, reason) in cases {
            let bytes = [before, *bytes, b"\n{\"input\":\"x\",\"target\":\"y\"}\n"].concat();
            let rows = read(&bytes, Targets::Required);
            assert_eq!(rows.len(), 2, "reading ends at the first error");
            let error = rows[1].as_ref().unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let error = error.to_string();
            assert!(
                error.starts_with("rows.jsonl:4: ") && error.contains(reason),
                "{error}\nnot: {reason}"
            );
        }
    }

    #[test]
    fn files_without_rows_and_endless_lines_are_refused() {
        for bytes in [&b""[..], b"\n\n", b"\xef\xbb\xbf", b" \r\n"] {
            let rows = read(bytes, Targets::Optional);
            assert_eq!(rows.len(), 1);
            let error = rows[0].as_ref().unwrap_err().to_string();
            assert!(error.starts_with("rows.jsonl: there are no rows"), "{error}");
        }
        // A line that never ends is not read to its end.
        let endless = BufReader::new(std::io::repeat(b' '));
        let mut reader = RowReader::new(endless, "rows.jsonl", Targets::Optional);
        let error = reader.next().unwrap().unwrap_err().to_string();
        assert!(
            error.starts_with("rows.jsonl:1: the line is longer than 16777216 bytes"),
            "{error}"
        );
        assert!(reader.next().is_none());
        assert!(reader.buffer.capacity() <= 2 * MAX_LINE_BYTES + 8);

        let mut longest = vec![b' '; MAX_LINE_BYTES - 13];
        longest.extend(b"{\"input\":\"x\"}\r\n{\"input\":\"y\"}");
        let rows: Vec<_> = RowReader::new(&longest[..], "r", Targets::Optional).collect();
        assert!(rows.len() == 2 && rows.iter().all(Result::is_ok));
    }
}
