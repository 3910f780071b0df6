//! What tests say of what they leave out.

use std::{
    fmt::Display,
    io::{Write, stderr},
};

/// Says that something is left out. Past the macros: what those print is not shown of a test that passes.
pub(crate) fn skipped(what: impl Display) {
    let _ = writeln!(stderr(), "skipped: {what}");
}
