//! `log.jsonl`: a line a step and a line an evaluation.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    error::{Error, Result},
    formats::safetensors::write_atomically,
};

pub(super) const FILE_NAME: &str = "log.jsonl";

/// The log of a run in progress.
pub(super) struct Log {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Log {
    /// A new log in the output folder, or the lines up to step `from.1` of the one in `from.0`.
    pub(super) fn open(output_dir: &Path, from: Option<(&Path, u64)>) -> Result<Self> {
        fs::create_dir_all(output_dir).map_err(Error::io("create", output_dir))?;
        let path = output_dir.join(FILE_NAME);
        let kept = match from {
            Some((dir, step)) => lines_up_to(&dir.join(FILE_NAME), step)?,
            None => String::new(),
        };
        write_atomically(&path, |file| file.write_all(kept.as_bytes()))?;
        let file = File::options().append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file: BufWriter::new(file) })
    }

    /// Adds a line.
    pub(super) fn line(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}")
            .and_then(|()| self.file.flush())
            .map_err(Error::io("write", &self.path))
    }

    /// So that a checkpoint is never ahead of the log.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(Error::io("sync", &self.path))
    }
}

/// The whole lines of steps up to `step`. What came after will be computed again.
fn lines_up_to(path: &Path, step: u64) -> Result<String> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        text => text.map_err(Error::io("read", path))?,
    };
    let is_kept = |line: &&str| {
        let line: Option<Value> = serde_json::from_str(line).ok(); // The last one may be cut off.
        line.and_then(|line| line["step"].as_u64()).is_some_and(|of| of <= step)
    };
    Ok(text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect())
}
