//! `--config run.toml`: a verb's flags from a file.
//!
//! ```text
//! learning_rate = 1e-3              ->  --learning-rate=0.001
//! target_modules = ["q", "v"]       ->  --target-modules=q,v
//! router_sampling = false           ->  --router-sampling=off
//! ```
//!
//! The keys are the flags in Hugging Face's spelling, aliases included, and those of its
//! `TrainingArguments` that are none. What the file says stands before what the command line says, where
//! the last word counts.

mod training_arguments;

use std::{ffi::OsString, path::Path};

use clap::{Arg, ArgAction, Command, error::ErrorKind};
use toml::de::{DeTable, DeValue};

use self::training_arguments::{Beside, Meaning, meaning};
use super::tell;
use crate::error::{Error, Result};

/// The most bytes of a file.
const MAX_BYTES: u64 = 1 << 20;

/// The arguments with those of `--config FILE` behind the verb.
pub(super) fn expand(arguments: Vec<OsString>, cli: &Command) -> Result<Vec<OsString>> {
    let verb = arguments.get(1).and_then(|verb| verb.to_str()).unwrap_or_default();
    let Some(verb) = cli.find_subcommand(verb) else { return Ok(arguments) };
    let path = arguments.iter().enumerate().find_map(|(i, argument)| {
        let argument = argument.to_str()?;
        match argument.strip_prefix("--config") {
            Some("") => arguments.get(i + 1).cloned(),
            Some(rest) => rest.strip_prefix('=').map(OsString::from),
            None => None,
        }
    });
    let Some(path) = path.filter(|_| find(verb, "config").is_some()) else { return Ok(arguments) };
    let is_given = |flag: &Arg| {
        let given =
            arguments[2..].iter().filter_map(|argument| argument.to_str()?.strip_prefix("--"));
        let mut given = given.map(|argument| argument.split('=').next().unwrap_or_default());
        given.any(|name| names(flag).any(|known| known == name))
    };
    let mut expanded = arguments[..2].to_vec();
    let is_quiet = arguments.iter().any(|argument| argument == "-q");
    let from_file = read(Path::new(&path), cli, verb, is_given, is_quiet)?;
    expanded.extend(from_file.into_iter().map(OsString::from));
    expanded.extend_from_slice(&arguments[2..]);
    Ok(expanded)
}

/// The flag that a key means.
fn find<'a>(verb: &'a Command, name: &str) -> Option<&'a Arg> {
    verb.get_arguments().find(|argument| names(argument).any(|known| known == name))
}

/// The long names of a flag.
fn names(argument: &Arg) -> impl Iterator<Item = &str> {
    argument.get_long().into_iter().chain(argument.get_all_aliases().unwrap_or_default())
}

