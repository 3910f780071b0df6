// Embedding: y[t] = scale * table[ids[t]], and rows written into a key or value cache.
//   table [vocabulary, d]   ids [tokens]   y [tokens, d], overwritten
//   source [n, d]   rows [n], distinct   cache [n_rows, d], the named rows overwritten
// Grid: x = tokens. Block: 128 threads along the columns. The host has checked ids and rows.
#include "common.cuh"

template <u32 RUN>
__device__ inline void write_row(Item* to, const Item* from, u32 d, float scale) {
    for (u32 col = threadIdx.x * RUN; col < d; col += blockDim.x * RUN) {
        float values[RUN];
        load_run<RUN>(values, from + col);
#pragma unroll
        for (u32 i = 0; i < RUN; ++i) values[i] = scale == 1.0f ? values[i] : scale * values[i];
        store_run<RUN>(to + col, values);
    }
}

__device__ inline void write_row(Item* to, const Item* from, u32 d, float scale) {
    if (d % 8 == 0) write_row<8>(to, from, d, scale);
    else write_row<1>(to, from, d, scale);
}

extern "C" __global__ void __launch_bounds__(128)
embed(Item* y, const Item* table, const u32* ids, u32 d, float scale) {
    after_previous();
    write_row(y + size_t(blockIdx.x) * d, table + size_t(ids[blockIdx.x]) * d, d, scale);
}

extern "C" __global__ void __launch_bounds__(128)
cache_write(Item* cache, const Item* source, const u32* rows, u32 d) {
    after_previous();
    write_row(cache + size_t(rows[blockIdx.x]) * d, source + size_t(blockIdx.x) * d, d, 1.0f);
}
