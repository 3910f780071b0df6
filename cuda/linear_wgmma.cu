// The frozen linears of linear.cu on the warpgroup products of sm_90a, in bf16: the same arguments, the same
// results. Of an element the products are added in the same order, 16 at a time, and the mixed LoRA follows by
// the same `mma`; so where an instruction adds its 16 alike, as in the emulator, the bits are those of
// linear.cu. An element's bits depend neither on its place in a tile nor on the other rows.
//
//   warps 0..8, two warpgroups    a tile's upper and lower 64 rows: wait for a stage, multiply, give it back;
//                                 then the LoRA, and `finish` from registers by eights, or where it must be one by one by
//                                 way of 16 x 32 sums a warp in shared memory
//   warp 8, its first thread      copies boxes into the stages, as many ahead as there are, also of the next tile
//
// Stage s has two barriers: `full` ends a phase when both boxes have come, `empty` when each of the eight
// warps has read it. What is n-th in a stage waits for the n-th phase of `full`, and is brought after phase
// n - 1 of `empty`: both sides count alike what they have brought or read.
//
// Tiles are 128 x N, of a depth of 64 at a time. The host chooses N such that all multiprocessors have work, gives maps
// with boxes of 64 columns (128 rows of lhs; of a weight N rows forward, 64 backward), and depths that are multiples
// of 8, as copies want. Grid: x = as many blocks as there are multiprocessors, or tiles. Block: WGMMA_THREADS, with
// Stages<N>::SHARED_BYTES of dynamic shared memory.
#include "gemm.cuh"
#include "hopper.cuh"
#include "linear.cuh"

#if POLYTAPE_HOPPER

const u32 WGMMA_WARPS = 8;                           // That multiply.
const u32 WGMMA_THREADS = (WGMMA_WARPS + 4) * WARP;  // A warpgroup more, as registers are given to those.
// A block starts with 168 registers a thread (65536 / 384, in units of 8) and can only pass these around: whoever asks for one
// more than others have given up waits for ever.
const u32 BLOCK_REGISTERS = 65536 / WGMMA_THREADS / 8 * 8;
const u32 PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(PRODUCER_REGISTERS + 2 * CONSUMER_REGISTERS <= 3 * BLOCK_REGISTERS, "more registers than the block has");
const u32 LINE = 64;                                 // Elements of a line of shared memory: 128 bytes.
const u32 GROUP_BYTES = 8 * 128;                     // After which the swizzle repeats.
const u32 PART_COLS = 32;                            // Of a warp's sums, what is worked on at a time;
const u32 STAGED_PITCH = PART_COLS + 8;              // in shared memory without bank conflicts.

template <u32 N>
struct Stages {
    static const u32 M = 128, K = LINE, COUNT = N == 64 ? 8 : 4;
    static const u32 LEFT_BYTES = 2 * M * K, BYTES = LEFT_BYTES + 2 * N * K;
    static const u32 STAGED_BYTES = 4 * WGMMA_WARPS * 16 * STAGED_PITCH;
    // The first GROUP_BYTES are for the start to be a multiple of that.
    static const u32 SHARED_BYTES = GROUP_BYTES + COUNT * BYTES + STAGED_BYTES + COUNT * 2 * sizeof(u64);
    static_assert((COUNT & (COUNT - 1)) == 0, "a count that wraps goes on with stage 0");
    char* stages;

    __device__ explicit Stages(char* shared)
        : stages(shared + (GROUP_BYTES - shared_address(shared) % GROUP_BYTES) % GROUP_BYTES) {}

    __device__ float* staged() const { return reinterpret_cast<float*>(stages + COUNT * BYTES); }
    __device__ u64* full() const { return reinterpret_cast<u64*>(stages + COUNT * BYTES + STAGED_BYTES); }
    __device__ u64* empty() const { return full() + COUNT; }

    // Of what comes after `count` others: its stage, and whether it is there for an even or an odd time.
    __device__ char* stage(u32 count) const { return stages + count % COUNT * BYTES; }
    __device__ u64* full_of(u32 count) const { return full() + count % COUNT; }
    __device__ u64* empty_of(u32 count) const { return empty() + count % COUNT; }
    __device__ static u32 parity(u32 count) { return count / COUNT % 2; }
};

