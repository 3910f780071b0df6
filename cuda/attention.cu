// Attention without a score matrix in memory, and its backward from recomputed probabilities.
//   s_ij = scale q_i k_j + bias[head, zero + j - position(i)],  position(i) = i + n_keys - n_queries
//   p_ij = e^(s_ij - lse_i),   o_i = sum_j keep_ij p_ij v_j,    lse_i = ln sum_j e^(s_ij)
//   inner_i = d_o_i o_i,       d_s_ij = p_ij (keep_ij d_o_i v_j - inner_i)
//   d_q_i = scale sum_j d_s_ij k_j,  d_k_j = scale sum_i d_s_ij q_i,  d_v_j = sum_i keep_ij p_ij d_o_i
//   q, o, d_o, d_q [query tokens, n_heads * head_dim]   lse, inner [query tokens, n_heads]
//   k, v, d_k, d_v [key rows, n_kv_heads * head_dim]
// j runs over the keys that i sees: all of its sequence's, or with `causal` those up to position(i),
// of these with a `window` (0: none) the last few.
// tiles [n] = (sequence, first query or key of 8). Grid: x = tiles, y = heads (of d_k, d_v: of keys).
// Block: 8 warps, a warp a query (a key in the last kernel); the other side passes through shared
// memory 32 rows at a time, a lane scoring one of them and then owning columns lane + 32 c of the
// result. COLUMNS = ceil(head_dim / 32), to a power of two. For bf16 the kernels
// with `tiles` in their names are in the places of those three where a head is at most 128 wide: wider
// ones do not fit in registers. Sums: dots in order, a tree over 32 scores, tiles in order.
#include "gemm.cuh"
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

const u32 ATTENTION_WARPS = 8;

// Rows of a head, widened, into shared memory with a pitch of head_dim + 1 (a lane a row, and lanes
// along a row, both meet different banks); rows past `n` are 0.
__device__ inline void load_rows(float* to, const Item* from, size_t row_size, u32 n, u32 max, u32 head_dim) {
    for (u32 at = threadIdx.x; at < max * head_dim; at += blockDim.x) {
        const u32 row = at / head_dim, col = at % head_dim;
        to[row * (head_dim + 1) + col] = row < n ? widen(from[row * row_size + col]) : 0.0f;
    }
}

__device__ inline float dot(const float* a, const float* b, u32 n) {
    float sum = 0.0f;
    for (u32 c = 0; c < n; ++c) sum = fmaf(a[c], b[c], sum);
    return sum;
}

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

__device__ inline float bias(const Attention& args, const Span& span, u32 head, u32 i, u32 j) {
    if (!args.bias) return 0.0f;
    return args.bias[size_t(head) * args.n_distances + args.zero + j + span.n_queries - i - span.n_keys];
}

__device__ inline float keep(const Attention& args, const Span& span, u32 head, u32 i, u32 j) {
    const u32 col = head * ((span.n_keys + 7) / 8 * 8) + j;
    return dropout_factor(args.dropout, span.query_start + i, col);
}

template <u32 COLUMNS>
__device__ inline void attend(Item* o, float* lse, const Attention& args) {
    const u32 d = args.head_dim, pitch = d + 1, head = blockIdx.y, warp = threadIdx.x / WARP;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, i = first + warp;
    const u32 n_queries = min(ATTENTION_WARPS, span.n_queries - first);
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_col = size_t(head / (args.n_heads / args.n_kv_heads)) * d;
    DYNAMIC_SHARED(float, shared);
    float *queries = shared, *rows = queries + ATTENTION_WARPS * pitch;
    load_rows(queries, args.q + (span.query_start + first) * q_size + head * d, q_size, n_queries,
              ATTENTION_WARPS, d);
    const bool active = warp < n_queries;
    const u32 seen = active ? n_seen(args, span, i) : 0, from = active ? first_seen(args, span, i) : 0;
    // What any query of the block sees: its last one goes furthest, its first one begins first.
    const u32 most = n_seen(args, span, first + n_queries - 1);
    const u32 start = first_seen(args, span, first) / WARP * WARP;
    float largest = -INFINITY, sum = 0.0f, out[COLUMNS] = {};
    for (u32 j0 = start; j0 < most; j0 += WARP) {
        const size_t at = (span.key_start + j0) * kv_size + kv_col;
        const u32 n_keys = min(WARP, span.n_keys - j0);
        __syncthreads();
        load_rows(rows, args.k + at, kv_size, n_keys, WARP, d);
        __syncthreads();
        const u32 j = j0 + lane();
        const bool meets = j0 < seen && j0 + WARP > from, sees = j >= from && j < seen;
        float probability = 0.0f, rescale = 1.0f;
        if (meets) {
            float score = -INFINITY;
            if (sees)
                score = fmaf(args.scale, dot(queries + warp * pitch, rows + lane() * pitch, d),
                             bias(args, span, head, i, j));
            const float larger = fmaxf(largest, warp_max(score));
            if (sees) probability = expf(score - larger);
            rescale = expf(largest - larger);
            sum = fmaf(sum, rescale, warp_sum(probability));
            largest = larger;
            if (sees) probability *= keep(args, span, head, i, j);
        }
        __syncthreads();
        load_rows(rows, args.v + at, kv_size, n_keys, WARP, d);
        __syncthreads();
        if (!meets) continue;
        float added[COLUMNS] = {};
        const u32 n = min(WARP, seen - j0);
        for (u32 other = 0; other < n; ++other) {
            const float p = __shfl_sync(ALL_LANES, probability, other);
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c)
                if (lane() + WARP * c < d)
                    added[c] = fmaf(p, rows[other * pitch + lane() + WARP * c], added[c]);
        }
#pragma unroll
        for (u32 c = 0; c < COLUMNS; ++c) out[c] = fmaf(out[c], rescale, added[c]);
    }
    if (!active) return;
    const size_t token = span.query_start + i;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c)
        if (lane() + WARP * c < d)
            store(&o[token * q_size + head * d + lane() + WARP * c], seen == 0 ? 0.0f : out[c] / sum);
    if (lane() == 0) lse[token * args.n_heads + head] = seen == 0 ? -INFINITY : largest + logf(sum);
}

