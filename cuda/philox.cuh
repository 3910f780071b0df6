// Counter-based random numbers: Philox 4x32-10, the same words as kernels/philox.rs, and the
// dropout that is made of them.
#pragma once
#include "common.cuh"

struct Key {
    u32 words[2];
};

struct Block {
    u32 words[4];
};

// The four words at a counter.
__device__ inline Block philox(Key key, u32 c0, u32 c1, u32 c2, u32 c3) {
    u32 k0 = key.words[0], k1 = key.words[1];
#pragma unroll 1  // Ten times the text wherever it is used is not worth the few cycles.
    for (int round = 0; round < 10; ++round) {
        const u64 p0 = u64(c0) * 0xD2511F53u, p1 = u64(c2) * 0xCD9E8D57u;
        const u32 n0 = u32(p1 >> 32) ^ c1 ^ k0, n2 = u32(p0 >> 32) ^ c3 ^ k1;
        c1 = u32(p1);
        c3 = u32(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Block{{c0, c1, c2, c3}};
}

// A word as a uniform number in [0, 1) with 24 bits.
__device__ inline float unit(u32 word) { return float(word >> 8) * (1.0f / 16777216.0f); }

struct TokenKey {
    u32 example, position;
};

// Element (token, col) is dropped where half-word col % 8 of the block with counter
// [col / 8, position, example, site] is below `threshold`; the others are multiplied by `scale`.
// Without `tokens` nothing is dropped.
struct Dropout {
    const TokenKey* tokens;  // [tokens]
    Key key;
    u32 site, threshold;
    float scale;
};

// The eight factors of columns 8 * group ... 8 * group + 7 of a token.
__device__ inline void dropout_factors(const Dropout& dropout, u32 token, u32 group, float (&factors)[8]) {
    if (!dropout.tokens) {
        for (u32 i = 0; i < 8; ++i) factors[i] = 1.0f;
        return;
    }
    const TokenKey at = dropout.tokens[token];
    const Block block = philox(dropout.key, group, at.position, at.example, dropout.site);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 bits = block.words[i / 2] >> (16 * (i % 2)) & 0xffff;
        factors[i] = bits < dropout.threshold ? 0.0f : dropout.scale;
    }
}

// The factors of columns col and col + 1 of a token; col is even.
__device__ inline void dropout_factors(const Dropout& dropout, u32 token, u32 col, float (&factors)[2]) {
    const TokenKey at = dropout.tokens[token];
    const Block block = philox(dropout.key, col / 8, at.position, at.example, dropout.site);
    const u32 pair = col % 8 / 2;
    // Not an index: a run-time one would put the words into local memory.
    const u32 word = pair == 0 ? block.words[0] : pair == 1 ? block.words[1]
                   : pair == 2 ? block.words[2] : block.words[3];
    factors[0] = (word & 0xffff) < dropout.threshold ? 0.0f : dropout.scale;
    factors[1] = word >> 16 < dropout.threshold ? 0.0f : dropout.scale;
}

// Which of the eight columns of a group of a token are kept, a bit each.
__device__ inline u32 kept_bits(const Dropout& dropout, u32 token, u32 group) {
    const TokenKey at = dropout.tokens[token];
    const Block block = philox(dropout.key, group, at.position, at.example, dropout.site);
    u32 bits = 0;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) bits |= u32((block.words[i / 2] >> (16 * (i % 2)) & 0xffff) >= dropout.threshold) << i;
    return bits;
}

// The factor of one element.
__device__ inline float dropout_factor(const Dropout& dropout, u32 token, u32 col) {
    if (!dropout.tokens) return 1.0f;
    float factors[2];
    dropout_factors(dropout, token, col / 2 * 2, factors);
    return col % 2 == 0 ? factors[0] : factors[1];
}
