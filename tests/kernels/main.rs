//! Every operation of every backend against the oracle; see [`common`] for what is required and how
//! a failure is replayed.

#![allow(clippy::unwrap_used, unreachable_pub, missing_docs)]

mod attention;
#[path = "../../fuzz/src/attention.rs"]
mod attention_target;
#[path = "../common/mod.rs"]
mod common;
#[path = "../../fuzz/src/corpus.rs"]
mod corpus;
mod dense;
mod faults;
#[path = "../../fuzz/src/gemm.rs"]
mod gemm;
mod lora;
#[path = "../../fuzz/src/routed_lora.rs"]
mod routed_lora;
mod twins;

use attention as attention_cases; // As the target calls them, which has their name itself.

#[test]
fn fuzzed_cases() {
    corpus::replay("routed_lora", routed_lora::check);
    corpus::replay("attention", attention_target::check);
    corpus::replay("gemm", gemm::check);
}
