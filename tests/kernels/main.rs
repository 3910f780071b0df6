//! Every operation of every backend against the oracle; see [`common`] for what is required and how
//! a failure is replayed.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod dense;
mod faults;
mod lora;
