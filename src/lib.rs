//! polytape trains and runs Poly / MHR adapters (routed LoRA: a shared bank of low-rank skills, mixed
//! per task and per feature split by learned routing) over a frozen, memory-mapped transformer,
//! without a general ML framework.
//!
//! ```no_run
//! use polytape::{
//!     formats::poly_config::PolyConfig,
//!     model::{Adapter, Example, Model, Options},
//!     train::{TrainConfig, Trainer},
//! };
//!
//! # fn main() -> polytape::Result<()> {
//! let base = Model::open("flan-t5-base", &Options::default())?;
//! let config = PolyConfig { n_tasks: 8, n_splits: 4, ..PolyConfig::default() };
//! let adapter = Adapter::new(&base, &config, 42)?;
//! let mut trainer = Trainer::new(&base, adapter, TrainConfig::default())?;
//! let example = Example { input: vec![21, 7, 9, 1], labels: vec![4, 1], task: 3, mixing: None };
//! let report = trainer.step(&[&example])?;
//! println!("loss {}", report.loss);
//! trainer.adapter().save_peft(base.backend(), "out")
//! # }
//! ```
//!
//! Data flows one way:
//!
//! ```text
//! bytes on disk -> formats -> model -> tape -> kernels (oracle | cpu | cuda)
//!                          train, generate, cli, capi sit on top
//! ```
//!
//! Reading order: [`formats`] (untrusted bytes become checked views), [`tensor`], [`kernels`] (the seam:
//! about thirty operations, each defined by a plain f64 oracle), [`tape`] (reverse mode over them),
//! [`model`] (architectures as calls on the tape, and the adapter), [`train`], [`generate`].
//!
//! What holds everywhere: a batch is ragged, no kernel sees padding; the same inputs give the same bits
//! for any number of threads; in inference a row's bits do not depend on its neighbours; a CPU reads a frozen
//! weight in place (GPT-2's linears and Gemma's norms are changed, so these are copied when the base is opened),
//! and a GPU has a copy; a file's content can make an error, not a crash.
//!
//! Left out on purpose: a general tensor library, gradients of base weights, and f16 arithmetic (T5
//! overflows in it).

#[cfg(test)]
extern crate self as polytape; // As the emulator calls it, which the tests of `tests/` use as well.
#[cfg(test)]
#[path = "../tests/x86_emulator/mod.rs"]
mod x86_emulator;

pub mod activation;
pub mod bench;
#[cfg(feature = "capi")]
pub mod capi;
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
pub mod weighting;

pub use dtype::Dtype;
pub use error::{Error, Result};
