// Attention without a score matrix in memory, and its backward from recomputed probabilities, on CUDA cores:
// for f32, and for heads that attention_tiles.cu does not take.
// tiles [n] = (sequence, first query or key of 8). Grid: x = tiles, y = heads (of d_k, d_v: of keys).
// Block: 8 warps, a warp a query (a key in the last kernel); the other side passes through shared
// memory 32 rows at a time, a lane scoring one of them and then owning columns lane + 32 c of the
// result. COLUMNS = ceil(head_dim / 32), to a power of two. Sums: dots in order, a tree over 32 scores, tiles in order.
#include "attention.cuh"

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
    const u32 to = n_seeing(args, span, first + n_keys - 1);
    float out_k[COLUMNS] = {}, out_v[COLUMNS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (u32 i0 = from; i0 < to; i0 += WARP) {
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
    after_previous();
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
        after_previous();                                                                       \
        attend<columns>(o, lse, args);                                                          \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP, 2)                      \
    attention_backward_queries_##columns(Item* d_q, const Item* d_o, const float* lse,          \
                                         const float* inner, Attention args) {                  \
        after_previous();                                                                       \
        attend_backward_queries<columns>(d_q, d_o, lse, inner, args);                           \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS* WARP, 2)                      \
    attention_backward_keys_##columns(Item* d_k, Item* d_v, const Item* d_o, const float* lse,  \
                                      const float* inner, Attention args) {                     \
        after_previous();                                                                       \
        attend_backward_keys<columns>(d_k, d_v, d_o, lse, inner, args);                         \
    }

ATTENTION_KERNELS(1)
ATTENTION_KERNELS(2)
ATTENTION_KERNELS(4)
ATTENTION_KERNELS(8)
