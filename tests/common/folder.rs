//! A folder of a test's own, removed at the end.

use std::{fs, path::PathBuf};

/// The folder, and where it is.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    /// An empty folder; `name` is this test's.
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("polytape-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file and gives its path.
    #[allow(dead_code)] // Not every test writes files itself.
    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
