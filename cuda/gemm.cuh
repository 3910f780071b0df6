// Matrix products: one tile of out = lhs * rhs, added up in f32 over the whole depth by one block.
//
// Depth is never split over blocks and always walked in the same steps, so an element's bits depend
// neither on the tile nor on the other rows. `multiply` adds to a tile, so that products chain.
//   lhs [m, k]   rhs [n, k] (TRANSPOSED: a frozen weight, forward) or [k, n] (the same, backward)
// Block: GEMM_THREADS. Rows and columns past m and n are 0 in the tile; the caller skips them.
#pragma once
#include "common.cuh"

const u32 GEMM_THREADS = 256;
const u32 GEMM_SUM = 256;  // Products that are added up in one sum; those sums are then added up.

// On CUDA cores, for any types: 64 x 64, a thread owns 4 rows times 4 columns.
struct ScalarTile {
    static const u32 M = 64, N = 64, K = 16, ELEMENTS = 16;
    float values[ELEMENTS];
    // Where element i lies in the tile.
    __device__ static u32 row(u32 i) { return threadIdx.x / 16 * 4 + i / 4; }
    __device__ static u32 col(u32 i) { return threadIdx.x % 16 + i % 4 * 16; }
};

template <bool TRANSPOSED, class L, class R>
__device__ inline void multiply(ScalarTile& tile, const L* lhs, const R* rhs, u32 m, u32 n, u32 k, u32 row0,
                                u32 col0) {
    // One more column, so that threads of a warp that store down a column meet different banks.
    const u32 M = ScalarTile::M, N = ScalarTile::N, K = ScalarTile::K, PITCH = M + 1;
    SHARED(float, lefts, K * PITCH);
    SHARED(float, rights, K * PITCH);
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
__device__ inline void for_each(const ScalarTile& tile, Finish finish) {
    const u32 M = ScalarTile::M, N = ScalarTile::N, PITCH = N + 1;
    SHARED(float, staged, M * PITCH);
#pragma unroll
    for (u32 i = 0; i < ScalarTile::ELEMENTS; ++i)
        staged[ScalarTile::row(i) * PITCH + ScalarTile::col(i)] = tile.values[i];
    __syncthreads();
#pragma unroll 1
    for (u32 at = threadIdx.x; at < M * N; at += GEMM_THREADS)
        finish(at / N, at % N, staged[at / N * PITCH + at % N]);
}
