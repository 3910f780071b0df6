//! Mixing a bank's skills into a pair for each routing row, and its backward.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn mix(cpu: &Cpu, args: Mix<'_, Cpu>) -> MixedPair<Cpu> {
    todo!()
}

pub(super) fn unmix(cpu: &Cpu, args: Unmix<'_, Cpu>) {
    todo!()
}