template <u32 COLUMNS>
__device__ inline void attend_backward_queries(Item* d_q, const Item* d_o, const float* lse,
                                               const float* inner, const Attention& args) {
    const u32 d = args.head_dim, pitch = d + 1, head = blockIdx.y, warp = threadIdx.x / WARP;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, i = first + warp;
    const u32 n_queries = min(ATTENTION_WARPS, span.n_queries - first);
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_col = size_t(head / (args.n_heads / args.n_kv_heads)) * d;
    DYNAMIC_SHARED(float, shared);
    float *queries = shared, *d_os = queries + ATTENTION_WARPS * pitch;
    float *keys = d_os + ATTENTION_WARPS * pitch, *values = keys + WARP * pitch;
    const size_t at_q = (span.query_start + first) * q_size + head * d;
    load_rows(queries, args.q + at_q, q_size, n_queries, ATTENTION_WARPS, d);
    load_rows(d_os, d_o + at_q, q_size, n_queries, ATTENTION_WARPS, d);
    const bool active = warp < n_queries;
    const u32 seen = active ? n_seen(args, span, i) : 0, most = n_seen(args, span, first + n_queries - 1);
    const u32 from = active ? first_seen(args, span, i) : 0;
    const u32 start = first_seen(args, span, first) / WARP * WARP;
    const size_t at_row = (size_t(span.query_start) + i) * args.n_heads + head;
    const float row_lse = active ? lse[at_row] : 0.0f, row_inner = active ? inner[at_row] : 0.0f;
    float out[COLUMNS] = {};
    for (u32 j0 = start; j0 < most; j0 += WARP) {
        const size_t at = (span.key_start + j0) * kv_size + kv_col;
        const u32 n_keys = min(WARP, span.n_keys - j0);
        __syncthreads();
        load_rows(keys, args.k + at, kv_size, n_keys, WARP, d);
        load_rows(values, args.v + at, kv_size, n_keys, WARP, d);
        __syncthreads();
        if (j0 >= seen || j0 + WARP <= from) continue;
        const u32 j = j0 + lane();
        float d_score = 0.0f;
        if (j >= from && j < seen) {
            const float score = fmaf(args.scale, dot(queries + warp * pitch, keys + lane() * pitch, d),
                                     bias(args, span, head, i, j));
            const float d_p =
                keep(args, span, head, i, j) * dot(d_os + warp * pitch, values + lane() * pitch, d);
            d_score = args.scale * (expf(score - row_lse) * (d_p - row_inner));
        }
        const u32 n = min(WARP, seen - j0);
        float added[COLUMNS] = {};
        for (u32 other = 0; other < n; ++other) {
            const float factor = __shfl_sync(ALL_LANES, d_score, other);
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c)
                if (lane() + WARP * c < d)
                    added[c] = fmaf(factor, keys[other * pitch + lane() + WARP * c], added[c]);
        }
#pragma unroll
        for (u32 c = 0; c < COLUMNS; ++c) out[c] += added[c];
    }
    if (!active) return;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c)
        if (lane() + WARP * c < d)
            store(&d_q[(span.query_start + i) * q_size + head * d + lane() + WARP * c], out[c]);
}

