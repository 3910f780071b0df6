// Siblings: linears whose adapters run in one launch, because they share an input, or for the launch's sake.
// The grid says which one is a block's own. A launch takes up to MAX_SIBLINGS. Kernels take them as
// `const __grid_constant__`, or each thread would copy all of them to find its own.
#pragma once
#include "bank.cuh"

const u32 MAX_SIBLINGS = 4;

// One thin product: z [tokens, rank] of lhs [tokens, depth] and a matrix for each routing row.
struct ThinProduct {
    float* z;
    const Item* lhs;
    const float* right;
    u32 depth, padding;
};
struct ThinProducts {
    ThinProduct of[MAX_SIBLINGS];
};

// The gradients of one mixed pair.
struct PairGradient {
    float* d_a;
    float* d_b;
    const Item* d_y;
    const float* z;
    const float* d_z;
    u32 d_out, padding;
};
struct PairGradients {
    PairGradient of[MAX_SIBLINGS];
};

// A bank and its mixed pair.
struct MixedPair {
    float* a;
    float* b;
    Bank bank;
};
struct MixedPairs {
    MixedPair of[MAX_SIBLINGS];
};

// What a mixed pair's gradients are added to.
struct Unmixed {
    float* d_a;        // Of the bank.
    float* d_b;
    float* d_weights;  // [rows, splits * skills] of this linear
    const float* d_mixed_a;
    const float* d_mixed_b;
    Bank bank;
};
struct UnmixedAll {
    Unmixed of[MAX_SIBLINGS];
};
