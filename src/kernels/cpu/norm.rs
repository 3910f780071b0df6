//! Root-mean-square norm, forward and backward.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn norm(cpu: &Cpu, args: Norm<'_, Cpu>) -> Normed<Cpu> {
    todo!()
}

pub(super) fn norm_again(cpu: &Cpu, args: NormAgain<'_, Cpu>) -> Tensor<Cpu> {
    todo!()
}

pub(super) fn norm_backward(cpu: &Cpu, args: NormBackward<'_, Cpu>) -> Tensor<Cpu> {
    todo!()
}