template <u32 COLUMNS>
__device__ inline void attend_backward_keys(Item* d_k, Item* d_v, const Item* d_o, const float* lse,
                                            const float* inner, const Attention& args) {
    const u32 d = args.head_dim, pitch = d + 1, kv_head = blockIdx.y, warp = threadIdx.x / WARP;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, j = first + warp;
    const u32 n_keys = min(ATTENTION_WARPS, span.n_keys - first), group = args.n_heads / args.n_kv_heads;
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    DYNAMIC_SHARED(float, shared);
    float *keys = shared, *values = keys + ATTENTION_WARPS * pitch;
    float *queries = values + ATTENTION_WARPS * pitch, *d_os = queries + WARP * pitch;
    const size_t at_k = (span.key_start + first) * kv_size + kv_head * d;
    load_rows(keys, args.k + at_k, kv_size, n_keys, ATTENTION_WARPS, d);
    load_rows(values, args.v + at_k, kv_size, n_keys, ATTENTION_WARPS, d);
    const bool active = warp < n_keys;
    // The first query that sees the block's first key.
    const u32 past = span.n_keys > span.n_queries ? span.n_keys - span.n_queries : 0;
    const u32 ahead = span.n_queries > span.n_keys ? span.n_queries - span.n_keys : 0;
    const u32 from = args.causal ? (first + ahead > past ? first + ahead - past : 0) / WARP * WARP : 0;
    float out_k[COLUMNS] = {}, out_v[COLUMNS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (u32 i0 = from; i0 < span.n_queries; i0 += WARP) {
            const size_t at = (span.query_start + i0) * q_size + head * d;
            const u32 n_queries = min(WARP, span.n_queries - i0);
            __syncthreads();
            load_rows(queries, args.q + at, q_size, n_queries, WARP, d);
            load_rows(d_os, d_o + at, q_size, n_queries, WARP, d);
            __syncthreads();
            const u32 i = i0 + lane();
            float p = 0.0f, d_score = 0.0f;
            if (active && lane() < n_queries && j < n_seen(args, span, i) &&
                j >= first_seen(args, span, i)) {
                const size_t at_row = (size_t(span.query_start) + i) * args.n_heads + head;
                const float score = fmaf(args.scale, dot(queries + lane() * pitch, keys + warp * pitch, d),
                                         bias(args, span, head, i, j));
                const float factor = keep(args, span, head, i, j);
                const float d_p = factor * dot(d_os + lane() * pitch, values + warp * pitch, d);
                p = expf(score - lse[at_row]);
                d_score = args.scale * (p * (d_p - inner[at_row]));
                p *= factor;
            }
            float added_k[COLUMNS] = {}, added_v[COLUMNS] = {};
            for (u32 other = 0; other < n_queries; ++other) {
                const float factor = __shfl_sync(ALL_LANES, d_score, other);
                const float kept = __shfl_sync(ALL_LANES, p, other);
#pragma unroll
                for (u32 c = 0; c < COLUMNS; ++c) {
                    if (lane() + WARP * c >= d) continue;
                    const u32 at_shared = other * pitch + lane() + WARP * c;
                    added_k[c] = fmaf(factor, queries[at_shared], added_k[c]);
                    added_v[c] = fmaf(kept, d_os[at_shared], added_v[c]);
                }
            }
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c) {
                out_k[c] += added_k[c];
                out_v[c] += added_v[c];
            }
        }
    }
    if (!active) return;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) {
        if (lane() + WARP * c >= d) continue;
        const size_t at = (span.key_start + j) * kv_size + kv_head * d + lane() + WARP * c;
        store(&d_k[at], out_k[c]);
        store(&d_v[at], out_v[c]);
    }
}

// inner[t, head] = sum_c d_o[t, head, c] o[t, head, c]. Grid: x = tokens * heads / 32, eight lanes each.
extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * WARP)
attention_inner(float* inner, const Item* d_o, const Item* o, u32 n, u32 head_dim) {
    const u32 at = (blockIdx.x * blockDim.x + threadIdx.x) / 8, own = threadIdx.x % 8;
    float sum = 0.0f;
    if (at < n) {
        const Item *d_o_row = d_o + size_t(at) * head_dim, *o_row = o + size_t(at) * head_dim;
        if (head_dim % 8 == 0) {
            for (u32 c = own * 8; c < head_dim; c += 64) {
                float lefts[8], rights[8];
                load_run<8>(lefts, d_o_row + c);
                load_run<8>(rights, o_row + c);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) sum = fmaf(lefts[i], rights[i], sum);
            }
        } else {
            for (u32 c = own; c < head_dim; c += 8) sum = fmaf(widen(d_o_row[c]), widen(o_row[c]), sum);
        }
    }
    for (u32 step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (at < n && own == 0) inner[at] = sum;
}

