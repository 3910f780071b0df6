// Gated activation: h = dropout(f(gate) * up), and with g = dropout(d_h)
// d_gate = g * up * f'(gate), d_up = g * f(gate).
//   gate, up, h, d_h, d_gate, d_up [tokens, d]; without `up` its factor is 1
//   f: 0 relu, 1 gelu_new (tanh), 2 gelu (erf), 3 silu
// Grid: x = tokens, y = groups of 8 columns / 128: a thread draws one Philox block.
#include "philox.cuh"

// sigmoid(x) and sigmoid(-x), of one exponential and one division.
struct Sigmoids {
    float up, down;
};
__device__ inline Sigmoids sigmoids(float x) {
    const float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e), small = e * large;
    return x < 0.0f ? Sigmoids{small, large} : Sigmoids{large, small};
}

__device__ inline float gauss_cdf(float x) { return 0.5f * erfcf(-0.70710678118f * x); }

// f(x) and f'(x). GELU's approximation: (1 + tanh(a)) / 2 = sigmoid(2 a).
struct Activation {
    float value, slope;
};
__device__ inline Activation activate(u32 f, float x) {
    if (f == 0) return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};  // Not a maximum, which would hide a NaN.
    if (f == 1) {
        const float a = 2.0f * 0.7978845608f * (x + 0.044715f * x * x * x);
        const float d_a = 2.0f * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
        const Sigmoids s = sigmoids(a);
        return {x * s.up, s.up + x * d_a * (s.up * s.down)};
    }
    if (f == 2) {
        const float cdf = gauss_cdf(x);
        return {x * cdf, cdf + x * (0.3989422804f * expf(-0.5f * x * x))};
    }
    const Sigmoids s = sigmoids(x);
    return {x * s.up, s.up + x * (s.up * s.down)};
}

// RUN: 8 where rows are whole runs of 8, else 1 a time.
template <u32 RUN>
__device__ inline void gate_run(Item* h, const Item* gate, const Item* up, const float* factors, u32 f, size_t at) {
    float gates[RUN], ups[RUN], products[RUN];
    load_run<RUN>(gates, gate + at);
    if (up) load_run<RUN>(ups, up + at);
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) products[i] = factors[i] * (activate(f, gates[i]).value * (up ? ups[i] : 1.0f));
    store_run<RUN>(h + at, products);
}

extern "C" __global__ void __launch_bounds__(128)
gated(Item* h, const Item* gate, const Item* up, Dropout dropout, u32 f, u32 d) {
    after_previous();
    const u32 group = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
    if (group * 8 >= d) return;
    float factors[8];
    dropout_factors(dropout, token, group, factors);
    const size_t at = size_t(token) * d + group * 8;
    if (d % 8 == 0) return gate_run<8>(h, gate, up, factors, f, at);
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (group * 8 + i < d) gate_run<1>(h, gate, up, factors + i, f, at + i);
}

template <u32 RUN>
__device__ inline void gate_run_backward(Item* d_gate, Item* d_up, const Item* d_h, const Item* gate, const Item* up,
                                         const float* factors, u32 f, size_t at) {
    float gates[RUN], ups[RUN], gradients[RUN], d_gates[RUN], d_ups[RUN];
    load_run<RUN>(gates, gate + at);
    load_run<RUN>(gradients, d_h + at);
    if (up) load_run<RUN>(ups, up + at);
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) {
        const float g = factors[i] * gradients[i];
        const Activation at_gate = activate(f, gates[i]);
        d_gates[i] = g * (up ? ups[i] : 1.0f) * at_gate.slope;
        d_ups[i] = g * at_gate.value;
    }
    store_run<RUN>(d_gate + at, d_gates);
    if (up) store_run<RUN>(d_up + at, d_ups);
}

extern "C" __global__ void __launch_bounds__(128)
gated_backward(Item* d_gate, Item* d_up, const Item* d_h, const Item* gate, const Item* up,
               Dropout dropout, u32 f, u32 d) {
    after_previous();
    const u32 group = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
    if (group * 8 >= d) return;
    float factors[8];
    dropout_factors(dropout, token, group, factors);
    const size_t at = size_t(token) * d + group * 8;
    if (d % 8 == 0) return gate_run_backward<8>(d_gate, d_up, d_h, gate, up, factors, f, at);
#pragma unroll
    for (u32 i = 0; i < 8; ++i)
        if (group * 8 + i < d) gate_run_backward<1>(d_gate, d_up, d_h, gate, up, factors + i, f, at + i);
}
