//! The C library: what `include/polytape.h` declares.
//!
//! ```text
//! C ─ pointers, sizes ─> checked slices, objects by handle ─> model, train, generate, kernels
//!   <─ status, message ─ Error, panic, wrong handle, wrong size
//! ```
//!
//! Every function but those that give a version or a message returns a status; the message of the last
//! failure of a thread is [`polytape_last_error`]. What can be noticed gives a status and nothing else happens: a null
//! pointer, an object that was freed or is of another kind, a structure of another size, memory that
//! is too small, misaligned or overlaps, an object that another thread is using and that only one may
//! use, a process that was forked, a panic.
//!
//! A handle is a number that was given out once, never an address: a stale or invented one
//! is not followed. Memory is the caller's: what comes in is copied or, by the kernels, read in
//! place during the call; what goes out is written to where the caller says. Nothing keeps a pointer
//! after its function returned.
//!
//! # Safety
//! What cannot be noticed is the caller's duty, the same for every function here: a pointer that is
//! not null points to as many readable (for results, writable) elements as the function says or as
//! its size argument says, and nobody writes them during the call.

// Comments go into the header, where brackets are shapes and no links.
#![allow(rustdoc::broken_intra_doc_links)]
#![allow(unsafe_code, clippy::missing_safety_doc, non_camel_case_types)]

mod adapter;
mod engine;
mod examples;
mod handles;
mod kernels;
mod memory;
mod model;
mod status;
mod trainer;

pub use adapter::*;
pub use engine::*;
pub use examples::*;
pub use kernels::*;
pub use model::*;
pub use status::*;
pub use trainer::*;

/// The version of this header's functions and structures. A library with another one is another
/// library; within one version structures only grow at their end, and functions are only added.
pub const POLYTAPE_ABI_VERSION: u32 = 1;

/// `POLYTAPE_ABI_VERSION` of the library: compare it with the header's.
#[unsafe(no_mangle)]
pub extern "C" fn polytape_abi_version() -> u32 {
    POLYTAPE_ABI_VERSION
}

/// The version of the library, as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn polytape_version() -> *const std::ffi::c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
