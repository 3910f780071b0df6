// The optimiser step over a range of the flat parameter vector, and the gradient norm.
//   g = grad_scale * grad   m = beta1 m + (1 - beta1) g   v = beta2 v + (1 - beta2) g^2
//   p = p * keep - rate * m / (sqrt(v) * inverse_root + eps)
// Grid of `adamw`: x = n / 256. Grid of `sum_of_squares`: x = n / 4096, at most 1024 (by n alone, so
// that the order does not depend on the device); each block adds its share in f64, and the one block
// of `sum_of_partials` adds those.
#include "common.cuh"

struct AdamW {
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, keep, rate, inverse_root, eps;
};

extern "C" __global__ void __launch_bounds__(256)
adamw(float* params, float* m, float* v, const float* grads, AdamW f, u64 n) {
    const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n) return;
    const float g = f.grad_scale * grads[at];
    const float m_new = fmaf(f.beta1, m[at], f.one_minus_beta1 * g);
    const float v_new = fmaf(f.beta2, v[at], f.one_minus_beta2 * (g * g));
    const float root = fmaf(sqrtf(v_new), f.inverse_root, f.eps);
    m[at] = m_new;
    v[at] = v_new;
    params[at] = fmaf(-f.rate, m_new / root, params[at] * f.keep);
}

template <class T>
__device__ inline void squares(double* partials, const T* x, u64 n) {
    SHARED(double, scratch, 256 / WARP);
    double sum = 0.0;
    for (u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x; at < n; at += u64(gridDim.x) * blockDim.x) {
        const double value = widen(x[at]);
        sum += value * value;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
sum_of_squares(double* partials, const Item* x, u64 n) {
    squares(partials, x, n);
}

extern "C" __global__ void __launch_bounds__(256)
sum_of_squares_full(double* partials, const float* x, u64 n) {
    squares(partials, x, n);
}

extern "C" __global__ void __launch_bounds__(256) sum_of_partials(double* sum, const double* partials, u32 n) {
    SHARED(double, scratch, 256 / WARP);
    double mine = 0.0;
    for (u32 at = threadIdx.x; at < n; at += blockDim.x) mine += partials[at];
    mine = block_sum(mine, scratch);
    if (threadIdx.x == 0) *sum = mine;
}
