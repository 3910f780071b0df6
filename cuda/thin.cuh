// Thin products on tensor cores, whose one side is f32 and as wide as the rank. That side is split in two
// bf16 halves, so 2^-16 of each product is lost.
//
// `thin_product`: z[t, r] = scale * sum_k lhs[t, k] * right[row(t), k, r] for tokens of one routing row.
//   lhs [tokens, depth] bf16   right [rows, depth, rank] or (ALONG_DEPTH) [rows, rank, depth] f32
//   tiles [n] = up to 16 consecutive tokens of one routing row
// Grid: x = tiles, y = ranks / 16. Block: GEMM_THREADS. A warp adds every 8th 32 of the depth, in order, straight from
// global memory, then the warps' sums are added in order: a token's bits do not depend on the tile.
//
// `thin_stacked`: the same from the bank, for tokens of any routing rows; see there.
//
// `thin_outer`: out[i, r] = sum_t wide[t, i] * thin[t, r] over the tokens of one routing row, run after run.
//   wide [tokens, width] bf16   thin [tokens, rank] f32   out [width, rank] or (rank_first) [rank, width]
// For 128 of the features (`features` says which) and one routing row. Grid: y = ranks / 16. Block:
// GEMM_THREADS, a warp 16 features; a step adds 32 tokens of a run.
#pragma once
#include "bank.cuh"
#include "gemm.cuh"

#if POLYTAPE_BF16

struct RunTile {
    u32 first, n, row;
};

// The sum of both halves' products. An infinity that met a low half of 0 is NaN there: `high` has it right.
__device__ inline float both_halves(float high, float low) { return fabsf(high) < INFINITY ? high + low : high; }

const u32 THIN_TOKENS = 16, THIN_RANKS = 16, THIN_DEPTH = 32, THIN_WARPS = GEMM_THREADS / WARP;
const u32 THIN_SUMS = THIN_TOKENS * THIN_RANKS;

// Adds a warp's part, every n_parts-th 32 of the depth, of rows that are `pitch` apart: `high` and `low` are [16 tokens,
// 8 * GROUPS ranks] as fragments of 8 ranks. Which of an instruction's 16 products are of which depth is free, as long as
// both factors have the same: a lane's are eight neighbours.
template <bool ALONG_DEPTH, bool ALIGNED, u32 GROUPS>
__device__ inline void add_thin(float (&high)[2][4], float (&low)[2][4], const Bf16* lhs, u32 pitch, const float* right,
                                u32 n_tokens, u32 depth, u32 rank, u32 first_rank, u32 part, u32 n_parts) {
    const u32 g = lane() / 4, t = lane() % 4, stride = n_parts * THIN_DEPTH;
    const u32 AHEAD = GROUPS == 1 ? 4 : 2;  // As many loads under way as there are registers for.
    for (u32 start = part * THIN_DEPTH; start < depth; start += AHEAD * stride) {
        u32 left[AHEAD][2][4];
        float right_values[AHEAD][GROUPS][8];
#pragma unroll
        for (u32 step = 0; step < AHEAD; ++step) {
            const u32 k = start + step * stride + t * 8, n = k < depth ? min(8u, depth - k) : 0;
#pragma unroll
            for (u32 h = 0; h < 2; ++h)
                load_words<ALIGNED>(left[step][h], lhs + size_t(g + h * 8) * pitch + k, g + h * 8 < n_tokens ? n : 0);
#pragma unroll
            for (u32 group = 0; group < GROUPS; ++group) {
                const u32 r = first_rank + group * 8 + g, n_own = r < rank ? n : 0;
                float(&values)[8] = right_values[step][group];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) values[i] = 0.0f;
                if (ALONG_DEPTH && ALIGNED) {
                    if (n_own > 0) load_run<8>(values, right + size_t(r) * depth + k);
                } else {
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) {
                        const size_t from = ALONG_DEPTH ? size_t(r) * depth + k + i : size_t(k + i) * rank + r;
                        if (i < n_own) values[i] = right[from];
                    }
                }
            }
        }
#pragma unroll
        for (u32 step = 0; step < AHEAD; ++step)
#pragma unroll
            for (u32 group = 0; group < GROUPS; ++group) {
                const float(&values)[8] = right_values[step][group];
                u32 highs[4], lows[4];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) split(values[2 * i], values[2 * i + 1], highs[i], lows[i]);
#pragma unroll
                for (u32 i = 0; i < 4; i += 2) {
                    const u32 lefts[4] = {left[step][0][i], left[step][1][i], left[step][0][i + 1], left[step][1][i + 1]};
                    mma(high[group], lefts, highs[i], highs[i + 1]);
                    mma(low[group], lefts, lows[i], lows[i + 1]);
                }
            }
    }
}

// What the warps have of 16 tokens and ranks, added up in order: thread 16 t + r has the sum of token t and rank r, the
// others nothing. scratch [warps, 16 tokens, 16 ranks].
template <u32 WARPS>
__device__ inline float thin_sum(const float (&sums)[2][4], float* scratch) {
    const u32 g = lane() / 4, t = lane() % 4 * 2;
#pragma unroll
    for (u32 group = 0; group < 2; ++group)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
            const u32 token = threadIdx.x / WARP * THIN_TOKENS + g + e / 2 * 8;
            scratch[token * THIN_RANKS + group * 8 + t + e % 2] = sums[group][e];
        }
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x < THIN_SUMS) {
#pragma unroll
        for (u32 warp = 0; warp < WARPS; ++warp) sum += scratch[warp * THIN_SUMS + threadIdx.x];
    }
    return sum;
}

