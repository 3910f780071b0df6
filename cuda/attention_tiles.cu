// The kernels of attention.cu on tensor cores, for bf16 where a head is whole runs of 8 and at most 128 wide: the same
// arguments, with tiles of 64 queries or keys.
//
// A block has 64 queries (keys) of a head, a warp 16 of them, in fragments as `mma` has them: of a fragment a thread has two
// rows, row() and the eighth after it. The other side passes through shared memory 64 or 32 rows at a time, the next ones on
// their way. DEPTH: head_dim rounded up to a power of two from 32 on, the rest zeros.
//
// A tile that all of a warp's rows see whole has no masks and no clamps: a step is written once and compiled for each kind. Scores are
// kept times log2(e), as the GPU's exponential wants them. Probabilities and gradients of scores are rounded to bf16 once, for
// their products, as on the CPU's tiles.
#include "attention.cuh"

#if POLYTAPE_BF16

const u32 TILE_QUERIES = 64, TILE_THREADS = 2 * TILE_QUERIES;
const u32 FORWARD_KEYS = 64;    // Rows of the other side at a time: keys of the forward,
const u32 BACKWARD_OTHERS = 32;  // keys or queries of the backward, which has more in registers.
const float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Kinds of tiles: all pairs meet; some may not; probabilities are dropped, and some may not.
struct Whole {
    static const bool IS_MASKED = false, IS_DROPPED = false;
};
struct Masked {
    static const bool IS_MASKED = true, IS_DROPPED = false;
};
struct Dropped {
    static const bool IS_MASKED = true, IS_DROPPED = true;
};

// Where a chunk of 8 elements of a row of DEPTH lies: exchanged as in gemm.cuh.
template <u32 DEPTH>
__device__ inline u32 head_place(u32 row, u32 chunk) {
    return row * DEPTH + (chunk ^ (DEPTH == 32 ? row / 2 % 4 : row % 8)) * 8;
}

// Brings ROWS rows of a head into shared memory, zeros from the n-th on. A thread has the same chunk of each of its rows.
template <u32 DEPTH, u32 ROWS>
__device__ inline void bring_rows(Bf16* to, const Item* from, size_t row_size, u32 n, u32 head_dim) {
    const u32 CHUNKS = DEPTH / 8, STEP = TILE_THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "chunks are exchanged alike in all rows of a thread");
    const u32 row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    to += head_place<DEPTH>(row, chunk);
    const Item* at = from + row * row_size + chunk * 8;
    const bool inside = chunk * 8 < head_dim;
#pragma unroll
    for (u32 i = 0; i < ROWS / STEP; ++i, at += STEP * row_size) {
        const bool valid = inside && row + i * STEP < n;
        copy_async(to + i * STEP * DEPTH, valid ? at : from, valid);
    }
}

// A tile of the other side: ROWS rows of one matrix, then of another.
template <u32 DEPTH, u32 ROWS>
__device__ inline void bring_tile(Bf16* to, const Item* one, const Item* other, size_t from, size_t row_size, u32 n,
                                  u32 head_dim) {
    bring_rows<DEPTH, ROWS>(to, one + from, row_size, n, head_dim);
    bring_rows<DEPTH, ROWS>(to + ROWS * DEPTH, other + from, row_size, n, head_dim);
    copy_async_commit();
}

