// The optimiser step over groups of the flat parameter vector, and what clips it.
//   g = grad_scale * grad   m = beta1 m + (1 - beta1) g   v = beta2 v + (1 - beta2) g^2
//   p = p * keep - rate * m / (sqrt(v) * inverse_root + eps)
//   clipped = min(1, max_norm / (sqrt(squares) + 1e-6)), in the place of grad_scale where it is given; a NaN
//   where the norm or the loss is not finite, and then nothing is written
//   sum = [sum +] sum_i numbers[i]
// Grid of `adamw`: x = groups, y = blocks of 256 threads that walk a group. Grid of `sum_of_squares`: x =
// n / 4096, at most 1024 (by n alone, so that the order does not depend on the device); each block adds its
// share in f64. `sum_of_squares_in` is the same for ranges (first element, length): x = ranges, y = the
// longest's length / 4096, at most 64. `add_up` and `clip_scale` are one block.
#include "common.cuh"

struct AdamW {
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, inverse_root, eps;
};

struct Group {
    u64 first, n;
    float keep, rate;
};

extern "C" __global__ void __launch_bounds__(256)
adamw(float* params, float* m, float* v, const float* grads, const Group* groups, AdamW f, const float* clipped) {
    after_previous();
    const float grad_scale = clipped ? *clipped : f.grad_scale;
    if (grad_scale != grad_scale) return;
    const Group group = groups[blockIdx.x];
    for (u64 i = u64(blockIdx.y) * blockDim.x + threadIdx.x; i < group.n; i += u64(gridDim.y) * blockDim.x) {
        const u64 at = group.first + i;
        const float g = grad_scale * grads[at];
        const float m_new = fmaf(f.beta1, m[at], f.one_minus_beta1 * g);
        const float v_new = fmaf(f.beta2, v[at], f.one_minus_beta2 * (g * g));
        const float root = fmaf(sqrtf(v_new), f.inverse_root, f.eps);
        m[at] = m_new;
        v[at] = v_new;
        params[at] = fmaf(-group.rate, m_new / root, params[at] * group.keep);
    }
}

// The share of a block among n_blocks.
template <class T>
__device__ inline void squares(double* partial, const T* x, u64 n, u32 block, u32 n_blocks) {
    SHARED(double, scratch, 256 / WARP);
    double sum = 0.0;
    for (u64 at = u64(block) * blockDim.x + threadIdx.x; at < n; at += u64(n_blocks) * blockDim.x) {
        const double value = widen(x[at]);
        sum += value * value;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *partial = sum;
}

extern "C" __global__ void __launch_bounds__(256)
sum_of_squares(double* partials, const Item* x, u64 n) {
    after_previous();
    squares(&partials[blockIdx.x], x, n, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
sum_of_squares_full(double* partials, const float* x, u64 n) {
    after_previous();
    squares(&partials[blockIdx.x], x, n, blockIdx.x, gridDim.x);
}

extern "C" __global__ void __launch_bounds__(256)
sum_of_squares_in(double* partials, const float* x, const u64* ranges) {
    after_previous();
    const u64 first = ranges[2 * blockIdx.x], n = ranges[2 * blockIdx.x + 1];
    squares(&partials[size_t(blockIdx.x) * gridDim.y + blockIdx.y], x + first, n, blockIdx.y, gridDim.y);
}

extern "C" __global__ void __launch_bounds__(256)
add_up(double* sum, const double* numbers, u32 n, u32 adds) {
    after_previous();
    SHARED(double, scratch, 256 / WARP);
    double mine = 0.0;
    for (u32 at = threadIdx.x; at < n; at += blockDim.x) mine += numbers[at];
    mine = block_sum(mine, scratch);
    if (threadIdx.x == 0) *sum = adds ? *sum + mine : mine;
}

extern "C" __global__ void __launch_bounds__(32)
clip_scale(float* clipped, const double* squares, const double* loss, double max_norm) {
    after_previous();
    if (threadIdx.x != 0) return;
    const double largest = 1.7976931348623157e308, norm = sqrt(*squares);
    const double scale = max_norm > 0.0 ? max_norm / (norm + 1e-6) : 1.0;
    const bool finite = norm <= largest && fabs(*loss) <= largest;
    *clipped = finite ? float(scale < 1.0 ? scale : 1.0) : __uint_as_float(0x7fc00000);
}
