//! The optimiser step over the flat parameter vector, and the gradient norm.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn sum_of_squares(tensor: &Tensor<Cpu>) -> f64 {
    todo!()
}

pub(super) fn adamw(cpu: &Cpu, args: AdamW<'_, Cpu>) {
    todo!()
}