__device__ inline void swap(Bf16*& one, Bf16*& other) {
    Bf16* const kept = one;
    one = other;
    other = kept;
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

// Element e of row h (of a thread's two) in a fragment row: its column.
__device__ inline u32 fragment_col(u32 e) { return e / 2 * 8 + lane() % 4 * 2 + e % 2; }

// 16 rows of shared memory, 16 columns from 16 c on, as a left operand.
template <u32 DEPTH>
__device__ inline void load_left(u32 (&to)[4], const Bf16* rows, u32 own, u32 c) {
    load_matrices(to, rows + head_place<DEPTH>(own + lane() % 16, 2 * c + lane() / 16));
}

// to += left times the transposed rows of rights: 16 columns of depth, from 16 c on, of the first `groups` times 16 rows.
template <u32 DEPTH, u32 FRAGMENTS>
__device__ inline void add_products(float (&to)[FRAGMENTS][4], const u32 (&left)[4], const Bf16* rights, u32 c, u32 groups) {
    const u32 l = lane();
#pragma unroll
    for (u32 j = 0; j < FRAGMENTS / 2; ++j) {
        if (j >= groups) continue;
        u32 right[4];
        load_matrices(right, rights + head_place<DEPTH>(j * 16 + l % 8 + l / 16 * 8, 2 * c + l / 8 % 2));
        mma(to[2 * j], left, right[0], right[1]);
        mma(to[2 * j + 1], left, right[2], right[3]);
    }
}

// out += factors, rounded, times the first `groups` times 16 rows of rights.
template <u32 DEPTH, u32 FRAGMENTS>
__device__ inline void add_weighted(float (&out)[DEPTH / 8][4], const float (&factors)[FRAGMENTS][4], const Bf16* rights,
                                    u32 groups) {
    const u32 l = lane();
#pragma unroll
    for (u32 j = 0; j < FRAGMENTS / 2; ++j) {
        if (j >= groups) continue;
        u32 left[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            left[i] = to_bf16s(factors[2 * j + i / 2][i % 2 * 2], factors[2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (u32 c = 0; c < DEPTH; c += 16) {
            u32 right[4];
            load_matrices_transposed(right, rights + head_place<DEPTH>(j * 16 + l % 16, c / 8 + l / 16));
            mma(out[c / 8], left, right[0], right[1]);
            mma(out[c / 8 + 1], left, right[2], right[3]);
        }
    }
}

// Stores row h of a warp's result times a factor.
template <u32 DEPTH>
__device__ inline void store_row(Item* to, const float (&out)[DEPTH / 8][4], u32 h, float factor, u32 head_dim) {
#pragma unroll
    for (u32 i = 0; i < DEPTH / 8; ++i) {
        const u32 col = fragment_col(2 * i);
        if (col < head_dim) store_4_bytes(to + col, to_bf16s(factor * out[i][2 * h], factor * out[i][2 * h + 1]));
    }
}

// Adds to the scores of a warp's rows and a tile's columns their biases, times log2(e). KEY_ROWS: rows are keys and columns
// queries, else the other way round. Pairs that do not meet get others' biases, or 0.
template <bool IS_MASKED, bool KEY_ROWS, u32 FRAGMENTS>
__device__ inline void add_biases(float (&scores)[FRAGMENTS][4], const Attention& args, const Span& span, u32 head,
                                  const u32 (&rows)[2], u32 col0) {
    if (!args.bias) return;
    const float* biases = args.bias + size_t(head) * args.n_distances;
    // Of the first row and column; an eighth row after it, and columns, are so many from there.
    const u32 base = args.zero + span.n_queries - span.n_keys;
    const u32 col = col0 + lane() % 4 * 2, at = KEY_ROWS ? base + rows[0] - col : base + col - rows[0];
#pragma unroll
    for (u32 h = 0; h < 2; ++h)
#pragma unroll
        for (u32 e = 0; e < 2 * FRAGMENTS; ++e) {
            const int offset = KEY_ROWS ? int(8 * h) - int(e / 2 * 8 + e % 2) : int(e / 2 * 8 + e % 2) - int(8 * h);
            const float bias = IS_MASKED ? biases[min(at + u32(offset), args.n_distances - 1)] : (biases + at)[offset];
            float& score = scores[e / 2][2 * h + e % 2];
            score = fmaf(bias, LOG2_E, score);
        }
}

// Multiplies by dropout's factors the values of a warp's queries, `low` and the 15 after it, and a tile's keys from j0 on. The
// four lanes of a row draw a quarter of its blocks each.
template <u32 FRAGMENTS>
__device__ inline void drop_keys(float (&values)[FRAGMENTS][4], const Attention& args, const Span& span, u32 head,
                                 const u32 (&rows)[2], u32 j0) {
    const u32 group = (head * ((span.n_keys + 7) / 8 * 8) + j0) / 8, t = lane() % 4;
    u32 own = 0;
#pragma unroll
    for (u32 at = 0; at < FRAGMENTS / 2; ++at) {
        const u32 token = span.query_start + min(rows[at % 2], span.n_queries - 1);
        own |= kept_bits(args.dropout, token, group + at / 2 * 4 + t) << 8 * at;
    }
#pragma unroll
    for (u32 j = 0; j < FRAGMENTS; ++j) {
        const u32 bits = __shfl_sync(ALL_LANES, own, lane() / 4 * 4 + j % 4) >> (j / 4 * 16 + 2 * t);
#pragma unroll
        for (u32 e = 0; e < 4; ++e) values[j][e] *= bits >> (e / 2 * 8 + e % 2) & 1 ? args.dropout.scale : 0.0f;
    }
}

// Which of a warp's 16 keys from `low` on a query keeps, bits of lane l for the query l after i0.
__device__ inline u32 kept_of_query(const Attention& args, const Span& span, u32 head, u32 low, u32 i0) {
    const u32 group = (head * ((span.n_keys + 7) / 8 * 8) + low) / 8;
    const u32 token = span.query_start + min(i0 + lane(), span.n_queries - 1);
    return kept_bits(args.dropout, token, group) | kept_bits(args.dropout, token, group + 1) << 8;
}

// A sequence's only query, as in decoding: the warps share its keys, 32 at a time in turns, a lane a key; then what they have
// is put together in order. CUDA cores, as there is one row.
template <u32 DEPTH>
__device__ inline void attend_one(Item* o, float* lse, const Attention& args, const Span& span) {
    const u32 WARPS = TILE_THREADS / WARP, COLUMNS = DEPTH / WARP;
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
#pragma unroll
        for (u32 c = 0; c < DEPTH; c += 8) {
            if (c >= d) continue;
            float values[8];
            load_run<8>(values, key + c);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) score = fmaf(query[c + i], values[i], score);
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
// What a block of queries works on.
struct QueryTile {
    Span span;
    u32 head, first, n_queries;
    size_t q_size, kv_size, q_at, kv_col;
    // A warp's rows are `low` and the 15 after it, of which those to `high` are there, if any.
    u32 low, high;
    bool has_rows;

    __device__ explicit QueryTile(const Attention& args) {
        const u32 d = args.head_dim;
        head = blockIdx.y;
        span = args.spans[args.tiles[blockIdx.x].x];
        first = args.tiles[blockIdx.x].y, n_queries = min(TILE_QUERIES, span.n_queries - first);
        q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
        q_at = (span.query_start + first) * q_size + head * d;
        kv_col = size_t(head / (args.n_heads / args.n_kv_heads)) * d;
        low = first + threadIdx.x / WARP * 16, high = min(low + 15, first + n_queries - 1);
        has_rows = low < first + n_queries;
    }
};

// Keys of a tile that a warp's queries see.
struct Meeting {
    bool any, whole;
    u32 end;  // One past the last key that any of them sees.

    __device__ Meeting(const QueryTile& own, const Attention& args, u32 j0, u32 n) {
        end = own.has_rows ? n_seen(args, own.span, own.high) : 0;
        any = own.has_rows && j0 < end && j0 + n > first_seen(args, own.span, own.low);
        whole = own.low + 15 == own.high && j0 + n <= n_seen(args, own.span, own.low) &&
                j0 >= first_seen(args, own.span, own.high);
    }
};

// Brings the tiles of keys from `start` to `most`, each while the one before is worked on, and calls add(kind, j0, end) with
// `keys` for those that this warp's queries meet.
template <u32 N, class Bring, class Add>
__device__ inline void for_each_meeting(const QueryTile& tile, const Attention& args, u32 start, u32 most, Bf16*& keys,
                                        Bf16*& next, const Bring& bring, const Add& add) {
    for (u32 j0 = start; j0 < most; j0 += N) {
        copy_async_wait<0>();
        __syncthreads();  // This tile is there, and all are done with the one before.
        bring(next, j0 + N);
        const Meeting meeting(tile, args, j0, N);
        if (meeting.any && args.dropout.tokens) add(Dropped(), j0, meeting.end);
        else if (meeting.whole) add(Whole(), j0, meeting.end);
        else if (meeting.any) add(Masked(), j0, meeting.end);
        swap(keys, next);
    }
}

template <u32 DEPTH>
__device__ inline void attend_tiles(Item* o, float* lse, const Attention& args) {
    const u32 N = FORWARD_KEYS, d = args.head_dim, own = threadIdx.x / WARP * 16;
    const QueryTile tile(args);
    const Span& span = tile.span;
    const u32 head = tile.head;
    if (span.n_queries == 1) return attend_one<DEPTH>(o, lse, args, span);
    DYNAMIC_SHARED(Bf16, queries);
    Bf16 *keys = queries + TILE_QUERIES * DEPTH, *next = keys + 2 * N * DEPTH;  // With values behind each.
    // Of this thread's two rows: the query, what it sees, its largest score and its part of the sum so far.
    u32 row[2], from[2], seen[2];
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        row[h] = tile.low + lane() / 4 + h * 8;
        const bool there = row[h] < tile.first + tile.n_queries;
        seen[h] = there ? n_seen(args, span, row[h]) : 0;
        from[h] = there ? first_seen(args, span, row[h]) : 0;
    }
    const u32 most = n_seen(args, span, tile.first + tile.n_queries - 1);
    const u32 start = first_seen(args, span, tile.first) / N * N;
    const auto bring = [&](Bf16* to, u32 j0) {
        const size_t from = (span.key_start + j0) * tile.kv_size + tile.kv_col;
        if (j0 < most) bring_tile<DEPTH, N>(to, args.k, args.v, from, tile.kv_size, span.n_keys - j0, d);
    };
    bring_rows<DEPTH, TILE_QUERIES>(queries, args.q + tile.q_at, tile.q_size, tile.n_queries, d);
    bring(keys, start);
    copy_async_wait<0>();
    __syncthreads();
    u32 lefts[DEPTH / 16][4];
#pragma unroll
    for (u32 c = 0; c < DEPTH / 16; ++c) load_left<DEPTH>(lefts[c], queries, own, c);
    float out[DEPTH / 8][4] = {};
    const float scale = args.scale * LOG2_E;
    const auto add = [&](auto kind, u32 j0, u32 end) {
        constexpr bool IS_MASKED = decltype(kind)::IS_MASKED, IS_DROPPED = decltype(kind)::IS_DROPPED;
        const u32 groups = IS_MASKED ? min(N / 16, (end - j0 + 15) / 16) : N / 16;
        float scores[N / 8][4] = {};
#pragma unroll
        for (u32 c = 0; c < DEPTH / 16; ++c) add_products<DEPTH>(scores, lefts[c], keys, c, groups);
#pragma unroll
        for (u32 i = 0; i < N / 2; ++i) scores[i / 4][i % 4] *= scale;
        add_biases<IS_MASKED, false>(scores, args, span, head, row, j0);
        float rescale[2];
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            float larger = largest[h];
#pragma unroll
            for (u32 e = 0; e < N / 4; ++e) {
                float& score = scores[e / 2][2 * h + e % 2];
                const u32 j = j0 + fragment_col(e);
                if (IS_MASKED && (j < from[h] || j >= seen[h])) score = -INFINITY;
                larger = fmaxf(larger, score);
            }
            larger = row_max(larger);
            const float base = larger == -INFINITY ? 0.0f : larger;  // Nothing seen so far: 0 less 0, not NaN.
            float added = 0.0f;
#pragma unroll
            for (u32 e = 0; e < N / 4; ++e) {
                float& score = scores[e / 2][2 * h + e % 2];
                score = exp2_fast(score - base);
                added += score;
            }
            rescale[h] = exp2_fast(largest[h] - base);
            sum[h] = fmaf(sum[h], rescale[h], added);
            largest[h] = larger;
        }
#pragma unroll
        for (u32 i = 0; i < DEPTH / 2; ++i) out[i / 4][i % 4] *= rescale[i % 4 / 2];
        if (IS_DROPPED) drop_keys(scores, args, span, head, row, j0);
        add_weighted<DEPTH>(out, scores, keys + N * DEPTH, groups);
    };
    for_each_meeting<N>(tile, args, start, most, keys, next, bring, add);
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        const float total = row_sum(sum[h]);
        if (row[h] >= tile.first + tile.n_queries) continue;
        const size_t token = span.query_start + row[h];
        if (lane() % 4 == 0)
            lse[token * args.n_heads + head] = seen[h] == 0 ? -INFINITY : (largest[h] + log2f(total)) * LN_2;
        store_row<DEPTH>(o + token * tile.q_size + head * d, out, h, seen[h] == 0 ? 0.0f : 1.0f / total, d);
    }
}

template <u32 DEPTH>
__device__ inline void attend_backward_queries_tiles(Item* d_q, const Item* d_o, const float* lse,
                                                     const float* inner, const Attention& args) {
    const u32 N = BACKWARD_OTHERS, d = args.head_dim, own = threadIdx.x / WARP * 16;
    const QueryTile tile(args);
    const Span& span = tile.span;
    const u32 head = tile.head;
    DYNAMIC_SHARED(Bf16, queries);
    Bf16 *d_os = queries + TILE_QUERIES * DEPTH, *keys = d_os + TILE_QUERIES * DEPTH;
    Bf16* next = keys + 2 * N * DEPTH;  // Keys with values behind them, as the ones before.
    u32 row[2], from[2], seen[2];
    float row_lse[2], row_inner[2];
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        row[h] = tile.low + lane() / 4 + h * 8;
        const bool there = row[h] < tile.first + tile.n_queries;
        const size_t at = (size_t(span.query_start) + row[h]) * args.n_heads + head;
        seen[h] = there ? n_seen(args, span, row[h]) : 0;
        from[h] = there ? first_seen(args, span, row[h]) : 0;
        row_lse[h] = there ? lse[at] * LOG2_E : 0.0f;
        row_inner[h] = there ? inner[at] : 0.0f;
    }
    const u32 most = n_seen(args, span, tile.first + tile.n_queries - 1);
    const u32 start = first_seen(args, span, tile.first) / N * N;
    const auto bring = [&](Bf16* to, u32 j0) {
        const size_t from = (span.key_start + j0) * tile.kv_size + tile.kv_col;
        if (j0 < most) bring_tile<DEPTH, N>(to, args.k, args.v, from, tile.kv_size, span.n_keys - j0, d);
    };
    bring_rows<DEPTH, TILE_QUERIES>(queries, args.q + tile.q_at, tile.q_size, tile.n_queries, d);
    bring_rows<DEPTH, TILE_QUERIES>(d_os, d_o + tile.q_at, tile.q_size, tile.n_queries, d);
    bring(keys, start);
    copy_async_wait<0>();
    __syncthreads();
    u32 lefts[DEPTH / 16][4], d_lefts[DEPTH / 16][4];
#pragma unroll
    for (u32 c = 0; c < DEPTH / 16; ++c) {
        load_left<DEPTH>(lefts[c], queries, own, c);
        load_left<DEPTH>(d_lefts[c], d_os, own, c);
    }
    float out[DEPTH / 8][4] = {};
    const float scale = args.scale * LOG2_E;
    const auto add = [&](auto kind, u32 j0, u32 end) {
        constexpr bool IS_MASKED = decltype(kind)::IS_MASKED, IS_DROPPED = decltype(kind)::IS_DROPPED;
        const u32 groups = IS_MASKED ? min(N / 16, (end - j0 + 15) / 16) : N / 16;
        float scores[N / 8][4] = {}, d_ps[N / 8][4] = {};
#pragma unroll
        for (u32 c = 0; c < DEPTH / 16; ++c) {
            add_products<DEPTH>(scores, lefts[c], keys, c, groups);
            add_products<DEPTH>(d_ps, d_lefts[c], keys + N * DEPTH, c, groups);
        }
#pragma unroll
        for (u32 i = 0; i < N / 2; ++i) scores[i / 4][i % 4] = fmaf(scores[i / 4][i % 4], scale, -row_lse[i % 4 / 2]);
        add_biases<IS_MASKED, false>(scores, args, span, head, row, j0);
        if (IS_DROPPED) drop_keys(d_ps, args, span, head, row, j0);
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 e = 0; e < N / 4; ++e) {
                const u32 j = j0 + fragment_col(e);
                float& score = scores[e / 2][2 * h + e % 2];
                const bool sees = !IS_MASKED || (j >= from[h] && j < seen[h]);
                score = sees ? exp2_fast(score) * (d_ps[e / 2][2 * h + e % 2] - row_inner[h]) : 0.0f;
            }
        add_weighted<DEPTH>(out, scores, keys, groups);
    };
    for_each_meeting<N>(tile, args, start, most, keys, next, bring, add);
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] >= tile.first + tile.n_queries) continue;
        const size_t at = (span.query_start + row[h]) * tile.q_size + head * d;
        store_row<DEPTH>(d_q + at, out, h, args.scale, d);
    }
}

