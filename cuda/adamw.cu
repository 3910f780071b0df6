// The optimiser step over a range of the flat parameter vector, and what clips it.
//   g = grad_scale * grad   m = beta1 m + (1 - beta1) g   v = beta2 v + (1 - beta2) g^2
//   p = p * keep - rate * m / (sqrt(v) * inverse_root + eps)
//   clipped = min(1, max_norm / (sqrt(squares) + 1e-6)), in the place of grad_scale where it is given; a NaN
//   where the norm or the loss is not finite, and then nothing is written
//   sum = [sum +] sum_i numbers[i]
// Grid of `adamw`: x = n / 256. Grid of `sum_of_squares`: x = n / 4096, at most 1024 (by n alone, so
// that the order does not depend on the device); each block adds its share in f64. `add_up` and `clip_scale`
// are one block.
#include "common.cuh"

struct AdamW {
    float grad_scale, beta1, beta2, one_minus_beta1, one_minus_beta2, keep, rate, inverse_root, eps;
};

extern "C" __global__ void __launch_bounds__(256)
adamw(float* params, float* m, float* v, const float* grads, AdamW f, const float* clipped, u64 n) {
    const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= n) return;
    const float grad_scale = clipped ? *clipped : f.grad_scale;
    if (grad_scale != grad_scale) return;
    const float g = grad_scale * grads[at];
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

extern "C" __global__ void __launch_bounds__(256)
add_up(double* sum, const double* numbers, u32 n, u32 adds) {
    SHARED(double, scratch, 256 / WARP);
    double mine = 0.0;
    for (u32 at = threadIdx.x; at < n; at += blockDim.x) mine += numbers[at];
    mine = block_sum(mine, scratch);
    if (threadIdx.x == 0) *sum = adds ? *sum + mine : mine;
}

extern "C" __global__ void __launch_bounds__(32)
clip_scale(float* clipped, const double* squares, const double* loss, double max_norm) {
    if (threadIdx.x != 0) return;
    const double largest = 1.7976931348623157e308, norm = sqrt(*squares);
    const double scale = max_norm > 0.0 ? max_norm / (norm + 1e-6) : 1.0;
    const bool finite = norm <= largest && fabs(*loss) <= largest;
    *clipped = finite ? float(scale < 1.0 ? scale : 1.0) : __uint_as_float(0x7fc00000);
}
