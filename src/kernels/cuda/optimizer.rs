//! The optimiser step and the gradient norm.

use bytemuck::NoUninit;

use super::Cuda;
use crate::{
    dtype::Dtype,
    kernels::ops::{AdamW, ParamGroup},
    tensor::Tensor,
};

/// `AdamW` of `cuda/adamw.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct AdamWArg {
    grad_scale: f32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    keep: f32,
    rate: f32,
    inverse_root: f32,
    eps: f32,
}

pub(super) fn adamw(cuda: &Cuda, args: AdamW<'_, Cuda>) {
    let AdamW { params, m, v, grads, groups, grad_scale, step, beta1, beta2, eps } = args;
    let n = params.len();
    for tensor in [&*m, &*v, grads] {
        assert_eq!((tensor.len(), tensor.dtype), (n, Dtype::F32));
    }
    let [params, m, v] = [params, m, v].map(|tensor| tensor.address_mut());
    // In f64: 1 - beta^step loses everything in f32.
    let correction1 = 1.0 - beta1.powf(step as f64);
    let correction2 = 1.0 - beta2.powf(step as f64);
    for ParamGroup { range, lr, weight_decay } in groups {
        assert!(range.start <= range.end && range.end <= n, "groups lie in the parameters");
        let (lr, weight_decay) = (f64::from(*lr), f64::from(*weight_decay));
        let arg = AdamWArg {
            grad_scale,
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            keep: (1.0 - lr * weight_decay) as f32,
            rate: (lr / correction1) as f32,
            inverse_root: (1.0 / correction2.sqrt()) as f32,
            eps,
        };
        let start = 4 * range.start as u64;
        let kernel = cuda.kernel("adamw", "adamw").arg(params + start).arg(m + start);
        let kernel = kernel.arg(v + start).arg(grads.address() + start).arg(arg);
        kernel.arg(range.len() as u64).launch([range.len().div_ceil(256), 1, 1], 256);
    }
}

pub(super) fn sum_of_squares(cuda: &Cuda, tensor: &Tensor<Cuda>) -> f64 {
    let n = tensor.len();
    if n == 0 {
        return 0.0;
    }
    let blocks = n.div_ceil(4096).min(1024);
    let (partials, sum) = (cuda.take(8 * blocks), cuda.take(8));
    let name = if tensor.dtype == cuda.compute { "sum_of_squares" } else { "sum_of_squares_full" };
    let kernel = cuda.kernel("adamw", name).arg(partials.address()).arg(tensor.address());
    kernel.arg(n as u64).launch([blocks, 1, 1], 256);
    let kernel = cuda.kernel("adamw", "sum_of_partials").arg(sum.address());
    kernel.arg(partials.address()).count(blocks).launch([1, 1, 1], 256);
    let bytes = cuda.read(&sum, 8);
    f64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for"))
}
