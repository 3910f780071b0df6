//! The binary; see [`polytape::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    polytape::cli::run()
}
