// Thin products on tensor cores, whose one side is f32 and as wide as the rank. That side is split in two
// bf16 halves, so 2^-16 of each product is lost.
//
// `thin_product`: z[t, r] = scale * sum_k lhs[t, k] * right[row(t), k, r] for tokens of one routing row.
//   lhs [tokens, depth] bf16   right [rows, depth, rank] or (ALONG_DEPTH) [rows, rank, depth] f32
//   tiles [n] = up to 32 consecutive tokens of one routing row
// Grid: x = tiles, y = ranks / 16. Block: GEMM_THREADS. Of each 128 of the depth, four pairs of warps add
// 32 each, in order; then the four sums are added in order: a token's bits do not depend on the tile.
//
// `thin_outer`: out[i, r] = sum_t wide[t, i] * thin[t, r] over the tokens of one routing row, run after run.
//   wide [tokens, width] bf16   thin [tokens, rank] f32   out [width, rank] or (rank_first) [rank, width]
// For 128 of the features (`features` says which) and one routing row. Grid: y = ranks / 16. Block:
// GEMM_THREADS, a warp 16 features; a step adds 32 tokens of a run.
#pragma once
#include "gemm.cuh"

#if POLYTAPE_BF16

struct RunTile {
    u32 first, n, row;
};

// The sum of both halves' products. An infinity that met a low half of 0 is NaN there: `high` has it right.
__device__ inline float both_halves(float high, float low) { return fabsf(high) < INFINITY ? high + low : high; }

const u32 THIN_TOKENS = 32, THIN_RANKS = 16, THIN_DEPTH = 128;

template <bool ALONG_DEPTH>
__device__ inline void thin_product(float* z, const Bf16* lhs, const float* right, const RunTile& tile, u32 depth,
                                    u32 rank, float scale) {
    const u32 OPERAND = THIN_TOKENS * THIN_DEPTH;
    SHARED(Bf16, memory, 2 * 2 * OPERAND);  // Two steps of two operands.
    const u32 first_rank = blockIdx.y * THIN_RANKS, warp = threadIdx.x / WARP, l = lane();
    const u32 row = warp % 2 * 16, k0 = warp / 2 * 32;
    lhs += size_t(tile.first) * depth;
    right += size_t(tile.row) * depth * rank;
    float values[4][4] = {};  // Columns: 16 ranks' high halves, then their low ones.
    const u32 n_steps = (depth + THIN_DEPTH - 1) / THIN_DEPTH;
    const auto start = [&](u32 step) {
        if (step < n_steps) {
            Bf16 *lefts = memory + step % 2 * 2 * OPERAND, *rights = lefts + OPERAND;
            bring<THIN_TOKENS, THIN_DEPTH>(lefts, lhs, tile.n, depth, 0, step * THIN_DEPTH);
#pragma unroll
            for (u32 i = 0; i < THIN_RANKS * THIN_DEPTH / GEMM_THREADS; ++i) {
                const u32 at = threadIdx.x + i * GEMM_THREADS;
                const u32 k = ALONG_DEPTH ? at % THIN_DEPTH : at / THIN_RANKS;
                const u32 r = ALONG_DEPTH ? at / THIN_DEPTH : at % THIN_RANKS;
                const u32 from_k = step * THIN_DEPTH + k, from_r = first_rank + r;
                const size_t from = ALONG_DEPTH ? size_t(from_r) * depth + from_k : size_t(from_k) * rank + from_r;
                const float value = from_k < depth && from_r < rank ? right[from] : 0.0f;
                const Bf16 high = to_bf16(value);
                rights[wide_place(r, k / 8) + k % 8] = high;
                rights[wide_place(THIN_RANKS + r, k / 8) + k % 8] = low_half(value, high);
            }
        }
        copy_async_commit();
    };
    start(0);
    for (u32 step = 0; step < n_steps; ++step) {
        copy_async_wait<0>();
        __syncthreads();  // This step is there for all, and all are done with the one before.
        start(step + 1);
        const Bf16 *lefts = memory + step % 2 * 2 * OPERAND, *rights = lefts + OPERAND;
#pragma unroll
        for (u32 kk = k0; kk < k0 + 32; kk += 16) {
            u32 left[4];
            load_matrices(left, lefts + wide_place(row + l % 16, kk / 8 + l / 16));
#pragma unroll
            for (u32 j = 0; j < 2; ++j) {
                u32 both[4];
                load_matrices(both, rights + wide_place(j * 16 + l % 8 + l / 16 * 8, kk / 8 + l / 8 % 2));
                mma(values[2 * j], left, both[0], both[1]);
                mma(values[2 * j + 1], left, both[2], both[3]);
            }
        }
    }
    __syncthreads();
    float* partials = reinterpret_cast<float*>(memory);  // [4, tokens, 32]
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            const u32 at_row = warp / 2 * THIN_TOKENS + row + l / 4 + e / 2 * 8;
            partials[at_row * 32 + j * 8 + l % 4 * 2 + e % 2] = values[j][e];
        }
    __syncthreads();
    for (u32 at = threadIdx.x; at < THIN_TOKENS * THIN_RANKS; at += GEMM_THREADS) {
        const u32 token = at / THIN_RANKS, r = at % THIN_RANKS;
        if (token >= tile.n || first_rank + r >= rank) continue;
        float high = 0.0f, low = 0.0f;
        for (u32 group = 0; group < 4; ++group) {
            high += partials[(group * THIN_TOKENS + token) * 32 + r];
            low += partials[(group * THIN_TOKENS + token) * 32 + THIN_RANKS + r];
        }
        z[size_t(tile.first + token) * rank + first_rank + r] = scale * both_halves(high, low);
    }
}

