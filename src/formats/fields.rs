//! The fields of a configuration file: each is taken by name and type, with its default.
//!
//! serde's derive would do for the types, but its messages name neither the range nor the second of
//! two names of one field, and nothing would be left to judge the keys that nobody reads.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    formats::json::type_name,
};

/// A configuration's fields, taken one by one.
pub(crate) struct Fields {
    path: PathBuf,
    /// In front of a field's name in messages.
    prefix: String,
    left: Map<String, Value>,
}

impl Fields {
    pub(crate) fn new(left: Map<String, Value>, path: &Path) -> Self {
        Self { path: path.to_path_buf(), prefix: String::new(), left }
    }

    /// The fields of an object that is itself the field `key`.
    pub(crate) fn within(left: Map<String, Value>, path: &Path, key: &str) -> Self {
        Self { path: path.to_path_buf(), prefix: format!("{key}."), left }
    }

    /// Where they came from.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What nobody took.
    pub(crate) fn unread(&self) -> &Map<String, Value> {
        &self.left
    }

    pub(crate) fn error(&self, key: &str, detail: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("field {}{key}: {detail}", self.prefix))
    }

    pub(crate) fn wrong_type(&self, key: &str, expected: &str, found: &Value) -> Error {
        self.error(key, format!("expected {expected}, found {}", type_name(found)))
    }

    /// A field, if it is there. Null is a value of its own for some fields.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.left.shift_remove(key)
    }

    /// A field, if it is there and not null.
    pub(crate) fn take_value(&mut self, key: &str) -> Option<Value> {
        self.take(key).filter(|value| !value.is_null())
    }

    /// A count from 1 to `max`, under any of the names that transformers has for it.
    pub(crate) fn size(&mut self, keys: &[&str], default: usize, max: usize) -> Result<usize> {
        let mut found: Option<(&str, usize)> = None;
        for &key in keys {
            let Some(value) = self.take_value(key) else { continue };
            let size = value
                .as_u64()
                .and_then(|size| usize::try_from(size).ok())
                .filter(|size| (1..=max).contains(size))
                .ok_or_else(|| {
                    let found = match &value {
                        Value::Number(number) => number.to_string(),
                        other => type_name(other).to_owned(),
                    };
                    self.error(key, format!("expected an integer from 1 to {max}, found {found}"))
                })?;
            match found {
                Some((first, other)) if other != size => {
                    return Err(self.error(key, format!("{size} contradicts {first} {other}")));
                }
                _ => found = Some((key, size)),
            }
        }
        Ok(found.map_or(default, |(_, size)| size))
    }

    pub(crate) fn float(&mut self, key: &str, default: f32) -> Result<f32> {
        match self.take_value(key) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(float) => Ok(float as f32),
                None => Err(self.wrong_type(key, "a number", &value)),
            },
        }
    }

    /// A finite number, if it is there.
    pub(crate) fn number(&mut self, key: &str) -> Result<Option<f64>> {
        match self.take_value(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong_type(key, "a number", &value)),
            },
        }
    }

    /// A number above 0 that must be there.
    pub(crate) fn positive(&mut self, key: &str) -> Result<f64> {
        match self.number(key)? {
            Some(number) if number > 0.0 => Ok(number),
            Some(number) => Err(self.error(key, format!("expected above 0, found {number}"))),
            None => Err(self.error(key, "missing")),
        }
    }

    /// Whether a field is there and null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.left.get(key).is_some_and(Value::is_null)
    }

    pub(crate) fn boolean(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take_value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(key, "true or false", &other)),
        }
    }

    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>> {
        match self.take_value(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong_type(key, "a string", &other)),
        }
    }

    /// An id below `vocab_size`. The outer `None` is an absent field, the inner one null.
    pub(crate) fn token_id(&mut self, key: &str, vocab_size: usize) -> Result<Option<Option<u32>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(None)),
            Some(value) => self.check_id(key, &value, vocab_size).map(Some).map(Some),
        }
    }

    /// One id or a list of ids below `vocab_size`; null is an empty list.
    pub(crate) fn token_ids(&mut self, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(Vec::new())),
            Some(Value::Array(ids)) => ids
                .iter()
                .map(|id| self.check_id(key, id, vocab_size))
                .collect::<Result<_>>()
                .map(Some),
            Some(value) => Ok(Some(vec![self.check_id(key, &value, vocab_size)?])),
        }
    }

    /// The same, or the family's own: that has to be below `vocab_size`, too.
    pub(crate) fn token_ids_or(
        &mut self,
        key: &str,
        vocab_size: usize,
        default: &[u32],
    ) -> Result<Vec<u32>> {
        if let Some(ids) = self.token_ids(key, vocab_size)? {
            return Ok(ids);
        }
        default.iter().map(|&id| self.check_id(key, &id.into(), vocab_size)).collect()
    }

    /// One id below `vocab_size`; null is none, and where the field is missing, the family's own.
    pub(crate) fn token_id_or(
        &mut self,
        key: &str,
        vocab_size: usize,
        default: u32,
    ) -> Result<Option<u32>> {
        match self.token_id(key, vocab_size)? {
            Some(id) => Ok(id),
            None => self.check_id(key, &default.into(), vocab_size).map(Some),
        }
    }

    pub(crate) fn check_id(&self, key: &str, value: &Value, vocab_size: usize) -> Result<u32> {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
            let found = match value {
                Value::Number(number) => number.to_string(),
                other => type_name(other).to_owned(),
            };
            self.error(
                key,
                format!("expected a token id below vocab_size ({vocab_size}), found {found}"),
            )
        })
    }
}
