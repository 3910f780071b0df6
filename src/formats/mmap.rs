//! A file, mapped read-only: the base model stays in the page cache instead of this process's memory.
//!
//! ```text
//! path -> open (regular files only) -> size at opening -> pages, read when touched
//! ```
//!
//! Replacing the file by renaming another over it is harmless: the mapping keeps the old one. Writing
//! into it or truncating it is not, so [`MappedFile::verify_unchanged`] asks again, and callers ask it
//! before they give away what they computed. A page that is gone when it is read raises SIGBUS, which
//! ends the process; `signals::handle` lets it end with a message. [`Access::InMemory`] avoids
//! both, at the cost of the file's whole size in anonymous memory.
//!
//! Linux is asked for huge pages: a core reads memory half as fast again if it need not look up one page in every 4 KiB
//! (benches/results). In memory they are to be had. Of a mapped file only if it is read from disk then and the file
//! system can (ext4 of Linux 6.18 does), or was written in blocks as large ([`super::disk::InBlocks`]): what lies in
//! the page cache in small pages stays as it is, until it is dropped.

use std::{
    fs::{File, Metadata},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::{Mmap, MmapMut};

#[cfg(all(unix, feature = "cli"))]
use crate::formats::signals;
use crate::{
    error::{Error, Result},
    formats::json::open_regular,
    tensor::Bytes,
};

/// How a file's bytes are had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// Mapped: pages are read when they are touched, and shared with whoever maps the file.
    #[default]
    Mapped,
    /// Read as a whole when it is opened, so that nothing that happens to the file later matters.
    InMemory,
}

/// A mapped file. The bytes live as long as any handle to it.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Mapped {
        // Fields drop in this order: a page is watched as long as it is mapped.
        #[cfg(all(unix, feature = "cli"))]
        _watched: signals::Watched,
        map: Mmap,
        file: File,
        modified: Option<SystemTime>,
    },
    InMemory {
        memory: Mmap,
        len: usize,
    },
}

impl MappedFile {
    /// Maps a regular file (links are followed).
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>> {
        Self::open_with(path, Access::Mapped)
    }

    /// Opens a regular file (links are followed).
    ///
    /// # Errors
    /// If it cannot be opened, changes meanwhile, or does not fit in memory.
    pub fn open_with(path: impl AsRef<Path>, access: Access) -> Result<Arc<Self>> {
        let path = path.as_ref().to_path_buf();
        let file = open_regular(&path)?;
        let metadata = file.metadata().map_err(Error::io("open", &path))?;
        let content = match access {
            Access::Mapped => map(file, &path, &metadata)?,
            Access::InMemory => read(&file, &path, &metadata)?,
        };
        Ok(Arc::new(Self { path, content }))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails if the mapped file has been truncated, extended or written since it was opened. Asks the
    /// system, which takes about a microsecond. What was read into memory does not change.
    pub fn verify_unchanged(&self) -> Result<()> {
        let Content::Mapped { file, map, modified, .. } = &self.content else { return Ok(()) };
        let metadata = file.metadata().map_err(Error::io("stat", &self.path))?;
        let (found, expected) = (metadata.len(), map.len() as u64);
        if found != expected {
            return Err(Error::file(
                &self.path,
                format!(
                    "the file had {expected} bytes when it was mapped, now it has {found}; {REMEDY}"
                ),
            ));
        }
        if metadata.modified().ok() != *modified {
            return Err(Error::file(
                &self.path,
                format!("the file was written to while it was mapped; {REMEDY}"),
            ));
        }
        Ok(())
    }
}

/// What to do about a file that changed.
pub(super) const REMEDY: &str = "files in use must be replaced by renaming, not written into: restore the file and start \
    again (--no-mmap reads it into memory instead)";

fn map(file: File, path: &Path, metadata: &Metadata) -> Result<Content> {
    // SAFETY: the mapping is private to this process and read-only, and is only ever read as
    // bytes, for which every bit pattern is valid. What a mapping cannot exclude is another
    // process writing into the file: `verify_unchanged` is there to notice, and the module doc
    // says what is harmless.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
    if map.len() as u64 != metadata.len() {
        return Err(Error::file(path, "the file changed its size while it was opened"));
    }
    #[cfg(target_os = "linux")]
    let _ = map.advise(Advice::HugePage); // A wish: kernels without them refuse.
    Ok(Content::Mapped {
        #[cfg(all(unix, feature = "cli"))]
        _watched: signals::watch(&map, path),
        map,
        file,
        modified: metadata.modified().ok(),
    })
}

fn read(file: &File, path: &Path, metadata: &Metadata) -> Result<Content> {
    let n = metadata.len();
    // There are no mappings of nothing.
    let memory = usize::try_from(n).ok().and_then(|n| MmapMut::map_anon(n.max(1)).ok());
    let Some(mut memory) = memory else {
        let detail = format!("its {n} bytes do not fit in memory: map the file instead");
        return Err(Error::file(path, detail));
    };
    #[cfg(target_os = "linux")]
    let _ = memory.advise(Advice::HugePage); // As in `map`.
    let len = n as usize; // As long as the mapping.
    let mut file = file;
    let whole = file.read_exact(&mut memory[..len]);
    let after = file.metadata().map_err(Error::io("stat", path))?;
    let ended = whole.as_ref().is_err_and(|e| e.kind() == ErrorKind::UnexpectedEof);
    let same = after.len() == n && after.modified().ok() == metadata.modified().ok();
    if ended || !same {
        return Err(Error::file(path, "the file changed while it was read; try again"));
    }
    whole.map_err(Error::io("read", path))?;
    let memory = memory.make_read_only().map_err(Error::io("read", path))?;
    Ok(Content::InMemory { memory, len })
}

impl Bytes for MappedFile {
    fn bytes(&self) -> &[u8] {
        match &self.content {
            Content::Mapped { map, .. } => map,
            Content::InMemory { memory, len } => &memory[..*len],
        }
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
    fn writing_is_noticed_and_does_not_matter_in_memory() {
        let path = temporary("written");
        std::fs::write(&path, b"0123456789").unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        let memory = MappedFile::open_with(&path, Access::InMemory).unwrap();
        std::fs::write(&path, b"9876543210").unwrap();
        let error = mapped.verify_unchanged().unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("was written to while it was mapped"), "{error}");
        file.set_len(0).unwrap();
        memory.verify_unchanged().unwrap();
        assert_eq!(memory.bytes(), b"0123456789");
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
