//! `init`: a base with random weights.

use std::path::PathBuf;

use clap::Args;

use super::{Common, ComputeDtype, print, print_json};
use crate::{
    dtype::Dtype,
    error::{Error, Result},
    model::presets::Preset,
};

#[derive(Args)]
pub(super) struct Init {
    #[command(flatten)]
    pub(super) common: Common,
    /// The shape, for example flan-t5-base or llama-1b.
    #[arg(long)]
    preset: String,
    /// A head of its own for a decoder-only preset that shares the embedding.
    #[arg(long)]
    untied: bool,
    /// Where the folder goes.
    #[arg(long)]
    output_dir: PathBuf,
}

impl Init {
    pub(super) fn run(&self) -> Result<()> {
        self.common.cpu_only("init")?;
        let mut preset = Preset::named(&self.preset)?;
        if self.untied {
            preset = preset.untied()?;
        }
        if let Some(file) = self.taken() {
            return Err(Error::Usage(format!(
                "{} already holds {file}: nothing is overwritten; remove it or name another folder",
                self.output_dir.display()
            )));
        }
        let dtype = match self.common.dtype {
            Some(ComputeDtype::F32) => Dtype::F32,
            Some(ComputeDtype::Bf16) | None => Dtype::Bf16,
        };
        preset.write(&self.output_dir, dtype, self.common.seed)?;
        if self.common.json {
            return print_json(&serde_json::json!({
                "preset": preset.name, "dtype": dtype.to_string(), "output_dir": self.output_dir,
            }));
        }
        print(&format!("{} in {dtype}: {}", preset.name, self.output_dir.display()))
    }

    /// A file in the folder that would be replaced, or be taken for one of the new model's. A tokenizer may lie there.
    fn taken(&self) -> Option<String> {
        let names = self.output_dir.read_dir().ok()?.flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).find(|name| {
            name == "config.json"
                || name.ends_with(".safetensors")
                || name.ends_with(".safetensors.index.json")
        })
    }
}
