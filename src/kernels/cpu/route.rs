//! The router.

use super::{super::ops::*, Cpu};
use crate::tensor::Tensor;

pub(super) fn route(cpu: &Cpu, args: &Route<'_, Cpu>) -> Routing<Cpu> {
    todo!()
}

pub(super) fn route_backward(args: RouteBackward<'_, Cpu>) {
    todo!()
}