// One set of entry points for each number of columns a lane.
#define ATTENTION_KERNELS(columns)                                                              \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP, 2)                      \
    attention_##columns(Item* o, float* lse, Attention args) {                                  \
        attend<columns>(o, lse, args);                                                          \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP, 2)                      \
    attention_backward_queries_##columns(Item* d_q, const Item* d_o, const float* lse,          \
                                         const float* inner, Attention args) {                  \
        attend_backward_queries<columns>(d_q, d_o, lse, inner, args);                           \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP, 2)                      \
    attention_backward_keys_##columns(Item* d_k, Item* d_v, const Item* d_o, const float* lse,  \
                                      const float* inner, Attention args) {                     \
        attend_backward_keys<columns>(d_k, d_v, d_o, lse, inner, args);                         \
    }

#if !POLYTAPE_BF16
ATTENTION_KERNELS(1)
ATTENTION_KERNELS(2)
ATTENTION_KERNELS(4)
#endif
ATTENTION_KERNELS(8)

#if POLYTAPE_BF16

// On tensor cores: a block has 64 queries (keys) of a head, a warp 16 of them; the other side passes through
// shared memory 32 rows at a time, the next ones on their way. DEPTH: head_dim rounded up to a power of two from 32 on,
// the rest zeros.
// A probability or its gradient is split in two bf16 halves for its product, so 2^-16 of it is lost.
const u32 TILE_QUERIES = 64, TILE_KEYS = 32;

// Where a chunk of 8 elements of a row of DEPTH lies: exchanged as in gemm.cuh.
template <u32 DEPTH>
__device__ inline u32 head_place(u32 row, u32 chunk) {
    return row * DEPTH + (chunk ^ (DEPTH == 32 ? row / 2 % 4 : row % 8)) * 8;
}

template <u32 DEPTH>
__device__ inline void bring_rows(Bf16* to, const Bf16* from, size_t row_size, u32 n, u32 max, u32 head_dim) {
    const u32 chunks = DEPTH / 8;
#pragma unroll 1
    for (u32 at = threadIdx.x; at < max * chunks; at += blockDim.x) {
        const u32 row = at / chunks, chunk = at % chunks, place = head_place<DEPTH>(row, chunk);
        if (head_dim % 8 == 0) {
            const bool valid = row < n && chunk * 8 < head_dim;
            copy_async(to + place, from + (valid ? row * row_size + chunk * 8 : 0), valid);
        } else {
#pragma unroll 1
            for (u32 i = 0; i < 8; ++i) {
                const bool valid = row < n && chunk * 8 + i < head_dim;
                to[place + i] = valid ? from[row * row_size + chunk * 8 + i] : Bf16{0};
            }
        }
    }
}

__device__ inline void swap(Bf16*& one, Bf16*& other) {
    Bf16* const kept = one;
    one = other;
    other = kept;
}

// A tile of the other side: TILE_KEYS rows of one matrix, then of another.
template <u32 DEPTH>
__device__ inline void bring_tile(Bf16* to, const Item* one, const Item* other, size_t from, size_t row_size, u32 n,
                                  u32 head_dim) {
    bring_rows<DEPTH>(to, one + from, row_size, n, TILE_KEYS, head_dim);
    bring_rows<DEPTH>(to + TILE_KEYS * DEPTH, other + from, row_size, n, TILE_KEYS, head_dim);
    copy_async_commit();
}

// Sums and maxima of a row of a fragment: over the four lanes that have it.
__device__ inline float row_sum(float value) {
    value += __shfl_xor_sync(ALL_LANES, value, 1);
    return value + __shfl_xor_sync(ALL_LANES, value, 2);
}
__device__ inline float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 1));
    return fmaxf(value, __shfl_xor_sync(ALL_LANES, value, 2));
}

// to = lefts rows [own, own + 16) times the 32 rows of rights: scores, a fragment for 8 of them.
template <u32 DEPTH>
__device__ inline void products(float (&to)[4][4], const Bf16* lefts, u32 own, const Bf16* rights) {
    const u32 l = lane();
#pragma unroll 1  // Else loads are hoisted until registers run out.
    for (u32 c = 0; c < DEPTH; c += 16) {
        u32 left[4];
        load_matrices(left, lefts + head_place<DEPTH>(own + l % 16, c / 8 + l / 16));
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            u32 right[4];
            load_matrices(right, rights + head_place<DEPTH>(j * 16 + l % 8 + l / 16 * 8, c / 8 + l / 8 % 2));
            mma(to[2 * j], left, right[0], right[1]);
            mma(to[2 * j + 1], left, right[2], right[3]);
        }
    }
}

// out += factors times the 32 rows of rights, each factor in two halves.
template <u32 DEPTH>
__device__ inline void add_weighted(float (&out)[DEPTH / 8][4], const float (&factors)[4][4], const Bf16* rights) {
    const u32 l = lane();
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        u32 high[4], low[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const float a = factors[2 * j + i / 2][i % 2 * 2], b = factors[2 * j + i / 2][i % 2 * 2 + 1];
            split(a, b, high[i], low[i]);
        }
#pragma unroll
        for (u32 c = 0; c < DEPTH; c += 16) {
            u32 right[4];
            load_matrices_transposed(right, rights + head_place<DEPTH>(j * 16 + l % 16, c / 8 + l / 16));
            mma(out[c / 8], high, right[0], right[1]);
            mma(out[c / 8], low, right[0], right[1]);
            mma(out[c / 8 + 1], high, right[2], right[3]);
            mma(out[c / 8 + 1], low, right[2], right[3]);
        }
    }
}

