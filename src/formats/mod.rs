//! Untrusted bytes become checked, borrowed views. No arithmetic, no device.
//!
//! ```text
//! model folder    config.json          -> config       -> ModelConfig, GenerationConfig
//!                 *.safetensors        -> mmap, safetensors
//!                 + index              -> checkpoint   -> Frozen weights, read in place
//!                 tokenizer.json       -> tokenizer    -> ids
//!                 chat_template.jinja  -> chat         -> text of a conversation
//! adapter folder  adapter_config.json  -> poly_config  -> PolyConfig
//!                 adapter_model.*      -> adapter      -> lora_a, lora_b, router_logits
//!                 the same of LoRA     -> lora         -> pairs
//!                 tasks.json           -> tasks        -> names of task ids
//! data            rows.jsonl, .csv     -> rows, csv    -> Row, with its line number
//!                 .parquet             -> parquet      -> Row, with its number (feature parquet)
//! ```
//!
//! Every reader here accepts any bytes at all: it returns a value that keeps its module's promises,
//! or an [`Error`](crate::Error) that names the file, the place in it, what was expected, what was
//! found and how to put it right. Sizes are checked before anything is allocated from them. Whoever
//! uses the values (models, kernels, training) does not check again.

pub mod disk;
mod fields;
pub mod fingerprint;
pub mod folder;
pub mod json;
pub mod mmap;
pub mod safetensors;
#[cfg(all(unix, feature = "cli"))]
pub mod signals;
// Model folders:
#[cfg(feature = "cli")]
pub mod chat;
pub mod checkpoint;
pub mod config;
#[cfg(feature = "cli")]
pub mod tokenizer;
// Adapter folders:
pub mod adapter;
pub mod lora;
pub mod poly_config;
// Data:
#[cfg(feature = "cli")]
pub mod csv;
#[cfg(feature = "parquet")]
pub mod parquet;
pub mod rows;
pub mod tasks;
