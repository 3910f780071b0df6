// Head and cross-entropy over a chunk of tokens, and the greedy choice.
//   raw = x W^T by `linear_full` (linear.cu), [tokens, vocabulary]
//   nll[t] = ln sum_v e^(scale raw[t, v]) - scale raw[t, labels[t]]
//   d_raw[t, v] = d_nll * scale * (softmax[v] - [v = labels[t]])
//     f32: in the place of raw, and d_x = d_raw W [tokens, d_model] by `head_backward`
//     bf16: rounded once, as any activation's gradient is, and d_x = d_raw W by `linear_backward`
//   argmax[t]: the column of the largest value not forbidden; the first of equals
// Grid of `head_softmax` and `argmax`: x = tokens, HEAD_THREADS along the vocabulary; a thread adds in
// order, then a tree within a warp, then the warps in order.
#include "gemm.cuh"

const u32 HEAD_THREADS = 1024;

extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
head_softmax(double* nll, float* raw, Item* d_raw, const u32* labels, u32 n_vocabulary, float scale, float d_nll,
             u32 wants_gradient) {
    after_previous();
    SHARED(float, scratch, HEAD_THREADS / WARP);
    float* row = raw + size_t(blockIdx.x) * n_vocabulary;
    float largest = -INFINITY;
    for (u32 v = threadIdx.x; v < n_vocabulary; v += HEAD_THREADS) largest = fmaxf(largest, scale * row[v]);
    largest = block_max(largest, scratch);
    float sum = 0.0f;
    for (u32 v = threadIdx.x; v < n_vocabulary; v += HEAD_THREADS) sum += expf(scale * row[v] - largest);
    sum = block_sum(sum, scratch);
    const u32 label = labels[blockIdx.x];
    if (threadIdx.x == 0) nll[blockIdx.x] = logf(sum) + (largest - scale * row[label]);
    if (!wants_gradient) return;
    __syncthreads();
    for (u32 v = threadIdx.x; v < n_vocabulary; v += HEAD_THREADS) {
        const float probability = expf(scale * row[v] - largest) / sum;
        const float d = d_nll * scale * (probability - (v == label ? 1.0f : 0.0f));
#if POLYTAPE_BF16
        d_raw[size_t(blockIdx.x) * n_vocabulary + v] = to_bf16(d);
#else
        row[v] = d;
#endif
    }
}

#if !POLYTAPE_BF16
extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
head_backward(Item* d_x, const float* d_raw, const Item* weight, u32 n_tokens, u32 d_model, u32 n_vocabulary) {
    after_previous();
    ScalarTile tile = {};
    DYNAMIC_SHARED(float, shared);
    const u32 row0 = blockIdx.y * ScalarTile::M, col0 = blockIdx.x * ScalarTile::N;
    multiply<false>(tile, d_raw, weight, n_tokens, d_model, n_vocabulary, row0, col0, shared);
    const auto finish = [&](u32 row, u32 col, float value) {
        if (row0 + row < n_tokens && col0 + col < d_model)
            store(&d_x[size_t(row0 + row) * d_model + col0 + col], value);
    };
    for_each(tile, finish, shared);
}
#endif

// The better of two columns; none is n_columns. A NaN is never better.
struct Choice {
    float value;
    u32 col;
};

__device__ inline Choice better(Choice a, Choice b, u32 none) {
    if (a.col == none) return b;
    if (b.col == none) return a;
    if (a.value != b.value) return a.value > b.value || b.value != b.value ? a : b;
    return a.col < b.col ? a : b;
}

__device__ inline bool is_forbidden(const u32* forbidden, u32 n_forbidden, u32 col) {
    for (u32 i = 0; i < n_forbidden; ++i)
        if (forbidden[i] == col) return true;
    return false;
}

extern "C" __global__ void __launch_bounds__(HEAD_THREADS)
argmax(u32* columns, const float* logits, const u32* forbidden, u32 n_forbidden, u32 n_columns) {
    after_previous();
    SHARED(Choice, scratch, HEAD_THREADS / WARP);
    const float* row = logits + size_t(blockIdx.x) * n_columns;
    Choice best = {0.0f, n_columns};
    for (u32 col = threadIdx.x; col < n_columns; col += HEAD_THREADS)
        if (!is_forbidden(forbidden, n_forbidden, col)) best = better(best, Choice{row[col], col}, n_columns);
    for (u32 step = WARP / 2; step > 0; step /= 2) {
        const Choice other = {__shfl_xor_sync(ALL_LANES, best.value, step),
                              __shfl_xor_sync(ALL_LANES, best.col, step)};
        best = better(best, other, n_columns);
    }
    if (lane() == 0) scratch[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 warp = 1; warp < HEAD_THREADS / WARP; ++warp) best = better(best, scratch[warp], n_columns);
    columns[blockIdx.x] = best.col == n_columns ? 0 : best.col;
}
