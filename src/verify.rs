//! The kernels' tests inside the binary: the cases and the harness are those of `tests/kernels`, so
//! that what a user runs on a machine is what every change is tested with.

#[path = "../tests/kernels/attention.rs"]
mod attention;
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/kernels/dense.rs"]
mod dense;
#[path = "../tests/kernels/lora.rs"]
mod lora;

use common::{Emulate, check_seed, seed_of};
use polytape::cli::verify::{Kernel, Passed};

/// Every operation with its random cases.
macro_rules! kernels {
    ($($module:ident: $($name:ident)*;)*) => {
        &[$($(Kernel {
            name: stringify!($name),
            seed: |base, i| seed_of(stringify!($name), base, i),
            check: |seed| check_seed(seed, Emulate::Nothing, $module::$name).map(converted),
        },)*)*]
    };
}

pub(crate) const KERNELS: &[Kernel] = kernels! {
    dense: linear linear_backward embed rope gather norm norm_backward gated dropout add cache_write
        head_loss argmax sample sum_of_squares sum_of_squares_in adamw;
    attention: attention attention_backward;
    lora: route route_backward mix mix_each unmix unmix_each shrink shrink_stacked lora_backward;
};

fn converted(passed: Vec<common::Passed>) -> Vec<Passed> {
    let convert =
        |common::Passed { backend, worst, executions }| Passed { backend, worst, executions };
    passed.into_iter().map(convert).collect()
}
