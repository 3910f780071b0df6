// Mixing and its backward, for every routing row of one adapted linear.
//   mixed_a[row, i, r] = sum_s w[row, q, s] a[q, s, i, r]        [rows * d_in, rank], overwritten
//   mixed_b[row, r, o] = sum_s w[row, q, s] b[q, s, r, o]        [rows * rank, d_out], overwritten
//   d_a[q, s] += sum_row w[row, q, s] d_mixed_a[row, q], likewise d_b
//   d_w[row, q, s] += <d_mixed_a[row, q], a[q, s]> + <d_mixed_b[row, q], b[q, s]>
// q is the split of feature i or o. Grids: `mix` x = elements of a pair / 1024, y = rows, z = siblings;
// `unmix` x = rows * splits * skills, a block a sum of d_w, then elements of the bank / 1024, y = siblings; x is
// that of the largest. A thread has runs of 4 elements where splits are whole runs, else single ones. Rows and skills are
// added in order.
#include "siblings.cuh"

// Whether a bank's matrices, and the pair's, can be walked by runs of 4.
__device__ inline bool has_runs(const Bank& bank) {
    const bool aligned = ((reinterpret_cast<size_t>(bank.a) | reinterpret_cast<size_t>(bank.b)) & 15) == 0;
    return aligned && bank.d_in / bank.n_splits * bank.rank % 4 == 0 && bank.d_out / bank.n_splits % 4 == 0;
}

template <u32 RUN>
__device__ inline void add_scaled(float (&sums)[RUN], float factor, const float* from) {
    float values[RUN];
    load_run<RUN>(values, from);
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) sums[i] = fmaf(factor, values[i], sums[i]);
}

// The run of a mixed pair that starts with element `at`.
template <u32 RUN>
__device__ inline void mix_run(const MixedPair& pair, u32 at, u32 row) {
    const Bank& bank = pair.bank;
    const u32 a_len = bank.d_in * bank.rank, b_len = bank.rank * bank.d_out;
    float sums[RUN] = {};
    if (at < a_len) {
        const u32 width = bank.d_in / bank.n_splits * bank.rank;  // Of one split and skill.
        const u32 split = at / width;
        const float* w = mixing(bank, row, split);
        const float* a = bank.a + size_t(split) * bank.n_skills * width + at % width;
        for (u32 s = 0; s < bank.n_skills; ++s) add_scaled<RUN>(sums, w[s], a + size_t(s) * width);
        store_run<RUN>(pair.a + size_t(row) * a_len + at, sums);
    } else {
        at -= a_len;
        const u32 width = bank.d_out / bank.n_splits, r = at / bank.d_out, o = at % bank.d_out;
        const float* w = mixing(bank, row, o / width);
        const float* b = bank.b + (size_t(o / width) * bank.n_skills * bank.rank + r) * width + o % width;
        for (u32 s = 0; s < bank.n_skills; ++s) add_scaled<RUN>(sums, w[s], b + size_t(s) * bank.rank * width);
        store_run<RUN>(pair.b + size_t(row) * b_len + at, sums);
    }
}

extern "C" __global__ void __launch_bounds__(256) mix(const __grid_constant__ MixedPairs pairs) {
    after_previous();
    const MixedPair& pair = pairs.of[blockIdx.z];
    const u32 len = (pair.bank.d_in + pair.bank.d_out) * pair.bank.rank, row = blockIdx.y;
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, n_threads = gridDim.x * blockDim.x;
    if (has_runs(pair.bank))
        for (u32 at = 4 * thread; at < len; at += 4 * n_threads) mix_run<4>(pair, at, row);
    else
        for (u32 at = thread; at < len; at += n_threads) mix_run<1>(pair, at, row);
}

