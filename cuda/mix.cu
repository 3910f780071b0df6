// Mixing and its backward, for every routing row of one adapted linear.
//   mixed_a[row, i, r] = sum_s w[row, q, s] a[q, s, i, r]        [rows * d_in, rank], overwritten
//   mixed_b[row, r, o] = sum_s w[row, q, s] b[q, s, r, o]        [rows * rank, d_out], overwritten
//   d_a[q, s] += sum_row w[row, q, s] d_mixed_a[row, q], likewise d_b
//   d_w[row, q, s] += <d_mixed_a[row, q], a[q, s]> + <d_mixed_b[row, q], b[q, s]>
// q is the split of feature i or o. Grids: `mix` x = elements of a pair / 256, y = rows, z = siblings;
// `unmix` x = rows * splits * skills, a block a sum of d_w, then elements of the bank / 256, y = siblings; x is
// that of the largest. Rows and skills are added in order.
#include "siblings.cuh"

extern "C" __global__ void __launch_bounds__(256) mix(const __grid_constant__ MixedPairs pairs) {
    const MixedPair& pair = pairs.of[blockIdx.z];
    const Bank& bank = pair.bank;
    float *mixed_a = pair.a, *mixed_b = pair.b;
    const u32 a_len = bank.d_in * bank.rank, b_len = bank.rank * bank.d_out, row = blockIdx.y;
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < a_len) {
        const u32 width = bank.d_in / bank.n_splits;
        const u32 split = at / bank.rank / width, in_split = at - split * width * bank.rank;
        const float* w = mixing(bank, row, split);
        const float* a = bank.a + size_t(split) * bank.n_skills * width * bank.rank + in_split;
        float sum = 0.0f;
        for (u32 s = 0; s < bank.n_skills; ++s)
            sum = fmaf(w[s], a[size_t(s) * width * bank.rank], sum);
        mixed_a[size_t(row) * a_len + at] = sum;
    } else if (at - a_len < b_len) {
        const u32 width = bank.d_out / bank.n_splits;
        const u32 r = (at - a_len) / bank.d_out, o = (at - a_len) % bank.d_out;
        const float* w = mixing(bank, row, o / width);
        const float* b = bank.b + (size_t(o / width) * bank.n_skills * bank.rank + r) * width + o % width;
        float sum = 0.0f;
        for (u32 s = 0; s < bank.n_skills; ++s)
            sum = fmaf(w[s], b[size_t(s) * bank.rank * width], sum);
        mixed_b[size_t(row) * b_len + at - a_len] = sum;
    }
}

// Element `at` of the bank's gradients.
__device__ inline void unmix_bank(const Unmixed& one, u32 at, u32 n_rows) {
    const Bank& bank = one.bank;
    const float *d_mixed_a = one.d_mixed_a, *d_mixed_b = one.d_mixed_b;
    const u32 a_len = bank.n_skills * bank.d_in * bank.rank;
    const u32 b_len = bank.n_skills * bank.rank * bank.d_out;
    if (at < a_len) {
        const u32 width = bank.d_in / bank.n_splits * bank.rank;  // Of one split and skill.
        const u32 split = at / width / bank.n_skills, s = at / width % bank.n_skills;
        const float* d = d_mixed_a + size_t(split) * width + at % width;
        float sum = 0.0f;
        for (u32 row = 0; row < n_rows; ++row)
            sum = fmaf(mixing(bank, row, split)[s], d[size_t(row) * bank.d_in * bank.rank], sum);
        one.d_a[at] += sum;
    } else if (at - a_len < b_len) {
        const u32 width = bank.d_out / bank.n_splits, in_bank = at - a_len;
        const u32 o = in_bank % width, r = in_bank / width % bank.rank;
        const u32 s = in_bank / width / bank.rank % bank.n_skills;
        const u32 split = in_bank / width / bank.rank / bank.n_skills;
        const float* d = d_mixed_b + size_t(r) * bank.d_out + split * width + o;
        float sum = 0.0f;
        for (u32 row = 0; row < n_rows; ++row)
            sum = fmaf(mixing(bank, row, split)[s], d[size_t(row) * bank.rank * bank.d_out], sum);
        one.d_b[in_bank] += sum;
    }
}

// The sum of one routing row, split and skill, by the whole block.
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
    for (u32 at = threadIdx.x; at < a_width; at += blockDim.x) sum = fmaf(d_a[at], a[at], sum);
    for (u32 at = threadIdx.x; at < bank.rank * b_width; at += blockDim.x)
        sum = fmaf(d_b[size_t(at / b_width) * bank.d_out + at % b_width], b[at], sum);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) one.d_weights[size_t(row) * bank.n_splits * bank.n_skills + col] += sum;
}

extern "C" __global__ void __launch_bounds__(256) unmix(const __grid_constant__ UnmixedAll all, u32 n_rows) {
    const Unmixed& one = all.of[blockIdx.y];
    const u32 width = one.bank.n_splits * one.bank.n_skills, n_sums = n_rows * width;
    if (blockIdx.x < n_sums)
        unmix_weight(one, blockIdx.x / width, blockIdx.x % width);
    else
        unmix_bank(one, (blockIdx.x - n_sums) * blockDim.x + threadIdx.x, n_rows);
}
