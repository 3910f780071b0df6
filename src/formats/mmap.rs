//! A file, mapped read-only: the base model stays in the page cache instead of this process's memory.
//!
//! ```text
//! path -> open (regular files only) -> size at opening -> pages, read when touched
//! ```
//!
//! Replacing the file by renaming another over it is harmless: the mapping keeps the old one. Writing
//! into it or truncating it is not, so [`MappedFile::verify_unchanged`] asks again, and long-running
//! callers call it once a step. Reading the file into memory instead would cost its whole size in
//! anonymous memory, which is what this crate avoids.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use memmap2::Mmap;

use crate::{
    error::{Error, Result},
    formats::json::open_regular,
    tensor::Bytes,
};

/// A mapped file. The bytes live as long as any handle to it.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    modified: Option<SystemTime>,
}

impl MappedFile {
    /// Maps a regular file (links are followed).
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        let path = path.as_ref().to_path_buf();
        let file = open_regular(&path)?;
        let metadata = file.metadata().map_err(Error::io("open", &path))?;
        // SAFETY: the mapping is private to this process and read-only, and is only ever read as
        // bytes, for which every bit pattern is valid. What a mapping cannot exclude is another
        // process writing into the file: `verify_unchanged` is there to notice, and the module doc
        // says what is harmless.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
        if map.len() as u64 != metadata.len() {
            return Err(Error::file(&path, "the file changed its size while it was opened"));
        }
        Ok(Arc::new(Self { path, file, map, modified: metadata.modified().ok() }))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the mapped file has been truncated, extended or written since it was opened.
    pub fn verify_unchanged(&self) -> Result<()> {
        let metadata = self.file.metadata().map_err(Error::io("stat", &self.path))?;
        let (found, expected) = (metadata.len(), self.map.len() as u64);
        let remedy = "files in use must be replaced by renaming, not written into: restore the file and \
        start again";
        if found != expected {
            return Err(Error::file(
                &self.path,
                format!(
                    "the file had {expected} bytes when it was mapped, now it has {found}; {remedy}"
                ),
            ));
        }
        if metadata.modified().ok() != self.modified {
            return Err(Error::file(
                &self.path,
                format!("the file was written to while it was mapped; {remedy}"),
            ));
        }
        Ok(())
    }
}

impl Bytes for MappedFile {
    fn bytes(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("polytape-mmap-{name}-{}", std::process::id()))
    }

    #[test]
    fn truncation_is_noticed_and_replacement_is_harmless() {
        let path = temporary("change");
        std::fs::write(&path, b"0123456789").unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!(mapped.bytes(), b"0123456789");
        mapped.verify_unchanged().unwrap();

        let other = temporary("other");
        std::fs::write(&other, b"x").unwrap();
        std::fs::rename(&other, &path).unwrap();
        mapped.verify_unchanged().unwrap();
        assert_eq!(mapped.bytes(), b"0123456789");

        let mapped = MappedFile::open(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        let error = mapped.verify_unchanged().unwrap_err().to_string();
        assert!(error.contains("polytape-mmap-change"), "{error}");
        assert!(error.contains("had 1 bytes when it was mapped, now it has 0"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn only_regular_files_are_opened() {
        let error = MappedFile::open(std::env::temp_dir()).unwrap_err().to_string();
        assert!(error.contains("expected a regular file, found a directory"), "{error}");
        let error = MappedFile::open(temporary("absent")).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().starts_with("cannot open "), "{error}");
        #[cfg(unix)]
        {
            let error = MappedFile::open("/dev/zero").unwrap_err().to_string();
            assert!(error.contains("found a device, pipe or socket"), "{error}");
            let fifo = temporary("fifo");
            if std::process::Command::new("mkfifo").arg(&fifo).status().is_ok_and(|s| s.success()) {
                let error = MappedFile::open(&fifo).unwrap_err().to_string();
                assert!(error.contains("found a device, pipe or socket"), "{error}");
                std::fs::remove_file(&fifo).unwrap();
            }
        }
    }
}