const u32 OUTER_TOKENS = 32, OUTER_WIDTH = 128;

__device__ inline void thin_outer(float* out, const Bf16* wide, const float* thin, const u32* row_segments,
                                  const uint2* row_runs, u32 width, u32 rank, u32 features, u32 row,
                                  bool rank_first) {
    SHARED(Bf16, wides, OUTER_TOKENS * OUTER_WIDTH);
    SHARED(Bf16, thins, OUTER_TOKENS * 2 * THIN_RANKS);
    const u32 col0 = features * OUTER_WIDTH, first_rank = blockIdx.y * THIN_RANKS, l = lane();
    const u32 own = threadIdx.x / WARP * 16;
    float values[4][4] = {};  // Columns: 16 ranks' high halves, then their low ones.
    for (u32 run = row_segments[row]; run < row_segments[row + 1]; ++run) {
        const size_t start = row_runs[run].x;
        const u32 len = row_runs[run].y;
        for (u32 t0 = 0; t0 < len; t0 += OUTER_TOKENS) {
            __syncthreads();  // All are done with the step before.
            bring<OUTER_TOKENS, OUTER_WIDTH>(wides, wide + start * width, len, width, t0, col0);
            copy_async_commit();
            for (u32 at = threadIdx.x; at < OUTER_TOKENS * THIN_RANKS; at += GEMM_THREADS) {
                const u32 t = at / THIN_RANKS, r = at % THIN_RANKS;
                const bool there = t0 + t < len && first_rank + r < rank;
                const float value = there ? thin[(start + t0 + t) * rank + first_rank + r] : 0.0f;
                const Bf16 high = to_bf16(value);
                thins[narrow_place(t, r / 8) + r % 8] = high;
                thins[narrow_place(t, 2 + r / 8) + r % 8] = low_half(value, high);
            }
            copy_async_wait<0>();
            __syncthreads();
#pragma unroll
            for (u32 tt = 0; tt < OUTER_TOKENS; tt += 16) {
                u32 left[4];
                load_matrices_transposed(left, wides + wide_place(tt + l % 8 + l / 16 * 8, own / 8 + l / 8 % 2));
#pragma unroll
                for (u32 j = 0; j < 2; ++j) {
                    u32 both[4];
                    load_matrices_transposed(both, thins + narrow_place(tt + l % 16, j * 2 + l / 16));
                    mma(values[2 * j], left, both[0], both[1]);
                    mma(values[2 * j + 1], left, both[2], both[3]);
                }
            }
        }
    }
    out += size_t(row) * width * rank;
#pragma unroll
    for (u32 j = 0; j < 2; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            const u32 i = col0 + own + l / 4 + e / 2 * 8, r = first_rank + j * 8 + l % 4 * 2 + e % 2;
            if (i < width && r < rank)
                out[rank_first ? size_t(r) * width + i : size_t(i) * rank + r] = both_halves(values[j][e], values[j + 2][e]);
        }
}

#endif
