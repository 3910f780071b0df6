// The draw of the next token: a column of each row, by integer weights, so that no sum has an order.
//   weight[v] = 2^40 e^(scale (logits[v] - largest)), rounded down; 0 of a forbidden column and of NaN
//   columns[t]: the first column at which the weights that the rules leave, added up, exceed uniforms[t] of their sum
// The rules leave the top_k largest logits and equals of the last one; of these the largest, equals by column, until
// they have top_p of the weight; of these what weighs at least min_weight.
// Grid: x = rows, SAMPLE_THREADS along the columns, which are read some thirty times, from the L2 cache.
#include "common.cuh"

const u32 SAMPLE_THREADS = 512;
const u32 SAMPLE_WARPS = SAMPLE_THREADS / WARP;
// Thresholds that a pass tries at once.
const u32 TRIES = 8;
const float ONE = 1099511627776.0f;
// Below it a weight is 0: e^-28 2^40 < 1.
const float NOTHING = -28.0f;

// A row of logits, the columns that may not be drawn as NaN.
struct Row {
    const float* logits;
    const u32* forbidden;
    u32 n_forbidden;
    u32 n_columns;
    float scale;
    float largest;

    __device__ float at(u32 col) const {
        for (u32 i = 0; i < n_forbidden; ++i)
            if (forbidden[i] == col) return __uint_as_float(0x7fffffff);
        return logits[col];
    }
    // Of a NaN, or where there is no finite largest one, 0.
    __device__ u64 weight(float logit) const {
        const float x = (logit - largest) * scale;
        return x > NOTHING ? u64(expf(x) * ONE) : 0;
    }
};

// In the order of the values, -0 as 0; not of NaN.
__device__ inline u32 key_of(float value) {
    const u32 bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// The sum over all columns of `amount(col, value, key)`, which is 0 of a NaN. All threads get it.
template <class Amount>
__device__ inline u64 sum_of(const Row& row, Amount amount, u64* scratch) {
    u64 sum = 0;
    for (u32 col = threadIdx.x; col < row.n_columns; col += SAMPLE_THREADS) {
        const float value = row.at(col);
        if (value == value) sum += amount(col, value, key_of(value));
    }
    return block_sum(sum, scratch);
}

// Eight sums over a warp at once: lane 4 i gets the i-th. At each step a lane gives half of what it has away.
__device__ inline u64 warp_sums(u64 (&sums)[TRIES]) {
#pragma unroll
    for (u32 half = TRIES / 2; half > 0; half /= 2) {
        const u32 step = 4 * half;
        const bool upper = lane() & step;
#pragma unroll
        for (u32 i = 0; i < half; ++i) {
            const u64 given = upper ? sums[i] : sums[i + half];
            const u64 own = upper ? sums[i + half] : sums[i];
            sums[i] = own + __shfl_xor_sync(ALL_LANES, given, step);
        }
    }
    u64 sum = sums[0];
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 1);
}

// The largest key at which the amounts of it and all larger ones reach `wanted`, which is above 0; 0 if all together do
// not. Three bits a pass, from above: the last of eight thresholds that does. (The first pass has two bits: to its
// other thresholds no key comes up.)
template <class Amount>
__device__ inline u32 select(const Row& row, u64 wanted, Amount amount, u64* scratch) {
    u32 chosen = 0;
    for (u32 shift = 30;; shift -= 3) {
        u64 sums[TRIES] = {}; // The first, of the threshold that is known to do, is left out.
        for (u32 col = threadIdx.x; col < row.n_columns; col += SAMPLE_THREADS) {
            const float value = row.at(col);
            const u32 key = key_of(value);
            if (value != value || key < chosen) continue;
            const u32 digit = (key - chosen) >> shift;
            if (digit == 0) continue;
            const u64 some = amount(col, value, key);
#pragma unroll
            for (u32 i = 1; i < TRIES; ++i) sums[i] += digit >= i ? some : 0;
        }
        const u64 of_warp = warp_sums(sums);
        if (lane() % 4 == 0) scratch[lane() / 4 * SAMPLE_WARPS + threadIdx.x / WARP] = of_warp;
        __syncthreads();
        u64 total = 0;
        if (threadIdx.x < TRIES)
            for (u32 warp = 0; warp < SAMPLE_WARPS; ++warp) total += scratch[threadIdx.x * SAMPLE_WARPS + warp];
        __syncthreads();
        if (threadIdx.x < TRIES) scratch[threadIdx.x] = total;
        __syncthreads();
        u32 digit = 0;
        for (u32 i = 1; i < TRIES; ++i)
            if (scratch[i] >= wanted) digit = i;
        __syncthreads();
        chosen += digit << shift;
        if (shift == 0) return chosen;
    }
}

