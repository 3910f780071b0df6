// Frozen linears with the routed LoRA, bias, dropout and residual in the same kernel.
//   y = residual + dropout(x W^T + bias + z B^)      rounded once at the end
//   d_x = d_residual + sum_i (d_y_i W_i + d_z_i A^_i^T)
//   x [tokens, d_in]   W [d_out, d_in]   bias [d_out]   z, d_z [tokens, rank]   token_rows [tokens]
//   B^ mixed [rows * rank, d_out], or stacked: sum_s w[row, q, s] B[q, s], q the split of the column
//   A^ [rows * d_in, rank]   y, residual [tokens, d_out]   d_x, d_residual [tokens, d_in]
// Grid: x = tiles of columns, y = tiles of tokens. Block: GEMM_THREADS. The order of the sums is that
// of gemm.cuh; the low-rank part follows rank by rank, for bf16 in the same tile on tensor cores. d_x
// may be d_residual (null: none).
// `linear_dot` is the same forward for few tokens: a warp owns a column and streams its weights once
// for 8 tokens; a lane adds every 32nd run of 16 bytes' features in order, then a tree over the lanes.
// Grid: x = columns / 8, y = tokens / 8.
#include "gemm.cuh"
#include "linear.cuh"

// Adds the low-rank part to a whole tile, where the tile can; else `finish` does.
__device__ inline bool expand_tile(ScalarTile&, const Expand&, u32, u32, u32, u32, void*) { return false; }

#if POLYTAPE_BF16
__device__ inline bool expand_tile(MmaTile& tile, const Expand& expand, u32 n_tokens, u32 d_out, u32 row0,
                                   u32 col0, void* shared) {
    if (!expand.z || !expand.mixed_b) return false;
    const u32 rank = expand.bank.rank;
    multiply_tail(tile, expand.z, expand.mixed_b, expand.token_rows, n_tokens, d_out, rank, row0, col0,
                  size_t(rank) * d_out, d_out, 1, shared);
    return true;
}
#endif

