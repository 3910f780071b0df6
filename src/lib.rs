//! polytape
#[cfg(feature = "cli")]
pub mod cli;
pub mod demo;
pub mod dtype;
pub mod error;
pub mod formats;
pub mod generate;
pub mod kernels;
pub mod model;
pub mod process;
pub mod report;
pub mod tape;
pub mod tensor;
pub mod train;
pub use dtype::Dtype;
pub use error::{Error, Result};