template <u32 N>
__device__ inline u32 n_tiles(u32 m, u32 n) {
    return (m + Stages<N>::M - 1) / Stages<N>::M * ((n + N - 1) / N);
}

// Where a tile lies in the result of one of several linears.
struct Place {
    u32 linear, row0, col0;
};

// In bands of eight rows of tiles, in each one column of tiles after the other, so that what runs at a time shares
// its boxes in the cache.
template <u32 N>
__device__ inline Place place_of(u32 linear, u32 tile, u32 m, u32 n) {
    const u32 rows = (m + Stages<N>::M - 1) / Stages<N>::M, cols = (n + N - 1) / N;
    const u32 band = tile / (8 * cols), within = tile % (8 * cols), height = min(8u, rows - 8 * band);
    return {linear, (8 * band + within % height) * Stages<N>::M, within / height * N};
}

template <u32 N>
struct WgmmaTile {
    float values[N / 2];
};

// Adds one stage to a tile, as a group of products.
template <bool TRANSPOSED, u32 N>
__device__ inline void multiply_stage(WgmmaTile<N>& tile, const char* stage) {
    const u32 left = shared_address(stage) + threadIdx.x / 128 * 64 * 128;
    const u32 right = shared_address(stage) + Stages<N>::LEFT_BYTES;
#pragma unroll
    for (u32 k = 0; k < Stages<N>::K; k += 16) {
        const u64 lefts = operand(left + 2 * k, GROUP_BYTES, 16);
        const u64 rights = TRANSPOSED ? operand(right + 2 * k, GROUP_BYTES, 16)
                                      : operand(right + 128 * k, GROUP_BYTES, 128 * Stages<N>::K);
        wgmma<TRANSPOSED>(tile.values, lefts, rights);
    }
    wgmma_commit();
}

// `multiply_tail` of gemm.cuh, a warp by itself: its 16 rows start at row0, and both operands are read into
// registers where `mma` wants them. Sums are registers as well, which have no index: a part of them is what one of
// as many branches takes. Without parts the compiler loads more ahead than there are registers.
// RANK_FIRST: a routing row's matrix is [rank, n], else [n, rank].
template <bool RANK_FIRST, u32 N>
__device__ inline void multiply_tail(WgmmaTile<N>& tile, const float* z, const float* right, const u32* token_rows,
                                     u32 m, u32 n, u32 rank, u32 row0, u32 col0) {
    const u32 g = lane() / 4, t = lane() % 4 * 2, end = min(m, row0 + 16);
    for (u32 first = row0; first < end;) {
        const u32 row = token_rows[first];
        u32 next = first + 1;
        while (next < end && token_rows[next] == row) ++next;
        for (u32 r0 = 0; r0 < rank; r0 += 16) {
            u32 high[4], finite[4], low[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 token = row0 + g + i % 2 * 8, r = r0 + t + i / 2 * 8;
                float values[2], finites[2];
#pragma unroll
                for (u32 e = 0; e < 2; ++e) {
                    const bool own = token >= first && token < next && r + e < rank;
                    values[e] = own ? z[size_t(token) * rank + r + e] : 0.0f;
                    finites[e] = fabsf(values[e]) == INFINITY ? 0.0f : values[e];
                }
                split(values[0], values[1], high[i], low[i]);
                finite[i] = to_bf16s(finites[0], finites[1]);
            }
            // The first 8 ranks a part ahead, as there is nothing else to do while they are on their way.
            const float* own = right + size_t(row) * rank * n;
            float ahead[PART_COLS / 8][2];
            const auto load = [&](u32 part, u32 j, u32 r) {
                const u32 col = col0 + part * PART_COLS + j * 8 + g;
                const bool there = part < N / PART_COLS && col < n && r < rank;
                return there ? own[RANK_FIRST ? r * n + col : col * rank + r] : 0.0f;
            };
#pragma unroll
            for (u32 at = 0; at < PART_COLS / 4; ++at) ahead[at / 2][at % 2] = load(0, at / 2, r0 + t + at % 2);
#pragma unroll 1
            for (u32 part = 0; part < N / PART_COLS; ++part) {
                u32 right_high[PART_COLS / 8][2], right_low[PART_COLS / 8][2];
#pragma unroll
                for (u32 j = 0; j < PART_COLS / 8; ++j) {
                    const float first = load(part, j, r0 + 8 + t), second = load(part, j, r0 + 8 + t + 1);
                    split(ahead[j][0], ahead[j][1], right_high[j][0], right_low[j][0]);
                    split(first, second, right_high[j][1], right_low[j][1]);
                }
#pragma unroll
                for (u32 at = 0; at < PART_COLS / 4; ++at)
                    ahead[at / 2][at % 2] = load(part + 1, at / 2, r0 + t + at % 2);
#pragma unroll
                for (u32 i = 0; i < N / PART_COLS; ++i) {
                    if (i != part) continue;
#pragma unroll
                    for (u32 j = 0; j < PART_COLS / 8; ++j) {
                        float(&sums)[4] = *reinterpret_cast<float(*)[4]>(&tile.values[i * PART_COLS / 2 + 4 * j]);
                        mma(sums, high, right_high[j][0], right_high[j][1]);
                        mma(sums, finite, right_low[j][0], right_low[j][1]);
                        mma(sums, low, right_high[j][0], right_high[j][1]);
                    }
                }
            }
        }
        first = next;
    }
}

