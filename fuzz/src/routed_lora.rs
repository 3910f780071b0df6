//! Routed-LoRA problems, of shapes that the bytes choose, on every instruction set of this CPU.
//!
//! ```text
//! bytes   0            1..9             10..
//!         operation    seed of values   choices: class, batch, sizes, splits, skills, flags, ...
//! ```
//!
//! The cases and what is asserted of them are those of `tests/kernels`: agreement with the f64 oracle
//! within a few units in the last place of `Σ|ab|` (bit for bit on small integers), the same bits for
//! any number of threads, and the same bits for a token alone as among its neighbours.

use crate::{
    common::{Gen, check_steered},
    dense::{linear, linear_backward},
    lora::{lora_backward, mix, route, route_backward, shrink, shrink_stacked, unmix},
};

/// One problem.
pub fn check(data: &[u8]) {
    let Some((&operation, rest)) = data.split_first() else { return };
    let random = Gen::steered(rest);
    match operation % 9 {
        0 => check_steered(random, linear),
        1 => check_steered(random, linear_backward),
        2 => check_steered(random, shrink),
        3 => check_steered(random, shrink_stacked),
        4 => check_steered(random, mix),
        5 => check_steered(random, unmix),
        6 => check_steered(random, lora_backward),
        7 => check_steered(random, route),
        _ => check_steered(random, route_backward),
    }
}