// Writes a thread's sum of `thin_sum`.
__device__ inline void thin_finish(float* z, float sum, u32 n_tokens, u32 rank, u32 first_rank, float scale) {
    const u32 token = threadIdx.x / THIN_RANKS, r = threadIdx.x % THIN_RANKS;
    if (token < n_tokens && first_rank + r < rank) z[size_t(token) * rank + first_rank + r] = scale * sum;
}

template <bool ALONG_DEPTH>
__device__ inline void thin_product(float* z, const Bf16* lhs, const float* right, const RunTile& tile, u32 depth,
                                    u32 rank, float scale) {
    SHARED(float, scratch, THIN_WARPS * THIN_TOKENS * THIN_RANKS);
    const u32 first_rank = blockIdx.y * THIN_RANKS, warp = threadIdx.x / WARP;
    lhs += size_t(tile.first) * depth;
    right += size_t(tile.row) * depth * rank;
    float high[2][4] = {}, low[2][4] = {};
    if (depth % 8 != 0)
        add_thin<ALONG_DEPTH, false, 2>(high, low, lhs, depth, right, tile.n, depth, rank, first_rank, warp, THIN_WARPS);
    else if (rank - first_rank > 8)
        add_thin<ALONG_DEPTH, true, 2>(high, low, lhs, depth, right, tile.n, depth, rank, first_rank, warp, THIN_WARPS);
    else
        add_thin<ALONG_DEPTH, true, 1>(high, low, lhs, depth, right, tile.n, depth, rank, first_rank, warp, THIN_WARPS);
#pragma unroll
    for (u32 at = 0; at < 8; ++at) high[at / 4][at % 4] = both_halves(high[at / 4][at % 4], low[at / 4][at % 4]);
    thin_finish(z + size_t(tile.first) * rank, thin_sum<THIN_WARPS>(high, scratch), tile.n, rank, first_rank, scale);
}

const u32 STACKED_WARPS = 16, STACKED_BLOCKS = 8;

// z[t, r] = scale * sum_q,s w[row(t), q, s] sum_i x[t, i] a[q, s, i, r], i over the features of split q: the bank of all skills
// at once, weighted in between. Each pair of a split and a skill has as many of the blocks' warps as there are for it, and they
// all in turns; then a block's warps are added in order, and then the blocks, by the last one that is done: that depends on
// the bank's shape alone. Splits are whole runs of 8 features.
// Grid: x = tokens / 16, y = ranks / 16, z = STACKED_BLOCKS. Block: STACKED_WARPS.
// partials [tiles, STACKED_BLOCKS, 16 tokens, 16 ranks]   done [tiles], zeros before and after
__device__ inline void thin_stacked(float* z, const Bf16* x, const u32* token_rows, const Bank& bank, float* partials,
                                    u32* done, u32 n_tokens, float scale) {
    SHARED(float, scratch, STACKED_WARPS * THIN_TOKENS * THIN_RANKS);
    const u32 first = blockIdx.x * THIN_TOKENS, n = min(THIN_TOKENS, n_tokens - first), rank = bank.rank;
    const u32 first_rank = blockIdx.y * THIN_RANKS, width = bank.d_in / bank.n_splits;
    const u32 n_pairs = bank.n_splits * bank.n_skills, n_warps = STACKED_BLOCKS * STACKED_WARPS;
    const u32 n_parts = max(1u, n_warps / n_pairs), n_slots = n_warps / n_parts;
    const u32 warp = blockIdx.z * STACKED_WARPS + threadIdx.x / WARP, slot = warp / n_parts, part = warp % n_parts;
    u32 rows[2];  // Of this thread's two tokens.
#pragma unroll
    for (u32 h = 0; h < 2; ++h) rows[h] = token_rows[first + min(lane() / 4 + h * 8, n - 1)];
    float sums[2][4] = {};
#pragma unroll 1
    for (u32 pair = slot; pair < n_pairs && slot < n_slots; pair += n_slots) {
        const u32 split = pair / bank.n_skills;
        const float* a = bank.a + size_t(pair) * width * rank;
        const Bf16* lhs = x + size_t(first) * bank.d_in + split * width;
        float high[2][4] = {}, low[2][4] = {};
        if (rank - first_rank > 8)
            add_thin<false, true, 2>(high, low, lhs, bank.d_in, a, n, width, rank, first_rank, part, n_parts);
        else
            add_thin<false, true, 1>(high, low, lhs, bank.d_in, a, n, width, rank, first_rank, part, n_parts);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            const float w = mixing(bank, rows[h], split)[pair % bank.n_skills];
#pragma unroll
            for (u32 at = 0; at < 4; ++at) {
                const u32 group = at / 2, e = 2 * h + at % 2;
                sums[group][e] = fmaf(w, both_halves(high[group][e], low[group][e]), sums[group][e]);
            }
        }
    }
    const u32 tile = blockIdx.y * gridDim.x + blockIdx.x;
    float* own = partials + size_t(tile) * STACKED_BLOCKS * THIN_SUMS + threadIdx.x;
    const float sum = thin_sum<STACKED_WARPS>(sums, scratch);
    if (threadIdx.x < THIN_SUMS) own[blockIdx.z * THIN_SUMS] = sum;
    if (!is_last_block(&done[tile], STACKED_BLOCKS) || threadIdx.x >= THIN_SUMS) return;
    float total = 0.0f;
    for (u32 block = 0; block < STACKED_BLOCKS; ++block) total += load_fresh(own + block * THIN_SUMS);
    thin_finish(z + size_t(first) * rank, total, n, rank, first_rank, scale);
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
