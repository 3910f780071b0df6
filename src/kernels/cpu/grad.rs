//! Gradients of the routed LoRA.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn lora_backward(cpu: &Cpu, args: LoraBackward<'_, Cpu>) -> Vec<LoraGradients<Cpu>> {
    todo!()
}
