//! Data files and the flags about them, as `train`, `eval` and `generate` share them.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::{
    error::Result,
    formats::{
        rows::{Row, Targets},
        tasks::TaskNames,
        tokenizer::Tokenizer,
    },
    kernels::Backend,
    model::{
        Model,
        dataset::{Dataset, Encode, Encoding, Overlong, read_rows},
    },
    train::recipe::Recipe,
};

#[derive(Args)]
pub(super) struct DataFlags {
    /// JSONL rows.
    #[arg(long)]
    pub(super) data: PathBuf,
    #[command(flatten)]
    pub(super) limits: Limits,
}

/// Length limits.
#[derive(Args, Clone)]
pub(super) struct Limits {
    /// The most source tokens [default: 512 for text, none for ids].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_source_length: Option<u32>,
    /// The most label tokens [default: 128].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_target_length: Option<u32>,
    /// What happens to longer rows.
    #[arg(long, default_value = "truncate")]
    overlong: OverlongFlag,
}

#[derive(Clone, Copy, ValueEnum)]
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
    pub(super) fn with_defaults(&self, recipe: &Recipe) -> Self {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut limits = self.clone();
        limits.max_source_length = self.max_source_length.or(recipe.max_source_length.map(narrow));
        limits.max_target_length =
            self.max_target_length.or(Some(narrow(recipe.max_target_length)));
        limits
    }

    /// The rows of a file as examples. Says how many were cut or left out.
    pub(super) fn encode(
        &self,
        rows: Vec<Row>,
        path: &Path,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        tasks: Option<&TaskNames>,
        targets: Targets,
    ) -> Result<Dataset> {
        let eos_token_ids = &model.generation().eos_token_ids;
        let end = tokenizer.map(Tokenizer::end_token).transpose()?.flatten();
        let encoding = Encoding {
            tokenizer: tokenizer.map(|t| t as &dyn Encode),
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
            tasks,
            targets: targets == Targets::Required,
        };
        let dataset = Dataset::encode(rows, path, &encoding)?;
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
}

impl DataFlags {
    /// Reads and encodes the data file for an adapter's tasks, or without tasks.
    pub(super) fn load(
        &self,
        model: &Model<impl Backend>,
        tokenizer: Option<&Tokenizer>,
        tasks: Option<&TaskNames>,
        targets: Targets,
    ) -> Result<Dataset> {
        let rows = read_rows(&self.data, targets)?;
        self.limits.encode(rows, &self.data, model, tokenizer, tasks, targets)
    }
}
