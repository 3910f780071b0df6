//! What several test files share.
#![allow(dead_code, clippy::unwrap_used)]

use std::path::PathBuf;

/// The folder of committed fixtures.
pub fn data(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}