// Calls finish(row, col, value) for each element of a warp's 16 rows: as `for_each` of gemm.cuh, part by part, a
// column a lane.
template <u32 N, class Finish>
__device__ inline void for_each(const WgmmaTile<N>& tile, Finish finish, float* staged) {
    const u32 g = lane() / 4, t = lane() % 4 * 2;
#pragma unroll 1
    for (u32 part = 0; part < N / PART_COLS; ++part) {
        __syncwarp();  // All have read the part before.
#pragma unroll
        for (u32 i = 0; i < N / PART_COLS; ++i) {
            if (i != part) continue;
#pragma unroll
            for (u32 e = 0; e < PART_COLS / 2; ++e)
                staged[(g + e / 2 % 2 * 8) * STAGED_PITCH + e / 4 * 8 + t + e % 2] =
                    tile.values[i * PART_COLS / 2 + e];
        }
        __syncwarp();
#pragma unroll 1
        for (u32 row = 0; row < 16; ++row)
            finish(row, part * PART_COLS + lane(), staged[row * STAGED_PITCH + lane()]);
    }
}

template <u32 N, class Results>
__device__ inline void for_each_run(const WgmmaTile<N>& tile, const Results& results, u32 row0, u32 col0) {
    const auto sums_of = [&](u32 part, float (&values)[4][4]) {
#pragma unroll
        for (u32 at = 0; at < 16; ++at) values[at / 4][at % 4] = tile.values[part * PART_COLS / 2 + at];
    };
    for_each_run<N / PART_COLS>(results, sums_of, [&](u32 part, u32& row, u32& col) {
        row = row0, col = col0 + part * PART_COLS;
    });
}

// Brings all stages of this block's tiles, in order. One thread.
template <bool TRANSPOSED, u32 N, class Problem>
__device__ inline void produce(const Stages<N>& shared, const Problem& problem) {
    u32 count = 0;
    for (u32 tile = blockIdx.x; tile < problem.template n_tiles<N>(); tile += gridDim.x) {
        const auto [linear, row0, col0] = problem.template place<N>(tile);
        for (u32 term = 0; term < problem.n_terms(); ++term)
            for (u32 k0 = 0; k0 < problem.depth(term); k0 += Stages<N>::K) {
                char* left = shared.stage(count);
                char* right = left + Stages<N>::LEFT_BYTES;
                u64* full = shared.full_of(count);
                barrier_wait(shared.empty_of(count), shared.parity(count) ^ 1);
                barrier_arrive_expect(full, Stages<N>::BYTES);
                copy_box(left, problem.left(term), k0, row0, full);
                if (TRANSPOSED)
                    copy_box(right, problem.right(linear, term), k0, col0, full);
                else
                    for (u32 col = 0; col < N; col += LINE)
                        copy_box(right + 2 * Stages<N>::K * col, problem.right(linear, term), col0 + col, k0, full);
                ++count;
            }
    }
}

