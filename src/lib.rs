//! polytape
pub mod dtype;
pub mod error;
pub mod formats;
pub mod kernels;
pub mod model;
pub mod tape;
pub mod tensor;
pub use dtype::Dtype;
pub use error::{Error, Result};
