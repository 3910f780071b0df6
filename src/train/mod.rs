//! Training: batches in, a better adapter out.
//!
//! ```text
//! examples ─ shuffle ─> batches ─ step: route, forward, backward, clip, AdamW ─> adapter
//! ```
//!
//! One [`Trainer`] owns an adapter and its optimiser state. The order of examples and everything
//! random in a step are functions of the seed and the step's number, so a run repeats bit by bit for
//! any number of threads, and one that is resumed from a [`checkpoint`] ends with the bits of one that
//! never stopped.

pub mod adafactor;
pub mod adapt;
pub mod checkpoint;
pub mod choices;
pub mod evaluate;
pub mod memory;
pub mod metrics;
pub mod order;
pub mod prior;
pub mod recipe;
pub mod schedule;
mod trainer;

pub use schedule::Schedule;
pub use trainer::{
    Optimizer, RouterRows, RouterSampling, StepReport, TrainConfig, Trainable, Trainer,
};
