// Mixing and its backward, for every routing row of one adapted linear.
//   mixed_a[row, i, r] = sum_s w[row, q, s] a[q, s, i, r]        [rows * d_in, rank], overwritten
//   mixed_b[row, r, o] = sum_s w[row, q, s] b[q, s, r, o]        [rows * rank, d_out], overwritten
//   d_a[q, s] += sum_row w[row, q, s] d_mixed_a[row, q], likewise d_b
//   d_w[row, q, s] += <d_mixed_a[row, q], a[q, s]> + <d_mixed_b[row, q], b[q, s]>
// q is the split of feature i or o. Grids: `mix` x = elements of a pair / 256, y = rows;
// `unmix_bank` x = elements of the bank / 256; `unmix_weights` x = splits * skills, y = rows, a block
// a sum. Rows and skills are added in order.
#include "bank.cuh"

extern "C" __global__ void __launch_bounds__(256) mix(float* mixed_a, float* mixed_b, Bank bank) {
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

extern "C" __global__ void __launch_bounds__(256)
unmix_bank(float* d_a, float* d_b, const float* d_mixed_a, const float* d_mixed_b, Bank bank,
           u32 n_rows) {
    const u32 a_len = bank.n_skills * bank.d_in * bank.rank;
    const u32 b_len = bank.n_skills * bank.rank * bank.d_out;
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < a_len) {
        const u32 width = bank.d_in / bank.n_splits * bank.rank;  // Of one split and skill.
        const u32 split = at / width / bank.n_skills, s = at / width % bank.n_skills;
        const float* d = d_mixed_a + size_t(split) * width + at % width;
        float sum = 0.0f;
        for (u32 row = 0; row < n_rows; ++row)
            sum = fmaf(mixing(bank, row, split)[s], d[size_t(row) * bank.d_in * bank.rank], sum);
        d_a[at] += sum;
    } else if (at - a_len < b_len) {
        const u32 width = bank.d_out / bank.n_splits, in_bank = at - a_len;
        const u32 o = in_bank % width, r = in_bank / width % bank.rank;
        const u32 s = in_bank / width / bank.rank % bank.n_skills;
        const u32 split = in_bank / width / bank.rank / bank.n_skills;
        const float* d = d_mixed_b + size_t(r) * bank.d_out + split * width + o;
        float sum = 0.0f;
        for (u32 row = 0; row < n_rows; ++row)
            sum = fmaf(mixing(bank, row, split)[s], d[size_t(row) * bank.rank * bank.d_out], sum);
        d_b[in_bank] += sum;
    }
}

extern "C" __global__ void __launch_bounds__(256)
unmix_weights(float* d_weights, const float* d_mixed_a, const float* d_mixed_b, Bank bank) {
    SHARED(float, scratch, 256 / WARP);
    const u32 split = blockIdx.x / bank.n_skills, s = blockIdx.x % bank.n_skills, row = blockIdx.y;
    const u32 a_width = bank.d_in / bank.n_splits * bank.rank, b_width = bank.d_out / bank.n_splits;
    const float* a = bank.a + (size_t(split) * bank.n_skills + s) * a_width;
    const float* d_a = d_mixed_a + size_t(row) * bank.d_in * bank.rank + size_t(split) * a_width;
    const float* b = bank.b + (size_t(split) * bank.n_skills + s) * bank.rank * b_width;
    const float* d_b = d_mixed_b + size_t(row) * bank.rank * bank.d_out + split * b_width;
    float sum = 0.0f;
    for (u32 at = threadIdx.x; at < a_width; at += blockDim.x) sum = fmaf(d_a[at], a[at], sum);
    for (u32 at = threadIdx.x; at < bank.rank * b_width; at += blockDim.x)
        sum = fmaf(d_b[size_t(at / b_width) * bank.d_out + at % b_width], b[at], sum);
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) d_weights[size_t(row) * bank.n_splits * bank.n_skills + blockIdx.x] += sum;
}
