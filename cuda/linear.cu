// Frozen linears with the routed LoRA, bias, dropout and residual in the same kernel.
//   y = residual + dropout(x W^T + bias + z B^)      rounded once at the end
//   d_x = d_residual + sum_i (d_y_i W_i + d_z_i A^_i^T)
//   x [tokens, d_in]   W [d_out, d_in]   bias [d_out]   z, d_z [tokens, rank]   token_rows [tokens]
//   B^ mixed [rows * rank, d_out], or stacked: sum_s w[row, q, s] B[q, s], q the split of the column
//   A^ [rows * d_in, rank]   y, residual [tokens, d_out]   d_x, d_residual [tokens, d_in]
// Grid: x = tiles of columns (of the widest), y = tiles of tokens, z = siblings. Block: GEMM_THREADS. The order of the
// sums is that of gemm.cuh; the low-rank part follows rank by rank, for bf16 in the same tile on tensor cores. d_x
// may be d_residual (null: none).
// `linear_dot` is the same forward for few tokens: it streams the weights once for all of a block's tokens. In f32 a warp
// owns a column for 8 tokens; a lane adds every 32nd run of 4 features in order, then a tree over the lanes. Grid: x =
// columns / 8, y = tokens / 8, z = siblings. In bf16 a block has 16 columns for 8 * TILES tokens, on tensor cores whose rows are the
// columns; a warp adds every 8th 32 features in order, then the warps in order. Grid: x = columns / 16, y = tokens / (8 *
// TILES), which changes no bits, z = siblings.
// `expand_stacked` makes the low-rank part of stacked siblings before `linear` and `linear_wgmma` in bf16, whose tiles have no
// place for it, where a split is whole runs of 16 columns; elsewhere it is added element by element.
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
__device__ inline void linear_tile(const Projection& own, const Item* x, u32 n_tokens, u32 d_in) {
    const u32 row0 = blockIdx.y * ItemTile::M, col0 = blockIdx.x * ItemTile::N, d_out = own.d_out;
    if (col0 >= d_out) return;  // A whole block.
    const Epilogue& epilogue = own.epilogue;
    Out* y = static_cast<Out*>(own.y);
    ItemTile tile = {};
    DYNAMIC_SHARED(float, shared);
    multiply<true>(tile, x, own.weight, n_tokens, d_out, d_in, row0, col0, shared);
    const bool expanded = expand_tile(tile, epilogue.expand, n_tokens, d_out, row0, col0, shared);
#if POLYTAPE_BF16
    const ForwardRuns<Out> runs = {y, epilogue, n_tokens, d_out};
    if (runs.are_possible(expanded)) return for_each_run(tile, runs, row0, col0);
#endif
    const auto finish_one = [&](u32 row, u32 col, float value) {
        if (row0 + row < n_tokens && col0 + col < d_out)
            finish(y, epilogue, expanded, value, row0 + row, col0 + col, d_out);
    };
    for_each(tile, finish_one, shared);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
linear(const __grid_constant__ Projections projections, const Item* x, u32 n_tokens, u32 d_in) {
    after_previous();
    linear_tile<Item>(projections.of[blockIdx.z], x, n_tokens, d_in);
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS)
linear_full(const __grid_constant__ Projections projections, const Item* x, u32 n_tokens, u32 d_in) {
    after_previous();
    linear_tile<float>(projections.of[blockIdx.z], x, n_tokens, d_in);
}

#if POLYTAPE_BF16

const u32 DOT_COLUMNS = 16, DOT_WARPS = 8, DOT_DEPTH = 32;
const u32 DOT_PITCH = DOT_COLUMNS + 4;  // Of a token's sums in shared memory, without bank conflicts.

// Adds this warp's part of the products of 16 columns with 8 tokens a tile. Which of an instruction's 16 products are of which
// feature is free, as long as both factors have the same: a lane's are eight neighbours.
template <bool ALIGNED, u32 TILES>
__device__ inline void add_dots(float (&sums)[TILES][4], const Item* x, const Item* weight, u32 token0, u32 col0,
                                u32 n_tokens, u32 d_in, u32 d_out) {
    const u32 g = lane() / 4;
    const u32 AHEAD = TILES == 1 ? 8 : TILES <= 4 ? 4 : 1;  // As many loads under way as there are registers for.
    const u32 STRIDE = DOT_WARPS * DOT_DEPTH;
    for (u32 start = threadIdx.x / WARP * DOT_DEPTH; start < d_in; start += AHEAD * STRIDE) {
        u32 left[AHEAD][2][4], right[AHEAD][TILES][4];
#pragma unroll
        for (u32 step = 0; step < AHEAD; ++step) {
            const u32 k = start + step * STRIDE + lane() % 4 * 8, n = k < d_in ? min(8u, d_in - k) : 0;
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                const u32 col = col0 + g + h * 8;
                load_words<ALIGNED, true>(left[step][h], weight + size_t(col) * d_in + k, col < d_out ? n : 0);
            }
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile) {
                const u32 token = token0 + tile * 8 + g;
                load_words<ALIGNED>(right[step][tile], x + size_t(token) * d_in + k, token < n_tokens ? n : 0);
            }
        }
#pragma unroll
        for (u32 step = 0; step < AHEAD; ++step)
#pragma unroll
            for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (u32 i = 0; i < 4; i += 2) {
                    const u32 lefts[4] = {left[step][0][i], left[step][1][i], left[step][0][i + 1], left[step][1][i + 1]};
                    mma(sums[tile], lefts, right[step][tile][i], right[step][tile][i + 1]);
                }
    }
}