fn read(
    path: &Path,
    cli: &Command,
    verb: &Command,
    is_given: impl Fn(&Arg) -> bool,
    is_quiet: bool,
) -> Result<Vec<String>> {
    let bytes = crate::formats::json::read_capped(path, MAX_BYTES)?;
    let text = String::from_utf8(bytes)
        .map_err(|error| Error::file(path, format!("not UTF-8: {error}")))?;
    let line_of = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let fail = |at: usize, detail: String| Error::Line {
        path: path.to_path_buf(),
        line: line_of(at),
        detail,
    };
    let table = DeTable::parse(&text).map_err(|error| {
        fail(error.span().map_or(0, |span| span.start), error.message().to_owned())
    })?;
    let in_file = |flag: &str| {
        let flag = find(verb, flag)?;
        table.get_ref().iter().find_map(|(key, value)| {
            let name = key.get_ref().replace('_', "-");
            let is_it = names(flag).any(|known| known == name);
            is_it.then(|| scalar(value.get_ref()).unwrap_or_default())
        })
    };
    let given = |flag: &str| find(verb, flag).is_some_and(&is_given);
    let beside = Beside { in_file: &in_file, is_given: &given };
    let (mut arguments, mut without_effect) = (Vec::new(), Vec::new());
    for (key, value) in table.get_ref() {
        let (name, at) = (key.get_ref().replace('_', "-"), key.span().start);
        if name == "config" {
            return Err(fail(at, "a file of settings cannot name another".to_owned()));
        }
        let said = scalar(value.get_ref()).unwrap_or_default();
        match meaning(&name, &said, &beside) {
            Some(Meaning::Flags(new)) => {
                arguments.extend(new);
                continue;
            }
            Some(Meaning::NoEffect) => {
                without_effect.push(key.get_ref().as_ref());
                continue;
            }
            Some(Meaning::Refused(why)) => {
                return Err(fail(at, format!("key {}: {why}", key.get_ref())));
            }
            None => {}
        }
        let Some(flag) = find(verb, &name) else {
            let near = nearest(&name, verb.get_arguments().flat_map(names));
            let near = near.map_or_else(String::new, |near| {
                format!("; the nearest is {}", near.replace('-', "_"))
            });
            return Err(fail(at, format!("unknown key {}{near}", key.get_ref())));
        };
        let long = flag.get_long().unwrap_or_default();
        let wrong = |found: &str| fail(at, format!("key {}: found {found}", key.get_ref()));
        // A flag that may stand alone, and has no word for off.
        let is_switch = matches!(flag.get_action(), ArgAction::SetTrue)
            || (flag.get_num_args().is_some_and(|n| n.min_values() == 0)
                && flag.get_possible_values().is_empty());
        let new = match value.get_ref() {
            DeValue::Boolean(true) if is_switch => vec![format!("--{long}")],
            DeValue::Boolean(false) if is_switch => vec![],
            DeValue::Array(items) => {
                let items: Vec<String> = items
                    .iter()
                    .map(|item| {
                        scalar(item.get_ref()).ok_or_else(|| wrong("a table or list in a list"))
                    })
                    .collect::<Result<_>>()?;
                match flag.get_action() {
                    ArgAction::Append => {
                        items.iter().map(|item| format!("--{long}={item}")).collect()
                    }
                    _ => vec![format!("--{long}={}", items.join(","))],
                }
            }
            value => {
                let value = scalar(value).ok_or_else(|| wrong("a table or a date"))?;
                vec![format!("--{long}={value}")]
            }
        };
        if let Some(detail) = refusal(cli, verb, &new) {
            return Err(fail(at, format!("key {}: {detail}", key.get_ref())));
        }
        // Of lists the command line's replaces the file's; of all else the last word counts.
        if !(matches!(flag.get_action(), ArgAction::Append) && is_given(flag)) {
            arguments.extend(new);
        }
    }
    if !without_effect.is_empty() && !is_quiet {
        // The log is not there yet: its level is a flag, too.
        let (path, keys) = (path.display(), without_effect.join(", "));
        tell(&format!("WARN {path}: of no effect here: {keys}"));
    }
    Ok(arguments)
}

/// Why a flag does not take its value, if it does not.
fn refusal(cli: &Command, verb: &Command, arguments: &[String]) -> Option<String> {
    let line =
        ["polytape", verb.get_name()].into_iter().chain(arguments.iter().map(String::as_str));
    let error = cli.clone().try_get_matches_from(line).err()?;
    // What else the verb needs may still come.
    let is_of_value = matches!(
        error.kind(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::TooManyValues
    );
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    is_of_value.then(|| first.strip_prefix("error: ").unwrap_or(first).to_owned())
}

/// A value as the command line has it.
fn scalar(value: &DeValue<'_>) -> Option<String> {
    Some(match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Integer(number) => number.to_string().replace('_', ""),
        DeValue::Float(number) => number.to_string().replace('_', ""),
        DeValue::Boolean(true) => "on".to_owned(),
        DeValue::Boolean(false) => "off".to_owned(),
        _ => return None,
    })
}

/// The name with the least edits, if that is less than half of it.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let nearest = names.map(|other| (n_edits(name, other), other)).min()?;
    (2 * nearest.0 <= name.len()).then_some(nearest.1)
}

/// Insertions, removals and replacements from one to the other (Levenshtein).
fn n_edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, c) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, d) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(c != *d);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        assert_eq!(n_edits("kitten", "sitting"), 3);
        assert_eq!((n_edits("", "abc"), n_edits("abc", "")), (3, 3));
        assert_eq!(
            nearest("lerning-rate", ["learning-rate", "r"].into_iter()),
            Some("learning-rate")
        );
        assert_eq!(nearest("zzz", ["learning-rate"].into_iter()), None);
    }
}
