// Matrix products: one tile of out = lhs * rhs, added up in f32 over the whole depth by one block.
//
// Depth is never split over blocks and always walked in the same steps, so an element's bits depend
// neither on the tile nor on the other rows. `multiply` adds to a tile, so that products chain.
//   lhs [m, k]   rhs [n, k] (TRANSPOSED: a frozen weight, forward) or [k, n] (the same, backward)
// Block: GEMM_THREADS, with SHARED_BYTES of dynamic shared memory. Rows and columns past m and n are 0
// in the tile; the caller skips them.
#pragma once
#include "mma.cuh"

const u32 GEMM_THREADS = 256;
const u32 GEMM_SUM = 256;  // Products that are added up in one sum; those sums are then added up.

// On CUDA cores, for any types: 64 x 64, a thread owns 4 rows times 4 columns.
struct ScalarTile {
    static const u32 M = 64, N = 64, K = 16, ELEMENTS = 16;
    static const u32 SHARED_BYTES = 4 * M * (N + 1);  // What a block launches with: `for_each` needs most.
    float values[ELEMENTS];
    // Where element i lies in the tile.
    __device__ static u32 row(u32 i) { return threadIdx.x / 16 * 4 + i / 4; }
    __device__ static u32 col(u32 i) { return threadIdx.x % 16 + i % 4 * 16; }
};

