// Embedding: y[t] = scale * table[ids[t]], and rows written into a key or value cache.
//   table [vocabulary, d]   ids [tokens]   y [tokens, d], overwritten
//   source [n, d]   rows [n], distinct   cache [n_rows, d], the named rows overwritten
// Grid: x = tokens. Block: 128 threads along the columns. The host has checked ids and rows.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
embed(Item* y, const Item* table, const u32* ids, u32 d, float scale) {
    const Item* from = table + size_t(ids[blockIdx.x]) * d;
    Item* to = y + size_t(blockIdx.x) * d;
    for (u32 col = threadIdx.x; col < d; col += blockDim.x) {
        if (scale == 1.0f) to[col] = from[col];
        else store(to + col, scale * widen(from[col]));
    }
}

extern "C" __global__ void __launch_bounds__(128)
cache_write(Item* cache, const Item* source, const u32* rows, u32 d) {
    const Item* from = source + size_t(blockIdx.x) * d;
    Item* to = cache + size_t(rows[blockIdx.x]) * d;
    for (u32 col = threadIdx.x; col < d; col += blockDim.x) to[col] = from[col];
}
