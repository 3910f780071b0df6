//! JSON, read strictly: files up to a cap, objects without duplicate keys.
//!
//! serde_json keeps the last of two equal keys, so two readers of one file (a scanner and an engine,
//! say) can see different values. [`UniqueMap`] and [`UniqueObject`] refuse the second one. Depth is
//! bounded by serde_json itself (128), memory by the caps.

use std::{collections::BTreeMap, fmt, fs::File, io::Read, marker::PhantomData, path::Path};

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The most bytes of `config.json` and its small siblings.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A JSON object with values of one type, sorted by key. A key that comes twice is an error.
#[derive(Debug, Default)]
pub struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = UniqueMap<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if entries.contains_key(&key) {
                        return Err(duplicate(&key));
                    }
                    let value = map.next_value()?;
                    entries.insert(key, value);
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// A JSON object in its own order. A key that comes twice at the top level is an error.
#[derive(Debug, Default)]
pub struct UniqueObject(pub Map<String, Value>);

impl<'de> Deserialize<'de> for UniqueObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = UniqueObject;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Map::new();
                while let Some(key) = map.next_key::<String>()? {
                    if fields.contains_key(&key) {
                        return Err(duplicate(&key));
                    }
                    let value = map.next_value()?;
                    fields.insert(key, value);
                }
                Ok(UniqueObject(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The error for a key that comes twice.
pub(crate) fn duplicate<E: de::Error>(key: &str) -> E {
    E::custom(format_args!("the name {} comes twice", excerpt(key)))
}

/// All bytes of a regular file of at most `max_bytes`.
pub fn read_capped(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    // One more than allowed, so that a file which grows meanwhile is seen too.
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > max_bytes {
        return Err(Error::file(
            path,
            format!("the file is larger than {max_bytes} bytes, the most that is read of its kind"),
        ));
    }
    Ok(bytes)
}

/// Reads and parses a JSON file of at most `max_bytes`.
pub fn read_json<T: de::DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<T> {
    parse(&read_capped(path, max_bytes)?, path)
}

/// Parses the JSON of the file at `path`.
pub fn parse<'de, T: Deserialize<'de>>(bytes: &'de [u8], path: &Path) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::file(path, format!("not the JSON expected: {}", describe(&error))))
}

/// Opens a regular file. Links are followed (the Hub cache is made of them); what they lead to must
/// be a file: opening a FIFO would block for ever, and a device has no size to check against.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let kind = |metadata: std::fs::Metadata| {
        if metadata.is_file() {
            return Ok(());
        }
        let found = if metadata.is_dir() { "a directory" } else { "a device, pipe or socket" };
        Err(Error::file(path, format!("expected a regular file, found {found}")))
    };
    kind(std::fs::metadata(path).map_err(Error::io("open", path))?)?;
    let file = File::open(path).map_err(Error::io("open", path))?;
    // Once more on what was opened: the name may have changed hands in between.
    kind(file.metadata().map_err(Error::io("open", path))?)?;
    Ok(file)
}

/// serde_json's message and place, with what it echoes of the file cut and made printable.
pub(crate) fn describe(error: &serde_json::Error) -> String {
    format!("{} (line {}, column {})", reason(error), error.line(), error.column())
}

/// The same without the place.
pub(crate) fn reason(error: &serde_json::Error) -> String {
    const HEAD_CHARS: usize = 120;
    const TAIL_CHARS: usize = 60; // "..., expected a string"
    let message = error.to_string();
    let reason = message.rsplit_once(" at line ").map_or(message.as_str(), |(head, _)| head);
    let n_chars = reason.chars().count();
    let mut text = String::new();
    for (i, c) in reason.chars().enumerate() {
        if i < HEAD_CHARS || i + TAIL_CHARS >= n_chars {
            text.push(if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
        } else if i == HEAD_CHARS {
            text += "...";
        }
    }
    text
}

/// The JSON type of a value, for messages: "expected a string, found a number".
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Foreign text for a message: quoted, control characters escaped, cut after 80 bytes.
pub(crate) fn excerpt(text: &str) -> String {
    const MAX_BYTES: usize = 80;
    if text.len() <= MAX_BYTES {
        return format!("{text:?}");
    }
    let cut = (0..=MAX_BYTES).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{:?}...", &text[..cut])
}

/// Foreign names for a message: the first 20, then how many more.
pub(crate) fn list_names<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    const MAX_NAMES: usize = 20;
    let n_names = names.len();
    let mut text = names.take(MAX_NAMES).map(excerpt).collect::<Vec<_>>().join(", ");
    if n_names > MAX_NAMES {
        text += &format!(" and {} more", n_names - MAX_NAMES);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_twice_is_refused() {
        let path = Path::new("x.json");
        let error = parse::<UniqueMap<u32>>(br#"{"a":1,"a":2}"#, path).unwrap_err().to_string();
        assert!(error.contains("x.json") && error.contains("\"a\" comes twice"), "{error}");
        let error = parse::<UniqueObject>(br#"{"b":1,"b":2}"#, path).unwrap_err().to_string();
        assert!(error.contains("\"b\" comes twice"), "{error}");
        assert_eq!(parse::<UniqueMap<u32>>(br#"{"b":1,"a":2}"#, path).unwrap().0["a"], 2);
    }

    #[test]
    fn a_file_over_the_cap_is_refused() {
        let path = std::env::temp_dir().join(format!("polytape-json-cap-{}", std::process::id()));
        std::fs::write(&path, [b' '; 11]).unwrap();
        assert_eq!(read_capped(&path, 11).unwrap().len(), 11);
        assert!(read_capped(&path, 10).unwrap_err().to_string().contains("larger than 10 bytes"));
        std::fs::remove_file(&path).unwrap();
        let error = read_capped(&std::env::temp_dir(), 10).unwrap_err().to_string();
        assert!(error.contains("found a directory"), "{error}");
    }

    #[test]
    fn what_a_message_echoes_is_bounded_and_printable() {
        let path = Path::new("x.json");
        let long = format!("{{\"a\":\"{}\"}}", "z".repeat(100_000));
        let error = parse::<UniqueMap<u32>>(long.as_bytes(), path).unwrap_err().to_string();
        assert!(error.len() < 300 && error.contains("expected u32"), "{error}");
        assert!(error.ends_with("(line 1, column 100007)"), "{error}");
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Empty {}
        let error = parse::<Empty>(br#"{"\u001b[2J":1}"#, path).unwrap_err().to_string();
        assert!(error.contains("unknown field `\u{fffd}[2J`"), "{error}");
    }

    #[test]
    fn messages_quote_foreign_text_briefly() {
        assert_eq!(excerpt("a\u{1b}[2J"), r#""a\u{1b}[2J""#);
        assert!(excerpt(&"é".repeat(100)).len() < 100);
        let names: Vec<String> = (0..30).map(|i| format!("t{i}")).collect();
        let text = list_names(names.iter().map(String::as_str));
        assert!(text.contains("\"t19\" and 10 more") && !text.contains("t20"), "{text}");
    }
}
