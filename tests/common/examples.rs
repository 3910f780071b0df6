//! The programs and the C library in `examples/`, which tests run.

use std::{env, path::PathBuf, process::Command};

/// Builds examples (`--example NAME`, or `--examples`) with the features of this test, for which they
/// mostly are built already: to cargo, even `default` makes a difference. Gives the folder that they are in.
pub(crate) fn built(which: &[&str]) -> PathBuf {
    let features = [
        ("capi", cfg!(feature = "capi")),
        ("cli", cfg!(feature = "cli")),
        ("cuda", cfg!(feature = "cuda")),
        ("parquet", cfg!(feature = "parquet")),
    ];
    let features: Vec<_> = features.into_iter().filter_map(|(f, on)| on.then_some(f)).collect();
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).arg("build").args(which);
    cargo.args(["--features", &features.join(",")]);
    if !cfg!(feature = "default") {
        cargo.arg("--no-default-features");
    }
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // target/debug/deps/c-0123 -> target/debug/examples
    env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples")
}
