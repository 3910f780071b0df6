//! The committed corpus of the fuzz targets of the formats, replayed: valid files, damaged ones, and
//! whatever found a bug. What each target asserts is said in `fuzz/README.md`. The corpus of the
//! kernels' target is replayed by `tests/kernels`.

#![allow(unreachable_pub, missing_docs)]

#[path = "../fuzz/src/adapter.rs"]
mod adapter;
#[path = "../fuzz/src/checkpoint.rs"]
mod checkpoint;
#[path = "../fuzz/src/config.rs"]
mod config;
#[path = "../fuzz/src/corpus.rs"]
mod corpus;
#[cfg(feature = "cli")]
#[path = "../fuzz/src/flags.rs"]
mod flags;
#[path = "../fuzz/src/index.rs"]
mod index;
#[path = "../fuzz/src/memory.rs"]
mod memory;
#[path = "../fuzz/src/messages.rs"]
mod messages;
#[path = "../fuzz/src/resume.rs"]
mod resume;
#[path = "../fuzz/src/rows.rs"]
mod rows;
#[cfg(feature = "cli")]
#[path = "../fuzz/src/tokenizer.rs"]
mod tokenizer;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

#[test]
fn safetensors_files() {
    corpus::replay("checkpoint", checkpoint::check);
}

#[test]
fn adapter_folders() {
    corpus::replay("adapter", adapter::check);
}

#[test]
fn row_files() {
    corpus::replay("rows", rows::check);
}

#[test]
fn configurations() {
    corpus::replay("config", config::check);
}

#[test]
fn indices() {
    corpus::replay("index", index::check);
}

#[test]
fn checkpoints() {
    corpus::replay("resume", resume::check);
}

#[cfg(feature = "cli")]
#[test]
fn tokenizers() {
    corpus::replay("tokenizer", tokenizer::check);
}

#[cfg(feature = "cli")]
#[test]
fn command_lines() {
    corpus::replay("flags", flags::check);
}
