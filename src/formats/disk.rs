//! What outputs are made of: creating, writing, syncing, renaming and removing, in one place, so that a
//! test can see each of them, and refuse it.
//!
//! Every file and folder that must appear whole or not at all goes through here. [`observed`] gives what
//! happens to a test that makes each operation fail in turn, or plays a loss of power between any two.

use std::{
    cell::RefCell,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

/// Something that is about to happen on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A folder is made, where there was none.
    CreateDir(PathBuf),
    /// An empty file is made, where there was none.
    Create(PathBuf),
    /// A file grows by these bytes.
    Write(PathBuf, Vec<u8>),
    /// A file's content, or a folder's names, shall survive a loss of power.
    Sync(PathBuf),
    /// A file or folder changes its name.
    Rename(PathBuf, PathBuf),
    /// A file has one more name.
    Link(PathBuf, PathBuf),
    /// A file goes, or a folder with all that is in it.
    Remove(PathBuf),
}

/// Is told of operations, and may refuse them.
type Observer = Box<dyn FnMut(&Operation) -> io::Result<()>>;

thread_local! {
    static OBSERVER: RefCell<Option<Observer>> = const { RefCell::new(None) };
}

/// Runs `work`; `observer` is told of each operation of this thread before it is done, and an error of
/// its is the operation's.
pub fn observed<T>(
    observer: impl FnMut(&Operation) -> io::Result<()> + 'static,
    work: impl FnOnce() -> T,
) -> T {
    /// Takes the observer away again, after panics, too.
    struct Observed;
    impl Drop for Observed {
        fn drop(&mut self) {
            OBSERVER.set(None);
        }
    }
    OBSERVER.set(Some(Box::new(observer)));
    let _observed = Observed;
    work()
}

/// Nothing is made of the operation's description unless somebody asked for it.
fn about_to(operation: impl FnOnce() -> Operation) -> io::Result<()> {
    OBSERVER.with_borrow_mut(|observer| match observer {
        None => Ok(()),
        Some(observer) => observer(&operation()),
    })
}

/// A file that is being made.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    file: fs::File,
}

impl NewFile {
    /// An empty file where there was none.
    pub fn create(path: &Path) -> io::Result<Self> {
        about_to(|| Operation::Create(path.to_path_buf()))?;
        let file = fs::OpenOptions::new().write(true).create_new(true).open(path)?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// What is at `path`, to be written to: a device or a pipe.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = fs::OpenOptions::new().write(true).open(path)?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Makes the content survive a loss of power.
    pub fn sync(&self) -> io::Result<()> {
        about_to(|| Operation::Sync(self.path.clone()))?;
        self.file.sync_all()
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        about_to(|| Operation::Write(self.path.clone(), bytes.to_vec()))?;
        // All of it, so that what was told is what was done.
        self.file.write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Collects what is written to a file, and passes it on in whole blocks.
///
/// A block of 2 MiB at a multiple of its size stays in Linux's page cache as one huge page, where the file system has such
/// (ext4 of Linux 6.18 has): whoever maps the file reads it the faster.
#[derive(Debug)]
pub struct InBlocks {
    file: NewFile,
    block: Vec<u8>,
}

impl InBlocks {
    const BLOCK: usize = 2 << 20;

    /// In front of a file that is empty, or has no places.
    pub fn new(file: NewFile) -> Self {
        Self { file, block: Vec::new() }
    }

    /// Passes on what is left.
    pub fn finish(mut self) -> io::Result<NewFile> {
        self.flush()?;
        Ok(self.file)
    }
}

impl Write for InBlocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(Self::BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..n]);
        if self.block.len() == Self::BLOCK {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.block.is_empty() {
            self.file.write_all(&self.block)?;
            self.block.clear();
        }
        self.file.flush()
    }
}

/// A hidden name beside `path` that nobody else has, for what will take its name: `.NAME.tmp-PROCESS-TIME-NUMBER`.
/// A process id alone would do for neither two threads nor two containers, where it is 1 every time.
pub fn hidden_beside(path: &Path) -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".tmp-{}-{time:x}-{number}", process::id()));
    path.with_file_name(name)
}

/// Whether a name is one of [`hidden_beside`]: of something that was never finished, unless its process is still at it.
pub fn is_hidden(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with('.') && name.contains(".tmp-"))
}

/// Makes a folder, and those that it lies in.
pub fn create_dir_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    about_to(|| Operation::CreateDir(path.to_path_buf()))?;
    fs::create_dir_all(path)
}

/// Gives a file or folder another name.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    about_to(|| Operation::Rename(from.to_path_buf(), to.to_path_buf()))?;
    fs::rename(from, to)
}

/// Gives a file one more name. A copy, where the file system has no such names.
pub fn link(from: &Path, to: &Path) -> io::Result<()> {
    about_to(|| Operation::Link(from.to_path_buf(), to.to_path_buf()))?;
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to)?;
    fs::File::open(to)?.sync_all()
}

/// Removes a file, if it is there.
pub fn remove_file(path: &Path) -> io::Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    about_to(|| Operation::Remove(path.to_path_buf()))?;
    fs::remove_file(path)
}

/// Removes a folder with all that is in it, if it is there.
pub fn remove_dir_all(path: &Path) -> io::Result<()> {
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    about_to(|| Operation::Remove(path.to_path_buf()))?;
    fs::remove_dir_all(path)
}

/// Makes the names in a folder survive a loss of power.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    about_to(|| Operation::Sync(path.to_path_buf()))?;
    #[cfg(unix)] // Elsewhere a folder cannot be opened for this.
    fs::File::open(path)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn a_file_grows_in_whole_blocks() {
        let path = std::env::temp_dir().join(format!("polytape-blocks-{}", std::process::id()));
        let bytes: Vec<_> = (0..2 * InBlocks::BLOCK + 5).map(|i| (i % 251) as u8).collect();
        let sizes = Rc::new(RefCell::new(vec![]));
        let seen = Rc::clone(&sizes);
        let observer = move |operation: &Operation| {
            if let Operation::Write(_, bytes) = operation {
                seen.borrow_mut().push(bytes.len());
            }
            Ok(())
        };
        observed(observer, || {
            let mut file = InBlocks::new(NewFile::create(&path).unwrap());
            for some in bytes.chunks(InBlocks::BLOCK / 3 * 2 + 1) {
                file.write_all(some).unwrap();
            }
            file.finish().unwrap();
        });
        assert_eq!(*sizes.borrow(), [InBlocks::BLOCK, InBlocks::BLOCK, 5]);
        assert!(fs::read(&path).unwrap() == bytes);
        fs::remove_file(&path).unwrap();
    }
}
