// Copies of boxes, barriers in shared memory and products of warpgroups, of sm_90a (Hopper): one wrapper
// an instruction. The emulator has a twin of each, from the same text of the PTX ISA.
//
// Operands lie in shared memory in lines of 128 bytes. Of line l (address / 128) the chunks of 16 bytes are
// exchanged: chunk c is at c ^ (l % 8). A copy writes and a product reads so ("128-byte swizzle"); where each
// operand starts at a multiple of 1024, line 0 of both is the same.
#pragma once
#include "mma.cuh"

#if POLYTAPE_BF16 && (defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(POLYTAPE_EMULATOR))
#define POLYTAPE_HOPPER 1

// A matrix and the box that is copied of it at a time, as the driver's cuTensorMapEncodeTiled says it. A
// kernel's parameter: `const __grid_constant__ TensorMap`.
struct __align__(128) TensorMap {
    u64 opaque[16];
};

// What a product is told of an operand (its "matrix descriptor"): address, two strides and swizzle 1 (128
// bytes), addresses and strides without their last four bits. Lines of an operand come in groups of eight,
// `group_bytes` from one to the next, along
//   depth contiguous    its rows: `wide_bytes` counts for nothing
//   depth not           its depth: a line has 64 rows, the next 64 are `wide_bytes` on
__device__ inline u64 operand(u32 address, u32 group_bytes, u32 wide_bytes) {
    return u64(address >> 4 & 0x3fff) | u64(wide_bytes >> 4 & 0x3fff) << 16 | u64(group_bytes >> 4 & 0x3fff) << 32 |
           u64(1) << 62;
}

#ifndef POLYTAPE_EMULATOR

// A barrier whose phase ends when `arrivals` threads have arrived and all bytes that were announced have come.
__device__ inline void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread set up known to copies; a __syncthreads does so for threads.
__device__ inline void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The same, and announces bytes.
__device__ inline void barrier_arrive_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity (phases count from 0) has ended; the one before the first has.
__device__ inline void barrier_wait(u64* barrier, u32 parity) {
    u32 ended;
    do {
        asm volatile(
            "{ .reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2; selp.u32 %0, 1, 0, ended; }"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!ended);
}

// Copies the box that starts at this column and row, zeros where it leaves the matrix; its bytes come to the barrier.
__device__ inline void copy_box(void* shared, const TensorMap& map, u32 col, u32 row, u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// Before the first product after any other use of its sums.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most GROUPS groups are not done.
template <int GROUPS>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// No use of the sums after this moves before it.
template <u32 COUNT>
__device__ inline void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// What a thread of this warpgroup may have of registers.
template <int COUNT>
__device__ inline void registers_up_to() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void registers_down_to() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// d [64, N] += left [64, 16] * right [16, N], of a warpgroup; N is twice the number of sums of a thread. A warp
// has 16 rows, and element 4 j + e is what element e of `mma`'s sums is, in the j-th 8 columns. Depth is
// contiguous in left, and in right if TRANSPOSED (as in gemm.cuh).
#define D8(i)                                                                                               \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])

template <bool TRANSPOSED>
__device__ inline void wgmma(float (&d)[32], u64 left, u64 right) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, 0, %34;"
        : D8(0), D8(8), D8(16), D8(24)
        : "l"(left), "l"(right), "n"(TRANSPOSED ? 0 : 1)
        : "memory");
}

template <bool TRANSPOSED>
__device__ inline void wgmma(float (&d)[64], u64 left, u64 right) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, 0, %66;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56)
        : "l"(left), "l"(right), "n"(TRANSPOSED ? 0 : 1)
        : "memory");
}

template <bool TRANSPOSED>
__device__ inline void wgmma(float (&d)[128], u64 left, u64 right) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, 1, 1, 1, 0, %130;"
        : D8(0), D8(8), D8(16), D8(24), D8(32), D8(40), D8(48), D8(56),
          D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
        : "l"(left), "l"(right), "n"(TRANSPOSED ? 0 : 1)
        : "memory");
}

#undef D8

#endif
#endif
