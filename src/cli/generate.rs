//! `generate`: an output for every row.

use std::{
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::{
    Common, Described, Invariance, OnOff,
    adapters::AdapterFlags,
    data, print, print_json,
    results::{ResultFlags, Sources},
    run_on_device,
};
use crate::{
    error::{Error, Result},
    formats::{
        config::{GENERATION_FILE, GenerationDefaults},
        rows::Targets,
        safetensors::write_atomically,
    },
    generate::{EarlyStopping, Engine, GenerateOptions, Generated},
    model::{Example, Model},
};

#[derive(Args)]
pub(super) struct Generate {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    adapters: AdapterFlags,
    #[command(flatten)]
    data: data::DataFlags,
    /// Where the rows go, each with output and output_ids.
    #[arg(long)]
    output: PathBuf,
    #[command(flatten)]
    results: ResultFlags,
    #[command(flatten)]
    choice: Choice,
    /// Rows that are computed together.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    #[command(flatten)]
    invariance: Invariance,
}

/// How tokens are chosen: transformers' names. What is not given is as `generation_config.json` of the
/// model says, else greedy.
#[derive(Args)]
struct Choice {
    /// The most tokens of an output [default: 128].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    max_new_tokens: Option<u32>,
    /// No end token before this many [default: 0].
    #[arg(long)]
    min_new_tokens: Option<u32>,
    /// Sequences that a beam search follows [default: 1, no search].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    num_beams: Option<u32>,
    /// Sequences for each row [default: 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    num_return_sequences: Option<u32>,
    /// Exponent of the length by which a beam's score is divided [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    length_penalty: Option<f64>,
    /// When a beam search ends: false, true (as soon as there are enough sequences) or never (when no
    /// beam can become better) [default: false].
    #[arg(long)]
    early_stopping: Option<EarlyStoppingFlag>,
    /// Draws tokens [default: off].
    #[arg(long, num_args = 0..=1, default_missing_value = "on")]
    do_sample: Option<OnOff>,
    /// Divides the scores before a draw [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Draws among this many of the most probable tokens; 0: all [default: 50].
    #[arg(long)]
    top_k: Option<u32>,
    /// Draws among the most probable tokens that together have this probability [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Draws among tokens of at least this share of the largest probability [default: 0].
    #[arg(long, allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Divides the scores of tokens that were there before [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// No so many tokens in a row occur twice; 0: they may [default: 0].
    #[arg(long)]
    no_repeat_ngram_size: Option<u32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum EarlyStoppingFlag {
    #[value(aliases = ["False", "FALSE"])]
    False,
    #[value(aliases = ["True", "TRUE"])]
    True,
    #[value(aliases = ["Never", "NEVER"])]
    Never,
}

impl Choice {
    fn options<B: Described>(&self, model: &Model<B>, seed: u64) -> Result<GenerateOptions> {
        let generation = model.generation();
        let own = model.dir().join(GENERATION_FILE);
        let path = if own.exists() { own } else { model.dir().join("config.json") };
        if let [key, ..] = &generation.unsupported[..] {
            return Err(Error::file(
                path,
                format!("field {key} would change the outputs and is not supported; remove it"),
            ));
        }
        let size = |flag: Option<u32>, or: usize| flag.map_or(or, |n| n as usize);
        let own = GenerateOptions::of_model(generation);
        let min_new_tokens = match (self.min_new_tokens, self.max_new_tokens) {
            // A limit that is given wins over the model's own least length.
            (None, Some(max)) => own.min_new_tokens.min(max as usize),
            (given, _) => size(given, own.min_new_tokens),
        };
        let options = GenerateOptions {
            max_new_tokens: size(self.max_new_tokens, own.max_new_tokens),
            min_new_tokens,
            max_length: if self.max_new_tokens.is_some() { usize::MAX } else { own.max_length },
            min_length: if self.min_new_tokens.is_some() { 0 } else { own.min_length },
            num_beams: size(self.num_beams, own.num_beams),
            num_return_sequences: size(self.num_return_sequences, own.num_return_sequences),
            length_penalty: self.length_penalty.unwrap_or(own.length_penalty),
            early_stopping: match self.early_stopping {
                None => own.early_stopping,
                Some(EarlyStoppingFlag::False) => EarlyStopping::No,
                Some(EarlyStoppingFlag::True) => EarlyStopping::Yes,
                Some(EarlyStoppingFlag::Never) => EarlyStopping::Never,
            },
            do_sample: self.do_sample.map_or(own.do_sample, OnOff::is_on),
            temperature: self.temperature.unwrap_or(own.temperature),
            top_k: size(self.top_k, own.top_k),
            top_p: self.top_p.unwrap_or(own.top_p),
            min_p: self.min_p.unwrap_or(own.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(own.repetition_penalty),
            no_repeat_ngram_size: size(self.no_repeat_ngram_size, own.no_repeat_ngram_size),
            seed,
        };
        options.check().map_err(|error| self.with_origin(error, &generation.defaults, &path))?;
        Ok(options)
    }

    /// What is wrong with the options, and which of those that are named nobody gave: they are of the model's file.
    fn with_origin(&self, error: Error, of_file: &GenerationDefaults, path: &Path) -> Error {
        let Error::Usage(mut detail) = error else { return error };
        let Self { do_sample, num_beams, num_return_sequences, min_new_tokens, .. } = self;
        let is_more = |n: Option<usize>| n.is_some_and(|n| n > 1);
        let origins = [
            ("do_sample", do_sample.is_none() && of_file.do_sample == Some(true), "off"),
            ("num_beams", num_beams.is_none() && is_more(of_file.num_beams), "1"),
            (
                "num_return_sequences",
                num_return_sequences.is_none() && is_more(of_file.num_return_sequences),
                "1",
            ),
            ("min_new_tokens", min_new_tokens.is_none() && of_file.min_new_tokens.is_some(), "0"),
            ("temperature", self.temperature.is_none() && of_file.temperature.is_some(), "1"),
            ("top_p", self.top_p.is_none() && of_file.top_p.is_some(), "1"),
            ("min_p", self.min_p.is_none() && of_file.min_p.is_some(), "0"),
            (
                "repetition_penalty",
                self.repetition_penalty.is_none() && of_file.repetition_penalty.is_some(),
                "1",
            ),
            (
                "length_penalty",
                self.length_penalty.is_none() && of_file.length_penalty.is_some(),
                "1",
            ),
        ];
        let message = detail.clone();
        for (key, is_of_file, neutral) in origins {
            let flag = format!("--{}", key.replace('_', "-"));
            if is_of_file && message.contains(&flag) {
                let key =
                    if key == "min_new_tokens" { "min_new_tokens or min_length" } else { key };
                detail += &format!(
                    "; {key} comes from {}, and {flag} {neutral} wins over it",
                    path.display()
                );
            }
        }
        Error::Usage(detail)
    }
}

impl Generate {
    pub(super) fn run(&self) -> Result<()> {
        let sources = Sources { model: &self.model, adapters: &self.adapters, data: &self.data };
        self.results.check(&[&self.output], &sources)?;
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        let options = self.choice.options(&model, self.common.seed)?;
        let opened = self.adapters.open(&model)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let (adapter, routes) = (&opened.adapter, opened.routes());
        let data = self.data.load(&model, tokenizer.as_ref(), routes, Targets::Optional)?;
        let capacity = self.batch_size as usize;
        let engine = Engine::for_examples(&model, adapter.as_ref(), &data.examples, capacity)?;
        let examples: Vec<&Example> = data.examples.iter().collect();
        let bar = self.common.progress(examples.len() as u64);
        let started = Instant::now();
        let mut seen = 0;
        let outputs = engine.generate_sequences(&examples, &options, |row, _| {
            // Rows begin in order, so a row's first token says that the ones before are under way.
            if row >= seen {
                bar.inc((row + 1 - seen) as u64);
                seen = row + 1;
            }
        });
        bar.finish_and_clear();
        model.verify_unchanged()?;
        let seconds = started.elapsed().as_secs_f64();

        let mut lines = Vec::with_capacity(outputs.len() + data.n_skipped);
        for (row, place) in data.in_order() {
            let Some(sequences) = place.map(|place| &outputs[place]) else {
                let mut fields = row.raw.clone();
                let text = tokenizer.is_some().then_some("output");
                let several = (options.num_return_sequences > 1).then_some("sequences");
                for name in text.into_iter().chain(["output_ids"]).chain(several) {
                    fields.insert(name.into(), Value::Null); // It was left out (--overlong skip).
                }
                lines.push(Value::Object(fields));
                continue;
            };
            let mut all = Vec::with_capacity(sequences.len());
            for Generated { ids, score } in sequences {
                let mut fields = Map::new();
                if let Some(tokenizer) = &tokenizer {
                    fields.insert("output".into(), Value::from(tokenizer.decode(ids, true)?));
                }
                fields.insert("output_ids".into(), Value::from(ids.clone()));
                if let Some(score) = score {
                    fields.insert("score".into(), Value::from(*score));
                }
                all.push(fields);
            }
            let mut fields = row.raw.clone();
            fields.extend(all.first().cloned().unwrap_or_default());
            if options.num_return_sequences > 1 {
                fields.insert("sequences".into(), all.into_iter().map(Value::Object).collect());
            }
            lines.push(Value::Object(fields));
        }
        write_atomically(&self.output, |file| {
            lines.iter().try_for_each(|line| writeln!(file, "{line}"))
        })?;
        let n_tokens: usize = outputs.iter().flatten().map(|sequence| sequence.ids.len()).sum();
        let tok_per_s = n_tokens as f64 / seconds;
        if self.common.json {
            return print_json(&serde_json::json!({
                "n_rows": outputs.len(), "n_tokens": n_tokens, "seconds": seconds,
                "tok_per_s": tok_per_s, "n_truncated": data.n_truncated,
                "n_skipped": data.n_skipped, "output": self.output,
            }));
        }
        print(&format!(
            "{} rows, {n_tokens} tokens in {seconds:.1} s ({tok_per_s:.0} tokens/s): {}",
            outputs.len(),
            self.output.display()
        ))
    }
}
