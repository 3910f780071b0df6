//! The output folder of a run: of one run at a time.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use super::log;
use crate::{
    error::{Error, Result},
    formats::{
        json::{MAX_CONFIG_BYTES, UniqueObject, read_json},
        poly_config,
    },
    train::checkpoint::{self, BEST_DIR},
};

/// Refuses a folder whose files a run would replace and that no run made: a model's always, an adapter's unless that is asked
/// for. Nothing has been read or removed before.
pub(in crate::cli) fn check_replaceable(output_dir: &Path, overwrite: bool) -> Result<()> {
    if let Some(file) = model_file(output_dir) {
        return Err(Error::Usage(format!(
            "{} is a model folder (it has {file}), whose config.json this run would replace: name another --output-dir",
            output_dir.display()
        )));
    }
    let has_adapter = |dir: &Path| dir.join(poly_config::FILE_NAME).exists();
    if !overwrite
        && (has_adapter(output_dir) || has_adapter(&output_dir.join(BEST_DIR)))
        && !output_dir.join(log::FILE_NAME).exists()
        && checkpoint::list(output_dir)?.is_empty()
    {
        return Err(Error::Usage(format!(
            "{} has an adapter, but no {} of a run that made it: replace it with --overwrite-output-dir, or name another --output-dir",
            output_dir.display(),
            log::FILE_NAME
        )));
    }
    Ok(())
}

/// What shows that a folder is a model's. The `config.json` of a run names no architecture.
fn model_file(dir: &Path) -> Option<String> {
    let config = dir.join("config.json");
    if config.exists()
        && read_json::<UniqueObject>(&config, MAX_CONFIG_BYTES)
            .is_ok_and(|UniqueObject(fields)| fields.contains_key("model_type"))
    {
        return Some("config.json with model_type".to_owned());
    }
    let names = dir.read_dir().ok()?.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).find(|name| {
        name.starts_with("pytorch_model")
            || (name.starts_with("model")
                && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")))
    })
}

/// A folder that this run alone writes, until it is dropped.
pub(in crate::cli) struct OutputFolder {
    path: PathBuf,
    /// The lock ends with the process, however it ends; there is no file that could be left behind.
    _lock: Option<File>,
    is_new: bool,
}

impl OutputFolder {
    /// Creates the folder, if it is not there, and locks it.
    ///
    /// # Errors
    /// If another run writes there, or the folder cannot be created.
    pub(in crate::cli) fn take(path: &Path) -> Result<Self> {
        let is_new = !path.exists();
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let dir = File::open(path).map_err(Error::io("open", path))?;
        let lock = match dir.try_lock() {
            Ok(()) => Some(dir),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Usage(format!(
                    "another run is writing to {}: wait until it ends, or name another --output-dir",
                    path.display()
                )));
            }
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) => {
                tracing::debug!("{} is not locked: {error}", path.display());
                None
            }
        };
        Ok(Self { path: path.to_path_buf(), _lock: lock, is_new })
    }
}

impl Drop for OutputFolder {
    /// A run that fails before it has written anything leaves no folder.
    fn drop(&mut self) {
        if self.is_new {
            let _ = fs::remove_dir(&self.path); // Only if it is empty.
        }
    }
}