template <bool TRANSPOSED, class L, class R>
__device__ inline void multiply(ScalarTile& tile, const L* lhs, const R* rhs, u32 m, u32 n, u32 k, u32 row0,
                                u32 col0, void* shared) {
    // One more column, so that threads of a warp that store down a column meet different banks.
    const u32 M = ScalarTile::M, N = ScalarTile::N, K = ScalarTile::K, PITCH = M + 1;
    float *lefts = static_cast<float*>(shared), *rights = lefts + K * PITCH;
    float sums[ScalarTile::ELEMENTS] = {};
    for (u32 k0 = 0; k0 < k; k0 += K) {
        __syncthreads();
        for (u32 at = threadIdx.x; at < M * K; at += GEMM_THREADS) {
            const u32 row = at / K, kk = at % K;
            const bool inside = row0 + row < m && k0 + kk < k;
            lefts[kk * PITCH + row] = inside ? widen(lhs[size_t(row0 + row) * k + k0 + kk]) : 0.0f;
        }
        for (u32 at = threadIdx.x; at < N * K; at += GEMM_THREADS) {
            const u32 col = TRANSPOSED ? at / K : at % N, kk = TRANSPOSED ? at % K : at / N;
            const bool inside = col0 + col < n && k0 + kk < k;
            const size_t place =
                TRANSPOSED ? size_t(col0 + col) * k + k0 + kk : size_t(k0 + kk) * n + col0 + col;
            rights[kk * PITCH + col] = inside ? widen(rhs[place]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (u32 kk = 0; kk < K; ++kk) {
            if (k0 + kk >= k) break;  // A product of two zeros is not always nothing: -0 + 0.
            float left[4], right[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) left[i] = lefts[kk * PITCH + ScalarTile::row(4 * i)];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) right[j] = rights[kk * PITCH + ScalarTile::col(j)];
#pragma unroll
            for (u32 i = 0; i < ScalarTile::ELEMENTS; ++i)
                sums[i] = fmaf(left[i / 4], right[i % 4], sums[i]);
        }
        if ((k0 + K) % GEMM_SUM == 0 || k0 + K >= k) {
#pragma unroll
            for (u32 i = 0; i < ScalarTile::ELEMENTS; ++i) {
                tile.values[i] += sums[i];
                sums[i] = 0.0f;
            }
        }
    }
}

// Calls finish(row, col, value) for each element of a tile, consecutive threads along a row. By way
// of shared memory, so that stores coalesce and the text of `finish` is there once.
template <class Finish>
__device__ inline void for_each(const ScalarTile& tile, Finish finish, void* shared) {
    const u32 M = ScalarTile::M, N = ScalarTile::N, PITCH = N + 1;
    float* staged = static_cast<float*>(shared);
    __syncthreads();  // The products still read this memory.
#pragma unroll
    for (u32 i = 0; i < ScalarTile::ELEMENTS; ++i)
        staged[ScalarTile::row(i) * PITCH + ScalarTile::col(i)] = tile.values[i];
    __syncthreads();
#pragma unroll 1
    for (u32 at = threadIdx.x; at < M * N; at += GEMM_THREADS)
        finish(at / N, at % N, staged[at / N * PITCH + at % N]);
}

#if POLYTAPE_BF16

// Eight neighbours along the depth as four words, zeros behind the first n. ALIGNED: all or none, at a multiple of 16 bytes.
// STREAMED: once.
template <bool ALIGNED, bool STREAMED = false>
__device__ inline void load_words(u32 (&to)[4], const Bf16* from, u32 n) {
    if (ALIGNED) {
        uint4 bits = {0, 0, 0, 0};
        if (n > 0) bits = STREAMED ? stream_16_bytes(from) : load_16_bytes(from);
        to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            to[i] = (2 * i < n ? from[2 * i].bits : 0) | u32(2 * i + 1 < n ? from[2 * i + 1].bits : 0) << 16;
    }
}

// On tensor cores, for bf16: 128 x 128, a warp owns 64 x 32 as 4 x 4 fragments of 16 x 8. Steps of 32
// along the depth, three of them in shared memory, two on their way.
struct MmaTile {
    static const u32 M = 128, N = 128, K = 32, STAGES = 3;
    static const u32 STAGE = M * K;                      // Elements of one operand.
    static const u32 SHARED_BYTES = 4 * M * (N + 4);     // What a block launches with: `for_each` needs most.
    float values[4][4][4];
};

// Where a warp's part of the tile starts.
__device__ inline u32 warp_row() { return threadIdx.x / WARP % 2 * 64; }
__device__ inline u32 warp_col() { return threadIdx.x / WARP / 2 * 32; }

// Rows of 32 elements are four chunks of 16 bytes, rows of 128 are sixteen; chunks are exchanged such that
// the eight rows that a matrix load reads lie in different banks.
__device__ inline u32 narrow_place(u32 row, u32 chunk) { return row * 32 + (chunk ^ (row / 2 % 4)) * 8; }
__device__ inline u32 wide_place(u32 row, u32 chunk) { return row * 128 + (chunk ^ (row % 8)) * 8; }

// Brings rows row0..., columns col0... of a matrix [rows, cols] into shared memory: ROWS x COLS elements,
// zeros outside. By chunks of 16 bytes where every row starts at one, else by elements.
template <u32 ROWS, u32 COLS>
__device__ inline void bring(Bf16* to, const Bf16* from, u32 rows, u32 cols, u32 row0, u32 col0) {
    const u32 chunks = COLS / 8;
#pragma unroll
    for (u32 i = 0; i < ROWS * chunks / GEMM_THREADS; ++i) {
        const u32 at = threadIdx.x + i * GEMM_THREADS, row = at / chunks, chunk = at % chunks;
        const u32 place = COLS == 32 ? narrow_place(row, chunk) : wide_place(row, chunk);
        const u32 at_row = row0 + row, at_col = col0 + chunk * 8;
        if (cols % 8 == 0) {
            const bool valid = at_row < rows && at_col < cols;
            copy_async(to + place, from + (valid ? size_t(at_row) * cols + at_col : 0), valid);
        } else {
#pragma unroll 1
            for (u32 j = 0; j < 8; ++j) {
                const bool valid = at_row < rows && at_col + j < cols;
                to[place + j] = valid ? from[size_t(at_row) * cols + at_col + j] : Bf16{0};
            }
        }
    }
}

// Adds the products of one step, both operands in shared memory. TRANSPOSED: rights is [n, k].
template <bool TRANSPOSED>
__device__ inline void multiply_step(MmaTile& tile, const Bf16* lefts, const Bf16* rights, u32 k_left, u32 k_right) {
    const u32 l = lane();
    u32 left[4][4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        load_matrices(left[i], lefts + narrow_place(warp_row() + i * 16 + l % 16, k_left / 8 + l / 16));
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        u32 right[4];  // Of two fragments.
        const u32 col = warp_col() + j * 16;
        if (TRANSPOSED)
            load_matrices(right, rights + narrow_place(col + l % 8 + l / 16 * 8, k_right / 8 + l / 8 % 2));
        else
            load_matrices_transposed(right, rights + wide_place(k_right + l % 16, col / 8 + l / 16));
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            mma(tile.values[i][2 * j], left[i], right[0], right[1]);
            mma(tile.values[i][2 * j + 1], left[i], right[2], right[3]);
        }
    }
}

