// Dropout and addition.
//   y = x * (0 or 1 / (1 - p))      [tokens, d]; its own backward
//   y = a + b                       [n]; y may be a
// Grid of `dropout`: x = tokens, y = groups of 8 columns / 128: a thread draws one Philox block.
// Grid of `add`: x = n / 256.
#include "philox.cuh"

extern "C" __global__ void __launch_bounds__(128)
dropout(Item* y, const Item* x, Dropout dropout, u32 d) {
    after_previous();
    const u32 group = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
    if (group * 8 >= d) return;
    float factors[8];
    dropout_factors(dropout, token, group, factors);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 col = group * 8 + i;
        const size_t at = size_t(token) * d + col;
        if (col < d) store(&y[at], factors[i] * widen(x[at]));
    }
}

extern "C" __global__ void __launch_bounds__(256) add(Item* y, const Item* a, const Item* b, u64 n) {
    after_previous();
    const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < n) store(&y[at], widen(a[at]) + widen(b[at]));
}