// Multiplies and finishes this block's tiles, in order. The warps of two warpgroups.
template <bool TRANSPOSED, u32 N, class Problem>
__device__ inline void consume(const Stages<N>& shared, const Problem& problem) {
    const u32 warp = threadIdx.x / WARP;
    u32 count = 0;
    for (u32 tile = blockIdx.x; tile < problem.template n_tiles<N>(); tile += gridDim.x) {
        Place place = problem.template place<N>(tile);
        place.row0 += warp * 16;
        WgmmaTile<N> sums = {};
        for (u32 term = 0; term < problem.n_terms(); ++term) {
            for (u32 k0 = 0; k0 < problem.depth(term); k0 += Stages<N>::K) {
                barrier_wait(shared.full_of(count), shared.parity(count));
                wgmma_fence();
                multiply_stage<TRANSPOSED>(sums, shared.stage(count));
                wgmma_wait<1>();  // The stage before has been read, this one may not have.
                if (k0 > 0 && lane() == 0) barrier_arrive(shared.empty_of(count - 1));
                ++count;
            }
            wgmma_wait<0>();
            wgmma_settle(sums.values);
            if (lane() == 0) barrier_arrive(shared.empty_of(count - 1));
            problem.expand(sums, term, place);
        }
        problem.finish(sums, place, shared.staged() + warp * 16 * STAGED_PITCH);
    }
}

template <bool TRANSPOSED, u32 N, class Problem>
__device__ inline void multiply_all(const Problem& problem) {
    DYNAMIC_SHARED(char, memory);
    const Stages<N> shared(memory);
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < Stages<N>::COUNT; ++stage) {
            barrier_init(shared.full() + stage, 1);
            barrier_init(shared.empty() + stage, WGMMA_WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= WGMMA_WARPS * WARP) {
        registers_down_to<PRODUCER_REGISTERS>();
        if (threadIdx.x == WGMMA_WARPS * WARP) produce<TRANSPOSED>(shared, problem);
    } else {
        registers_up_to<CONSUMER_REGISTERS>();
        consume<TRANSPOSED>(shared, problem);
    }
}

// The maps of the weights of siblings.
struct WeightMaps {
    TensorMap of[MAX_PROJECTIONS];
};

template <class Out>
struct Forward {
    const Projections& projections;
    const TensorMap& x;
    const WeightMaps& weights;
    u32 m, d_in;
    template <u32 N>
    __device__ u32 n_tiles() const {
        u32 n = 0;
        for (u32 i = 0; i < projections.n; ++i) n += ::n_tiles<N>(m, projections.of[i].d_out);
        return n;
    }
    template <u32 N>
    __device__ Place place(u32 tile) const {
        u32 i = 0;
        for (; i + 1 < projections.n; ++i) {
            const u32 n = ::n_tiles<N>(m, projections.of[i].d_out);
            if (tile < n) break;
            tile -= n;
        }
        return place_of<N>(i, tile, m, projections.of[i].d_out);
    }
    __device__ u32 n_terms() const { return 1; }
    __device__ u32 depth(u32) const { return d_in; }
    __device__ const TensorMap& left(u32) const { return x; }
    __device__ const TensorMap& right(u32 linear, u32) const { return weights.of[linear]; }
    __device__ static bool is_expanded(const Expand& expand) { return expand.z && expand.mixed_b; }
    template <u32 N>
    __device__ void expand(WgmmaTile<N>& tile, u32, const Place& place) const {
        const Expand& expand = projections.of[place.linear].epilogue.expand;
        const u32 rank = expand.bank.rank, n = projections.of[place.linear].d_out;
        if (is_expanded(expand))
            multiply_tail<true>(tile, expand.z, expand.mixed_b, expand.token_rows, m, n, rank, place.row0, place.col0);
    }
    template <u32 N>
    __device__ void finish(const WgmmaTile<N>& tile, const Place& place, float* staged) const {
        const Projection& own = projections.of[place.linear];
        const bool expanded = is_expanded(own.epilogue.expand);
        Out* y = static_cast<Out*>(own.y);
        const ForwardRuns<Out> runs = {y, own.epilogue, m, own.d_out};
        if (runs.are_possible(expanded)) return for_each_run(tile, runs, place.row0, place.col0);
        const auto finish_one = [&](u32 row, u32 col, float value) {
            if (place.row0 + row < m && place.col0 + col < own.d_out)
                ::finish(y, own.epilogue, expanded, value, place.row0 + row, place.col0 + col, own.d_out);
        };
        for_each(tile, finish_one, staged);
    }
};

