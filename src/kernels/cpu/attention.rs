//! Attention, flash style, forward and backward.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn attention(cpu: &Cpu, args: &Attention<'_, Cpu>) -> Attended<Cpu> {
    todo!()
}

pub(super) fn attention_backward(cpu: &Cpu, args: AttentionBackward<'_, Cpu>) -> [Tensor<Cpu>; 3] {
    todo!()
}