// A block has 64 keys of a key head.
template <u32 DEPTH>
__device__ inline void attend_backward_keys_tiles(Item* d_k, Item* d_v, const Item* d_o, const float* lse,
                                                  const float* inner, const Attention& args) {
    const u32 N = BACKWARD_OTHERS, d = args.head_dim, kv_head = blockIdx.y, own = threadIdx.x / WARP * 16;
    const Span span = args.spans[args.tiles[blockIdx.x].x];
    const u32 first = args.tiles[blockIdx.x].y, n_keys = min(TILE_QUERIES, span.n_keys - first);
    const u32 group = args.n_heads / args.n_kv_heads;
    const size_t q_size = size_t(args.n_heads) * d, kv_size = size_t(args.n_kv_heads) * d;
    const size_t kv_at = (span.key_start + first) * kv_size + kv_head * d;
    DYNAMIC_SHARED(Bf16, keys);
    Bf16 *values = keys + TILE_QUERIES * DEPTH, *queries = values + TILE_QUERIES * DEPTH;
    // Queries with d_os behind them, then of each its lse and of each its inner, in f32; as the ones before.
    Bf16* next = queries + 2 * N * DEPTH + 4 * N;
    const auto stats = [](Bf16* tile) { return reinterpret_cast<float*>(tile + 2 * N * DEPTH); };
    // The first query that sees the block's first key, and the tile that it is in.
    const u32 past = span.n_keys > span.n_queries ? span.n_keys - span.n_queries : 0;
    const u32 ahead = span.n_queries > span.n_keys ? span.n_queries - span.n_keys : 0;
    const u32 seeing = first + ahead > past ? first + ahead - past : 0;
    const u32 from = args.causal ? seeing / N * N : 0;
    const u32 to = n_seeing(args, span, first + n_keys - 1);
    // Keys of this thread; of its warp, those from `low` to `high` are there, if any.
    const u32 row[2] = {first + own + lane() / 4, first + own + lane() / 4 + 8};
    const u32 low = first + own, high = min(low + 15, first + n_keys - 1);
    const bool has_rows = low < first + n_keys;
    float out_k[DEPTH / 8][4] = {}, out_v[DEPTH / 8][4] = {};
    // Moves on where a head has no more queries, and says whether there is another tile.
    const auto is_there = [&](u32& head, u32& i0) {
        if (i0 >= to) head += 1, i0 = from;
        return head < (kv_head + 1) * group && i0 < to;
    };
    const auto bring = [&](Bf16* tile, u32 head, u32 i0) {
        if (!is_there(head, i0)) return;
        const size_t start = (span.query_start + i0) * q_size + head * d;
        bring_rows<DEPTH, N>(tile, args.q + start, q_size, span.n_queries - i0, d);
        bring_rows<DEPTH, N>(tile + N * DEPTH, d_o + start, q_size, span.n_queries - i0, d);
        if (threadIdx.x < 2 * N) {
            const u32 i = i0 + threadIdx.x % N;
            const size_t at = (size_t(span.query_start) + min(i, span.n_queries - 1)) * args.n_heads + head;
            copy_word_async(stats(tile) + threadIdx.x, (threadIdx.x < N ? lse : inner) + at, i < span.n_queries);
        }
        copy_async_commit();
    };
    const auto add = [&](auto kind, u32 head, u32 i0) {
        constexpr bool IS_MASKED = decltype(kind)::IS_MASKED, IS_DROPPED = decltype(kind)::IS_DROPPED;
        const u32 groups = N / 16;
        const Bf16* d_os = queries + N * DEPTH;
        float scores[N / 8][4] = {}, d_ps[N / 8][4] = {};
#pragma unroll 2  // Else loads are hoisted until registers run out.
        for (u32 c = 0; c < DEPTH / 16; ++c) {
            u32 left[4], d_left[4];
            load_left<DEPTH>(left, keys, own, c);
            load_left<DEPTH>(d_left, values, own, c);
            add_products<DEPTH>(scores, left, queries, c, groups);
            add_products<DEPTH>(d_ps, d_left, d_os, c, groups);
        }
#pragma unroll
        for (u32 i = 0; i < N / 2; ++i) scores[i / 4][i % 4] *= args.scale * LOG2_E;
        add_biases<IS_MASKED, true>(scores, args, span, head, row, i0);
        const u32 kept_own = IS_DROPPED ? kept_of_query(args, span, head, low, i0) : 0;
        // A query i sees key j where j - i is in (nearest, furthest].
        const int end = int(span.n_keys) - int(span.n_queries), always = 1 << 30;
        const int furthest = args.causal ? end : always, nearest = args.window != 0 ? end - int(args.window) : -always;
#pragma unroll
        for (u32 e = 0; e < N / 4; ++e) {
            const u32 col = fragment_col(e), i = i0 + col;
            const float row_lse = stats(queries)[col] * LOG2_E, row_inner = stats(queries)[N + col];
            const u32 kept_keys = IS_DROPPED ? __shfl_sync(ALL_LANES, kept_own, col) >> lane() / 4 : 0;
#pragma unroll
            for (u32 h = 0; h < 2; ++h) {
                float &score = scores[e / 2][2 * h + e % 2], &d_p = d_ps[e / 2][2 * h + e % 2];
                const int ahead = int(row[h]) - int(i);
                const bool sees = !IS_MASKED || (i < span.n_queries && ahead <= furthest && ahead > nearest);
                const float p = sees ? exp2_fast(score - row_lse) : 0.0f;
                const float kept = !IS_DROPPED ? 1.0f : kept_keys >> 8 * h & 1 ? args.dropout.scale : 0.0f;
                d_p = sees ? p * (kept * d_p - row_inner) : 0.0f;
                score = kept * p;
            }
        }
        add_weighted<DEPTH>(out_v, scores, d_os, groups);
        add_weighted<DEPTH>(out_k, d_ps, queries, groups);
    };
    bring_rows<DEPTH, TILE_QUERIES>(keys, args.k + kv_at, kv_size, n_keys, d);
    bring_rows<DEPTH, TILE_QUERIES>(values, args.v + kv_at, kv_size, n_keys, d);
    bring(queries, kv_head * group, from);
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (u32 i0 = from; i0 < to; i0 += N) {
            copy_async_wait<0>();
            __syncthreads();  // This tile is there, and all are done with the one before.
            bring(next, head, i0 + N);
            const u32 last = min(i0 + N, span.n_queries) - 1;
            const bool meets = has_rows && low < n_seen(args, span, last) && high >= first_seen(args, span, i0);
            const bool whole = low + 15 == high && i0 + N == last + 1 && high < n_seen(args, span, i0) &&
                               low >= first_seen(args, span, last);
            if (meets && args.dropout.tokens) add(Dropped(), head, i0);
            else if (meets && whole) add(Whole(), head, i0);
            else if (meets) add(Masked(), head, i0);
            swap(queries, next);
        }
    }
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
        if (row[h] >= first + n_keys) continue;
        const size_t at = (span.key_start + row[h]) * kv_size + kv_head * d;
        store_row<DEPTH>(d_k + at, out_k, h, args.scale, d);
        store_row<DEPTH>(d_v + at, out_v, h, 1.0f, d);
    }
}

