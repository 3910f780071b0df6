// Rotary position embedding: pairs of features of each head turned by an angle.
//   y_i = cos x_i - sin x_(i + half)      y_(i + half) = cos x_(i + half) + sin x_i      i < half
//   x [tokens, n_heads * head_dim]   y as x; may be x: a thread owns both features of its pair
//   table [positions, head_dim], cosines then sines of pair i   positions [tokens]
// Grid: x = tokens, y = pairs of a row / 128. `sign` is -1 for the backward. The host has checked
// positions and widths.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
rope(Item* y, const Item* x, const float* table, const u32* positions, u32 width, u32 head_dim,
     float sign) {
    const u32 half = head_dim / 2, token = blockIdx.x, pair = blockIdx.y * blockDim.x + threadIdx.x;
    if (pair >= width / 2) return;
    const u32 head = pair / half, i = pair % half;
    const float* angles = table + size_t(positions[token]) * head_dim;
    const float cosine = angles[i], sine = sign * angles[half + i];
    const size_t first = size_t(token) * width + head * head_dim + i;
    const float a = widen(x[first]), b = widen(x[first + half]);
    store(&y[first], cosine * a - sine * b);
    store(&y[first + half], fmaf(cosine, b, sine * a));
}
