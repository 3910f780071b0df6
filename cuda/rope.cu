// Rotary position embedding: pairs of features of each head turned by an angle.
//   y_i = cos x_i - sin x_(i + half)      y_(i + half) = cos x_(i + half) + sin x_i      i < half
//   x [tokens, n_heads * head_dim]   y as x; may be x: a thread owns both features of its pair
//   table [positions, head_dim], cosines then sines of pair i   positions [tokens]
// Grid: x = tokens, y = groups of 8 pairs of a row / 128. `sign` is -1 for the backward. The host has checked
// positions and widths.
#include "common.cuh"

// RUN neighbouring pairs: 8 where halves of heads are whole runs of 8, else 1 a time.
template <u32 RUN>
__device__ inline void rotate_run(Item* y, const Item* x, const float* angles, u32 pair, u32 half, float sign) {
    const u32 i = pair % half, first = pair / half * 2 * half + i;
    float cosines[RUN], sines[RUN], a[RUN], b[RUN], firsts[RUN], seconds[RUN];
    load_run<RUN>(a, x + first);
    load_run<RUN>(b, x + first + half);
    load_run<RUN>(cosines, angles + i);
    load_run<RUN>(sines, angles + half + i);
#pragma unroll
    for (u32 e = 0; e < RUN; ++e) {
        const float sine = sign * sines[e];
        firsts[e] = cosines[e] * a[e] - sine * b[e];
        seconds[e] = fmaf(cosines[e], b[e], sine * a[e]);
    }
    store_run<RUN>(y + first, firsts);
    store_run<RUN>(y + first + half, seconds);
}

extern "C" __global__ void __launch_bounds__(128)
rope(Item* y, const Item* x, const float* table, const u32* positions, u32 width, u32 head_dim,
     float sign) {
    after_previous();
    const u32 half = head_dim / 2, token = blockIdx.x, pair = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (pair >= width / 2) return;
    const float* angles = table + size_t(positions[token]) * head_dim;
    x += size_t(token) * width;
    y += size_t(token) * width;
    if (half % 8 == 0) return rotate_run<8>(y, x, angles, pair, half, sign);
    for (u32 i = 0; i < 8 && pair + i < width / 2; ++i) rotate_run<1>(y, x, angles, pair + i, half, sign);
}