// The run of the bank's gradients that starts with element `at`.
template <u32 RUN>
__device__ inline void unmix_run(const Unmixed& one, u32 at, u32 n_rows) {
    const Bank& bank = one.bank;
    const u32 a_len = bank.n_skills * bank.d_in * bank.rank;
    float sums[RUN] = {};
    u32 split, s;
    size_t row_size;
    const float* d_mixed;
    float* d_bank;
    if (at < a_len) {
        const u32 width = bank.d_in / bank.n_splits * bank.rank;  // Of one split and skill.
        split = at / width / bank.n_skills, s = at / width % bank.n_skills;
        d_mixed = one.d_mixed_a + size_t(split) * width + at % width;
        row_size = size_t(bank.d_in) * bank.rank;
        d_bank = one.d_a + at;
    } else {
        at -= a_len;
        const u32 width = bank.d_out / bank.n_splits, o = at % width, r = at / width % bank.rank;
        s = at / width / bank.rank % bank.n_skills, split = at / width / bank.rank / bank.n_skills;
        d_mixed = one.d_mixed_b + size_t(r) * bank.d_out + split * width + o;
        row_size = size_t(bank.rank) * bank.d_out;
        d_bank = one.d_b + at;
    }
#pragma unroll 4
    for (u32 row = 0; row < n_rows; ++row)
        add_scaled<RUN>(sums, mixing(bank, row, split)[s], d_mixed + row * row_size);
    float values[RUN];
    load_run<RUN>(values, d_bank);
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) values[i] += sums[i];
    store_run<RUN>(d_bank, values);
}

template <u32 RUN>
__device__ inline float dot_run(float sum, const float* a, const float* b) {
    float lefts[RUN], rights[RUN];
    load_run<RUN>(lefts, a);
    load_run<RUN>(rights, b);
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) sum = fmaf(lefts[i], rights[i], sum);
    return sum;
}

// The sum of one routing row, split and skill, by the whole block.
template <u32 RUN>
__device__ inline void unmix_weight(const Unmixed& one, u32 row, u32 col) {
    SHARED(float, scratch, 256 / WARP);
    const Bank& bank = one.bank;
    const u32 split = col / bank.n_skills, s = col % bank.n_skills;
    const u32 a_width = bank.d_in / bank.n_splits * bank.rank, b_width = bank.d_out / bank.n_splits;
    const float* a = bank.a + (size_t(split) * bank.n_skills + s) * a_width;
    const float* d_a = one.d_mixed_a + size_t(row) * bank.d_in * bank.rank + size_t(split) * a_width;
    const float* b = bank.b + (size_t(split) * bank.n_skills + s) * bank.rank * b_width;
    const float* d_b = one.d_mixed_b + size_t(row) * bank.rank * bank.d_out + split * b_width;
    float sum = 0.0f;
#pragma unroll 4
    for (u32 at = threadIdx.x * RUN; at < a_width; at += blockDim.x * RUN) sum = dot_run<RUN>(sum, d_a + at, a + at);
#pragma unroll 4
    for (u32 at = threadIdx.x * RUN; at < bank.rank * b_width; at += blockDim.x * RUN)
        sum = dot_run<RUN>(sum, d_b + size_t(at / b_width) * bank.d_out + at % b_width, b + at);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) one.d_weights[size_t(row) * bank.n_splits * bank.n_skills + col] += sum;
}

extern "C" __global__ void __launch_bounds__(256) unmix(const __grid_constant__ UnmixedAll all, u32 n_rows) {
    after_previous();
    const Unmixed& one = all.of[blockIdx.y];
    const u32 width = one.bank.n_splits * one.bank.n_skills, n_sums = n_rows * width;
    const bool aligned = ((reinterpret_cast<size_t>(one.d_a) | reinterpret_cast<size_t>(one.d_b)) & 15) == 0;
    const bool runs = aligned && has_runs(one.bank);
    if (blockIdx.x < n_sums) {
        if (runs) unmix_weight<4>(one, blockIdx.x / width, blockIdx.x % width);
        else unmix_weight<1>(one, blockIdx.x / width, blockIdx.x % width);
        return;
    }
    const u32 len = one.bank.n_skills * (one.bank.d_in + one.bank.d_out) * one.bank.rank;
    const u32 thread = (blockIdx.x - n_sums) * blockDim.x + threadIdx.x, n_threads = (gridDim.x - n_sums) * blockDim.x;
    if (runs)
        for (u32 at = 4 * thread; at < len; at += 4 * n_threads) unmix_run<4>(one, at, n_rows);
    else
        for (u32 at = thread; at < len; at += n_threads) unmix_run<1>(one, at, n_rows);
}