// The low-rank part from the bank, of 16 columns of one split with 8 tokens, as an `mma` has it: columns by tokens. Both
// factors, w z and b, in two halves, as in `multiply_tail`: 2^-16 of each product is lost. A warp.
__device__ inline void expand_piece(float (&sums)[4], const Expand& expand, u32 token0, u32 col0, u32 n_tokens) {
    const Bank& bank = expand.bank;
    const u32 width = bank.d_out / bank.n_splits, own_split = col0 / width, depth = bank.n_skills * bank.rank;
    const float* b = bank.b + size_t(own_split) * depth * width + col0 % width;
    const u32 g = lane() / 4, t = lane() % 4 * 2, token = token0 + g;
    const bool there = token < n_tokens;
    const float* w = mixing(bank, there ? expand.token_rows[token] : 0, own_split);
    const float* z = expand.z + size_t(there ? token : 0) * bank.rank;
#pragma unroll 1
    for (u32 k0 = 0; k0 < depth; k0 += 16) {
        u32 left_high[4], left_low[4], high[2], low[2], finite[2];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            float values[2];
#pragma unroll
            for (u32 e = 0; e < 2; ++e) {
                const u32 k = k0 + t + i / 2 * 8 + e;
                values[e] = k < depth ? b[size_t(k) * width + g + i % 2 * 8] : 0.0f;
            }
            split(values[0], values[1], left_high[i], left_low[i]);
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float values[2], finites[2];
#pragma unroll
            for (u32 e = 0; e < 2; ++e) {
                const u32 k = k0 + t + i * 8 + e;
                values[e] = there && k < depth ? w[k / bank.rank] * z[k % bank.rank] : 0.0f;
                finites[e] = fabsf(values[e]) == INFINITY ? 0.0f : values[e];
            }
            split(values[0], values[1], high[i], low[i]);
            finite[i] = to_bf16s(finites[0], finites[1]);
        }
        mma(sums, left_high, high[0], high[1]);
        mma(sums, left_low, finite[0], finite[1]);
        mma(sums, left_high, low[0], low[1]);
    }
}

// The low-rank part of stacked siblings before the kernels of many tokens, whose tiles have no place for it. Grid: x =
// columns / 16, y = tokens / (8 * DOT_WARPS), z = siblings.
extern "C" __global__ void __launch_bounds__(DOT_WARPS* WARP)
expand_stacked(const __grid_constant__ Projections projections, u32 n_tokens) {
    after_previous();
    const Expand& expand = projections.of[blockIdx.z].epilogue.expand;
    const u32 d_out = expand.bank.d_out, col0 = blockIdx.x * DOT_COLUMNS;
    const u32 token0 = (blockIdx.y * DOT_WARPS + threadIdx.x / WARP) * 8;
    if (!expand.ready || col0 >= d_out || token0 >= n_tokens) return;  // A whole warp.
    float sums[4] = {};
    expand_piece(sums, expand, token0, col0, n_tokens);
#pragma unroll
    for (u32 e = 0; e < 4; ++e) {
        const u32 token = token0 + lane() % 4 * 2 + e % 2;
        if (token < n_tokens) expand.ready[size_t(token) * d_out + col0 + lane() / 4 + e / 2 * 8] = sums[e];
    }
}

