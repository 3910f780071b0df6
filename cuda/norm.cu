// Root-mean-square norm and layer norm: with c = x, or x - mean(x) where `mean` is not null,
// rstd = 1 / sqrt(mean(c^2) + eps), y = c * rstd * weight + bias, and with g = d_y * weight
// d_x = d_residual + rstd * (g - mean(g) - c * rstd^2 * mean(g * c)), mean(g) only where c has a mean.
//   x, y, d_y, d_residual, d_x [tokens, d]   weight, bias [d] (bias null: none)   mean, rstd [tokens]
// Grid: x = tokens. Block: warps along the columns, up to NORM_THREADS, each thread 8 columns at a time where rows are whole
// runs of 8. Sums: each thread in order, a tree within a warp, the warps in order. d_x may be d_residual (null: none).
#include "common.cuh"

const u32 NORM_THREADS = 256;

// One expression, so that `norm_again` gives the bits of `norm_rows`.
__device__ inline float normed(float x, float mean, float rstd, float weight, const float* bias, u32 col) {
    const float scaled = (x - mean) * rstd;
    return bias ? fmaf(scaled, weight, bias[col]) : scaled * weight;
}

template <u32 RUN>
__device__ inline void write_normed(Item* y, const Item* x, float mean, float rstd, const float* weight,
                                    const float* bias, u32 d) {
    for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
        float values[RUN], weights[RUN];
        load_run<RUN>(values, x + col);
        load_run<RUN>(weights, weight + col);
#pragma unroll
        for (u32 i = 0; i < RUN; ++i) values[i] = normed(values[i], mean, rstd, weights[i], bias, col + i);
        store_run<RUN>(y + col, values);
    }
}

template <u32 RUN>
__device__ inline void norm_row(Item* y, float* rstd, float* mean, const Item* x, const float* weight,
                                const float* bias, float eps, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    float center = 0.0f;
    if (mean) {
        float sum = 0.0f;
        for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
            float values[RUN];
            load_run<RUN>(values, x + col);
#pragma unroll
            for (u32 i = 0; i < RUN; ++i) sum += values[i];
        }
        center = block_sum(sum, scratch) / float(d);
        if (threadIdx.x == 0) *mean = center;
    }
    float sum = 0.0f;
    for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
        float values[RUN];
        load_run<RUN>(values, x + col);
#pragma unroll
        for (u32 i = 0; i < RUN; ++i) sum = fmaf(values[i] - center, values[i] - center, sum);
    }
    sum = block_sum(sum, scratch);
    const float r = 1.0f / sqrtf(sum / float(d) + eps);
    if (threadIdx.x == 0) *rstd = r;
    write_normed<RUN>(y, x, center, r, weight, bias, d);
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_rows(Item* y, float* rstd, float* mean, const Item* x, const float* weight, const float* bias,
          float eps, u32 d) {
    after_previous();
    const size_t row = size_t(blockIdx.x) * d;
    float *own_rstd = rstd + blockIdx.x, *own_mean = mean ? mean + blockIdx.x : nullptr;
    if (d % 8 == 0)
        norm_row<8>(y + row, own_rstd, own_mean, x + row, weight, bias, eps, d);
    else
        norm_row<1>(y + row, own_rstd, own_mean, x + row, weight, bias, eps, d);
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_again(Item* y, const float* rstd, const float* mean, const Item* x, const float* weight,
           const float* bias, u32 d) {
    after_previous();
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x], center = mean ? mean[blockIdx.x] : 0.0f;
    if (d % 8 == 0)
        write_normed<8>(y + row, x + row, center, r, weight, bias, d);
    else
        write_normed<1>(y + row, x + row, center, r, weight, bias, d);
}

template <u32 RUN>
__device__ inline void norm_row_backward(Item* d_x, const Item* d_residual, const Item* d_y, const Item* x,
                                         const float* weight, float r, float center, bool centered, u32 d) {
    SHARED(float, scratch, NORM_THREADS / WARP);
    float sum = 0.0f, sum_g = 0.0f;
    for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
        float values[RUN], gradients[RUN], weights[RUN];
        load_run<RUN>(values, x + col);
        load_run<RUN>(gradients, d_y + col);
        load_run<RUN>(weights, weight + col);
#pragma unroll
        for (u32 i = 0; i < RUN; ++i) {
            const float g = gradients[i] * weights[i];
            sum = fmaf(g, values[i] - center, sum);
            sum_g += g;
        }
    }
    const float product = block_sum(sum, scratch) / float(d);
    const float mean_g = centered ? block_sum(sum_g, scratch) / float(d) : 0.0f;
    for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
        float values[RUN], gradients[RUN], weights[RUN], residuals[RUN];
        load_run<RUN>(values, x + col);
        load_run<RUN>(gradients, d_y + col);
        load_run<RUN>(weights, weight + col);
        if (d_residual) load_run<RUN>(residuals, d_residual + col);
#pragma unroll
        for (u32 i = 0; i < RUN; ++i) {
            const float g = gradients[i] * weights[i] - mean_g;
            const float inner = fmaf(-(values[i] - center) * r * r, product, g);
            values[i] = fmaf(r, inner, d_residual ? residuals[i] : 0.0f);
        }
        store_run<RUN>(d_x + col, values);
    }
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_backward(Item* d_x, const Item* d_residual, const Item* d_y, const Item* x, const float* weight,
              const float* rstd, const float* mean, u32 d) {
    after_previous();
    const size_t row = size_t(blockIdx.x) * d;
    const float r = rstd[blockIdx.x], center = mean ? mean[blockIdx.x] : 0.0f;
    const Item* residual = d_residual ? d_residual + row : nullptr;
    if (d % 8 == 0)
        norm_row_backward<8>(d_x + row, residual, d_y + row, x + row, weight, r, center, mean != nullptr, d);
    else
        norm_row_backward<1>(d_x + row, residual, d_y + row, x + row, weight, r, center, mean != nullptr, d);
}
