//! The binary; see [`polytape::cli`].

use std::process::ExitCode;

#[cfg(unix)] // Its guard pages are.
// The tests' own code.
#[allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub, unused_imports)]
mod verify;

fn main() -> ExitCode {
    #[cfg(unix)]
    let kernels = verify::KERNELS;
    #[cfg(not(unix))]
    let kernels = &[];
    polytape::cli::run(kernels)
}
