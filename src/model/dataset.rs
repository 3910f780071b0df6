//! Data rows to examples: text becomes ids, names become task ids, long rows are dealt with.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Value, json};

use super::{Example, Layout, Mixing, united::Member};
use crate::{
    error::{Error, Result},
    formats::{
        fingerprint::Fingerprint,
        json::{excerpt, list_names, reason},
        poly_config::PolyConfig,
        rows::{Row, RowReader, Sequence, Targets},
        tasks::TaskNames,
    },
};

/// Turns text into ids.
pub trait Encode: Sync {
    /// The ids of a text; with `special` also what the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// If the tokenizer cannot encode it.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>>;
}

/// Turns conversations into text.
pub trait Converse: Sync {
    /// A conversation as text that has its special tokens; with `prompt` also what an answer begins
    /// with.
    ///
    /// # Errors
    /// What is wrong with the conversation, or with the template.
    fn render(&self, messages: &[Value], tools: &Value, prompt: bool) -> Result<String, String>;
}

/// What happens to rows over the length limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// They are cut (an end token at the end of a text stays) and counted.
    Truncate,
    /// They are left out and counted.
    Skip,
    /// They are an error.
    Error,
}

/// What rows may say of routing.
#[derive(Clone, Copy)]
pub struct Routes<'a> {
    /// The tasks' names and number.
    pub tasks: &'a TaskNames,
    /// The adapter whose mixtures they may name in a field `routing`; none: they may not.
    pub mixes: Option<&'a PolyConfig>,
    /// The adapters that `mixes` is made of, or the only one, of which rows name some in a field
    /// `adapter`; none: it has no name.
    pub members: &'a [Member],
    /// What rows mix that have no field `routing`; none: their task's mixture.
    pub routing: Option<&'a Value>,
}

impl<'a> Routes<'a> {
    /// Tasks alone, as in training.
    pub fn tasks(tasks: &'a TaskNames) -> Self {
        Self { tasks, mixes: None, members: &[], routing: None }
    }
}

/// How rows become examples.
pub struct Encoding<'a> {
    /// For text; rows of ids need none.
    pub tokenizer: Option<&'a dyn Encode>,
    /// For rows with `messages`.
    pub chat: Option<&'a dyn Converse>,
    /// Ids must be below.
    pub vocab_size: usize,
    /// How examples become tokens.
    pub layout: Layout,
    /// The most tokens of a sequence that the model has positions for; none: any number.
    pub max_positions: Option<usize>,
    /// The ids that end a text.
    pub eos_token_ids: &'a [u32],
    /// The id that follows a causal target that is text; an encoder-decoder's tokenizer appends it.
    pub end: Option<u32>,
    /// The most source tokens; none: 512 for text, no limit for ids.
    pub max_source_length: Option<usize>,
    /// The most label tokens.
    pub max_target_length: usize,
    /// What happens to longer rows.
    pub overlong: Overlong,
    /// What rows may say of routing; none: it does not matter.
    pub routes: Option<Routes<'a>>,
    /// Whether targets matter: for generation alone they do not.
    pub targets: bool,
}

/// Rows with their examples, in the file's order.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// What the file says.
    pub rows: Vec<Row>,
    /// What the model sees.
    pub examples: Vec<Example>,
    /// Rows that were cut.
    pub n_truncated: usize,
    /// Rows that were left out.
    pub n_skipped: usize,
    /// The rows that were left out, each with the number of rows that stand before it in `rows`.
    skipped: Vec<(usize, Row)>,
    /// The files, each with the number of rows up to its end.
    files: Vec<(PathBuf, usize)>,
}

/// All rows of a data file.
///
/// # Errors
/// If the file cannot be read, is empty, or a line is malformed: the message names the line.
pub fn read_rows(path: &Path, targets: Targets) -> Result<Vec<Row>> {
    RowReader::open(path, targets)?.collect()
}

