//! The C library as a file of its own: `target/*/examples/libpolytape.so`.
//!
//! It is an example so that building the crate does not link it each time. To install it use
//! `scripts/install-c.sh`.

pub use polytape::capi::*;