// The maps of the terms of `linear_backward`.
struct TermMaps {
    TensorMap d_y[MAX_TERMS], weight[MAX_TERMS];
};

struct Backward {
    Item* d_x;
    const Item* d_residual;
    const TermMaps& maps;
    const Terms& terms;
    u32 m, n;
    template <u32 N>
    __device__ u32 n_tiles() const { return ::n_tiles<N>(m, n); }
    template <u32 N>
    __device__ Place place(u32 tile) const { return place_of<N>(0, tile, m, n); }
    __device__ u32 n_terms() const { return terms.n; }
    __device__ u32 depth(u32 term) const { return terms.terms[term].d_out; }
    __device__ const TensorMap& left(u32 term) const { return maps.d_y[term]; }
    __device__ const TensorMap& right(u32, u32 term) const { return maps.weight[term]; }
    template <u32 N>
    __device__ void expand(WgmmaTile<N>& tile, u32 index, const Place& place) const {
        const Term& term = terms.terms[index];
        if (term.d_z)
            multiply_tail<false>(tile, term.d_z, term.mixed_a, term.token_rows, m, n, term.rank, place.row0, place.col0);
    }
    template <u32 N>
    __device__ void finish(const WgmmaTile<N>& tile, const Place& place, float*) const {
        // Rows are whole chunks: `copy_box`.
        for_each_run(tile, BackwardRuns{d_x, d_residual, m, n}, place.row0, place.col0);
    }
};

#define LINEAR_WGMMA(name, Out, N)                                                                              \
    extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)                                              \
    name(const __grid_constant__ Projections projections, const __grid_constant__ TensorMap x,                  \
         const __grid_constant__ WeightMaps weights, u32 n_tokens, u32 d_in) {                                  \
        after_previous();                                                                                       \
        multiply_all<true, N>(Forward<Out>{projections, x, weights, n_tokens, d_in});                           \
    }
LINEAR_WGMMA(linear_wgmma_64, Item, 64)
LINEAR_WGMMA(linear_wgmma_128, Item, 128)
LINEAR_WGMMA(linear_wgmma_256, Item, 256)
LINEAR_WGMMA(linear_full_wgmma_64, float, 64)
LINEAR_WGMMA(linear_full_wgmma_128, float, 128)
LINEAR_WGMMA(linear_full_wgmma_256, float, 256)

#define LINEAR_BACKWARD_WGMMA(name, N)                                                                     \
    extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1)                                         \
    name(Item* d_x, const Item* d_residual, const __grid_constant__ TermMaps maps,                         \
         const __grid_constant__ Terms terms, u32 n_tokens, u32 d_in) {                                    \
        after_previous();                                                                                  \
        multiply_all<false, N>(Backward{d_x, d_residual, maps, terms, n_tokens, d_in});                    \
    }
LINEAR_BACKWARD_WGMMA(linear_backward_wgmma_64, 64)
LINEAR_BACKWARD_WGMMA(linear_backward_wgmma_128, 128)
LINEAR_BACKWARD_WGMMA(linear_backward_wgmma_256, 256)

#endif
