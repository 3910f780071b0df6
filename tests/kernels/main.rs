//! Every operation of every backend against the oracle; see [`common`] for what is required and how
//! a failure is replayed.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
mod dense;
mod faults;
mod lora;
#[path = "../../fuzz/src/routed_lora.rs"]
mod routed_lora;

#[test]
fn fuzzed_cases() {
    corpus::replay("routed_lora", routed_lora::check);
}
