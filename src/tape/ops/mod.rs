//! The operations, one file each: forward, saved values and backward side by side.

mod attention;
mod dropout;
mod embed;
mod gated;
pub(crate) mod head;
mod linear;
mod norm;

pub use attention::{AttentionSpec, KeyValue};
pub use linear::{FrozenLinear, LinearSpec};