// Element e of row h (of this thread's two) in a fragment row: its column among the 32.
__device__ inline u32 fragment_col(u32 e) { return e / 2 * 8 + lane() % 4 * 2 + e % 2; }

// The biases of a thread's elements, all asked for before the first is needed. Those of a pair that does not meet are
// others', or 0: nobody uses them.
struct Biases {
    float of[2][8];

    // rows: of this thread. Its columns begin at col0, and are keys, or (KEY_ROWS) queries.
    template <bool KEY_ROWS>
    __device__ inline void load(const Attention& args, const Span& span, u32 head, const u32 (&rows)[2], u32 col0) {
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 col = col0 + fragment_col(e), i = KEY_ROWS ? col : rows[h], j = KEY_ROWS ? rows[h] : col;
                const u32 at = min(args.zero + j + span.n_queries - i - span.n_keys, args.n_distances - 1);
                of[h][e] = args.bias ? args.bias[size_t(head) * args.n_distances + at] : 0.0f;
            }
    }
};

// A sequence's only query, as in decoding: the warps share its keys, 32 at a time in turns, a lane a key; then what they have
// is put together in order. CUDA cores, as there is one row.
template <u32 DEPTH>
__device__ inline void attend_one(Item* o, float* lse, const Attention& args, const Span& span) {
    const u32 WARPS = 2 * TILE_QUERIES / WARP, COLUMNS = DEPTH / WARP;
    const u32 d = args.head_dim, head = blockIdx.y, warp = threadIdx.x / WARP;
    const size_t kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_at = span.key_start * kv_size + size_t(head / (args.n_heads / args.n_kv_heads)) * d;
    const size_t at_q = (size_t(span.query_start) * args.n_heads + head) * d;
    DYNAMIC_SHARED(float, query);
    float *outs = query + DEPTH, *largests = outs + WARPS * DEPTH, *sums = largests + WARPS;
    for (u32 c = threadIdx.x; c < DEPTH; c += blockDim.x) query[c] = c < d ? widen(args.q[at_q + c]) : 0.0f;
    __syncthreads();
    const u32 seen = n_seen(args, span, 0), from = first_seen(args, span, 0);
    float largest = -INFINITY, sum = 0.0f, out[COLUMNS] = {};
    for (u32 j0 = from / WARP * WARP + warp * WARP; j0 < seen; j0 += WARPS * WARP) {
        const u32 j = j0 + lane();
        const bool sees = j >= from && j < seen;
        const Item* key = args.k + kv_at + min(j, seen - 1) * kv_size;
        float score = 0.0f;
        if (d % 8 == 0) {
#pragma unroll
            for (u32 c = 0; c < DEPTH; c += 8) {
                if (c >= d) continue;
                float values[8];
                load_run<8>(values, key + c);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) score = fmaf(query[c + i], values[i], score);
            }
        } else {
            for (u32 c = 0; c < d; ++c) score = fmaf(query[c], widen(key[c]), score);
        }
        score = sees ? fmaf(args.scale, score, bias(args, span, head, 0, j)) : -INFINITY;
        const float larger = fmaxf(largest, warp_max(score)), rescale = expf(largest - larger);
        float probability = sees ? expf(score - larger) : 0.0f;
        sum = fmaf(sum, rescale, warp_sum(probability));
        largest = larger;
        if (args.dropout.tokens && sees) probability *= keep(args, span, head, 0, j);
        float added[COLUMNS] = {};
        const Item* value = args.v + kv_at + j0 * kv_size;
        const u32 n = min(WARP, seen - j0);
#pragma unroll 8
        for (u32 other = 0; other < n; ++other) {
            const float p = __shfl_sync(ALL_LANES, probability, other);
#pragma unroll
            for (u32 c = 0; c < COLUMNS; ++c)
                if (lane() + WARP * c < d)
                    added[c] = fmaf(p, widen(value[other * kv_size + lane() + WARP * c]), added[c]);
        }
#pragma unroll
        for (u32 c = 0; c < COLUMNS; ++c) out[c] = fmaf(out[c], rescale, added[c]);
    }
#pragma unroll
    for (u32 c = 0; c < COLUMNS; ++c) outs[warp * DEPTH + lane() + WARP * c] = out[c];
    if (lane() == 0) largests[warp] = largest, sums[warp] = sum;
    __syncthreads();
    float top = largests[0], total = 0.0f, factors[WARPS];