// `attention_one`: where no sequence has more than one query.
#define ATTENTION_TILES(columns)                                                                     \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 6)                                    \
    attention_one_##columns(Item* o, float* lse, const __grid_constant__ Attention args) {           \
        after_previous();                                                                            \
        attend_one<columns * WARP>(o, lse, args, args.spans[args.tiles[blockIdx.x].x]);              \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)                                    \
    attention_tiles_##columns(Item* o, float* lse, const __grid_constant__ Attention args) {         \
        after_previous();                                                                            \
        attend_tiles<columns * WARP>(o, lse, args);                                                  \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)                                    \
    attention_backward_queries_tiles_##columns(Item* d_q, const Item* d_o, const float* lse,         \
                                               const float* inner,                                   \
                                               const __grid_constant__ Attention args) {             \
        after_previous();                                                                            \
        attend_backward_queries_tiles<columns * WARP>(d_q, d_o, lse, inner, args);                   \
    }                                                                                                \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, 2)                                    \
    attention_backward_keys_tiles_##columns(Item* d_k, Item* d_v, const Item* d_o, const float* lse, \
                                            const float* inner,                                      \
                                            const __grid_constant__ Attention args) {                \
        after_previous();                                                                            \
        attend_backward_keys_tiles<columns * WARP>(d_k, d_v, d_o, lse, inner, args);                 \
    }

ATTENTION_TILES(1)
ATTENTION_TILES(2)
ATTENTION_TILES(4)

#endif
