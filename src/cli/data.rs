//! Data files and the flags about them, as `train`, `eval` and `generate` share them.

use std::{
    collections::HashSet,
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::{named_path, shown, train::flags::spelling};
use crate::{
    error::{Error, Result},
    formats::{
        chat::ChatTemplate,
        csv,
        rows::{Columns, Row, RowReader, Sequence, Targets},
        tokenizer::Tokenizer,
    },
    kernels::Backend,
    model::{
        Model,
        dataset::{Converse, Dataset, Encode, Encoding, Overlong, Routes},
        token_cache::TokenCache,
    },
    train::{choices::Choices, recipe::Recipe},
};

#[derive(Args)]
pub(super) struct DataFlags {
    /// Rows: JSONL, CSV with a header (.csv, .tsv), or Parquet (.parquet, where it is built in). Rows that name no task are of
    /// NAME; without it, of several files each is a task of its name, and one is the adapter's task of its name, or its only one.
    #[arg(long, required = true, num_args = 1.., value_name = "[NAME=]FILE")]
    data: Vec<NamedFile>,
    /// The field or column that is the input.
    #[arg(long)]
    input_column: Option<String>,
    /// The field or column that is the target.
    #[arg(long)]
    target_column: Option<String>,
    /// The field or column that is the task.
    #[arg(long)]
    task_column: Option<String>,
    #[command(flatten)]
    limits: Limits,
}

/// A data file, and what `NAME=FILE` says of it.
#[derive(Clone)]
pub(super) struct NamedFile {
    path: PathBuf,
    /// The task of its rows that name none.
    task: Option<String>,
}

impl From<OsString> for NamedFile {
    fn from(value: OsString) -> Self {
        match named_path(Path::new(&value)) {
            Some((task, path)) => Self { path, task: Some(task) },
            None => Self { path: value.into(), task: None },
        }
    }
}

impl NamedFile {
    /// As the flag has it, for the settings.
    pub(super) fn shown(&self) -> Value {
        match &self.task {
            Some(task) => format!("{task}={}", self.path.display()).into(),
            None => shown(&self.path),
        }
    }
}

/// The rows of a file.
pub(super) struct DataFile {
    pub(super) path: PathBuf,
    pub(super) rows: Vec<Row>,
}

impl DataFile {
    /// Its rows, with the file.
    pub(super) fn located(&self) -> impl Iterator<Item = (&Path, &Row)> + Clone {
        self.rows.iter().map(|row| (self.path.as_path(), row))
    }

    /// Gives a task to the rows that name none, and says how many those are.
    fn name_task(&mut self, task: &str) -> usize {
        let unnamed = |row: &&mut Row| row.task.is_none() && row.task_id.is_none();
        let mut n_unnamed = 0;
        for row in self.rows.iter_mut().filter(unnamed) {
            row.task = Some(task.to_owned());
            n_unnamed += 1;
        }
        n_unnamed
    }
}

/// Length limits, and where texts' ids are kept.
#[derive(Args, Clone)]
struct Limits {
    /// The most source tokens [default: 512 for text, none for ids].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_source_length: Option<u32>,
    /// The most label tokens [default: 128].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_target_length: Option<u32>,
    /// What happens to longer rows.
    #[arg(long, default_value = "truncate")]
    overlong: OverlongFlag,
    /// Keep tokenised texts in this folder, so that the next run on the same data need not tokenise them
    /// [default: nowhere].
    #[arg(long)]
    cache_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OverlongFlag {
    Error,
    Skip,
    Truncate,
}

/// A model's tokenizer, if its folder has one.
pub(super) fn open_tokenizer(model: &Model<impl Backend>) -> Result<Option<Tokenizer>> {
    if !model.dir().join("tokenizer.json").exists() {
        return Ok(None);
    }
    Tokenizer::open(model.dir(), model.vocab_size()).map(Some)
}

impl Limits {
    /// These limits, and a recipe's where none is given.
    fn with_defaults(&self, recipe: &Recipe) -> Self {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut limits = self.clone();
        limits.max_source_length = self.max_source_length.or(recipe.max_source_length.map(narrow));
        limits.max_target_length =
            self.max_target_length.or(Some(narrow(recipe.max_target_length)));
        limits
    }

    /// The rows of a file as examples. Says how many were cut or left out.
    fn encode(
        &self,
        rows: Vec<Row>,
        path: &Path,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        routes: Option<Routes<'_>>,
        targets: Targets,
    ) -> Result<Dataset> {
        let dataset = self.quietly(rows, path, model, tokenizer, routes, targets)?;
        let Dataset { n_truncated, n_skipped, .. } = dataset;
        tracing::info!("{}: {} rows", path.display(), dataset.examples.len());
        if n_truncated + n_skipped > 0 {
            tracing::warn!(
                "{}: {n_truncated} rows were truncated and {n_skipped} left out (--max-source-length, --max-target-length, --overlong)",
                path.display()
            );
        }
        Ok(dataset)
    }

    fn quietly(
        &self,
        rows: Vec<Row>,
        path: &Path,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        routes: Option<Routes<'_>>,
        targets: Targets,
    ) -> Result<Dataset> {
        let eos_token_ids = &model.generation().eos_token_ids;
        let end = tokenizer.map(Tokenizer::end_token).transpose()?.flatten();
        let cache = match (&self.cache_dir, tokenizer) {
            (Some(dir), Some(t)) => Some(TokenCache::open(dir, path, t, t.fingerprint())?),
            _ => None,
        };
        let encoder: Option<&dyn Encode> = match (&cache, tokenizer) {
            (Some(cache), _) => Some(cache),
            (None, tokenizer) => tokenizer.map(|t| t as &dyn Encode),
        };
        let has_chat = rows.iter().any(|row| matches!(row.input, Sequence::Messages(_)));
        let chat = if has_chat { ChatTemplate::open(model.dir())? } else { None };
        let encoding = Encoding {
            tokenizer: encoder,
            chat: chat.as_ref().map(|chat| chat as &dyn Converse),
            vocab_size: model.vocab_size(),
            layout: model.layout(),
            max_positions: model.config().max_positions(),
            eos_token_ids,
            end: end.or(eos_token_ids.first().copied()),
            max_source_length: self.max_source_length.map(|n| n as usize),
            max_target_length: self.max_target_length.unwrap_or(128) as usize,
            overlong: match self.overlong {
                OverlongFlag::Error => Overlong::Error,
                OverlongFlag::Skip => Overlong::Skip,
                OverlongFlag::Truncate => Overlong::Truncate,
            },
            routes,
            targets: targets == Targets::Required,
        };
        let dataset = Dataset::encode(rows, path, &encoding)?;
        cache.map_or(Ok(()), TokenCache::save)?;
        Ok(dataset)
    }
}

impl DataFlags {
    /// The files.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.data.iter().map(|file| file.path.as_path())
    }

    /// The files, for the settings.
    pub(super) fn shown(&self) -> Value {
        self.data.iter().map(NamedFile::shown).collect()
    }

    /// Length limits, for the settings.
    pub(super) fn settings(&self, recipe: &Recipe) -> [(String, Value); 3] {
        let limits = self.limits.with_defaults(recipe);
        [
            ("max_source_length".to_owned(), json!(limits.max_source_length)),
            ("max_target_length".to_owned(), json!(limits.max_target_length)),
            ("overlong".to_owned(), json!(spelling(limits.overlong))),
        ]
    }

    /// The first file, for messages about all.
    pub(super) fn first(&self) -> &Path {
        &self.data[0].path // clap asks for one.
    }

    /// The rows of all files.
    pub(super) fn read(&self, targets: Targets) -> Result<Vec<DataFile>> {
        self.read_files(&self.data, targets)
    }

    /// The rows of other files with the same columns.
    pub(super) fn read_files(
        &self,
        files: &[NamedFile],
        targets: Targets,
    ) -> Result<Vec<DataFile>> {
        let several = files.len() > 1;
        let mut stems = HashSet::new();
        files
            .iter()
            .map(|NamedFile { path, task }| {
                let mut file = self.read_file(path, targets)?;
                if let Some(task) = task {
                    file.name_task(task); // Of two files of one name it is meant so.
                } else if let Some(stem) = path.file_stem().filter(|_| several)
                    && file.name_task(&stem.to_string_lossy()) > 0
                    && !stems.insert(stem)
                {
                    return Err(Error::file(
                        path,
                        "another data file has the same name, so the rows of both would be one task: give rows a field task, name the file's with NAME=FILE, or rename the file",
                    ));
                }
                Ok(file)
            })
            .collect()
    }

    fn read_file(&self, path: &Path, targets: Targets) -> Result<DataFile> {
        let columns = Columns {
            input: self.input_column.clone(),
            target: self.target_column.clone(),
            task: self.task_column.clone(),
        };
        let rows = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("parquet")) {
            read_parquet(path, targets, &columns)?
        } else if csv::is_csv(path) {
            csv::read_csv(path, targets, &columns)?
        } else {
            RowReader::open(path, targets)?.with_columns(columns).collect::<Result<_>>()?
        };
        Ok(DataFile { path: path.to_path_buf(), rows })
    }

    /// The rows of files as examples, one file after the other.
    pub(super) fn encode(
        &self,
        files: Vec<DataFile>,
        recipe: &Recipe,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        routes: Option<Routes<'_>>,
        targets: Targets,
    ) -> Result<Dataset> {
        let limits = self.limits.with_defaults(recipe);
        let mut all = Dataset::default();
        for DataFile { path, rows } in files {
            all.extend(limits.encode(rows, &path, model, tokenizer, routes, targets)?);
        }
        Ok(all)
    }

    /// The wrong choices of each row of a data set: what its field `choices` (texts) or `choice_ids`
    /// (lists of ids) has beside the target. `evaluating` passes over fields that are something else; learning from choices
    /// does not.
    pub(super) fn choices(
        &self,
        data: &Dataset,
        recipe: &Recipe,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        routes: Option<Routes<'_>>,
        evaluating: bool,
    ) -> Result<Choices> {
        let mut limits = self.limits.with_defaults(recipe);
        if limits.overlong == OverlongFlag::Skip {
            limits.overlong = OverlongFlag::Truncate; // Rows that are too long are gone; a choice stays.
        }
        limits.cache_dir = None; // It is opened for each row here.
        let (mut n_unusable, mut n_equal) = (0, 0);
        let mut wrong = Vec::with_capacity(data.rows.len());
        for (i, (row, example)) in data.rows.iter().zip(&data.examples).enumerate() {
            let path = data.path_of(i).unwrap_or(self.first());
            let choices = match row_choices(row) {
                Ok(choices) => choices,
                Err(_) if evaluating => {
                    n_unusable += 1;
                    vec![]
                }
                Err(detail) => {
                    return Err(Error::Line { path: path.to_path_buf(), line: row.line, detail });
                }
            };
            let others = choices.into_iter().filter(|choice| Some(choice) != row.target.as_ref());
            let rows: Vec<Row> =
                others.map(|choice| Row { target: Some(choice), ..row.clone() }).collect();
            let mut examples = if rows.is_empty() {
                Vec::new()
            } else {
                limits.quietly(rows, path, model, tokenizer, routes, Targets::Required)?.examples
            };
            let n = examples.len();
            examples.retain(|choice| choice.labels != example.labels);
            n_equal += n - examples.len();
            wrong.push(examples);
        }
        if n_unusable > 0 {
            tracing::warn!(
                "{n_unusable} rows are not ranked: their choices are no list of texts (choices) or of ids (choice_ids) that has the target"
            );
        }
        if n_equal > 0 {
            tracing::warn!(
                "{n_equal} choices are left out: their ids are those of the answer, as far as --max-target-length lets them differ"
            );
        }
        Ok(Choices { wrong })
    }

    /// Reads and encodes the data for an adapter's tasks, or without tasks.
    pub(super) fn load(
        &self,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        routes: Option<Routes<'_>>,
        targets: Targets,
    ) -> Result<Dataset> {
        let files = self.read(targets)?;
        self.encode(files, &Recipe::default(), model, tokenizer, routes, targets)
    }
}