#pragma unroll
    for (u32 w = 1; w < WARPS; ++w) top = fmaxf(top, largests[w]);
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) {
        factors[w] = sums[w] == 0.0f ? 0.0f : expf(largests[w] - top);  // A warp without keys has no largest.
        total = fmaf(sums[w], factors[w], total);
    }
    for (u32 c = threadIdx.x; c < d; c += blockDim.x) {
        float value = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; ++w) value = fmaf(outs[w * DEPTH + c], factors[w], value);
        store(&o[at_q + c], seen == 0 ? 0.0f : value / total);
    }
    if (threadIdx.x == 0)
        lse[size_t(span.query_start) * args.n_heads + head] = seen == 0 ? -INFINITY : top + logf(total);
}

template <u32 DEPTH>
__device__ inline void attend_tiles(Item* o, float* lse, const Attention& args) {
    const u32 d = args.head_dim, head = blockIdx.y, l = lane(), own = threadIdx.x / WARP * 16;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    if (span.n_queries == 1) return attend_one<DEPTH>(o, lse, args, span);
    const u32 first = args.tiles[blockIdx.x].y, n_queries = min(TILE_QUERIES, span.n_queries - first);
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_col = size_t(head / (args.n_heads / args.n_kv_heads)) * d;
    DYNAMIC_SHARED(Bf16, queries);
    Bf16 *keys = queries + TILE_QUERIES * DEPTH, *next = keys + 2 * TILE_KEYS * DEPTH;  // With values behind each.
    bring_rows<DEPTH>(queries, args.q + (span.query_start + first) * q_size + head * d, q_size, n_queries,
                      TILE_QUERIES, d);
    // Of this thread's two rows: the query, what it sees, its largest score and sum so far.
    u32 row[2], from[2], seen[2];
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        row[h] = first + own + l / 4 + h * 8;
        seen[h] = row[h] < first + n_queries ? n_seen(args, span, row[h]) : 0;
        from[h] = row[h] < first + n_queries ? first_seen(args, span, row[h]) : 0;
    }
    float out[DEPTH / 8][4] = {};
    const u32 most = n_seen(args, span, first + n_queries - 1);
    const u32 start = first_seen(args, span, first) / TILE_KEYS * TILE_KEYS;
    const auto bring = [&](Bf16* to, u32 j0) {
        const size_t from = (span.key_start + j0) * kv_size + kv_col;
        if (j0 < most) bring_tile<DEPTH>(to, args.k, args.v, from, kv_size, min(TILE_KEYS, span.n_keys - j0), d);
    };
    bring(keys, start);
    for (u32 j0 = start; j0 < most; j0 += TILE_KEYS) {
        copy_async_wait<0>();
        __syncthreads();  // This tile is there, and all are done with the one before.
        bring(next, j0 + TILE_KEYS);
        const Bf16* values = keys + TILE_KEYS * DEPTH;
        Biases biases;
        biases.load<false>(args, span, head, row, j0);
        float scores[4][4] = {};
        products<DEPTH>(scores, queries, own, keys);
        float rescale[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            float larger = -INFINITY;
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 j = j0 + fragment_col(e);
                float& score = scores[e / 2][2 * h + e % 2];
                if (j >= from[h] && j < seen[h]) {
                    score = fmaf(args.scale, score, biases.of[h][e]);
                    larger = fmaxf(larger, score);
                }
            }
            larger = fmaxf(largest[h], row_max(larger));
            float added = 0.0f;
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 j = j0 + fragment_col(e);
                float& score = scores[e / 2][2 * h + e % 2];
                const bool sees = j >= from[h] && j < seen[h];
                const float probability = sees ? expf(score - larger) : 0.0f;
                added += probability;
                score = probability;
                if (args.dropout.tokens && sees) score *= keep(args, span, head, row[h], j);
            }
            // Nothing of this tile is seen: nothing to rescale.
            const bool meets = j0 < seen[h] && j0 + TILE_KEYS > from[h];
            rescale[h] = meets ? expf(largest[h] - larger) : 1.0f;
            sum[h] = fmaf(sum[h], rescale[h], row_sum(added));
            if (meets) largest[h] = larger;
        }
#pragma unroll
        for (u32 c = 0; c < DEPTH / 8; ++c)
#pragma unroll
            for (u32 e = 0; e < 4; ++e) out[c][e] *= rescale[e / 2];
        add_weighted<DEPTH>(out, scores, values);
        swap(keys, next);
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] >= first + n_queries) continue;
        const size_t token = span.query_start + row[h];
        if (l % 4 == 0)
            lse[token * args.n_heads + head] = seen[h] == 0 ? -INFINITY : largest[h] + logf(sum[h]);
#pragma unroll
        for (u32 e = 0; e < DEPTH / 4; ++e) {
            const u32 col = fragment_col(e);
            const float value = seen[h] == 0 ? 0.0f : out[e / 2][2 * h + e % 2] / sum[h];
            if (col < d) store(&o[token * q_size + head * d + col], value);
        }
    }
}

