//! Examples from C.

use super::{
    memory::read,
    status::{Failure, POLYTAPE_BAD_SIZE},
};
use crate::{
    kernels::cpu::Cpu,
    model::{Example, Model},
};

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
    /// The task, below the adapter's `n_tasks`; unused without an adapter.
    pub task: u32,
    /// 0.
    pub reserved: u32,
}

/// Checked copies.
pub(super) fn copied(
    model: &Model<Cpu>,
    examples: *const polytape_example,
    n: usize,
    n_tasks: Option<usize>,
) -> Result<Vec<Example>, Failure> {
    let copy = |(i, from): (usize, &polytape_example)| {
        let in_example =
            |failure: Failure| Failure::new(failure.status, format!("example {i}: {failure}"));
        let example = || {
            let example = Example {
                input: read(from.input, from.n_input, "input")?.to_vec(),
                labels: read(from.labels, from.n_labels, "labels")?.to_vec(),
                task: from.task,
            };
            model.check_example(&example, n_tasks)?;
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
