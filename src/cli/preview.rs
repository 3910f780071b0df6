//! `preview`: what the model will see of a data file.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{
    Common,
    data::{self, DataFile},
    print, print_json,
};
use crate::{
    error::Result,
    formats::{rows::Targets, tasks::TaskNames},
    model::dataset::Routes,
    train::recipe::Recipe,
};

#[derive(Args)]
pub(super) struct Preview {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model's folder.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: data::DataFlags,
    /// Rows of each file.
    #[arg(short, long = "num-rows", default_value_t = 3)]
    n: usize,
}

impl Preview {
    pub(super) fn run(&self) -> Result<()> {
        self.common.cpu_only("preview")?;
        let model = self.common.open_model(&self.model)?;
        let tokenizer = data::open_tokenizer(&model)?;
        let mut files = self.data.read(Targets::Optional)?;
        let all = files.iter().flat_map(DataFile::located);
        let (n_rows, found) = (all.clone().count(), TaskNames::from_rows(all)?);
        for file in &mut files {
            file.rows.truncate(self.n.max(1)); // Of each file, so that each can be judged.
            for row in &mut file.rows {
                row.target = row.target.take().filter(|target| !target.is_empty()); // As generate reads it: a prompt alone.
            }
        }
        // Without a task in the data there is none to show.
        let tasks = (found.n_tasks() > 0).then_some(&found);
        let data = self.data.encode(
            files,
            &Recipe::default(),
            &model,
            tokenizer.as_ref(),
            tasks.map(Routes::tasks),
            Targets::Required,
        )?;
        let text = |ids: &[u32]| -> Result<Vec<String>> {
            ids.iter()
                .map(|&id| match &tokenizer {
                    Some(tokenizer) => Ok(tokenizer.token(id).unwrap_or_else(|| id.to_string())),
                    None => Ok(id.to_string()),
                })
                .collect()
        };
        for (row, example) in data.rows.iter().zip(&data.examples) {
            let task = tasks.map(|tasks| super::eval::task_name(Some(tasks), example.task));
            if self.common.json {
                print_json(&json!({
                    "line": row.line, "task": task, "task_id": tasks.map(|_| example.task),
                    "input_ids": example.input, "label_ids": example.labels,
                    "input_tokens": text(&example.input)?, "label_tokens": text(&example.labels)?,
                }))?;
                continue;
            }
            let task = task
                .map_or_else(String::new, |name| format!(", task {name} (id {})", example.task));
            print(&format!("line {}{task}", row.line))?;
            print(&format!(
                "  input, {} tokens, masked (no loss):\n    {}",
                example.input.len(),
                text(&example.input)?.join(" ")
            ))?;
            if row.target.is_none() {
                print("  no target: a prompt for generate")?;
                continue;
            }
            print(&format!(
                "  labels, {} tokens, the loss is on these:\n    {}",
                example.labels.len(),
                text(&example.labels)?.join(" ")
            ))?;
        }
        if self.common.json {
            return print_json(
                &json!({"n_rows": n_rows, "n_tasks": found.n_tasks(), "n_truncated": data.n_truncated}),
            );
        }
        print(&format!(
            "{n_rows} rows, {} tasks; {} of those shown were cut",
            found.n_tasks(),
            data.n_truncated
        ))
    }
}