template <class Out>
__device__ inline void linear_tile(Out* y, const Item* x, const Item* weight, const Epilogue& epilogue,
                                   u32 n_tokens, u32 d_in, u32 d_out) {
    ItemTile tile = {};
    DYNAMIC_SHARED(float, shared);
    const u32 row0 = blockIdx.y * ItemTile::M, col0 = blockIdx.x * ItemTile::N;
    multiply<true>(tile, x, weight, n_tokens, d_out, d_in, row0, col0, shared);
    const bool expanded = expand_tile(tile, epilogue.expand, n_tokens, d_out, row0, col0, shared);
#if POLYTAPE_BF16
    const ForwardPairs<Out> pairs = {y, epilogue, n_tokens, d_out};
    if (pairs.are_possible(expanded)) return for_each_pair(tile, pairs, row0, col0);
#endif
    const auto finish_one = [&](u32 row, u32 col, float value) {
        if (row0 + row < n_tokens && col0 + col < d_out)
            finish(y, epilogue, expanded, value, row0 + row, col0 + col, d_out);
    };
    for_each(tile, finish_one, shared);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
linear(Item* y, const Item* x, const Item* weight, Epilogue epilogue, u32 n_tokens, u32 d_in, u32 d_out) {
    linear_tile(y, x, weight, epilogue, n_tokens, d_in, d_out);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
linear_full(float* y, const Item* x, const Item* weight, Epilogue epilogue, u32 n_tokens, u32 d_in,
            u32 d_out) {
    linear_tile(y, x, weight, epilogue, n_tokens, d_in, d_out);
}

const u32 DOT_TOKENS = 8;   // Sums of a lane.
const u32 DOT_COLUMNS = 8;  // Warps of a block.
const u32 DOT_RUN = 16 / sizeof(Item);  // Consecutive features of a lane: what one instruction loads.

// DOT_RUN values, zeros behind the first n. ALIGNED: all are there, at a multiple of 16 bytes.
template <bool ALIGNED>
__device__ inline void load_run(float (&to)[DOT_RUN], const Item* from, u32 n) {
    if (ALIGNED) {
        const uint4 bits = load_16_bytes(from);
        const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
#if POLYTAPE_BF16
            to[2 * i] = __uint_as_float(words[i] << 16);
            to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
#else
            to[i] = __uint_as_float(words[i]);
#endif
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < DOT_RUN; ++i) to[i] = i < n ? widen(from[i]) : 0.0f;
    }
}

// Adds this lane's part of the dot products of 8 tokens with one row of weights.
template <bool ALIGNED>
__device__ inline void add_dots(float (&sums)[DOT_TOKENS], const Item* x, const Item* w, u32 token0, u32 n_tokens,
                                u32 d_in) {
    for (u32 first = lane() * DOT_RUN; first < d_in; first += WARP * DOT_RUN) {
        float left[DOT_RUN], right[DOT_RUN];
        load_run<ALIGNED>(left, w + first, d_in - first);
#pragma unroll
        for (u32 t = 0; t < DOT_TOKENS; ++t) {
            if (token0 + t < n_tokens) {
                load_run<ALIGNED>(right, x + size_t(token0 + t) * d_in + first, d_in - first);
#pragma unroll
                for (u32 i = 0; i < DOT_RUN; ++i) sums[t] = fmaf(left[i], right[i], sums[t]);
            }
        }
    }
}

template <class Out>
__device__ inline void dot_columns(Out* y, const Item* x, const Item* weight, const Epilogue& epilogue,
                                   u32 n_tokens, u32 d_in, u32 d_out) {
    const u32 col = blockIdx.x * DOT_COLUMNS + threadIdx.x / WARP, token0 = blockIdx.y * DOT_TOKENS;
    if (col >= d_out) return;  // A whole warp.
    const Item* w = weight + size_t(col) * d_in;
    float sums[DOT_TOKENS] = {};
    if (d_in % DOT_RUN == 0)
        add_dots<true>(sums, x, w, token0, n_tokens, d_in);
    else
        add_dots<false>(sums, x, w, token0, n_tokens, d_in);
    float own = 0.0f;
#pragma unroll
    for (u32 t = 0; t < DOT_TOKENS; ++t) {
        const float sum = warp_sum(sums[t]);
        if (lane() == t) own = sum;
    }
    // Lane t finishes token t: the epilogues run side by side.
    const u32 token = token0 + lane();
    if (lane() < DOT_TOKENS && token < n_tokens) finish(y, epilogue, false, own, token, col, d_out);
}

extern "C" __global__ void __launch_bounds__(DOT_COLUMNS * WARP)
linear_dot(Item* y, const Item* x, const Item* weight, Epilogue epilogue, u32 n_tokens, u32 d_in, u32 d_out) {
    dot_columns(y, x, weight, epilogue, n_tokens, d_in, d_out);
}

extern "C" __global__ void __launch_bounds__(DOT_COLUMNS * WARP)
linear_dot_full(float* y, const Item* x, const Item* weight, Epilogue epilogue, u32 n_tokens, u32 d_in,
                u32 d_out) {
    dot_columns(y, x, weight, epilogue, n_tokens, d_in, d_out);
}

// Adds d_z A^T of one sibling to a whole tile, where the tile can.
__device__ inline bool expand_tile(ScalarTile&, const Term&, u32, u32, u32, u32, void*) { return false; }

#if POLYTAPE_BF16
__device__ inline bool expand_tile(MmaTile& tile, const Term& term, u32 n_tokens, u32 d_in, u32 row0, u32 col0,
                                   void* shared) {
    multiply_tail(tile, term.d_z, term.mixed_a, term.token_rows, n_tokens, d_in, term.rank, row0, col0,
                  size_t(d_in) * term.rank, 1, term.rank, shared);
    return true;
}
#endif

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
linear_backward(Item* d_x, const Item* d_residual, Terms terms, u32 n_tokens, u32 d_in) {
    ItemTile tile = {};
    DYNAMIC_SHARED(float, shared);
    const u32 row0 = blockIdx.y * ItemTile::M, col0 = blockIdx.x * ItemTile::N;
    bool expanded = false;
    for (u32 n = 0; n < terms.n; ++n) {
        const Term& term = terms.terms[n];
        multiply<false>(tile, term.d_y, term.weight, n_tokens, d_in, term.d_out, row0, col0, shared);
        if (term.d_z) expanded = expand_tile(tile, term, n_tokens, d_in, row0, col0, shared);
    }
#if POLYTAPE_BF16
    const BackwardPairs pairs = {d_x, d_residual, n_tokens, d_in};
    if (pairs.are_possible()) return for_each_pair(tile, pairs, row0, col0);
#endif
    const auto finish_one = [&](u32 row, u32 col, float value) {
        if (row0 + row < n_tokens && col0 + col < d_in)
            finish(d_x, d_residual, terms, expanded, value, row0 + row, col0 + col, d_in);
    };
    for_each(tile, finish_one, shared);
}
