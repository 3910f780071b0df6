//! Into rank space.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn shrink(cpu: &Cpu, args: Shrink<'_, Cpu>) -> Vec<Tensor<Cpu>> {
    todo!()
}

pub(super) fn shrink_stacked(cpu: &Cpu, args: ShrinkStacked<'_, Cpu>) -> Tensor<Cpu> {
    todo!()
}
