// Shrink: z[t, r] = scale * sum_i x[t, i] * mixed_a[row(t), i, r], and the same from the bank:
// z[t, r] = scale * sum_i x[t, i] * sum_s w[row(t), q, s] * a[q, s, i, r].
//   x [tokens, d_in]   mixed_a [rows * d_in, rank]   token_rows [tokens]   z [tokens, rank], overwritten
// Grid: x = tokens / 8, y = ranks / 8, z = siblings. Block: 8 warps, a warp a token. A lane adds every 32nd input
// feature in order for 8 ranks at a time, then a tree over the lanes: a token's bits are its own.
// For bf16 `shrink_tiles` is in the place of `shrink`, and `shrink_stacked_tiles` in that of `shrink_stacked` where splits
// are whole runs of 8 features: thin.cuh, on tensor cores.
#include "siblings.cuh"
#include "thin.cuh"

const u32 SHRINK_TOKENS = 8;  // Warps of a block.
const u32 SHRINK_RANKS = 8;   // Sums of a lane.

// Adds up the lanes and writes this warp's ranks.
__device__ inline void shrink_finish(float* z, float* sums, u32 token, u32 first, u32 rank, float scale) {
#pragma unroll
    for (u32 i = 0; i < SHRINK_RANKS; ++i) {
        const float sum = warp_sum(sums[i]);
        if (lane() == 0 && first + i < rank) z[size_t(token) * rank + first + i] = scale * sum;
    }
}

extern "C" __global__ void __launch_bounds__(SHRINK_TOKENS * WARP)
shrink_stacked(float* z, const Item* x, const u32* token_rows, Bank bank, u32 n_tokens, float scale) {
    after_previous();
    const u32 token = blockIdx.x * SHRINK_TOKENS + threadIdx.x / WARP;
    const u32 first = blockIdx.y * SHRINK_RANKS;
    if (token >= n_tokens) return;  // A whole warp.
    const Item* x_row = x + size_t(token) * bank.d_in;
    const u32 n = min(SHRINK_RANKS, bank.rank - first), width = bank.d_in / bank.n_splits;
    float sums[SHRINK_RANKS] = {};
    for (u32 i = lane(); i < bank.d_in; i += WARP) {
        const float value = widen(x_row[i]);
        const u32 split = i / width;
        const float* w = mixing(bank, token_rows[token], split);
        const float* a =
            bank.a + (size_t(split) * bank.n_skills * width + i % width) * bank.rank + first;
        for (u32 s = 0; s < bank.n_skills; ++s) {
            const float weighted = value * w[s];
#pragma unroll
            for (u32 r = 0; r < SHRINK_RANKS; ++r)
                if (r < n) sums[r] = fmaf(weighted, a[size_t(s) * width * bank.rank + r], sums[r]);
        }
    }
    shrink_finish(z, sums, token, first, bank.rank, scale);
}

#if POLYTAPE_BF16

extern "C" __global__ void __launch_bounds__(STACKED_WARPS * WARP)
shrink_stacked_tiles(float* z, const Item* x, const u32* token_rows, Bank bank, float* partials, u32* done,
                     u32 n_tokens, float scale) {
    after_previous();
    thin_stacked(z, x, token_rows, bank, partials, done, n_tokens, scale);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
shrink_tiles(const __grid_constant__ ThinProducts products, const RunTile* tiles, u32 rank, float scale) {
    after_previous();
    const ThinProduct& own = products.of[blockIdx.z];
    thin_product<false>(own.z, own.lhs, own.right, tiles[blockIdx.x], own.depth, rank, scale);
}

#else

extern "C" __global__ void __launch_bounds__(SHRINK_TOKENS * WARP)
shrink(const __grid_constant__ ThinProducts products, const u32* token_rows, u32 n_tokens, u32 rank, float scale) {
    after_previous();
    const ThinProduct& own = products.of[blockIdx.z];
    const u32 d_in = own.depth;
    const u32 token = blockIdx.x * SHRINK_TOKENS + threadIdx.x / WARP;
    const u32 first = blockIdx.y * SHRINK_RANKS;
    if (token >= n_tokens) return;  // A whole warp.
    const Item* x_row = own.lhs + size_t(token) * d_in;
    const float* a = own.right + size_t(token_rows[token]) * d_in * rank + first;
    const u32 n = min(SHRINK_RANKS, rank - first);
    float sums[SHRINK_RANKS] = {};
    for (u32 i = lane(); i < d_in; i += WARP) {
        const float value = widen(x_row[i]);
#pragma unroll
        for (u32 r = 0; r < SHRINK_RANKS; ++r)
            if (r < n) sums[r] = fmaf(value, a[size_t(i) * rank + r], sums[r]);
    }
    shrink_finish(own.z, sums, token, first, rank, scale);
}

#endif
