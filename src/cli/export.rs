//! `export`: one mixture of an adapter as a plain LoRA folder, or merged into the base.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{Common, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{
        adapter::AdapterFiles,
        checkpoint::Checkpoint,
        config::ModelConfig,
        folder::{check_free, write_folder},
        lora::save_lora,
        tasks::TaskNames,
    },
    generate::Engine,
    kernels::{
        Backend,
        cpu::Cpu,
        philox::{Key, Purpose},
    },
    model::{
        Adapter, Example, Layout, Mixing, Model,
        lora::mixed,
        merge::{Merged, write_merged},
    },
};

#[derive(Args)]
pub(super) struct Export {
    #[command(flatten)]
    pub(super) common: Common,
    /// The adapter's folder; it stays as it is.
    #[arg(long)]
    adapter: PathBuf,
    /// The base model's folder. With it the adapter's logits and those of what was written are compared,
    /// on 8 rows of random ids (from --seed), and the largest difference is printed [default: the one that the adapter's
    /// base_model_name_or_path names, where that is a folder here].
    #[arg(long)]
    model: Option<PathBuf>,
    /// The task, by name or id [default: the only one].
    #[arg(long, conflicts_with = "routing")]
    task: Option<String>,
    /// Another mixture, as rows have it: average, '{"weights": [0.5, 0.5]}' or '{"blend": {"a": 1, "b": 3}}'.
    #[arg(long)]
    routing: Option<String>,
    /// Write the base with the mixture merged into its weights, instead of a LoRA.
    #[arg(long, requires = "model")]
    merged: bool,
    /// Where the folder goes; nothing is overwritten.
    #[arg(long)]
    output_dir: PathBuf,
}

/// The rows that a comparison runs on.
const N_ROWS: usize = 8;

/// How far two engines are from each other.
struct Deviation {
    n_logits: usize,
    logit: f64,
    largest_logit: f64,
    nll: f64,
}

impl Export {
    pub(super) fn run(&self) -> Result<()> {
        self.common.cpu_only("export")?;
        check_free(&self.output_dir)?;
        let files = AdapterFiles::open(&self.adapter)?;
        let tasks = files.tasks.clone().unwrap_or_else(|| TaskNames::unnamed(files.config.n_tasks));
        let (mixing, routing) = self.mixing(&files, &tasks)?;
        // The base first: an adapter of another one is refused before anything is written.
        let opened = match &self.model {
            Some(dir) => Some(self.open(dir)?),
            None => self.open_named(files.config.base_model_name_or_path.as_deref()),
        };
        let (mut lora, pairs) = mixed(&files, &mixing);
        if let (None, Some(dir)) = (&lora.base_model_name_or_path, &self.model) {
            lora.base_model_name_or_path = Some(dir.to_string_lossy().into_owned());
        }
        let merged = write_folder(&self.output_dir, |dir| match (&self.model, self.merged) {
            (Some(model), true) => {
                let checkpoint = Checkpoint::open_with(model, self.common.access())?;
                let transposed = matches!(ModelConfig::open(model)?, ModelConfig::Gpt2(_));
                let scale = 1.0 / lora.r as f64;
                write_merged(&checkpoint, &pairs, scale, transposed, dir).map(Some)
            }
            _ => save_lora(dir, &lora, &pairs).map(|()| None),
        })?;
        let deviation = match &opened {
            None => None,
            Some((model, adapter)) => {
                let rows = self.rows(model, &mixing);
                let routed = Engine::for_examples(model, Some(adapter), &rows, N_ROWS)?;
                Some(if self.merged {
                    let other = self.common.open_model(&self.output_dir)?;
                    let merged = Engine::for_examples(&other, None, &rows, N_ROWS)?;
                    compare((&routed, &rows), (&merged, &rows))
                } else {
                    let lora = Adapter::open_lora(model, &self.output_dir)?;
                    // A LoRA has one task and no mixture.
                    let plain: Vec<Example> =
                        rows.iter().map(|row| Example { mixing: None, ..row.clone() }).collect();
                    let exported = Engine::for_examples(model, Some(&lora), &plain, N_ROWS)?;
                    compare((&routed, &rows), (&exported, &plain))
                })
            }
        };
        if let Some((model, _)) = &opened {
            model.verify_unchanged()?;
        }
        self.say(&files, &routing, pairs.len(), merged.as_ref(), deviation.as_ref())
    }

    /// A base, and the adapter on it.
    fn open(&self, base: &Path) -> Result<(Model, Adapter<Cpu>)> {
        let model = self.common.open_model(base)?;
        let adapter = Adapter::open(&model, &self.adapter)?;
        Ok((model, adapter))
    }

    /// The base that the adapter names, if it is here. Nobody asked for it, so it need not be one.
    fn open_named(&self, name: Option<&str>) -> Option<(Model, Adapter<Cpu>)> {
        let dir = name.map(Path::new).filter(|dir| dir.is_dir())?;
        match self.open(dir) {
            Ok(opened) => {
                tracing::info!("comparing on {}, the base that the adapter names", dir.display());
                Some(opened)
            }
            Err(error) => {
                tracing::warn!("not comparing on the base that the adapter names: {error}");
                None
            }
        }
    }

