//! `report`: a run's folder in, one HTML page out.

use std::{fs, io::Write, path::PathBuf};

use clap::Args;
use serde_json::{Map, Value};

use super::{Common, print, print_json};
use crate::{
    error::{Error, Result},
    formats::{adapter::AdapterFiles, json::read_json, safetensors::write_atomically},
    report::page,
};

#[derive(Args)]
pub(super) struct Report {
    #[command(flatten)]
    pub(super) common: Common,
    /// The run's folder.
    output_dir: PathBuf,
    /// The page [default: report.html in the run's folder].
    #[arg(long)]
    output: Option<PathBuf>,
}

impl Report {
    pub(super) fn run(&self) -> Result<()> {
        self.common.cpu_only("report")?;
        let dir = &self.output_dir;
        let files = AdapterFiles::open(dir)?;
        let path = dir.join("log.jsonl");
        let text = fs::read_to_string(&path).map_err(Error::io("open", &path))?;
        let mut log: Vec<Value> = Vec::new();
        for (i, line) in text.lines().enumerate() {
            match serde_json::from_str(line) {
                Ok(line) => log.push(line),
                // The last line of a run that was killed may be cut off.
                Err(_) if i + 1 == text.lines().count() => {}
                Err(error) => {
                    return Err(Error::Line { path, line: i + 1, detail: error.to_string() });
                }
            }
        }
        let settings: Map<String, Value> = read_json(&dir.join("config.json"), 64 << 20)?;
        let n_tasks = files.config.n_tasks;
        let task_names = match &files.tasks {
            Some(tasks) => tasks.filled(n_tasks),
            None => (0..n_tasks).map(|id| id.to_string()).collect(),
        };
        let name = dir
            .file_name()
            .map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned());
        let html = page::html(&page::Run {
            name: &name,
            log: &log,
            settings: &settings,
            adapter: (&files.config, &files.modules),
            task_names: &task_names,
        });
        let output = self.output.clone().unwrap_or_else(|| dir.join("report.html"));
        write_atomically(&output, |file| file.write_all(html.as_bytes()))?;
        if self.common.json {
            return print_json(
                &serde_json::json!({"output": super::shown(&output), "n_bytes": html.len()}),
            );
        }
        print(&format!("{}", output.display()))
    }
}
