// Attention: its arguments, and what a query sees.
//   s_ij = scale q_i k_j + bias[head, zero + j - position(i)],  position(i) = i + n_keys - n_queries
//   p_ij = e^(s_ij - lse_i),   o_i = sum_j keep_ij p_ij v_j,    lse_i = ln sum_j e^(s_ij)
//   inner_i = d_o_i o_i,       d_s_ij = p_ij (keep_ij d_o_i v_j - inner_i)
//   d_q_i = scale sum_j d_s_ij k_j,  d_k_j = scale sum_i d_s_ij q_i,  d_v_j = sum_i keep_ij p_ij d_o_i
//   q, o, d_o, d_q [query tokens, n_heads * head_dim]   lse, inner [query tokens, n_heads]
//   k, v, d_k, d_v [key rows, n_kv_heads * head_dim]
// j runs over the keys that i sees: all of its sequence's, or with `causal` those up to position(i),
// of these with a `window` (0: none) the last few.
#pragma once
#include "mma.cuh"
#include "philox.cuh"

struct Span {
    u32 query_start, n_queries, key_start, n_keys;
};

struct Attention {
    const Item *q, *k, *v;
    const Span* spans;
    const uint2* tiles;
    const float* bias;  // [n_heads, n_distances]; null: none
    Dropout dropout;
    u32 n_distances, zero, n_heads, n_kv_heads, head_dim, causal;
    float scale;
    u32 window;
};

// One past the last key that query i of a sequence sees.
__device__ inline u32 n_seen(const Attention& args, const Span& span, u32 i) {
    if (!args.causal) return span.n_keys;
    const u32 end = i + span.n_keys + 1;
    return end > span.n_queries ? end - span.n_queries : 0;
}

// The first key that query i sees, which never moves back from one query to the next.
__device__ inline u32 first_seen(const Attention& args, const Span& span, u32 i) {
    const u32 end = n_seen(args, span, i);
    return args.window != 0 && end > args.window ? end - args.window : 0;
}

// The queries up to the last one that sees key j: those behind it see later ones only.
__device__ inline u32 n_seeing(const Attention& args, const Span& span, u32 j) {
    if (!args.causal || args.window == 0) return span.n_queries;
    const u32 end = j + args.window + span.n_queries;  // Below 2^32: neither is above 2^30.
    return end > span.n_keys ? min(span.n_queries, end - span.n_keys) : 0;
}

__device__ inline float bias(const Attention& args, const Span& span, u32 head, u32 i, u32 j) {
    if (!args.bias) return 0.0f;
    return args.bias[size_t(head) * args.n_distances + args.zero + j + span.n_queries - i - span.n_keys];
}

__device__ inline float keep(const Attention& args, const Span& span, u32 head, u32 i, u32 j) {
    const u32 col = head * ((span.n_keys + 7) / 8 * 8) + j;
    return dropout_factor(args.dropout, span.query_start + i, col);
}