    /// What is mixed, and how the flags say it.
    fn mixing(&self, files: &AdapterFiles, tasks: &TaskNames) -> Result<(Mixing, Value)> {
        let n_tasks = files.config.n_tasks;
        let (flag, value) = match (&self.task, &self.routing) {
            (Some(task), _) => ("--task", json!({"task": task})),
            (None, Some(text)) => {
                let value = serde_json::from_str(text).unwrap_or_else(|_| text.as_str().into());
                ("--routing", value)
            }
            (None, None) if n_tasks == 1 => return Ok((Mixing::Task(0), json!({"task": 0}))),
            (None, None) => {
                return Err(Error::Usage(format!(
                    "the adapter has {n_tasks} tasks: name one with --task, or a mixture with --routing"
                )));
            }
        };
        let mixing = Mixing::parse(&value, tasks, &files.config)
            .map_err(|detail| Error::Usage(format!("{flag}: {detail}")))?;
        Ok((mixing, value))
    }

    /// Rows of random ids.
    fn rows(&self, model: &Model<impl Backend>, mixing: &Mixing) -> Vec<Example> {
        let key = Key::new(self.common.seed, Purpose::Data, 2);
        let n_ids = model.vocab_size() as u64;
        let mut draw = 0;
        let mut ids = |n: usize| -> Vec<u32> {
            (0..n)
                .map(|_| {
                    draw += 1;
                    ((u64::from(key.word(draw)) * n_ids) >> 32) as u32
                })
                .collect()
        };
        let room = model.config().max_positions().unwrap_or(usize::MAX);
        let (n_input, n_labels) = match model.layout() {
            Layout::Causal => (24.min(room / 2).max(1), 8.min(room / 2).max(1)),
            Layout::EncoderDecoder { .. } => (24.min(room), 8.min(room)),
        };
        (0..N_ROWS)
            .map(|_| Example {
                input: ids(n_input),
                labels: ids(n_labels),
                task: 0,
                mixing: Some(mixing.clone()),
            })
            .collect()
    }

    fn say(
        &self,
        files: &AdapterFiles,
        routing: &Value,
        n_linears: usize,
        merged: Option<&Merged>,
        deviation: Option<&Deviation>,
    ) -> Result<()> {
        let dir = self.output_dir.display();
        if let Some(merged) = merged
            && !merged.left.is_empty()
        {
            tracing::info!("not copied: {}", merged.left.join(", "));
        }
        if self.common.json {
            return print_json(&json!({
                "kind": if merged.is_some() { "merged" } else { "lora" },
                "output_dir": self.output_dir,
                "routing": routing,
                "linears": n_linears,
                "r": files.config.r,
                "tensors_merged": merged.map(|m| m.n_merged),
                "tensors_kept": merged.map(|m| m.n_kept),
                "files_copied": merged.map(|m| m.copied.clone()),
                "deviation": deviation.map_or(Value::Null, |d| json!({
                    "rows": N_ROWS, "logits": d.n_logits, "max_logit_difference": d.logit,
                    "max_logit": d.largest_logit, "max_nll_difference": d.nll,
                })),
            }));
        }
        match merged {
            Some(Merged { n_merged, n_kept, .. }) => print(&format!(
                "{dir}: the base with {n_merged} weights merged, {n_kept} tensors as they were"
            ))?,
            None => print(&format!(
                "{dir}: a LoRA of {n_linears} linears, r {}, lora_alpha 1",
                files.config.r
            ))?,
        }
        match deviation {
            Some(Deviation { n_logits, logit, largest_logit, nll }) => print(&format!(
                "compared with the adapter on {N_ROWS} rows of random ids: largest difference of {n_logits} logits {logit:.3e} (largest logit {largest_logit:.3e}), of a row's nll {nll:.3e}"
            )),
            None => print("not compared with the adapter: that needs --model"),
        }
    }
}

/// The differences of two engines, each on its own form of the same rows.
fn compare<B: Backend>(
    (one, rows): (&Engine<'_, B>, &[Example]),
    (other, other_rows): (&Engine<'_, B>, &[Example]),
) -> Deviation {
    let mut deviation = Deviation { n_logits: 0, logit: 0.0, largest_logit: 0.0, nll: 0.0 };
    for (row, other_row) in rows.iter().zip(other_rows) {
        let (logits, others) = (one.logits(row), other.logits(other_row));
        deviation.n_logits += logits.len();
        for (a, b) in logits.iter().zip(&others) {
            deviation.logit = deviation.logit.max((a - b).abs());
            deviation.largest_logit = deviation.largest_logit.max(a.abs());
        }
        let nll = |engine: &Engine<'_, B>, row: &Example| engine.nll(&[row])[0].iter().sum::<f64>();
        deviation.nll = deviation.nll.max((nll(one, row) - nll(other, other_row)).abs());
    }
    deviation
}
