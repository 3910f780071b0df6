//! The optimiser step and the gradient norm.

use std::ops::Range;

use bytemuck::NoUninit;

use super::{Cuda, Numbers};
use crate::{
    dtype::Dtype,
    kernels::{
        Backend, Precision,
        ops::{AdamW, GradScale, ParamGroup},
    },
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
    inverse_root: f32,
    eps: f32,
}

/// `Group` of `cuda/adamw.cu`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct GroupArg {
    first: u64,
    n: u64,
    keep: f32,
    rate: f32,
}

/// Elements of a group at most that few blocks are enough for.
const SHORT_GROUP: usize = 4096;

/// Blocks that walk a group of this length.
fn blocks(len: usize) -> usize {
    len.div_ceil(1024).clamp(1, 4096)
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
    let (grad_scale, clipped) = match grad_scale {
        GradScale::Given(scale) => (scale, None),
        GradScale::Clipped { max_norm, squares, loss } => {
            assert_eq!((squares.n, loss.n), (1, 1));
            let mut scale = cuda.alloc(1, 1, Precision::Full);
            let kernel = cuda.kernel("adamw", "clip_scale").arg(scale.address_mut());
            let kernel = kernel.arg(squares.address()).arg(loss.address()).arg(max_norm);
            kernel.launch([1, 1, 1], 32);
            (1.0, Some(scale))
        }
    };
    let clipped = clipped.as_ref().map_or(0, Tensor::address);
    let group = |ParamGroup { range, lr, weight_decay }: &ParamGroup| {
        assert!(range.start <= range.end && range.end <= n, "groups lie in the parameters");
        let (lr, weight_decay) = (f64::from(*lr), f64::from(*weight_decay));
        let (keep, rate) = ((1.0 - lr * weight_decay) as f32, (lr / correction1) as f32);
        GroupArg { first: range.start as u64, n: range.len() as u64, keep, rate }
    };
    let arg = AdamWArg {
        grad_scale,
        beta1: beta1 as f32,
        beta2: beta2 as f32,
        one_minus_beta1: (1.0 - beta1) as f32,
        one_minus_beta2: (1.0 - beta2) as f32,
        inverse_root: (1.0 / correction2.sqrt()) as f32,
        eps,
    };
    // A launch has as many blocks for each group as its longest one needs: the bank and a thousand rows of a router are not
    // for the same.
    let (short, long): (Vec<_>, Vec<_>) =
        groups.iter().partition(|group| group.range.len() <= SHORT_GROUP);
    for groups in [long, short] {
        let Some(longest) = groups.iter().map(|group| group.range.len()).max() else { continue };
        let table = cuda.buffer_of(&groups.iter().map(|g| group(g)).collect::<Vec<_>>());
        let kernel = cuda.kernel("adamw", "adamw").arg(params).arg(m).arg(v).arg(grads.address());
        let kernel = kernel.arg(table.address()).arg(arg).arg(clipped);
        kernel.launch([groups.len(), blocks(longest), 1], 256);
    }
}

pub(super) fn sum_of_squares_in(
    cuda: &Cuda,
    tensor: &Tensor<Cuda>,
    ranges: &[Range<usize>],
) -> Numbers {
    let Some(longest) = ranges.iter().map(Range::len).max() else { return cuda.number(0.0) };
    assert_eq!(tensor.dtype, Dtype::F32);
    assert!(ranges.iter().all(|range| range.end <= tensor.len()), "ranges lie in the tensor");
    let table: Vec<_> = ranges.iter().flat_map(|range| [range.start, range.len()]).collect();
    let table = cuda.words(table.into_iter().map(|word| word as u64));
    let blocks = longest.div_ceil(4096).clamp(1, 64);
    let n = ranges.len() * blocks;
    let (partials, sum) = (cuda.unwritten_numbers(n), cuda.unwritten_numbers(1));
    let kernel = cuda.kernel("adamw", "sum_of_squares_in").arg(partials.address());
    let kernel = kernel.arg(tensor.address()).arg(table.address());
    kernel.launch([ranges.len(), blocks, 1], 256);
    sum_of(cuda, &sum, &partials, n, false);
    sum
}

pub(super) fn sum_of_squares(cuda: &Cuda, tensor: &Tensor<Cuda>) -> Numbers {
    let n = tensor.len();
    if n == 0 {
        return cuda.number(0.0);
    }
    let blocks = n.div_ceil(4096).min(1024);
    let (partials, sum) = (cuda.unwritten_numbers(blocks), cuda.unwritten_numbers(1));
    let name = if tensor.dtype == cuda.compute { "sum_of_squares" } else { "sum_of_squares_full" };
    let kernel = cuda.kernel("adamw", name).arg(partials.address()).arg(tensor.address());
    kernel.arg(n as u64).launch([blocks, 1, 1], 256);
    sum_of(cuda, &sum, &partials, blocks, false);
    sum
}

pub(super) fn add_up(cuda: &Cuda, total: &mut Numbers, numbers: &Numbers, n: usize) {
    assert!(total.n == 1 && n <= numbers.n);
    sum_of(cuda, total, numbers, n, true);
}

/// The sum of the first `n` numbers, in the place of `total` or added to it.
fn sum_of(cuda: &Cuda, total: &Numbers, numbers: &Numbers, n: usize, adds: bool) {
    let kernel = cuda.kernel("adamw", "add_up").arg(total.address()).arg(numbers.address());
    kernel.count(n).arg(u32::from(adds)).launch([1, 1, 1], 256);
}
