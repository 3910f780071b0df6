//! What each fuzz target asserts about arbitrary bytes: one `check` a module; see `README.md`.
//!
//! The modules are also included by polytape's own tests, which replay the committed corpus:
//! `tests/fuzz_corpus.rs` those of the formats, `tests/kernels` the one of the kernels, `tests/c` the one
//! of the C library.

pub mod adapter;
pub mod attention;
pub mod capi;
pub mod checkpoint;
pub mod config;
pub mod flags;
pub mod gemm;
pub mod index;
pub mod memory;
pub mod messages;
pub mod resume;
pub mod routed_lora;
pub mod rows;
pub mod tokenizer;

// The harness of the kernels' tests, and its cases.
#[path = "../../tests/kernels/attention.rs"]
#[allow(dead_code, unused_imports)]
mod attention_cases;
#[path = "../../tests/common/mod.rs"]
#[allow(dead_code)]
mod common;
#[path = "../../tests/kernels/dense.rs"]
#[allow(dead_code, unused_imports)]
mod dense;
#[path = "../../tests/kernels/lora.rs"]
#[allow(dead_code, unused_imports)]
mod lora;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;
