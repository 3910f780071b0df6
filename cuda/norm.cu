// Root-mean-square norm: rstd = 1 / sqrt(mean(x^2) + eps), y = x * rstd * weight, and
// d_x = d_residual + rstd * (d_y * weight - x * rstd^2 * mean(d_y * weight * x)).
//   x, y, d_y, d_residual, d_x [tokens, d]   weight [d]   rstd [tokens]
// Grid: x = tokens. Block: 256 threads along the columns. Sums: each thread in order, a tree within
// a warp, the warps in order. d_x may be d_residual (null: none).
#include "common.cuh"

const u32 NORM_THREADS = 256;

// One expression, so that `norm_again` gives the bits of `rms_norm`.
__device__ inline float normed(float x, float rstd, float weight) { return x * rstd * weight; }

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm(Item* y, float* rstd, const Item* x, const float* weight, float eps, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    const size_t row = size_t(blockIdx.x) * d;
    float sum = 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) {
        const float value = widen(x[row + col]);
        sum = fmaf(value, value, sum);
    }
    sum = block_sum(sum, scratch);
    const float r = 1.0f / sqrtf(sum / float(d) + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS)
        store(&y[row + col], normed(widen(x[row + col]), r, weight[col]));
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_again(Item* y, const float* rstd, const Item* x, const float* weight, u32 d) {
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x];
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS)
        store(&y[row + col], normed(widen(x[row + col]), r, weight[col]));
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_backward(Item* d_x, const Item* d_residual, const Item* d_y, const Item* x, const float* weight,
              const float* rstd, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x];
    float sum = 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS)
        sum = fmaf(widen(d_y[row + col]) * weight[col], widen(x[row + col]), sum);
    const float mean = block_sum(sum, scratch) / float(d);
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) {
        const float inner =
            fmaf(-widen(x[row + col]) * r * r, mean, widen(d_y[row + col]) * weight[col]);
        const float residual = d_residual ? widen(d_residual[row + col]) : 0.0f;
        store(&d_x[row + col], fmaf(r, inner, residual));
    }
}