impl Dataset {
    /// Encodes the rows of the file at `path`, on the threads of the current rayon pool.
    ///
    /// # Errors
    /// If a row has text and there is no tokenizer, an id or task is out of range, or a row is too
    /// long and that is to be an error: the message names the first such line.
    pub fn encode(rows: Vec<Row>, path: &Path, encoding: &Encoding<'_>) -> Result<Self> {
        let encoded: Vec<_> = rows.par_iter().map(|row| encoding.example(row, path)).collect();
        let mut dataset = Self::default();
        for (row, encoded) in rows.into_iter().zip(encoded) {
            let Encoded { example, is_cut } = encoded?;
            match encoding.overlong {
                Overlong::Skip if is_cut => {
                    dataset.n_skipped += 1;
                    dataset.skipped.push((dataset.rows.len(), row));
                }
                _ => {
                    dataset.n_truncated += usize::from(is_cut);
                    dataset.examples.push(example);
                    dataset.rows.push(row);
                }
            }
        }
        if dataset.examples.is_empty() {
            return Err(Error::file(path, "every row is longer than the limits: none is left"));
        }
        dataset.files = vec![(path.to_path_buf(), dataset.rows.len())];
        Ok(dataset)
    }

    /// Adds the rows of another one behind these.
    pub fn extend(&mut self, more: Self) {
        let n = self.rows.len();
        self.rows.extend(more.rows);
        self.examples.extend(more.examples);
        self.n_truncated += more.n_truncated;
        self.n_skipped += more.n_skipped;
        self.skipped.extend(more.skipped.into_iter().map(|(before, row)| (n + before, row)));
        self.files.extend(more.files.into_iter().map(|(path, end)| (path, n + end)));
    }

    /// The file that a row is of.
    pub fn path_of(&self, row: usize) -> Option<&Path> {
        self.files.iter().find(|(_, end)| row < *end).map(|(path, _)| path.as_path())
    }

    /// All rows of the files in their order, those that were left out, too: a row and its place in `rows`, if it has one.
    pub fn in_order(&self) -> impl Iterator<Item = (&Row, Option<usize>)> {
        let mut skipped = self.skipped.iter().peekable();
        let mut kept = self.rows.iter().enumerate().peekable();
        std::iter::from_fn(move || {
            let place = kept.peek().map_or(self.rows.len(), |(place, _)| *place);
            match skipped.next_if(|(before, _)| *before <= place) {
                Some((_, row)) => Some((row, None)),
                None => kept.next().map(|(place, row)| (row, Some(place))),
            }
        })
    }

    /// Leaves these rows, by their places in increasing order.
    pub fn keep(&mut self, kept: &[usize]) {
        let ends = self.files.iter_mut().map(|(_, end)| end);
        for end in ends.chain(self.skipped.iter_mut().map(|(before, _)| before)) {
            *end = kept.partition_point(|place| place < end);
        }
        let mut flags = vec![false; self.rows.len()];
        kept.iter().for_each(|&place| flags[place] = true);
        let mut flag = flags.iter();
        self.rows.retain(|_| *flag.next().unwrap_or(&false));
        let mut flag = flags.iter();
        self.examples.retain(|_| *flag.next().unwrap_or(&false));
    }

    /// A fingerprint of what the model sees and of what its outputs are compared with, in order.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut print = Fingerprint::default();
        for (i, row) in self.rows.iter().enumerate() {
            for reference in row.references.iter().flatten() {
                print.add(&(i as u64).to_le_bytes());
                print.add(reference.as_bytes());
            }
        }
        for Example { input, labels, task, .. } in &self.examples {
            print.add(&task.to_le_bytes());
            print.add_ids(input);
            print.add_ids(labels);
        }
        print
    }
}

/// What is wrong with a sequence.
enum Fault {
    Detail(String),
    Other(Error),
}

impl Fault {
    fn into_error(self, fail: impl Fn(String) -> Error) -> Error {
        match self {
            Self::Detail(detail) => fail(detail),
            Self::Other(error) => error,
        }
    }
}

