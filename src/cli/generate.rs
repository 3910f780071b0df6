//! `generate`: an output for every row.

use std::{io::Write, path::PathBuf, time::Instant};

use clap::Args;
use serde_json::Value;

use super::{
    Common, Described, adapters::AdapterFlags, check_writable, data, print, print_json,
    run_on_device,
};
use crate::{
    error::{Error, Result},
    formats::{rows::Targets, safetensors::write_atomically},
    generate::{Engine, GenerateOptions},
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
    /// The most tokens of an output.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    max_new_tokens: u32,
    /// No end token before this many.
    #[arg(long, default_value_t = 0)]
    min_new_tokens: u32,
    /// Beams. Only greedy search (1) is there.
    #[arg(long, default_value_t = 1)]
    num_beams: usize,
    /// Rows that are computed together.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
}

impl Generate {
    pub(super) fn run(&self) -> Result<()> {
        if self.num_beams != 1 {
            return Err(Error::Usage(format!(
                "--num-beams {}: only greedy search (1) is there",
                self.num_beams
            )));
        }
        if self.min_new_tokens > self.max_new_tokens {
            return Err(Error::Usage(format!(
                "--min-new-tokens {} is more than --max-new-tokens {}",
                self.min_new_tokens, self.max_new_tokens
            )));
        }
        check_writable(&self.output)?;
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        let opened = self.adapters.open(&model)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let (adapter, routes) = (&opened.adapter, opened.routes());
        let data = self.data.load(&model, tokenizer.as_ref(), routes, Targets::Optional)?;
        let capacity = self.batch_size as usize;
        let engine = Engine::for_examples(&model, adapter.as_ref(), &data.examples, capacity)?;
        let options = GenerateOptions {
            max_new_tokens: self.max_new_tokens as usize,
            min_new_tokens: self.min_new_tokens as usize,
        };
        let examples: Vec<&Example> = data.examples.iter().collect();
        let bar = self.common.progress(examples.len() as u64);
        let started = Instant::now();
        let mut outputs = Vec::with_capacity(examples.len());
        for chunk in examples.chunks(capacity) {
            outputs.extend(engine.generate(chunk, &options, |_, _| ()));
            bar.inc(chunk.len() as u64);
        }
        bar.finish_and_clear();
        model.verify_unchanged()?;
        let seconds = started.elapsed().as_secs_f64();

        let mut lines = Vec::with_capacity(outputs.len());
        for (row, ids) in data.rows.iter().zip(&outputs) {
            let mut fields = row.raw.clone();
            if let Some(tokenizer) = &tokenizer {
                fields.insert("output".into(), Value::from(tokenizer.decode(ids, true)?));
            }
            fields.insert("output_ids".into(), Value::from(ids.clone()));
            lines.push(Value::Object(fields));
        }
        write_atomically(&self.output, |file| {
            lines.iter().try_for_each(|line| writeln!(file, "{line}"))
        })?;
        let n_tokens: usize = outputs.iter().map(Vec::len).sum();
        let tok_per_s = n_tokens as f64 / seconds;
        if self.common.json {
            return print_json(&serde_json::json!({
                "n_rows": outputs.len(), "n_tokens": n_tokens, "seconds": seconds,
                "tok_per_s": tok_per_s, "output": self.output,
            }));
        }
        print(&format!(
            "{} rows, {n_tokens} tokens in {seconds:.1} s ({tok_per_s:.0} tokens/s): {}",
            outputs.len(),
            self.output.display()
        ))
    }
}
