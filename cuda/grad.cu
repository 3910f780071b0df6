// Gradients in rank space and of the mixed pairs.
//   d_z[t, r] = scale * sum_o d_y[t, o] * mixed_b[row(t), r, o]           [tokens, rank]
//   d_a[row, i, r] = sum_t x[t, i] * d_z[t, r]                            [rows * d_in, rank]
//   d_b[row, r, o] = sum_t z[t, r] * d_y[t, o]                            [rows * rank, d_out]
// t runs over the tokens of the routing row, segment after segment (0 for a row without tokens):
// row_segments [rows + 1] says which of row_runs (first token, length) are its own.
// Grid of `d_z`: x = tokens / 8, y = ranks / 8, z = siblings, a warp a token. Grid of `d_pair`: x =
// d_in / 32 for d_a, then d_out / 32 for d_b (of the widest), y = ranks / 32, z = siblings * rows; a block of
// 256 threads owns a 32 x 32 tile and adds the tokens in order, in blocks of 256 that are then added up.
// For bf16 `d_z_tiles` and `d_pair_tiles` (128 features, 16 ranks) are in their places: thin.cuh, on tensor
// cores.
#include "siblings.cuh"
#include "thin.cuh"

#if POLYTAPE_BF16

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
d_z_tiles(const __grid_constant__ ThinProducts products, const RunTile* tiles, u32 rank, float scale) {
    after_previous();
    const ThinProduct& own = products.of[blockIdx.z];
    thin_product<true>(own.z, own.lhs, own.right, tiles[blockIdx.x], own.depth, rank, scale);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
d_pair_tiles(const __grid_constant__ PairGradients pairs, const Item* x, const u32* row_segments,
             const uint2* row_runs, u32 d_in, u32 rank, u32 n_rows) {
    after_previous();
    const PairGradient& own = pairs.of[blockIdx.z / n_rows];
    const u32 row = blockIdx.z % n_rows, a_blocks = (d_in + OUTER_WIDTH - 1) / OUTER_WIDTH;
    // Both in one text: its registers are there once.
    const bool is_a = blockIdx.x < a_blocks;
    const u32 features = is_a ? blockIdx.x : blockIdx.x - a_blocks, width = is_a ? d_in : own.d_out;
    if (features * OUTER_WIDTH >= width) return;  // A whole block.
    const Item* wide = is_a ? x : own.d_y;
    thin_outer(is_a ? own.d_a : own.d_b, wide, is_a ? own.d_z : own.z, row_segments, row_runs, width, rank, features,
               row, !is_a);
}

#else

const u32 GRAD_TOKENS = 8;  // Warps of a block of `d_z`.
const u32 GRAD_RANKS = 8;   // Sums of a lane.

extern "C" __global__ void __launch_bounds__(GRAD_TOKENS * WARP)
d_z(const __grid_constant__ ThinProducts products, const u32* token_rows, u32 n_tokens, u32 rank, float scale) {
    after_previous();
    const ThinProduct& own = products.of[blockIdx.z];
    const u32 d_out = own.depth;
    const u32 token = blockIdx.x * GRAD_TOKENS + threadIdx.x / WARP;
    const u32 first = blockIdx.y * GRAD_RANKS;
    if (token >= n_tokens) return;  // A whole warp.
    const Item* d_y_row = own.lhs + size_t(token) * d_out;
    const float* b = own.right + (size_t(token_rows[token]) * rank + first) * d_out;
    const u32 n = min(GRAD_RANKS, rank - first);
    float sums[GRAD_RANKS] = {};
    for (u32 o = lane(); o < d_out; o += WARP) {
        const float value = widen(d_y_row[o]);
#pragma unroll
        for (u32 r = 0; r < GRAD_RANKS; ++r)
            if (r < n) sums[r] = fmaf(value, b[size_t(r) * d_out + o], sums[r]);
    }
#pragma unroll
    for (u32 r = 0; r < GRAD_RANKS; ++r) {
        const float sum = warp_sum(sums[r]);
        if (lane() == 0 && r < n) own.z[size_t(token) * rank + first + r] = scale * sum;
    }
}

const u32 OUTER_TILE = 32;    // Features of a side.
const u32 OUTER_DEPTH = 16;   // Tokens in shared memory at a time.
const u32 OUTER_BLOCK = 256;  // Tokens that are added up in one sum.

// out[row, i, j] = sum_t left[t, i] * right[t, j] for one tile.
template <class L, class R>
__device__ inline void outer(float* out, const L* left, const R* right, const u32* row_segments,
                             const uint2* row_runs, u32 n_left, u32 n_right, u32 left_block,
                             u32 right_block, u32 row) {
    SHARED(float, lefts, OUTER_DEPTH * OUTER_TILE);
    SHARED(float, rights, OUTER_DEPTH * OUTER_TILE);
    const u32 i0 = left_block * OUTER_TILE, j0 = right_block * OUTER_TILE;
    // Thread: column j of the tile, rows i, i + 8, i + 16, i + 24.
    const u32 j = threadIdx.x % OUTER_TILE, i = threadIdx.x / OUTER_TILE;
    float sums[4] = {}, totals[4] = {};
    u32 in_block = 0;
    for (u32 run = row_segments[row]; run < row_segments[row + 1]; ++run) {
        const u32 start = row_runs[run].x, len = row_runs[run].y;
        for (u32 t0 = 0; t0 < len; t0 += OUTER_DEPTH) {
            __syncthreads();
            for (u32 at = threadIdx.x; at < OUTER_DEPTH * OUTER_TILE; at += blockDim.x) {
                const u32 t = t0 + at / OUTER_TILE, col = at % OUTER_TILE;
                const size_t token = start + t;
                lefts[at] =
                    t < len && i0 + col < n_left ? widen(left[token * n_left + i0 + col]) : 0.0f;
                rights[at] =
                    t < len && j0 + col < n_right ? widen(right[token * n_right + j0 + col]) : 0.0f;
            }
            __syncthreads();
            const u32 depth = min(OUTER_DEPTH, len - t0);
            for (u32 t = 0; t < depth; ++t) {
                const float value = rights[t * OUTER_TILE + j];
#pragma unroll
                for (u32 k = 0; k < 4; ++k)
                    sums[k] = fmaf(lefts[t * OUTER_TILE + i + 8 * k], value, sums[k]);
                if (++in_block == OUTER_BLOCK) {
                    in_block = 0;
#pragma unroll
                    for (u32 k = 0; k < 4; ++k) {
                        totals[k] += sums[k];
                        sums[k] = 0.0f;
                    }
                }
            }
        }
    }
    if (j0 + j >= n_right) return;
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
        const u32 at = i0 + i + 8 * k;
        if (at < n_left) out[(size_t(row) * n_left + at) * n_right + j0 + j] = totals[k] + sums[k];
    }
}

extern "C" __global__ void __launch_bounds__(256)
d_pair(const __grid_constant__ PairGradients pairs, const Item* x, const u32* row_segments,
       const uint2* row_runs, u32 d_in, u32 rank, u32 n_rows) {
    after_previous();
    const PairGradient& own = pairs.of[blockIdx.z / n_rows];
    const u32 row = blockIdx.z % n_rows, a_blocks = (d_in + OUTER_TILE - 1) / OUTER_TILE;
    if (blockIdx.x < a_blocks) {
        outer(own.d_a, x, own.d_z, row_segments, row_runs, d_in, rank, blockIdx.x, blockIdx.y, row);
    } else if ((blockIdx.x - a_blocks) * OUTER_TILE < own.d_out) {
        const u32 features = blockIdx.x - a_blocks;
        outer(own.d_b, own.z, own.d_y, row_segments, row_runs, rank, own.d_out, blockIdx.y, features, row);
    }
}

#endif
