//! Gated activation, forward and backward.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn gated(cpu: &Cpu, args: &Gated<'_, Cpu>) -> Tensor<Cpu> {
    todo!()
}

pub(super) fn gated_backward(
    cpu: &Cpu,
    args: &Gated<'_, Cpu>,
    d_h: &Tensor<Cpu>,
) -> (Tensor<Cpu>, Option<Tensor<Cpu>>) {
    todo!()
}
