//! The files that `eval` and `generate` write: over another file only when told to, and never over what they read.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{adapters::AdapterFlags, check_writable, data::DataFlags};
use crate::error::{Error, Result};

#[derive(Args)]
pub(super) struct ResultFlags {
    /// Replace a file that is there already; what is read is never replaced.
    #[arg(long)]
    overwrite: bool,
}

/// What a verb reads.
pub(super) struct Sources<'a> {
    pub(super) model: &'a Path,
    pub(super) adapters: &'a AdapterFlags,
    pub(super) data: &'a DataFlags,
}

impl ResultFlags {
    /// Fails now if one of the files must not, or could not, be written at the end of a long run.
    pub(super) fn check(&self, outputs: &[&PathBuf], sources: &Sources<'_>) -> Result<()> {
        for (i, &path) in outputs.iter().enumerate() {
            check_writable(path)?;
            // A device or a pipe has no content that could be lost.
            if path.exists() && !path.is_file() {
                continue;
            }
            let twice = |other: &str| {
                let path = path.display();
                Err(Error::Usage(format!("{path} is given twice: as an output and as {other}")))
            };
            if sources.data.paths().any(|other| is_same(other, path)) {
                return twice("--data");
            }
            if outputs[..i].iter().any(|other| is_same(other, path)) {
                return twice("another output");
            }
            let adapters = sources.adapters.dirs();
            let adapters = adapters.iter().map(|dir| ("--adapter", dir.as_path()));
            let mut folders = [("--model", sources.model)].into_iter().chain(adapters);
            if let Some((flag, dir)) = folders.find(|(_, dir)| is_file_of(path, dir)) {
                return Err(Error::Usage(format!(
                    "{} is a file of {flag} {}, which is only read: name another file",
                    path.display(),
                    dir.display()
                )));
            }
            // As `mktemp` leaves it.
            let is_empty = path.metadata().is_ok_and(|found| found.len() == 0);
            if path.exists() && !is_empty && !self.overwrite {
                return Err(Error::Usage(format!(
                    "{} is there already: replace it with --overwrite, or name another file",
                    path.display()
                )));
            }
        }
        Ok(())
    }
}

/// Whether two paths are of one file, by whatever name.
fn is_same(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}

/// Extensions of what is read of a folder.
const READ: [&str; 6] = ["bin", "jinja", "json", "model", "safetensors", "txt"];

/// Whether a file that is there is of what is read of a folder, or is what one of the folder's links leads to (the Hub's cache
/// is made of them). An earlier result may lie there, too.
fn is_file_of(path: &Path, dir: &Path) -> bool {
    let (Ok(path), Ok(dir)) = (path.canonicalize(), dir.canonicalize()) else { return false };
    let is_read =
        |path: &Path| path.extension().is_some_and(|e| READ.iter().any(|read| e == *read));
    let mut entries = dir.read_dir().into_iter().flatten().flatten();
    (path.starts_with(&dir) && is_read(&path))
        || entries.any(|entry| is_read(&entry.path()) && is_same(&entry.path(), &path))
}
