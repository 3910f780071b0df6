//! Attention problems, forward and backward, of shapes that the bytes choose: many tokens and one, windows,
//! biases, shared heads, dropout.
//!
//! ```text
//! bytes   0            1..9             10..
//!         operation    seed of values   choices: class, batch, sizes, flags, ...
//! ```
//!
//! Asserted as in [`routed_lora`](crate::routed_lora).

use crate::{
    attention_cases::{attention, attention_backward},
    common::{Gen, check_steered},
};

/// One problem.
pub fn check(data: &[u8]) {
    let Some((&operation, rest)) = data.split_first() else { return };
    let random = Gen::steered(rest);
    match operation % 2 {
        0 => check_steered(random, attention),
        _ => check_steered(random, attention_backward),
    }
}
