//! Examples from C.

use super::{
    memory::read,
    status::{Failure, POLYTAPE_BAD_SIZE},
};
use crate::model::Example;

/// One example as ids.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polytape_example {
    /// What the encoder sees; for a causal model the prompt. At least one id.
    pub input: *const u32,
    /// Its ids.
    pub n_input: usize,
    /// What should be said, with the end id; may be null where `n_labels` is 0.
    pub labels: *const u32,
    /// Their ids; 0 in generation.
    pub n_labels: usize,
    /// The task, below the adapter's `n_tasks`, or the row of an engine's weights; unused without an
    /// adapter.
    pub task: u32,
    /// 0.
    pub reserved: u32,
}

/// Copies, each checked and maybe changed by `check`.
pub(super) fn copied(
    examples: *const polytape_example,
    n: usize,
    check: impl Fn(&mut Example) -> Result<(), Failure>,
) -> Result<Vec<Example>, Failure> {
    let copy = |(i, from): (usize, &polytape_example)| {
        let in_example =
            |failure: Failure| Failure::new(failure.status, format!("example {i}: {failure}"));
        let example = || {
            let mut example = Example {
                input: read(from.input, from.n_input, "input")?.to_vec(),
                labels: read(from.labels, from.n_labels, "labels")?.to_vec(),
                task: from.task,
                mixing: None,
            };
            check(&mut example)?;
            Ok(example)
        };
        example().map_err(in_example)
    };
    read(examples, n, "examples")?.iter().enumerate().map(copy).collect()
}

/// Fails unless a result has as much room as it needs.
pub(super) fn check_room(found: usize, needed: usize, name: &str) -> Result<(), Failure> {
    if found == needed {
        return Ok(());
    }
    let message = format!("{name} has room for {found} elements, the result has {needed}");
    Err(Failure::new(POLYTAPE_BAD_SIZE, message))
}
