// What the kernels of frozen linears share, whatever multiplies: parameters, the routed LoRA of an element, and
// what becomes of a sum. See linear.cu for the formulas and shapes.
#pragma once
#include "bank.cuh"
#include "philox.cuh"

struct Expand {
    const float* z;        // Null: no LoRA.
    const u32* token_rows;
    const float* mixed_b;  // Null: stacked.
    float* ready;          // What `expand_stacked` of linear.cu made of a stacked one, [tokens, d_out]; null: nothing.
    Bank bank;             // Of a mixed one only rank and d_out count.
};

// z B^ of one element.
__device__ inline float expand(const Expand& expand, u32 token, u32 col) {
    if (!expand.z) return 0.0f;
    const Bank& bank = expand.bank;
    if (expand.ready) return expand.ready[size_t(token) * bank.d_out + col];
    const float* z = expand.z + size_t(token) * bank.rank;
    const u32 row = expand.token_rows[token];
    float sum = 0.0f;
    if (expand.mixed_b) {
        const float* b = expand.mixed_b + size_t(row) * bank.rank * bank.d_out + col;
        for (u32 r = 0; r < bank.rank; ++r) sum = fmaf(z[r], b[size_t(r) * bank.d_out], sum);
    } else {
        const u32 width = bank.d_out / bank.n_splits, split = col / width;
        const float* w = mixing(bank, row, split);
        const float* b = bank.b + size_t(split) * bank.n_skills * bank.rank * width + col % width;
        for (u32 s = 0; s < bank.n_skills; ++s)
            for (u32 r = 0; r < bank.rank; ++r, b += width) sum = fmaf(w[s] * z[r], *b, sum);
    }
    return sum;
}

struct Epilogue {
    const float* bias;     // Null: none.
    const Item* residual;  // Null: none.
    Expand expand;
    Dropout dropout;
};

// One of the linears that share an input: siblings, as q, k and v.
struct Projection {
    void* y;             // [tokens, d_out] of Item, or of float in the kernels with `full` in their names.
    const Item* weight;  // [d_out, d_in]
    Epilogue epilogue;
    u32 d_out, padding;
};

const u32 MAX_PROJECTIONS = 4;

// Those of a launch, which kernels take as `const __grid_constant__`: see siblings.cuh.
struct Projections {
    Projection of[MAX_PROJECTIONS];
    u32 n, padding;
};

// What becomes of a sum of `linear`. `expanded`: it has the low-rank part.
template <class Out>
__device__ inline void finish(Out* y, const Epilogue& epilogue, bool expanded, float value, u32 token,
                              u32 col, u32 d_out) {
    const size_t at = size_t(token) * d_out + col;
    if (!expanded) value += expand(epilogue.expand, token, col);
    if (epilogue.bias) value += epilogue.bias[col];
    value *= dropout_factor(epilogue.dropout, token, col);
    if (epilogue.residual) value += widen(epilogue.residual[at]);
    store(&y[at], value);
}

#if POLYTAPE_BF16

// Eight words' halves added to eight values, as those of a residual.
__device__ inline void add_residual(float (&run)[8], uint4 residual) {
    const u32 words[4] = {residual.x, residual.y, residual.z, residual.w};
#pragma unroll
    for (u32 i = 0; i < 8; ++i) run[i] += i % 2 == 0 ? low_value(words[i / 2]) : high_value(words[i / 2]);
}
__device__ inline uint4 fetch_residual(const Item* residual, u32 row, u32 col, u32 m, u32 n) {
    const bool there = residual && row < m && col < n;
    return there ? load_16_bytes(residual + size_t(row) * n + col) : uint4{0, 0, 0, 0};
}

// The results of `linear` by eights, for `for_each_run`: where rows are whole runs of 8, and the sums have the low-rank part or
// it is ready.
template <class Out>
struct ForwardRuns {
    Out* y;
    const Epilogue& epilogue;
    u32 m, n;
    __device__ bool are_possible(bool expanded) const {
        return n % 8 == 0 && (expanded || !epilogue.expand.z || epilogue.expand.ready);
    }
    __device__ bool are_plain() const {
        return sizeof(Out) == sizeof(Bf16) && !epilogue.bias && !epilogue.residual && !epilogue.dropout.tokens &&
               !epilogue.expand.ready;
    }
    __device__ void store(u32 row, u32 col, uint4 run) const {
        if (row < m && col < n) store_16_bytes(y + size_t(row) * n + col, run);
    }
    __device__ uint4 fetch(u32 row, u32 col) const { return fetch_residual(epilogue.residual, row, col, m, n); }
    __device__ void finish(u32 row, u32 col, float (&run)[8], uint4 residual) const {
        if (row >= m || col >= n) return;
        float more[8];
        if (epilogue.expand.ready) {
            load_run<8>(more, epilogue.expand.ready + size_t(row) * n + col);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) run[i] += more[i];
        }
        if (epilogue.bias) {
            load_run<8>(more, epilogue.bias + col);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) run[i] += more[i];
        }
        if (epilogue.dropout.tokens) {
            dropout_factors(epilogue.dropout, row, col / 8, more);
#pragma unroll
            for (u32 i = 0; i < 8; ++i) run[i] *= more[i];
        }
        if (epilogue.residual) add_residual(run, residual);
        store_run<8>(y + size_t(row) * n + col, run);
    }
};

// Those of `linear_backward`.
struct BackwardRuns {
    Item* d_x;
    const Item* d_residual;
    u32 m, n;
    __device__ bool are_plain() const { return !d_residual; }
    __device__ void store(u32 row, u32 col, uint4 run) const {
        if (row < m && col < n) store_16_bytes(d_x + size_t(row) * n + col, run);
    }
    __device__ uint4 fetch(u32 row, u32 col) const { return fetch_residual(d_residual, row, col, m, n); }
    __device__ void finish(u32 row, u32 col, float (&run)[8], uint4 residual) const {
        if (row >= m || col >= n) return;
        if (d_residual) add_residual(run, residual);
        store_run<8>(d_x + size_t(row) * n + col, run);
    }
};

#endif

const u32 MAX_TERMS = 4;

struct Term {
    const Item* d_y;     // [tokens, d_out]
    const Item* weight;  // [d_out, d_in]
    const float* d_z;    // [tokens, rank]; null: no LoRA
    const float* mixed_a;
    const u32* token_rows;
    u32 d_out, rank;
};

struct Terms {
    Term terms[MAX_TERMS];
    u32 n;
};

// What becomes of a sum of `linear_backward`. `expanded`: it has the low-rank parts.
__device__ inline void finish(Item* d_x, const Item* d_residual, const Terms& terms, bool expanded, float value,
                              u32 token, u32 col, u32 d_in) {
    for (u32 n = 0; n < terms.n && !expanded; ++n) {
        const Term& term = terms.terms[n];
        if (!term.d_z) continue;
        const float* d_z = term.d_z + size_t(token) * term.rank;
        const float* a = term.mixed_a + (size_t(term.token_rows[token]) * d_in + col) * term.rank;
        float sum = 0.0f;
        for (u32 r = 0; r < term.rank; ++r) sum = fmaf(d_z[r], a[r], sum);
        value += sum;
    }
    const size_t at = size_t(token) * d_in + col;
    if (d_residual) value += widen(d_residual[at]);
    store(&d_x[at], value);
}
