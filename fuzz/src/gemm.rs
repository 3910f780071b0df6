//! Products of matrices, and what stands between them in a model, of shapes that the bytes choose.
//!
//! ```text
//! bytes   0            1..9             10..
//!         operation    seed of values   choices: class, batch, sizes, flags, ...
//! ```
//!
//! Asserted as in [`routed_lora`](crate::routed_lora).

use crate::{
    common::{Gen, check_steered},
    dense::{
        adamw, add, argmax, dropout, embed, gated, gather, head_loss, linear, linear_backward,
        norm, norm_backward, rope, sample, sum_of_squares,
    },
};

/// One problem.
pub fn check(data: &[u8]) {
    let Some((&operation, rest)) = data.split_first() else { return };
    let random = Gen::steered(rest);
    // A new operation comes last: the corpus's files begin with these numbers.
    match operation % 15 {
        0 => check_steered(random, linear),
        1 => check_steered(random, linear_backward),
        2 => check_steered(random, head_loss),
        3 => check_steered(random, argmax),
        4 => check_steered(random, norm),
        5 => check_steered(random, norm_backward),
        6 => check_steered(random, gated),
        7 => check_steered(random, rope),
        8 => check_steered(random, embed),
        9 => check_steered(random, gather),
        10 => check_steered(random, dropout),
        11 => check_steered(random, add),
        12 => check_steered(random, sum_of_squares),
        13 => check_steered(random, sample),
        _ => check_steered(random, adamw), // 14
    }
}