/// A row's task, and what it mixes instead of the task's own mixture. With a field `routing` the task
/// is only what the row is counted under, so the adapter need not know it.
fn route(row: &Row, routes: Routes<'_>, path: &Path) -> Result<(u32, Option<Mixing>)> {
    let Routes { tasks, mixes, members, routing } = routes;
    let fail = |detail| Error::Line { path: path.to_path_buf(), line: row.line, detail };
    let used = match mixes {
        Some(_) => used_members(row, members).map_err(|e| fail(format!("field adapter: {e}")))?,
        None => None, // In training the field is one of the row's own.
    };
    let (config, used) = match (mixes, used, members) {
        (Some(config), Some(used), _) if used.is_empty() => {
            let none = Mixing::Weights(vec![0.0; config.n_splits * config.n_skills]);
            return Ok((0, Some(none)));
        }
        // A plain LoRA by itself is the same for every row that uses it.
        (_, Some(used), [Member { tasks: None, .. }]) if used.len() == 1 => return Ok((0, None)),
        (Some(config), Some(used), _) if members.len() > 1 || used.len() > 1 => (config, used),
        _ => {
            let mixing = explicit(row, routing, tasks, mixes).map_err(fail)?;
            let task = if mixing.is_some() { 0 } else { resolve(row, tasks, path)? };
            return Ok((task, mixing));
        }
    };
    let mut parts = Vec::with_capacity(used.len());
    for member in used {
        let unnamed = TaskNames::unnamed(1);
        let own_tasks = member.tasks.as_ref().unwrap_or(&unnamed);
        let mixing = match explicit(row, routing, own_tasks, Some(&member.config))
            .map_err(|e| fail(format!("adapter {}: {e}", excerpt(&member.name))))?
        {
            Some(mixing) => mixing,
            None if member.tasks.is_none() => Mixing::Task(0),
            None => Mixing::Task(resolve(row, own_tasks, path)?),
        };
        parts.push(member.among(mixing, config));
    }
    let mixing = if parts.len() == 1 { parts.remove(0) } else { Mixing::Sum(parts) };
    Ok((0, Some(mixing)))
}

/// The adapters that a row uses: those of its field `adapter` (of an empty list none: the base alone),
/// else the first; nothing where the only one has no name.
fn used_members<'m>(row: &Row, members: &'m [Member]) -> Result<Option<Vec<&'m Member>>, String> {
    let named = |name: &Value| -> Result<&'m Member, String> {
        let name = name.as_str().ok_or("expected a name or a list of names")?;
        members.iter().find(|member| member.name == name).ok_or_else(|| {
            let known = list_names(members.iter().map(|member| member.name.as_str()));
            format!("{} is not known; known: {known}", excerpt(name))
        })
    };
    match row.raw.get("adapter").filter(|value| !value.is_null()) {
        None => Ok(members.first().map(|first| vec![first])),
        Some(Value::Array(names)) => names.iter().map(named).collect::<Result<_, _>>().map(Some),
        Some(name) => Ok(Some(vec![named(name)?])),
    }
}

/// What a row's field `routing` says, or what is said for all rows.
fn explicit(
    row: &Row,
    of_all: Option<&Value>,
    tasks: &TaskNames,
    config: Option<&PolyConfig>,
) -> Result<Option<Mixing>, String> {
    let own = row.raw.get("routing").filter(|value| !value.is_null());
    let (place, value) = match (own, of_all) {
        (Some(value), _) => ("field routing", value),
        (None, Some(value)) => ("--routing", value),
        (None, None) => return Ok(None),
    };
    let config = config
        .ok_or("field routing: is for eval and generate; in training a row's task routes it")?;
    // A column of a CSV file is text.
    let parsed = value.as_str().filter(|text| text.trim_start().starts_with('{'));
    let parsed: Option<Value> = parsed.map(serde_json::from_str).transpose().map_err(|error| {
        format!("{place}: column {}: malformed JSON: {}", error.column(), reason(&error))
    })?;
    let mixing = Mixing::parse(parsed.as_ref().unwrap_or(value), tasks, config);
    mixing.map(Some).map_err(|detail| format!("{place}: {detail}"))
}

/// A row's task: the one that it names, else that of its file's name, else the only one.
fn resolve(row: &Row, tasks: &TaskNames, path: &Path) -> Result<u32> {
    let of_file = || tasks.id(&path.file_stem()?.to_string_lossy());
    let only = (tasks.n_tasks() == 1).then_some(0);
    tasks.resolve(row, path)?.or_else(of_file).or(only).ok_or_else(|| Error::Line {
        path: path.to_path_buf(),
        line: row.line,
        detail: "the row has neither task nor task_id, but the adapter needs one: give it either, or name the task of all such rows of a file with NAME=FILE".into(),
    })
}

/// A row as the model sees it.
struct Encoded {
    example: Example,
    /// Whether it was longer than the limits.
    is_cut: bool,
}

