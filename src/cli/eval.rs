//! `eval`: loss, exact match and Rouge-L.

use std::{io::Write, path::PathBuf};

use clap::Args;

use super::{
    Common, Described, Invariance, OnOff,
    adapters::AdapterFlags,
    data, print_json,
    results::{ResultFlags, Sources},
    run_on_device,
};
use crate::{
    error::{Error, Result},
    formats::{rows::Targets, safetensors::write_atomically, tasks::TaskNames},
    generate::{Engine, GenerateOptions},
    model::Model,
    train::{
        evaluate::{Decode, evaluate},
        recipe::Recipe,
    },
};

#[derive(Args)]
pub(super) struct Eval {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    adapters: AdapterFlags,
    #[command(flatten)]
    data: data::DataFlags,
    /// Writes a line of JSON a row: nll and n_tokens.
    #[arg(long)]
    per_example: Option<PathBuf>,
    /// Writes the scores of each task as a table in Markdown.
    #[arg(long)]
    markdown: Option<PathBuf>,
    #[command(flatten)]
    results: ResultFlags,
    /// Whether outputs are generated and scored; without, exact_match and rouge_l are null.
    #[arg(long, default_value = "on")]
    generate: OnOff,
    #[command(flatten)]
    outputs: Outputs,
    /// Rows that are computed together.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    #[command(flatten)]
    invariance: Invariance,
}

/// How the outputs that are scored are generated, whatever the model's folder asks for.
#[derive(Args)]
pub(super) struct Outputs {
    /// The most tokens of an output that is scored [default: 128].
    #[arg(
        long, visible_alias = "generation-max-length",
        value_parser = clap::value_parser!(u32).range(1..=1 << 16)
    )]
    max_new_tokens: Option<u32>,
    /// Sequences that a beam search for such an output follows [default: 1, no search].
    #[arg(
        long, visible_alias = "generation-num-beams",
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    num_beams: Option<u32>,
}

impl Outputs {
    pub(super) fn options(&self) -> GenerateOptions {
        let own = GenerateOptions::default();
        let size = |flag: Option<u32>, or: usize| flag.map_or(or, |n| n as usize);
        GenerateOptions {
            max_new_tokens: size(self.max_new_tokens, own.max_new_tokens),
            num_beams: size(self.num_beams, own.num_beams),
            ..own
        }
    }

    /// The first of the flags that was given.
    pub(super) fn given(&self) -> Option<&'static str> {
        let given = [
            ("--max-new-tokens", self.max_new_tokens.is_some()),
            ("--num-beams", self.num_beams.is_some()),
        ];
        given.into_iter().find_map(|(flag, is_given)| is_given.then_some(flag))
    }
}

impl Eval {
    pub(super) fn run(&self) -> Result<()> {
        let outputs: Vec<&PathBuf> = self.per_example.iter().chain(&self.markdown).collect();
        let sources = Sources { model: &self.model, adapters: &self.adapters, data: &self.data };
        self.results.check(&outputs, &sources)?;
        run_on_device!(self, &self.model)
    }

    fn run_on<B: Described>(&self, model: Model<B>) -> Result<()> {
        let opened = self.adapters.open(&model)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let (adapter, routes) = (&opened.adapter, opened.routes());
        let data = self.data.load(&model, tokenizer.as_ref(), routes, Targets::Required)?;
        let recipe = Recipe::default();
        let choices =
            self.data.choices(&data, &recipe, &model, tokenizer.as_ref(), routes, true)?;
        let engine = Engine::for_examples(
            &model,
            adapter.as_ref(),
            &data.examples,
            self.batch_size as usize,
        )?;
        let options = self.outputs.options();
        let evaluation = evaluate(
            &engine,
            &data,
            self.generate.is_on().then_some(&options),
            tokenizer.as_ref().map(|t| t as &dyn Decode),
            Some(&choices),
            |row, example| match (&opened.tasks, &row.task, row.task_id) {
                (Some(tasks), ..) if example.mixing.is_none() => {
                    task_name(Some(tasks), example.task)
                }
                (_, Some(name), _) => name.clone(),
                (_, None, Some(id)) => task_name(opened.tasks.as_ref(), id),
                (_, None, None) => "none".to_owned(),
            },
        )?;
        model.verify_unchanged()?;
        let loss = evaluation.overall.loss;
        if !loss.is_finite() {
            let names: Vec<&str> = (evaluation.tasks.iter())
                .filter(|(_, task)| !task.loss.is_finite())
                .map(|(name, _)| name.as_str())
                .collect();
            return Err(Error::NotFinite(format!(
                "the loss is {loss} (tasks {}): the base or the adapter has values that are not finite, or too large ones",
                names.join(", ")
            )));
        }
        if let Some(path) = &self.per_example {
            write_atomically(path, |file| {
                data.in_order().try_for_each(|(_, place)| {
                    let (nll, n_tokens) = place.map(|place| evaluation.rows[place]).unzip();
                    writeln!(file, "{}", serde_json::json!({"nll": nll, "n_tokens": n_tokens}))
                })
            })?;
        }
        if let Some(path) = &self.markdown {
            write_atomically(path, |file| file.write_all(evaluation.markdown().as_bytes()))?;
        }
        print_json(&evaluation)
    }
}

/// The name of a task, else its number.
pub(super) fn task_name(tasks: Option<&TaskNames>, task: u32) -> String {
    tasks.and_then(|tasks| tasks.name(task)).map_or_else(|| task.to_string(), str::to_owned)
}
