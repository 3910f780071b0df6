//! Folders that appear whole or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    error::{Error, Result},
    formats::disk,
};

/// Fails if there is something at `dir` that a new folder would replace.
pub fn check_free(dir: &Path) -> Result<()> {
    match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(Error::Usage(format!(
                "{} is not empty: nothing is overwritten; remove it or name another folder",
                dir.display()
            ))),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => {
            Err(Error::Usage(format!("{} is a file, not a folder", dir.display())))
        }
        Err(error) => Err(Error::io("open", dir)(error)),
    }
}

/// Gives the files of a folder names in another one, too. What a killed process left half-written has none. Files that are
/// only ever replaced, never changed, stay what they are under the new name.
///
/// # Errors
/// If a folder cannot be read or written.
pub fn link_files(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(Error::io("read", from))? {
        let path = entry.map_err(Error::io("read", from))?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else { continue };
        if !disk::is_hidden(name) {
            let target = to.join(name);
            disk::link(&path, &target).map_err(Error::io("write", &target))?;
        }
    }
    disk::sync_dir(to).map_err(Error::io("sync", to))
}

/// Makes a folder: `fill` writes into a hidden one beside it, which takes the name when all is there.
/// After an error nothing is left.
///
/// # Errors
/// If the folder exists and is not empty, it cannot be written, or `fill` fails.
pub fn write_folder<T>(dir: &Path, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    /// Removes the folder when dropped, so on errors and panics alike.
    struct Temporary(PathBuf);
    impl Drop for Temporary {
        fn drop(&mut self) {
            let _ = disk::remove_dir_all(&self.0);
        }
    }
    check_free(dir)?;
    if dir.file_name().is_none() {
        return Err(Error::Usage(format!("{} is not the name of a new folder", dir.display())));
    }
    let temporary = Temporary(disk::hidden_beside(dir));
    disk::create_dir_all(&temporary.0).map_err(Error::io("create", dir))?;
    let done = fill(&temporary.0)?;
    if dir.exists() {
        fs::remove_dir(dir).map_err(Error::io("remove", dir))?; // It is empty.
    }
    disk::sync_dir(&temporary.0).map_err(Error::io("sync", &temporary.0))?;
    disk::rename(&temporary.0, dir).map_err(Error::io("rename", dir))?;
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk::sync_dir(parent).map_err(Error::io("sync", parent))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let root = std::env::temp_dir().join(format!("polytape-folder-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let dir = root.join("deep/er");
        let write = |path: &Path| fs::write(path.join("f"), "x").map_err(Error::io("write", path));
        let failed = write_folder(&dir, |path| {
            write(path)?;
            Err::<(), _>(Error::Config("no".into()))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(fs::read_dir(root.join("deep")).unwrap().count(), 0);
        write_folder(&dir, write).unwrap();
        assert_eq!(fs::read(dir.join("f")).unwrap(), b"x");
        let error = write_folder(&dir, |_| Ok(())).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("is not empty"), "{error}");
        let error = check_free(&dir.join("f")).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
        fs::remove_file(dir.join("f")).unwrap();
        write_folder(&dir, write).unwrap(); // An empty folder is free.
        assert_eq!(fs::read_dir(root.join("deep")).unwrap().count(), 1);
        fs::remove_dir_all(root).unwrap();
    }
}