impl Encoding<'_> {
    fn example(&self, row: &Row, path: &Path) -> Result<Encoded> {
        let fail = |detail| Error::Line { path: path.to_path_buf(), line: row.line, detail };
        let (task, mixing) = match self.routes {
            Some(routes) => route(row, routes, path)?,
            None => (0, None),
        };
        let source_limit = self
            .max_source_length
            .or_else(|| matches!(row.input, Sequence::Text(_)).then_some(512));
        let target = row.target.as_ref().filter(|_| self.targets);
        let ids = match &row.input {
            Sequence::Messages(messages) => self.conversation(row, messages, target),
            input => self.ids(input, false).and_then(|input| {
                let labels = target.map(|target| self.ids(target, true)).transpose()?;
                Ok((input, labels))
            }),
        };
        let (mut input, labels) = ids.map_err(|e| e.into_error(fail))?;
        let is_text = matches!(row.input, Sequence::Text(_));
        let input_cut = match &row.input {
            // A prompt ends with what an answer begins with.
            Sequence::Messages(_) => {
                let (n, limit) = (input.len(), source_limit.unwrap_or(usize::MAX));
                input.drain(..n.saturating_sub(limit));
                (n > limit).then_some((n, limit))
            }
            _ => self.cut(&mut input, source_limit, is_text),
        };
        let mut labels = labels.unwrap_or_default();
        let labels_limit = Some(self.max_target_length);
        let labels_cut =
            self.cut(&mut labels, labels_limit, !matches!(row.input, Sequence::Ids(_)));
        let cut = input_cut.or(labels_cut);
        if let (Some((n, limit)), Overlong::Error) = (cut, self.overlong) {
            return Err(fail(format!("the row has {n} tokens where {limit} are allowed")));
        }
        // What is left out anyway may be as long as it likes.
        if cut.is_none() || self.overlong != Overlong::Skip {
            self.check_positions(input.len(), labels.len()).map_err(fail)?;
        }
        let example = Example { input, labels, task, mixing };
        Ok(Encoded { example, is_cut: cut.is_some() })
    }

    /// The ids of a text, or ids as they are.
    fn ids(&self, sequence: &Sequence, is_target: bool) -> Result<Vec<u32>, Fault> {
        match sequence {
            Sequence::Ids(ids) => self.checked(ids.clone()),
            Sequence::Text(text) => self.checked(self.text(self.tokenizer()?, text, is_target)?),
            Sequence::Messages(_) => unreachable!("an input alone, and looked at before"),
        }
    }

    /// The ids of a conversation, and those of an answer with its end: what the template says
    /// with the answer, beyond what it says without.
    fn conversation(
        &self,
        row: &Row,
        messages: &[Value],
        answer: Option<&Sequence>,
    ) -> Result<(Vec<u32>, Option<Vec<u32>>), Fault> {
        let tokenizer = self.tokenizer()?;
        let chat = self.chat.ok_or_else(|| {
            Fault::Detail(
                "the row has messages, but the model folder has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); give input and target".into(),
            )
        })?;
        let tools = row.raw.get("tools").unwrap_or(&Value::Null);
        let prompt = chat.render(messages, tools, true).map_err(Fault::Detail)?;
        let ids = tokenizer.encode(&prompt, false).map_err(Fault::Other)?;
        let input = self.checked(ids)?;
        let Some(Sequence::Text(answer)) = answer else { return Ok((input, None)) };
        let mut said = json!({"role": "assistant", "content": answer});
        if let (Some(Value::Object(last)), Value::Object(said)) =
            (row.raw.get("messages").and_then(|all| all.get(messages.len())), &mut said)
        {
            let other = last.iter().filter(|(key, _)| *key != "role" && *key != "content");
            said.extend(other.map(|(key, value)| (key.clone(), value.clone())));
        }
        let all = [messages, &[said]].concat();
        let said = chat.render(&all, tools, false).map_err(Fault::Detail)?;
        let said = said.strip_prefix(&prompt).ok_or_else(|| {
            Fault::Detail(
                "the chat template changes what comes before an answer when there is one, so what is to be learned cannot be told from it; give input and target".into(),
            )
        })?;
        let mut labels = tokenizer.encode(said, false).map_err(Fault::Other)?;
        // Templates put a line break after the end token; generation ends before it.
        match labels.iter().rposition(|id| self.eos_token_ids.contains(id) || Some(*id) == self.end)
        {
            Some(end) => labels.truncate(end + 1),
            None => labels.extend(self.end),
        }
        Ok((input, Some(self.checked(labels)?)))
    }

    fn tokenizer(&self) -> Result<&dyn Encode, Fault> {
        self.tokenizer.ok_or_else(|| {
            Fault::Detail(
                "the row has text, but the model folder has no tokenizer.json; give input_ids and label_ids".into(),
            )
        })
    }

    /// Ids that the model has, at least one.
    fn checked(&self, ids: Vec<u32>) -> Result<Vec<u32>, Fault> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            return Err(Fault::Detail(format!(
                "token id {id} is out of range: the model's vocabulary has {} ids",
                self.vocab_size
            )));
        }
        if ids.is_empty() {
            return Err(Fault::Detail(
                "the text has no tokens; the model needs at least one".into(),
            ));
        }
        Ok(ids)
    }

    /// Cuts ids to a limit: how many there were and how many are allowed. The end token at the end of a
    /// text stays.
    fn cut(
        &self,
        ids: &mut Vec<u32>,
        limit: Option<usize>,
        is_text: bool,
    ) -> Option<(usize, usize)> {
        let n = ids.len();
        let limit = limit.filter(|&limit| n > limit)?;
        let end = ids.last().copied().filter(|id| is_text && self.eos_token_ids.contains(id));
        ids.truncate(limit);
        if let (Some(end), Some(last)) = (end, ids.last_mut()) {
            *last = end;
        }
        Some((n, limit))
    }

    /// The ids of a text: with what the tokenizer adds for an encoder-decoder; a causal model's input
    /// has what comes before a text and its target what comes after, once each.
    fn text(&self, tokenizer: &dyn Encode, text: &str, is_target: bool) -> Result<Vec<u32>, Fault> {
        let special = self.layout != Layout::Causal || !is_target;
        let mut ids = tokenizer.encode(text, special).map_err(Fault::Other)?;
        if self.layout != Layout::Causal {
            return Ok(ids);
        }
        if !is_target {
            while ids.last().is_some_and(|last| self.eos_token_ids.contains(last)) {
                ids.pop();
            }
            return Ok(ids);
        }
        let Some(end) = self.end else {
            return Err(Fault::Detail(
                "the model folder names no end token for text (eos_token_id); give input_ids and label_ids".into(),
            ));
        };
        ids.push(end);
        Ok(ids)
    }

    /// Whether the model has positions for a row.
    fn check_positions(&self, n_input: usize, n_labels: usize) -> Result<(), String> {
        let longest = match self.layout {
            Layout::EncoderDecoder { .. } => n_input.max(n_labels),
            Layout::Causal => n_input + n_labels,
        };
        match self.max_positions {
            Some(max) if longest > max => Err(format!(
                "the row has {longest} tokens, but the model has positions for {max}; \
                --max-source-length and --max-target-length cut rows"
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(feature = "cli")]
impl Encode for crate::formats::tokenizer::Tokenizer {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.encode(text, special)
    }
}

#[cfg(feature = "cli")]
impl Converse for crate::formats::chat::ChatTemplate {
    fn render(&self, messages: &[Value], tools: &Value, prompt: bool) -> Result<String, String> {
        self.render(messages, tools, prompt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes;
    impl Encode for Bytes {
        fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
            Ok(text.bytes().map(u32::from).chain(special.then_some(1)).collect())
        }
    }

    fn encode(lines: &str, max: usize, overlong: Overlong) -> Result<Dataset> {
        encode_as(Layout::EncoderDecoder { start: 0 }, lines, max, overlong)
    }

    fn encode_as(layout: Layout, lines: &str, max: usize, overlong: Overlong) -> Result<Dataset> {
        let path = Path::new("rows.jsonl");
        let rows: Result<Vec<Row>> =
            RowReader::new(lines.as_bytes(), path, Targets::Required).collect();
        let tasks = TaskNames::unnamed(2);
        let encoding = Encoding {
            tokenizer: Some(&Bytes),
            chat: None,
            vocab_size: 256,
            layout,
            max_positions: (layout == Layout::Causal).then_some(9),
            eos_token_ids: &[1],
            end: Some(1),
            max_source_length: Some(max),
            max_target_length: max,
            overlong,
            routes: Some(Routes::tasks(&tasks)),
            targets: true,
        };
        Dataset::encode(rows?, path, &encoding)
    }

    const ROWS: &str = r#"{"task_id": 1, "input": "abcdef", "target": "a"}
{"task_id": 0, "input_ids": [5, 6, 7, 8, 9, 10], "label_ids": [5]}
{"task_id": 0, "input_ids": [5], "label_ids": [5]}
"#;

    #[test]
    fn long_rows_are_cut_and_texts_keep_their_end() {
        let dataset = encode(ROWS, 4, Overlong::Truncate).unwrap();
        assert_eq!(dataset.examples[0].input, [97, 98, 99, 1]);
        assert_eq!(dataset.examples[1].input, [5, 6, 7, 8]);
        assert_eq!((dataset.n_truncated, dataset.examples.len()), (2, 3));
        let mut dataset = encode(ROWS, 4, Overlong::Skip).unwrap();
        assert_eq!(dataset.n_skipped, 2);
        // What is left out keeps its place among the others.
        dataset.extend(encode(ROWS, 4, Overlong::Skip).unwrap());
        let order = |dataset: &Dataset| -> Vec<(usize, Option<usize>)> {
            dataset.in_order().map(|(row, place)| (row.line, place)).collect()
        };
        let first = [(1, None), (2, None), (3, Some(0))];
        let both = [first, [(1, None), (2, None), (3, Some(1))]].concat();
        assert_eq!(order(&dataset), both);
        dataset.keep(&[1]);
        let left = [(1, None), (2, None), (1, None), (2, None), (3, Some(0))];
        assert_eq!(order(&dataset), left);
        let error = encode(ROWS, 4, Overlong::Error).unwrap_err().to_string();
        assert_eq!(error, "rows.jsonl:1: the row has 7 tokens where 4 are allowed");
    }

    #[test]
    fn causal_text_ends_once() {
        let dataset = encode_as(Layout::Causal, ROWS, 8, Overlong::Error).unwrap();
        let Example { input, labels, .. } = &dataset.examples[0];
        assert_eq!((&input[..], &labels[..]), (&b"abcdef".map(u32::from)[..], &[97, 1][..]));
        let Example { input, labels, .. } = &dataset.examples[1];
        assert_eq!((input.len(), &labels[..]), (6, &[5][..])); // Nothing is added to ids.
        let text = r#"{"task_id": 0, "input": "ab", "target": "cdef"}"#;
        let dataset = encode_as(Layout::Causal, text, 3, Overlong::Truncate).unwrap();
        assert_eq!(dataset.examples[0].labels, [99, 100, 1]);
        let long = r#"{"task_id": 0, "input": "abcdef", "target": "cdef"}"#;
        let error = encode_as(Layout::Causal, long, 99, Overlong::Skip).unwrap_err().to_string();
        let expected = "rows.jsonl:1: the row has 11 tokens, but the model has positions for 9";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn a_task_that_is_not_named_is_that_of_the_file_or_the_only_one() {
        let row = r#"{"input": "a"}"#;
        let mut rows = RowReader::new(row.as_bytes(), "rows.jsonl", Targets::Optional);
        let row = rows.next().unwrap().unwrap();
        let two = TaskNames::from_list(&["a".to_owned(), "b".to_owned()]).unwrap();
        let task = |tasks: &TaskNames, path: &str| {
            resolve(&row, tasks, Path::new(path)).map_err(|error| error.to_string())
        };
        assert_eq!(task(&two, "dir/b.jsonl"), Ok(1));
        assert_eq!(task(&TaskNames::unnamed(1), "dir/b.jsonl"), Ok(0));
        let expected = "dir/c.jsonl:1: the row has neither task nor task_id";
        assert!(task(&two, "dir/c.jsonl").unwrap_err().starts_with(expected));
    }

    #[test]
    fn what_is_out_of_range_names_its_line() {
        let id = r#"{"task_id": 0, "input_ids": [256], "label_ids": [5]}"#;
        let error = encode(id, 9, Overlong::Error).unwrap_err().to_string();
        assert!(error.starts_with("rows.jsonl:1: token id 256 is out of range"), "{error}");
        let task = r#"{"task_id": 2, "input_ids": [2], "label_ids": [5]}"#;
        let error = encode(task, 9, Overlong::Error).unwrap_err().to_string();
        assert!(error.contains("task_id 2 is out of range: there are 2 tasks"), "{error}");
    }
}