template <bool TRANSPOSED>
__device__ inline void multiply(MmaTile& tile, const Bf16* lhs, const Bf16* rhs, u32 m, u32 n, u32 k, u32 row0,
                                u32 col0, void* memory) {
    Bf16* shared = static_cast<Bf16*>(memory);
    const u32 STAGES = MmaTile::STAGES, STAGE = MmaTile::STAGE, K = MmaTile::K;
    const u32 n_steps = (k + K - 1) / K;
    const auto start = [&](u32 step) {
        if (step < n_steps) {
            Bf16* lefts = shared + step % STAGES * 2 * STAGE;
            bring<128, 32>(lefts, lhs, m, k, row0, step * K);
            if (TRANSPOSED)
                bring<128, 32>(lefts + STAGE, rhs, n, k, col0, step * K);
            else
                bring<32, 128>(lefts + STAGE, rhs, k, n, step * K, col0);
        }
        copy_async_commit();  // Also where nothing is left: so that the count of groups holds.
    };
    __syncthreads();  // What an earlier product or tail still reads.
    for (u32 step = 0; step < STAGES - 1; ++step) start(step);
    for (u32 step = 0; step < n_steps; ++step) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // This step is there for all, and all are done with the one before.
        start(step + STAGES - 1);
        const Bf16* lefts = shared + step % STAGES * 2 * STAGE;
#pragma unroll
        for (u32 kk = 0; kk < K; kk += 16) multiply_step<TRANSPOSED>(tile, lefts, lefts + STAGE, kk, kk);
    }
    copy_async_wait<0>();
}

// The rest of a value that `high` does not hold.
__device__ inline Bf16 low_half(float value, Bf16 high) { return to_bf16(rest(value, widen(high))); }

// Adds the low-rank part: z [m, rank] in f32, and of the routing row of each token a matrix of
// which element (r, col) is right[row * row_size + r * r_size + col * col_size], in f32. Each factor is split
// in two bf16 halves, x = high + low, and high high + high low + low high are added: 2^-16 of each product
// is lost. One run of tokens of a routing row after another, the others' z being 0: the sums of a token
// do not depend on its neighbours.
__device__ inline void multiply_tail(MmaTile& tile, const float* z, const float* right, const u32* token_rows,
                                     u32 m, u32 n, u32 rank, u32 row0, u32 col0, size_t row_size,
                                     size_t r_size, size_t col_size, void* shared) {
    Bf16 *lefts = static_cast<Bf16*>(shared), *rights = lefts + MmaTile::STAGE;
    Bf16* finite = rights + MmaTile::STAGE;  // The high halves again, 0 for an infinity: times a low half of 0
                                             // it would be NaN.
    const u32 end = min(m, row0 + MmaTile::M);
    for (u32 first = row0; first < end;) {
        const u32 row = token_rows[first];
        u32 next = first + 1;
        while (next < end && token_rows[next] == row) ++next;
        for (u32 r0 = 0; r0 < rank; r0 += 16) {
            __syncthreads();
#pragma unroll 1
            for (u32 at = threadIdx.x; at < 128 * 16; at += GEMM_THREADS) {
                const u32 token = row0 + at / 16, r = at % 16, col = col0 + at % 128, right_r = at / 128;
                const bool own = token >= first && token < next && r0 + r < rank;
                const float left = own ? z[size_t(token) * rank + r0 + r] : 0.0f;
                const Bf16 left_high = to_bf16(left);
                Bf16* to = lefts + narrow_place(at / 16, r / 8) + r % 8;
                *to = left_high;
                finite[narrow_place(at / 16, r / 8) + r % 8] =
                    fabsf(left) == INFINITY ? Bf16{0} : left_high;
                lefts[narrow_place(at / 16, 2 + r / 8) + r % 8] = low_half(left, left_high);
                const bool there = col < n && r0 + right_r < rank;
                const float value =
                    there ? right[row * row_size + (r0 + right_r) * r_size + col * col_size] : 0.0f;
                const Bf16 high = to_bf16(value);
                rights[narrow_place(at % 128, right_r / 8) + right_r % 8] = high;
                rights[narrow_place(at % 128, 2 + right_r / 8) + right_r % 8] = low_half(value, high);
            }
            __syncthreads();
            multiply_step<true>(tile, lefts, rights, 0, 0);
            multiply_step<true>(tile, finite, rights, 0, 16);
            multiply_step<true>(tile, lefts, rights, 16, 0);
        }
        first = next;
    }
}

