//! Data rows as Parquet: what `datasets` and pandas write.
//!
//! ```text
//! columns task: string, input: string, target: string, references: list<string>
//!                       ->   {"task": "qnli", "input": "Is ... ?", "target": "yes", "references": ["yes"]}
//! ```
//!
//! A row is what the JSON object of its columns would be; a null is an absent field. Rows are counted from
//! 1, over all row groups. Not compressed or with Snappy, which is what pandas and `datasets` do unless
//! told otherwise. Columns that no JSON has (dates, decimals) become their text.
//!
//! The crate `parquet` panics on some malformed files; that is caught and is an error of the file.

use std::{
    panic::{self, AssertUnwindSafe},
    path::Path,
};

use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::Field,
};
use serde_json::{Map, Number, Value};

use super::{
    json::{excerpt, open_regular},
    rows::{Columns, Row, Targets, parse_row},
};
use crate::error::{Error, Result};

/// All rows of a file.
///
/// # Errors
/// If the file cannot be read, is not Parquet, has no row, or a row is malformed: the message names the
/// row.
pub fn read_parquet(path: &Path, targets: Targets, columns: &Columns) -> Result<Vec<Row>> {
    let file = open_regular(path)?;
    let read = || read(file, path, targets, columns);
    panic::catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(Error::file(path, "the file is malformed")))
}

fn read(file: std::fs::File, path: &Path, targets: Targets, columns: &Columns) -> Result<Vec<Row>> {
    let whole = |error: parquet::errors::ParquetError| Error::file(path, error.to_string());
    let reader = SerializedFileReader::new(file).map_err(whole)?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(None).map_err(whole)? {
        let line = rows.len() + 1;
        let fail = |detail: String| Error::Line { path: path.to_path_buf(), line, detail };
        let row = row.map_err(|error| fail(error.to_string()))?;
        let mut raw = Map::new();
        for (name, field) in row.get_column_iter() {
            let value = json(field).map_err(|e| fail(format!("column {}: {e}", excerpt(name))))?;
            if !value.is_null() {
                raw.insert(name.clone(), value);
            }
        }
        rows.push(parse_row(raw, line, targets, columns).map_err(fail)?);
    }
    if rows.is_empty() {
        return Err(Error::file(path, "there are no rows in the file"));
    }
    Ok(rows)
}

fn json(field: &Field) -> Result<Value, String> {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(x) => (*x).into(),
        Field::Byte(x) => (*x).into(),
        Field::Short(x) => (*x).into(),
        Field::Int(x) => (*x).into(),
        Field::Long(x) => (*x).into(),
        Field::UByte(x) => (*x).into(),
        Field::UShort(x) => (*x).into(),
        Field::UInt(x) => (*x).into(),
        Field::ULong(x) => (*x).into(),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Str(text) => text.as_str().into(),
        Field::Bytes(bytes) => match bytes.as_utf8() {
            Ok(text) => text.into(),
            Err(_) => return Err("bytes that are not UTF-8".to_owned()),
        },
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(json).collect::<Result<_, _>>()?)
        }
        Field::Group(row) => {
            let mut object = Map::new();
            for (name, field) in row.get_column_iter() {
                object.insert(name.clone(), json(field)?);
            }
            Value::Object(object)
        }
        other => other.to_string().into(),
    })
}
