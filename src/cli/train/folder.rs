//! The output folder of a run: of one run at a time.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

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