template <class Finish>
__device__ inline void for_each(const MmaTile& tile, Finish finish, void* shared) {
    float* staged = static_cast<float*>(shared);
    const u32 M = MmaTile::M, N = MmaTile::N, PITCH = N + 4, g = lane() / 4, t = lane() % 4 * 2;
    __syncthreads();  // The products still read this memory.
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
#pragma unroll
            for (u32 e = 0; e < 4; ++e)
                staged[(warp_row() + i * 16 + g + e / 2 * 8) * PITCH + warp_col() + j * 8 + t + e % 2] =
                    tile.values[i][j][e];
    __syncthreads();
#pragma unroll 1
    for (u32 at = threadIdx.x; at < M * N; at += GEMM_THREADS)
        finish(at / N, at % N, staged[at / N * PITCH + at % N]);
}

// Of four fragments, a lane has SIZE words each: lane t of the four of a row its t-th. It gets those of all four lanes of
// fragment t, so that what is stored are whole sectors of memory.
template <u32 SIZE>
__device__ inline void gather_fragment(u32 (&all)[4][SIZE], const u32 (&own)[4][SIZE]) {
    const bool odd = lane() % 2 == 1, upper = lane() % 4 >= 2;
    // Of fragment 2 i + odd, what this lane and its neighbour have.
    u32 halves[2][2][SIZE];
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 e = 0; e < SIZE; ++e) {
            const u32 first = own[2 * i][e], second = own[2 * i + 1][e];
            const u32 other = __shfl_xor_sync(ALL_LANES, odd ? first : second, 1);
            halves[i][0][e] = odd ? other : first;
            halves[i][1][e] = odd ? second : other;
        }
#pragma unroll
    for (u32 t = 0; t < 2; ++t)
#pragma unroll
        for (u32 e = 0; e < SIZE; ++e) {
            const u32 first = halves[0][t][e], second = halves[1][t][e];
            const u32 other = __shfl_xor_sync(ALL_LANES, upper ? first : second, 2);
            all[t][e] = upper ? other : first;
            all[2 + t][e] = upper ? second : other;
        }
}

// Calls results.finish(row, col, run, fetched) for each 8 neighbours in a row of some parts of a tile, from registers;
// `fetched` is what results.fetch(row, col) gave, a part ahead. Where results are_plain(), only rounded, they are exchanged
// rounded, half as many, and results.store(row, col, run) gets them. A part is 16 rows of 32 columns of a warp.
// sums_of(part, values): a thread's four fragments. place_of(part, row, col): where a part starts. A whole warp.
template <u32 PARTS, class Results, class Sums, class Place>
__device__ inline void for_each_run(const Results& results, const Sums& sums_of, const Place& place_of) {
    const u32 g = lane() / 4, t = lane() % 4;
    if (results.are_plain()) {
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part) {
            float values[4][4];
            u32 row, col;
            sums_of(part, values);
            place_of(part, row, col);
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                u32 own[4][1], all[4][1];
#pragma unroll
                for (u32 j = 0; j < 4; ++j) own[j][0] = to_bf16s(values[j][2 * h], values[j][2 * h + 1]);
                gather_fragment(all, own);
                results.store(row + g + 8 * h, col + 8 * t, uint4{all[0][0], all[1][0], all[2][0], all[3][0]});
            }
            keep_order();
        }
        return;
    }
    uint4 ahead[2];
    const auto fetch = [&](u32 part) {
        u32 row, col;
        place_of(part, row, col);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) ahead[h] = results.fetch(row + g + 8 * h, col + 8 * t);
    };
    fetch(0);
#pragma unroll
    for (u32 part = 0; part < PARTS; ++part) {
        const uint4 fetched[2] = {ahead[0], ahead[1]};
        if (part + 1 < PARTS) fetch(part + 1);
        float values[4][4];
        u32 row, col;
        sums_of(part, values);
        place_of(part, row, col);
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            u32 own[4][2], all[4][2];
            float run[8];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) own[i / 2][i % 2] = __float_as_uint(values[i / 2][2 * h + i % 2]);
            gather_fragment(all, own);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) run[i] = __uint_as_float(all[i / 2][i % 2]);
            results.finish(row + g + 8 * h, col + 8 * t, run, fetched[h]);
        }
        keep_order();
    }
}

template <class Results>
__device__ inline void for_each_run(const MmaTile& tile, const Results& results, u32 row0, u32 col0) {
    const auto sums_of = [&](u32 part, float (&values)[4][4]) {
#pragma unroll
        for (u32 at = 0; at < 16; ++at) values[at / 4][at % 4] = tile.values[part][at / 4][at % 4];
    };
    for_each_run<4>(results, sums_of, [&](u32 part, u32& row, u32& col) {
        row = row0 + warp_row() + part * 16, col = col0 + warp_col();
    });
}

typedef MmaTile ItemTile;  // What frozen weights are multiplied in.
#else
typedef ScalarTile ItemTile;
#endif
