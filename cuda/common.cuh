// What every kernel file starts with: element types, reductions in a fixed order, shared memory.
//
// The text is plain CUDA C++ without headers of the toolkit, so that NVRTC needs no include path.
// The same text builds with a host compiler against tests/cuda_emulator/emulator.hpp, which defines
// POLYTAPE_EMULATOR and stands in for the few built-ins used.
//
// POLYTAPE_BF16 (0 or 1) says what activations and frozen matrices are kept in: `Item`. Everything
// is added up in f32; parameters, gradients, statistics and vectors of the base are f32.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef POLYTAPE_EMULATOR
#define INFINITY __int_as_float(0x7f800000)
// 16 bytes at an address that is a multiple of 16, in one instruction.
__device__ inline uint4 load_16_bytes(const void* from) { return *static_cast<const uint4*>(from); }
// The same, of what is read once.
__device__ inline uint4 stream_16_bytes(const void* from) {
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(from));
    return bits;
}
__device__ inline void store_16_bytes(void* to, uint4 bits) { *static_cast<uint4*>(to) = bits; }
// The same of four.
__device__ inline u32 load_4_bytes(const void* from) { return *static_cast<const u32*>(from); }
__device__ inline void store_4_bytes(void* to, u32 bits) { *static_cast<u32*>(to) = bits; }
// Shared memory of a block: `count` elements, 16-byte aligned. The emulator hands out poisoned
// memory with guards in its place.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
// The shared memory whose size the launch gives.
extern __shared__ __align__(16) char dynamic_shared_memory[];
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(dynamic_shared_memory)
#endif

struct Bf16 {
    u16 bits;
};

#if POLYTAPE_BF16
typedef Bf16 Item;
#else
typedef float Item;
#endif

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

// Rounded to the nearest, ties to even; a NaN stays one. By one instruction of sm_80; for the emulator by its bits.
#ifndef POLYTAPE_EMULATOR
__device__ inline Bf16 to_bf16(float value) {
    Bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
}
// Two of them as the halves of a word, the first one lower.
__device__ inline u32 to_bf16s(float first, float second) {
    u32 rounded;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(second), "f"(first));
    return rounded;
}
#else
__device__ inline Bf16 to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    bits = value != value ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
    return Bf16{u16(bits >> 16)};
}
__device__ inline u32 to_bf16s(float first, float second) {
    return to_bf16(first).bits | u32(to_bf16(second).bits) << 16;
}
#endif

// 2^x to 2 units of f32, by one instruction; results under 2^-126 may be 0.
#ifndef POLYTAPE_EMULATOR
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
__device__ inline float exp2_fast(float x) { return exp2f(x); }
#endif

__device__ inline float low_value(u32 bits) { return __uint_as_float(bits << 16); }
__device__ inline float high_value(u32 bits) { return __uint_as_float(bits & 0xffff0000); }

// The rest of a value that its rounded one does not hold; nothing of an infinity.
__device__ inline float rest(float value, float rounded) {
    return fabsf(value) == INFINITY ? 0.0f : value - rounded;
}
// Two values in two halves each: `high` what is nearest, `low` the rest.
__device__ inline void split(float first, float second, u32& high, u32& low) {
    high = to_bf16s(first, second);
    low = to_bf16s(rest(first, low_value(high)), rest(second, high_value(high)));
}

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(Bf16* to, float value) { *to = to_bf16(value); }

// RUN consecutive elements of a row, 1 or 8: 8 at a multiple of 16 bytes, by 16 bytes an instruction.
template <u32 RUN>
__device__ inline void load_run(float (&to)[RUN], const Bf16* from) {
    if (RUN == 1) {
        to[0] = widen(*from);
        return;
    }
    const uint4 bits = load_16_bytes(from);
    const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) to[i] = i % 2 == 0 ? low_value(words[i / 2]) : high_value(words[i / 2]);
}
template <u32 RUN>
__device__ inline void load_run(float (&to)[RUN], const float* from) {
    if (RUN == 1) {
        to[0] = *from;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < RUN; i += 4) {
        const uint4 bits = load_16_bytes(from + i);
        const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (u32 j = 0; j < 4 && i + j < RUN; ++j) to[i + j] = __uint_as_float(words[j]);
    }
}
template <u32 RUN>
__device__ inline void store_run(Bf16* to, const float (&values)[RUN]) {
    if (RUN == 1) {
        *to = to_bf16(values[0]);
        return;
    }
    u32 words[4];
#pragma unroll
    for (u32 i = 0; i < 4 && 2 * i + 1 < RUN; ++i) words[i] = to_bf16s(values[2 * i], values[2 * i + 1]);
    store_16_bytes(to, uint4{words[0], words[1], words[2], words[3]});
}
template <u32 RUN>
__device__ inline void store_run(float* to, const float (&values)[RUN]) {
    if (RUN == 1) {
        *to = values[0];
        return;
    }
#pragma unroll
    for (u32 i = 0; i + 3 < RUN; i += 4)
        store_16_bytes(to + i, uint4{__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                     __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])});
}

// What every kernel starts with. Where a graph lets it start while the kernel before it ends (sm_90 on), it waits here until that
// one is done and what it wrote is seen. (To let the next one start any earlier was measured, too: slower.)
__device__ inline void after_previous() {
#if !defined(POLYTAPE_EMULATOR) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// No load moves before this: unrolled loops would ask for more at once than there are registers.
__device__ inline void keep_order() { asm volatile("" ::: "memory"); }

const u32 WARP = 32;
const u32 ALL_LANES = 0xffffffff;

__device__ inline u32 lane() { return threadIdx.x % WARP; }

// The sum over a warp, in every lane: a tree of exchanges, whose two sides add the same two numbers.
template <class T>
__device__ inline T warp_sum(T value) {
    for (u32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// The largest over a warp, in every lane. A NaN is passed over: the caller's sum still has it.
__device__ inline float warp_max(float value) {
    for (u32 step = WARP / 2; step > 0; step /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// The sum over a block of whole warps, in every thread: within each warp as above, then the warps
// in order. `scratch` has an element a warp and is free again afterwards.
template <class T>
__device__ inline T block_sum(T value, T* scratch) {
    value = warp_sum(value);
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    T sum = scratch[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) sum += scratch[warp];
    __syncthreads();
    return sum;
}

// The largest over a block, as `warp_max`.
__device__ inline float block_max(float value, float* scratch) {
    value = warp_max(value);
    if (lane() == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    float largest = scratch[0];
    for (u32 warp = 1; warp < blockDim.x / WARP; ++warp) largest = fmaxf(largest, scratch[warp]);
    __syncthreads();
    return largest;
}

// A value that another block of this launch wrote before `is_last_block`.
__device__ inline float load_fresh(const float* from) { return *static_cast<const volatile float*>(from); }

// Whether the `n` blocks that share a counter are all done with what comes before this: true in one of them, whichever is
// last. The counter is 0 before the launch and after it. All threads.
__device__ inline bool is_last_block(u32* counter, u32 n) {
    SHARED(u32, is_last, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last[0] = atomicAdd(counter, 1u) == n - 1;
        if (is_last[0]) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return is_last[0];
}
