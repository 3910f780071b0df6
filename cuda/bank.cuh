// A bank of skills and the mixing weights of its linear, as mix, shrink and expand read them.
#pragma once
#include "common.cuh"

struct Bank {
    const float* a;        // [splits, skills, d_in / splits, rank]
    const float* b;        // [splits, skills, rank, d_out / splits]
    const float* weights;  // [rows, splits * skills] of this linear
    u32 n_splits, n_skills, d_in, d_out, rank;
};

// The mixing weights of a routing row and a split: n_skills of them.
__device__ inline const float* mixing(const Bank& bank, u32 row, u32 split) {
    return bank.weights + (size_t(row) * bank.n_splits + split) * bank.n_skills;
}
