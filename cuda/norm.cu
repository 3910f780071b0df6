// Root-mean-square norm and layer norm: with c = x, or x - mean(x) where `mean` is not null,
// rstd = 1 / sqrt(mean(c^2) + eps), y = c * rstd * weight + bias, and with g = d_y * weight
// d_x = d_residual + rstd * (g - mean(g) - c * rstd^2 * mean(g * c)), mean(g) only where c has a mean.
//   x, y, d_y, d_residual, d_x [tokens, d]   weight, bias [d] (bias null: none)   mean, rstd [tokens]
// Grid: x = tokens. Block: 256 threads along the columns. Sums: each thread in order, a tree within
// a warp, the warps in order. d_x may be d_residual (null: none).
#include "common.cuh"

const u32 NORM_THREADS = 256;

// One expression, so that `norm_again` gives the bits of `norm_rows`.
__device__ inline float normed(float x, float mean, float rstd, const float* weight, const float* bias,
                               u32 col) {
    const float scaled = (x - mean) * rstd;
    return bias ? fmaf(scaled, weight[col], bias[col]) : scaled * weight[col];
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_rows(Item* y, float* rstd, float* mean, const Item* x, const float* weight, const float* bias,
          float eps, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    const size_t row = size_t(blockIdx.x) * d;
    float center = 0.0f;
    if (mean) {
        float sum = 0.0f;
        for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) sum += widen(x[row + col]);
        center = block_sum(sum, scratch) / float(d);
        if (threadIdx.x == 0) mean[blockIdx.x] = center;
    }
    float sum = 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) {
        const float value = widen(x[row + col]) - center;
        sum = fmaf(value, value, sum);
    }
    sum = block_sum(sum, scratch);
    const float r = 1.0f / sqrtf(sum / float(d) + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS)
        store(&y[row + col], normed(widen(x[row + col]), center, r, weight, bias, col));
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_again(Item* y, const float* rstd, const float* mean, const Item* x, const float* weight,
           const float* bias, u32 d) {
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x], center = mean ? mean[blockIdx.x] : 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS)
        store(&y[row + col], normed(widen(x[row + col]), center, r, weight, bias, col));
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_backward(Item* d_x, const Item* d_residual, const Item* d_y, const Item* x, const float* weight,
              const float* rstd, const float* mean, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x], center = mean ? mean[blockIdx.x] : 0.0f;
    float sum = 0.0f, sum_g = 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) {
        const float g = widen(d_y[row + col]) * weight[col];
        sum = fmaf(g, widen(x[row + col]) - center, sum);
        sum_g += g;
    }
    const float product = block_sum(sum, scratch) / float(d);
    const float mean_g = mean ? block_sum(sum_g, scratch) / float(d) : 0.0f;
    for (u32 col = threadIdx.x; col < d; col += NORM_THREADS) {
        const float g = widen(d_y[row + col]) * weight[col] - mean_g;
        const float inner = fmaf(-(widen(x[row + col]) - center) * r * r, product, g);
        const float residual = d_residual ? widen(d_residual[row + col]) : 0.0f;
        store(&d_x[row + col], fmaf(r, inner, residual));
    }
}