template <u32 DEPTH>
__device__ inline void attend_backward_queries_tiles(Item* d_q, const Item* d_o, const float* lse,
                                                     const float* inner, const Attention& args) {
    const u32 d = args.head_dim, head = blockIdx.y, own = threadIdx.x / WARP * 16;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, n_queries = min(TILE_QUERIES, span.n_queries - first);
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_col = size_t(head / (args.n_heads / args.n_kv_heads)) * d;
    const size_t q_at = (span.query_start + first) * q_size + head * d;
    DYNAMIC_SHARED(Bf16, queries);
    Bf16 *d_os = queries + TILE_QUERIES * DEPTH, *keys = d_os + TILE_QUERIES * DEPTH;
    Bf16* next = keys + 2 * TILE_KEYS * DEPTH;  // Keys with values behind them, as the ones before.
    bring_rows<DEPTH>(queries, args.q + q_at, q_size, n_queries, TILE_QUERIES, d);
    bring_rows<DEPTH>(d_os, d_o + q_at, q_size, n_queries, TILE_QUERIES, d);
    u32 row[2], from[2], seen[2];
    float row_lse[2], row_inner[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        row[h] = first + own + lane() / 4 + h * 8;
        const bool there = row[h] < first + n_queries;
        const size_t at = (size_t(span.query_start) + row[h]) * args.n_heads + head;
        seen[h] = there ? n_seen(args, span, row[h]) : 0;
        from[h] = there ? first_seen(args, span, row[h]) : 0;
        row_lse[h] = there ? lse[at] : 0.0f;
        row_inner[h] = there ? inner[at] : 0.0f;
    }
    float out[DEPTH / 8][4] = {};
    const u32 most = n_seen(args, span, first + n_queries - 1);
    const u32 start = first_seen(args, span, first) / TILE_KEYS * TILE_KEYS;
    const auto bring = [&](Bf16* to, u32 j0) {
        const size_t from = (span.key_start + j0) * kv_size + kv_col;
        if (j0 < most) bring_tile<DEPTH>(to, args.k, args.v, from, kv_size, min(TILE_KEYS, span.n_keys - j0), d);
    };
    bring(keys, start);
    for (u32 j0 = start; j0 < most; j0 += TILE_KEYS) {
        copy_async_wait<0>();
        __syncthreads();  // This tile is there, and all are done with the one before.
        bring(next, j0 + TILE_KEYS);
        const Bf16* values = keys + TILE_KEYS * DEPTH;
        Biases biases;
        biases.load<false>(args, span, head, row, j0);
        float scores[4][4] = {}, d_ps[4][4] = {};
        products<DEPTH>(scores, queries, own, keys);
        products<DEPTH>(d_ps, d_os, own, values);
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 j = j0 + fragment_col(e);
                float& score = scores[e / 2][2 * h + e % 2];
                if (j < from[h] || j >= seen[h]) {
                    score = 0.0f;
                    continue;
                }
                float d_p = d_ps[e / 2][2 * h + e % 2];
                if (args.dropout.tokens) d_p *= keep(args, span, head, row[h], j);
                score = fmaf(args.scale, score, biases.of[h][e]);
                score = args.scale * (expf(score - row_lse[h]) * (d_p - row_inner[h]));
            }
        add_weighted<DEPTH>(out, scores, keys);
        swap(keys, next);
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] >= first + n_queries) continue;
        const size_t at = (span.query_start + row[h]) * q_size + head * d;
#pragma unroll
        for (u32 e = 0; e < DEPTH / 4; ++e)
            if (fragment_col(e) < d) store(&d_q[at + fragment_col(e)], out[e / 2][2 * h + e % 2]);
    }
}

