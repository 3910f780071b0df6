//! The operations, one file each: forward, saved values and backward side by side.

mod add;
mod attention;
mod dropout;
mod embed;
mod gated;
mod gather;
pub(crate) mod head;
mod linear;
mod norm;
mod rope;
mod split;

pub use attention::{AttentionSpec, KeyValue};
pub use head::{HeadSpec, LossShape, TokenWeights, mean_row};
pub use linear::{FrozenLinear, LinearSpec};
pub use norm::LayerNorm;