template <class Out, u32 TILES>
__device__ inline void dot_columns(const Projection& own, const Item* x, u32 n_tokens, u32 d_in) {
    const u32 TOKENS = 8 * TILES, col0 = blockIdx.x * DOT_COLUMNS, token0 = blockIdx.y * TOKENS, d_out = own.d_out;
    if (col0 >= d_out) return;  // A whole block.
    const Item* weight = own.weight;
    SHARED(float, partials, (DOT_WARPS + 1) * TOKENS * DOT_PITCH);  // Of each warp, then the low-rank part.
    float sums[TILES][4] = {};
    if (d_in % 8 == 0)
        add_dots<true>(sums, x, weight, token0, col0, n_tokens, d_in, d_out);
    else
        add_dots<false>(sums, x, weight, token0, col0, n_tokens, d_in, d_out);
    float* part = partials + threadIdx.x / WARP * TOKENS * DOT_PITCH;
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (u32 e = 0; e < 4; ++e)
            part[(tile * 8 + lane() % 4 * 2 + e % 2) * DOT_PITCH + lane() / 4 + e / 2 * 8] = sums[tile][e];
    const Expand& expand = own.epilogue.expand;
    const bool stacked = expand.z && !expand.mixed_b && d_out / expand.bank.n_splits % DOT_COLUMNS == 0;
    if (stacked) {
        float* to = partials + DOT_WARPS * TOKENS * DOT_PITCH;
#pragma unroll 1
        for (u32 tile = threadIdx.x / WARP; tile < TILES && token0 + tile * 8 < n_tokens; tile += DOT_WARPS) {
            float own_sums[4] = {};
            expand_piece(own_sums, expand, token0 + tile * 8, col0, n_tokens);
#pragma unroll
            for (u32 e = 0; e < 4; ++e)
                to[(tile * 8 + lane() % 4 * 2 + e % 2) * DOT_PITCH + lane() / 4 + e / 2 * 8] = own_sums[e];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (u32 at = threadIdx.x; at < TOKENS * DOT_COLUMNS; at += DOT_WARPS * WARP) {
        const u32 token = at / DOT_COLUMNS, col = at % DOT_COLUMNS;
        if (token0 + token >= n_tokens || col0 + col >= d_out) continue;
        float sum = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < DOT_WARPS; ++warp) sum += partials[(warp * TOKENS + token) * DOT_PITCH + col];
        if (stacked) sum += partials[(DOT_WARPS * TOKENS + token) * DOT_PITCH + col];
        finish(static_cast<Out*>(own.y), own.epilogue, stacked, sum, token0 + token, col0 + col, d_out);
    }
}

#define LINEAR_DOT(name, Out, tiles)                                                            \
    extern "C" __global__ void __launch_bounds__(DOT_WARPS* WARP)                               \
    name(const __grid_constant__ Projections projections, const Item* x, u32 n_tokens, u32 d_in) { \
        after_previous();                                                                          \
        dot_columns<Out, tiles>(projections.of[blockIdx.z], x, n_tokens, d_in);                 \
    }
LINEAR_DOT(linear_dot_1, Item, 1)
LINEAR_DOT(linear_dot_2, Item, 2)
LINEAR_DOT(linear_dot_4, Item, 4)
LINEAR_DOT(linear_dot_8, Item, 8)
LINEAR_DOT(linear_full_dot_1, float, 1)
LINEAR_DOT(linear_full_dot_2, float, 2)
LINEAR_DOT(linear_full_dot_4, float, 4)
LINEAR_DOT(linear_full_dot_8, float, 8)

#else

const u32 DOT_TOKENS = 8;   // Sums of a lane.
const u32 DOT_COLUMNS = 8;  // Warps of a block.
const u32 DOT_RUN = 4;      // Consecutive features of a lane: what one instruction loads.

// DOT_RUN values, zeros behind the first n. ALIGNED: all are there, at a multiple of 16 bytes.
template <bool ALIGNED>
__device__ inline void load_part(float (&to)[DOT_RUN], const float* from, u32 n) {
    if (ALIGNED) return load_run<DOT_RUN>(to, from);
#pragma unroll
    for (u32 i = 0; i < DOT_RUN; ++i) to[i] = i < n ? from[i] : 0.0f;
}

// Adds this lane's part of the dot products of 8 tokens with one row of weights.
template <bool ALIGNED>
__device__ inline void add_dots(float (&sums)[DOT_TOKENS], const Item* x, const Item* w, u32 token0, u32 n_tokens,
                                u32 d_in) {
    for (u32 first = lane() * DOT_RUN; first < d_in; first += WARP * DOT_RUN) {
        float left[DOT_RUN], right[DOT_RUN];
        load_part<ALIGNED>(left, w + first, d_in - first);
#pragma unroll
        for (u32 t = 0; t < DOT_TOKENS; ++t) {
            if (token0 + t < n_tokens) {
                load_part<ALIGNED>(right, x + size_t(token0 + t) * d_in + first, d_in - first);
#pragma unroll
                for (u32 i = 0; i < DOT_RUN; ++i) sums[t] = fmaf(left[i], right[i], sums[t]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(DOT_COLUMNS * WARP)
linear_dot(const __grid_constant__ Projections projections, const Item* x, u32 n_tokens, u32 d_in) {
    after_previous();
    const Projection& own_linear = projections.of[blockIdx.z];
    const u32 col = blockIdx.x * DOT_COLUMNS + threadIdx.x / WARP, token0 = blockIdx.y * DOT_TOKENS;
    if (col >= own_linear.d_out) return;  // A whole warp.
    const Item* w = own_linear.weight + size_t(col) * d_in;
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
    if (lane() < DOT_TOKENS && token < n_tokens)
        finish(static_cast<Item*>(own_linear.y), own_linear.epilogue, false, own, token, col, own_linear.d_out);
}

#endif

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
    after_previous();
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
    if (d_in % 8 == 0) return for_each_run(tile, BackwardRuns{d_x, d_residual, n_tokens, d_in}, row0, col0);
#endif
    const auto finish_one = [&](u32 row, u32 col, float value) {
        if (row0 + row < n_tokens && col0 + col < d_in)
            finish(d_x, d_residual, terms, expanded, value, row0 + row, col0 + col, d_in);
    };
    for_each(tile, finish_one, shared);
}
