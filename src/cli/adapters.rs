//! `--adapter` of `eval` and `generate`: none, one, or several with names.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::Value;

use super::named_path;
use crate::{
    error::{Error, Result},
    formats::{adapter::AdapterFiles, lora::is_lora, poly_config, tasks::TaskNames},
    kernels::Backend,
    model::{
        Adapter, Model,
        dataset::Routes,
        lora::lora_as_poly,
        routing::Routing,
        united::{Member, united},
    },
};

#[derive(Args)]
pub(super) struct AdapterFlags {
    /// The adapter's folder, Poly or plain LoRA [default: the base alone]. Of several (DIR, NAME=DIR, or
    /// a folder of named sub-folders) a row uses what its field `adapter` names, of a list the sum, of an
    /// empty list the base alone; without the field the first.
    #[arg(long, num_args = 1..)]
    adapter: Vec<PathBuf>,
    /// How rows are mixed that do not say it themselves, as a row's field `routing` says it: average, or
    /// JSON such as {"blend": {"a": 1, "b": 3}} [default: by their task].
    #[arg(long, requires = "adapter")]
    routing: Option<String>,
}

/// What was opened, and what rows may say of it.
pub(super) struct Opened<B: Backend> {
    pub(super) adapter: Option<Adapter<B>>,
    pub(super) tasks: Option<TaskNames>,
    members: Vec<Member>,
    /// For rows, where the adapter is a plain LoRA and has none.
    no_tasks: TaskNames,
    routing: Option<Value>,
}

impl<B: Backend> Opened<B> {
    /// What rows may say of routing.
    pub(super) fn routes(&self) -> Option<Routes<'_>> {
        let adapter = self.adapter.as_ref()?;
        Some(Routes {
            tasks: self.tasks.as_ref().unwrap_or(&self.no_tasks),
            mixes: Some(adapter.config()),
            members: &self.members,
            routing: self.routing.as_ref(),
        })
    }
}

impl AdapterFlags {
    /// The folders, as far as they are there.
    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        let named = self.adapter.iter().filter_map(|value| expand(value).ok()).flatten();
        named.map(|(_, dir)| dir).collect()
    }

    /// Opens them on a base.
    pub(super) fn open<B: Backend>(&self, base: &Model<B>) -> Result<Opened<B>> {
        let no_tasks = TaskNames::unnamed(1);
        let mut named: Vec<(String, PathBuf)> = Vec::new();
        for value in &self.adapter {
            named.extend(expand(value)?);
        }
        if let [(name, dir)] = &named[..] {
            let (adapter, tasks) = Adapter::open_any(base, dir)?;
            let routing = self.routing()?;
            if let (Some(_), None) = (&routing, &tasks) {
                return Err(Error::Usage(format!(
                    "--routing: {} is a plain LoRA, which mixes nothing",
                    dir.display()
                )));
            }
            let only = Member::alone(name.clone(), adapter.config().clone(), tasks.clone());
            let adapter = Some(adapter);
            return Ok(Opened { adapter, tasks, members: vec![only], no_tasks, routing });
        }
        if named.is_empty() {
            let members = Vec::new();
            return Ok(Opened { adapter: None, tasks: None, members, no_tasks, routing: None });
        }
        let mut all = Vec::with_capacity(named.len());
        let mut are_loras = Vec::with_capacity(named.len());
        for (name, dir) in named {
            // Each by itself first, so that the message names the folder at fault.
            let files = if is_lora(&dir) {
                lora_as_poly(base, &dir)?
            } else {
                Adapter::open(base, &dir)?;
                AdapterFiles::open(&dir)?
            };
            are_loras.push(is_lora(&dir));
            all.push((name, files));
        }
        let (files, mut members) = united(all)?;
        for (member, is_lora) in members.iter_mut().zip(are_loras) {
            if is_lora {
                member.tasks = None;
            }
        }
        let adapter = Adapter::from_files(base, files, Routing::default())?;
        let tasks = Some(adapter.task_names());
        let routing = self.routing()?;
        Ok(Opened { adapter: Some(adapter), tasks, members, no_tasks, routing })
    }

    fn routing(&self) -> Result<Option<Value>> {
        let Some(text) = &self.routing else { return Ok(None) };
        if !text.trim_start().starts_with('{') {
            return Ok(Some(text.as_str().into()));
        }
        serde_json::from_str(text).map(Some).map_err(|error| {
            Error::Usage(format!("--routing: malformed JSON, column {}", error.column()))
        })
    }
}

/// The adapters that a value of the flag means, with their names.
fn expand(value: &Path) -> Result<Vec<(String, PathBuf)>> {
    if let Some(named) = named_path(value) {
        return Ok(vec![named]);
    }
    let is_adapter = |dir: &Path| dir.join(poly_config::FILE_NAME).exists();
    let name = |dir: &Path| {
        let name = dir.file_name().map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_else(|| dir.display().to_string())
    };
    if is_adapter(value) || !value.is_dir() {
        return Ok(vec![(name(value), value.to_path_buf())]);
    }
    // As PEFT saves adapters that are not called "default": a sub-folder each.
    let mut found = Vec::new();
    for entry in fs::read_dir(value).map_err(Error::io("read", value))? {
        let path = entry.map_err(Error::io("read", value))?.path();
        if is_adapter(&path) && !name(&path).starts_with('.') {
            found.push((name(&path), path));
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::file(
            value,
            format!(
                "not an adapter folder: neither {} nor a sub-folder with one",
                poly_config::FILE_NAME
            ),
        ));
    }
    Ok(found)
}