// A block has 64 keys of a key head; with blockIdx.z 0 it makes d_v, with 1 d_k: one of them fits in
// registers.
template <u32 DEPTH>
__device__ inline void attend_backward_keys_tiles(Item* d_k, Item* d_v, const Item* d_o, const float* lse,
                                                  const float* inner, const Attention& args) {
    const u32 d = args.head_dim, kv_head = blockIdx.y, own = threadIdx.x / WARP * 16;
    const bool wants_v = blockIdx.z == 0;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, n_keys = min(TILE_QUERIES, span.n_keys - first);
    const u32 group = args.n_heads / args.n_kv_heads;
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_at = (span.key_start + first) * kv_size + kv_head * d;
    DYNAMIC_SHARED(Bf16, keys);
    Bf16 *values = keys + TILE_QUERIES * DEPTH, *queries = values + TILE_QUERIES * DEPTH;
    Bf16* next = queries + 2 * TILE_KEYS * DEPTH;  // Queries with d_os behind them, as the ones before.
    bring_rows<DEPTH>(keys, args.k + kv_at, kv_size, n_keys, TILE_QUERIES, d);
    if (!wants_v) bring_rows<DEPTH>(values, args.v + kv_at, kv_size, n_keys, TILE_QUERIES, d);
    // The first query that sees the block's first key, and the tile that it is in.
    const u32 past = span.n_keys > span.n_queries ? span.n_keys - span.n_queries : 0;
    const u32 ahead = span.n_queries > span.n_keys ? span.n_queries - span.n_keys : 0;
    const u32 seeing = first + ahead > past ? first + ahead - past : 0;
    const u32 from = args.causal ? seeing / TILE_KEYS * TILE_KEYS : 0;
    const u32 row[2] = {first + own + lane() / 4, first + own + lane() / 4 + 8};  // Keys of this thread.
    float out[DEPTH / 8][4] = {};
    const auto bring = [&](Bf16* to, u32 head, u32 i0) {
        if (i0 >= span.n_queries) head += 1, i0 = from;
        if (head >= (kv_head + 1) * group || i0 >= span.n_queries) return;
        const size_t start = (span.query_start + i0) * q_size + head * d;
        bring_tile<DEPTH>(to, args.q, d_o, start, q_size, min(TILE_KEYS, span.n_queries - i0), d);
    };
    bring(queries, kv_head * group, from);
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (u32 i0 = from; i0 < span.n_queries; i0 += TILE_KEYS) {
            copy_async_wait<0>();
            __syncthreads();  // This tile is there, and all are done with the one before.
            bring(next, head, i0 + TILE_KEYS);
            const Bf16* d_os = queries + TILE_KEYS * DEPTH;
            Biases biases;
            biases.load<true>(args, span, head, row, i0);
            float row_lse[8], row_inner[8];
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 i = min(i0 + fragment_col(e), span.n_queries - 1);
                const size_t at_row = (size_t(span.query_start) + i) * args.n_heads + head;
                row_lse[e] = lse[at_row];
                row_inner[e] = wants_v ? 0.0f : inner[at_row];
            }
            float scores[4][4] = {}, d_ps[4][4] = {};
            products<DEPTH>(scores, keys, own, queries);
            if (!wants_v) products<DEPTH>(d_ps, values, own, d_os);
#pragma unroll
            for (u32 e = 0; e < 8; ++e) {
                const u32 i = i0 + fragment_col(e);
                const bool there = i < span.n_queries;
                const u32 seen = there ? n_seen(args, span, i) : 0;
                const u32 seen_from = there ? first_seen(args, span, i) : 0;
#pragma unroll
                for (u32 h = 0; h < 2; ++h) {
                    const u32 j = row[h];
                    float& score = scores[e / 2][2 * h + e % 2];
                    if (j < seen_from || j >= seen) {
                        score = 0.0f;
                        continue;
                    }
                    const float kept = args.dropout.tokens ? keep(args, span, head, i, j) : 1.0f;
                    score = fmaf(args.scale, score, biases.of[h][e]);
                    const float p = expf(score - row_lse[e]), d_p = kept * d_ps[e / 2][2 * h + e % 2];
                    score = wants_v ? kept * p : args.scale * (p * (d_p - row_inner[e]));
                }
            }
            add_weighted<DEPTH>(out, scores, wants_v ? d_os : queries);
            swap(queries, next);
        }
    }
    Item* to = wants_v ? d_v : d_k;
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const u32 row = own + lane() / 4 + h * 8;
        if (row >= n_keys) continue;
#pragma unroll
        for (u32 e = 0; e < DEPTH / 4; ++e)
            if (fragment_col(e) < d)
                store(&to[kv_at + row * kv_size + fragment_col(e)], out[e / 2][2 * h + e % 2]);
    }
}

#define ATTENTION_TILES(columns)                                                                     \
    extern "C" __global__ void __launch_bounds__(2 * TILE_QUERIES, 2)                                \
    attention_tiles_##columns(Item* o, float* lse, Attention args) {                                 \
        attend_tiles<columns * WARP>(o, lse, args);                                                  \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(2 * TILE_QUERIES, 2)                                \
    attention_backward_queries_tiles_##columns(Item* d_q, const Item* d_o, const float* lse,         \
                                               const float* inner, Attention args) {                 \
        attend_backward_queries_tiles<columns * WARP>(d_q, d_o, lse, inner, args);                   \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(2 * TILE_QUERIES, 2)                                \
    attention_backward_keys_tiles_##columns(Item* d_k, Item* d_v, const Item* d_o, const float* lse, \
                                            const float* inner, Attention args) {                    \
        attend_backward_keys_tiles<columns * WARP>(d_k, d_v, d_o, lse, inner, args);                 \
    }

ATTENTION_TILES(1)
ATTENTION_TILES(2)
ATTENTION_TILES(4)

#endif
