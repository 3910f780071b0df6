//! The committed corpus, for tests.

use std::{fs, path::Path};

/// Runs `check` on every file of `fuzz/corpus/<target>`, as the fuzzer would.
pub fn replay(target: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = (fs::read_dir(&folder).expect("the corpus is committed"))
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "{} is nearly empty", folder.display());
    for file in files {
        println!("{}", file.display()); // Shown if the check fails.
        check(&fs::read(&file).expect("a readable file"));
    }
}