#[cfg(feature = "parquet")]
use crate::formats::parquet::read_parquet;

#[cfg(not(feature = "parquet"))]
fn read_parquet(path: &Path, _: Targets, _: &Columns) -> Result<Vec<Row>> {
    Err(Error::file(
        path,
        "Parquet is not built in: cargo build --release --features parquet, or convert the file to JSONL",
    ))
}

/// What a row's field `choices` or `choice_ids` lists; what is wrong with it otherwise.
fn row_choices(row: &Row) -> Result<Vec<Sequence>, String> {
    let lists = |key: &str| match row.raw.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(items)) => Ok(Some(items)),
        Some(_) => Err(format!("field {key}: expected a list")),
    };
    let ids = |item: &Value| -> Option<Vec<u32>> {
        item.as_array()?.iter().map(|id| id.as_u64().and_then(|id| id.try_into().ok())).collect()
    };
    let mut choices = Vec::new();
    for item in lists("choices")?.into_iter().flatten() {
        let text = item.as_str().ok_or("field choices: expected texts")?;
        choices.push(Sequence::Text(text.to_owned()));
    }
    for item in lists("choice_ids")?.into_iter().flatten() {
        choices.push(Sequence::Ids(ids(item).ok_or("field choice_ids: expected lists of ids")?));
    }
    if choices.iter().any(Sequence::is_empty) {
        return Err("a choice is empty".to_owned());
    }
    if !choices.is_empty() && row.target.as_ref().is_some_and(|target| !choices.contains(target)) {
        return Err("the target is none of the choices".to_owned());
    }
    Ok(choices)
}