// The first column at which the amounts of it and those before it exceed `target`, which is below their sum: each
// warp adds up a part, and the part with that column is divided anew.
template <class Amount>
__device__ inline u32 find(const Row& row, u64 target, Amount amount, u64* scratch) {
    u32 first = 0, n = row.n_columns;
    while (n > 1) {
        const u32 part = (n + SAMPLE_WARPS - 1) / SAMPLE_WARPS;
        const u32 begin = threadIdx.x / WARP * part;
        u64 sum = 0;
        for (u32 i = begin + lane(); i < min(begin + part, n); i += WARP) {
            const float value = row.at(first + i);
            if (value == value) sum += amount(first + i, value, key_of(value));
        }
        sum = warp_sum(sum);
        if (lane() == 0) scratch[threadIdx.x / WARP] = sum;
        __syncthreads();
        u32 chosen = 0;
        for (; chosen + 1 < SAMPLE_WARPS && scratch[chosen] <= target; ++chosen) target -= scratch[chosen];
        __syncthreads();
        first += chosen * part;
        n = min(part, n - chosen * part);
    }
    return first;
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 1)
sample(u32* columns, const float* logits, const double* uniforms, const u32* forbidden, const u32* n_forbidden,
       u32 n_columns, float scale, u32 top_k, double top_p, u64 min_weight) {
    after_previous();
    SHARED(u64, scratch, TRIES * SAMPLE_WARPS);
    Row row = {logits + size_t(blockIdx.x) * n_columns, forbidden, n_forbidden[blockIdx.x], n_columns, scale, 0.0f};
    float largest = -INFINITY;
    for (u32 col = threadIdx.x; col < n_columns; col += SAMPLE_THREADS) largest = fmaxf(largest, row.at(col));
    row.largest = block_max(largest, reinterpret_cast<float*>(scratch));

    u32 least = 0; // The least key that is left,
    u32 last_equal = n_columns; // and of equals of it the last column.
    if (top_k > 0) least = select(row, top_k, [](u32, float, u32) { return u64(1); }, scratch);
    if (top_p < 1.0) {
        const auto left = [&](u32, float value, u32 key) { return key >= least ? row.weight(value) : u64(0); };
        const u64 total = sum_of(row, left, scratch);
        if (total > 0) {
            const double share = top_p * double(total);
            u64 wanted = u64(share);
            wanted = min(max(wanted + (double(wanted) < share ? 1 : 0), u64(1)), total);
            const u32 last = select(row, wanted, left, scratch);
            const auto larger = [&](u32, float value, u32 key) { return key > last ? row.weight(value) : u64(0); };
            const u64 before = sum_of(row, larger, scratch);
            const auto equal = [&](u32, float value, u32 key) { return key == last ? row.weight(value) : u64(0); };
            last_equal = find(row, wanted - before - 1, equal, scratch);
            least = last;
        }
    }
    const auto kept = [&](u32 col, float value, u32 key) {
        const u64 weight = row.weight(value);
        return weight >= min_weight && (key > least || (key == least && col <= last_equal)) ? weight : 0;
    };
    const u64 total = sum_of(row, kept, scratch);
    u32 drawn = 0;
    if (total > 0) {
        const u64 target = u64(uniforms[blockIdx.x] * double(total));
        drawn = find(row, min(target, total - 1), kept, scratch);
    }
    if (threadIdx.x == 0) columns[blockIdx.x] = drawn;
}
