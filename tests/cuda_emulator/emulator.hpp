// A small emulator of the CUDA execution model, for tests: the sources in cuda/ build with a host
// compiler after this header and run, block after block, on the CPU.
//
// * A thread is a fiber. Between two barriers the fibers run one after the other in an order that is
//   shuffled anew each time, so that a result that depends on the order shows as changed bits.
// * `__syncthreads`, warp shuffles and `mma` are meeting points. A block in which nobody can go on is
//   reported as a deadlock: threads that miss a barrier, lanes that miss a shuffle.
// * Shared memory starts as NaN in every block, with guard words behind each array. Its use is
//   checked against the launch's limit.
// * An asynchronous copy is made only when its group is waited for.
//
// * A launch with more threads than the kernel's launch bounds fails, as does an asynchronous copy or a
//   vector load that is not aligned.
//
// * Copies of boxes come at any time between their start and the end of the phase of the barrier that they are
//   announced to; products of warpgroups read shared memory only when they are waited for. So what is read too
//   early or overwritten too early is wrong in some order. Addresses, swizzle and strides are worked out from the
//   descriptors, as the PTX ISA has it.
//
// What it cannot show: weak memory order, clusters, timing. One launch at a time (the caller holds a lock).
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define POLYTAPE_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#ifdef POLYTAPE_LIST_KERNELS
#define __launch_bounds__(...) launch_bounds(__VA_ARGS__)
#else
#define __launch_bounds__(...)
#endif
#define __align__(n) alignas(n)
#define __grid_constant__

using std::max;
using std::min;

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

inline dim3 thread_index, block_index, block_size, grid_size;

const unsigned WARP_SIZE = 32;
const size_t STACK_BYTES = 64 << 10, SHARED_BYTES = 227 << 10;
const unsigned char POISON = 0xff, GUARD = 0xa5;
const size_t GUARD_BYTES = 16;

// What a fiber waits for.
enum class Wait { Nothing, Barrier, Phase, Warp, Done };

struct AsyncCopy {
    void* to;
    const void* from;
    size_t bytes, valid;
};

// Of a warpgroup, as one thread has it.
struct Product {
    float* sums;
    unsigned n;
    bool transposed;
    uint64_t left, right;
};

// An mbarrier, by its place in shared memory.
struct PhaseBarrier {
    const void* place;
    unsigned arrivals, pending, phase;
    int64_t bytes;  // Announced and not there yet.
};

struct Fiber {
    ucontext_t context;  // To start it; then `at`, which costs no system call.
    jmp_buf at;
    bool started = false;
    std::vector<char> stack;
    Wait wait = Wait::Nothing;
    unsigned index = 0;
    dim3 place;  // In the block.
    // The groups of asynchronous copies that are on their way, the last one still open.
    std::vector<std::vector<AsyncCopy>> copies;
    // The same of products.
    std::vector<std::vector<Product>> products;
    // What it waits for in Wait::Phase.
    const void* barrier;
    unsigned parity;
};

// Where the lanes of a warp meet: what each of them brings. Two rounds, so that a lane may go on to
// the next meeting while others still read this one.
struct Meeting {
    unsigned char brought[2][WARP_SIZE][64];
    unsigned arrived = 0, round = 0;
};

struct SharedArray {
    const void* site;
    size_t offset, bytes;
};

inline std::vector<Fiber*> fibers;
inline std::vector<Meeting> meetings;
inline Fiber* current;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline void (*body)(void*);
inline void* body_arguments;
inline unsigned n_threads, n_live, at_barrier;
alignas(1024) inline unsigned char shared_memory[SHARED_BYTES + 4096];
inline std::vector<PhaseBarrier> barriers;
inline std::vector<SharedArray> shared_arrays;
inline size_t shared_used, dynamic_bytes;
inline std::string problem;
inline uint64_t random_state = 1;

inline uint64_t random_word() {
    random_state += 0x9E3779B97F4A7C15u;
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Below n.
inline unsigned random_below(unsigned n) { return (random_word() >> 32) * n >> 32; }

inline void fail(const std::string& what) {
    if (problem.empty())
        problem = what + " in block (" + std::to_string(block_index.x) + ", " +
                  std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
}

// Back to the scheduler until it comes round again.
inline void yield_fiber() {
    Fiber* self = current;
    if (_setjmp(self->at) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
    for (;;) {
        body(body_arguments);
        current->wait = Wait::Done;
        yield_fiber();
    }
}

inline void resume(Fiber* fiber) {
    current = fiber;
    thread_index = fiber->place;
    if (_setjmp(scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->at, 1);
    fiber->started = true;
    fiber->stack.resize(STACK_BYTES);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    setcontext(&fiber->context);
}

inline void* shared(const void* site, size_t bytes) {
    for (const SharedArray& array : shared_arrays)
        if (array.site == site) return shared_memory + array.offset;
    const size_t offset = shared_used;
    shared_used = (offset + bytes + GUARD_BYTES + 127) / 128 * 128;
    if (shared_used > sizeof shared_memory) {
        fprintf(stderr, "emulator: a block wants more than %zu bytes of shared memory\n", SHARED_BYTES);
        abort();
    }
    memset(shared_memory + offset, POISON, bytes);
    memset(shared_memory + offset + bytes, GUARD, shared_used - offset - bytes);
    shared_arrays.push_back({site, offset, bytes});
    return shared_memory + offset;
}

inline void check_shared() {
    for (const SharedArray& array : shared_arrays)
        for (size_t i = 0; i < GUARD_BYTES; ++i)
            if (shared_memory[array.offset + array.bytes + i] != GUARD)
                return fail("a write past the end of an array in shared memory");
}

inline bool has_ended(const void* place, unsigned parity);
inline bool bring_boxes(const void* place);
inline void drop_boxes();

// Whether it can go on; whatever it waits for may come nearer.
inline bool is_ready(Fiber* fiber, bool& moved) {
    if (fiber->wait != Wait::Phase) return fiber->wait == Wait::Nothing;
    moved |= bring_boxes(fiber->barrier);
    if (!has_ended(fiber->barrier, fiber->parity)) return false;
    fiber->wait = Wait::Nothing;
    return true;
}

inline void run_block() {
    shared_arrays.clear();
    barriers.clear();
    drop_boxes();
    shared_used = 0;
    if (meetings.size() < (n_threads + WARP_SIZE - 1) / WARP_SIZE)
        meetings.resize((n_threads + WARP_SIZE - 1) / WARP_SIZE);
    for (Meeting& meeting : meetings) meeting.arrived = 0;
    std::vector<unsigned> order(n_threads);
    for (unsigned i = 0; i < n_threads; ++i) {
        order[i] = i;
        fibers[i]->wait = Wait::Nothing;
        fibers[i]->copies.assign(1, {});
        fibers[i]->products.assign(1, {});
    }
    n_live = n_threads;
    at_barrier = 0;
    while (n_live > 0) {
        // A full shuffle is dear where lanes meet often: turn, and swap a few.
        for (unsigned i = n_threads - 1; i > 0; i -= min(i, 1 + n_threads / 64))
            std::swap(order[i], order[random_below(i + 1)]);
        unsigned at = random_below(n_threads);
        bool moved = false;
        for (unsigned n = 0; n < n_threads; ++n, at = at + 1 < n_threads ? at + 1 : 0) {
            Fiber* fiber = fibers[order[at]];
            if (!is_ready(fiber, moved)) continue;
            resume(fiber);
            moved = true;
            if (fiber->wait == Wait::Done) n_live -= 1;
        }
        if (at_barrier == n_live && n_live > 0) {
            at_barrier = 0;
            for (unsigned i = 0; i < n_threads; ++i)
                if (fibers[i]->wait == Wait::Barrier) fibers[i]->wait = Wait::Nothing;
            moved = true;
        }
        if (!moved) {
            fail("deadlock: threads wait for others that left or wait elsewhere, or for bytes that nobody brings");
            // Their stacks hold no resources: start them afresh.
            for (unsigned i = 0; i < n_threads; ++i) fibers[i]->started = false;
            return;
        }
    }
    check_shared();
}

// All lanes of the warp bring `mine`; afterwards `brought(lane)` gives what each brought.
inline const Meeting& meet(const void* mine, size_t bytes, unsigned& round) {
    const unsigned warp = current->index / WARP_SIZE, lane = current->index % WARP_SIZE;
    Meeting& meeting = meetings[warp];
    const unsigned lanes = min(WARP_SIZE, n_threads - warp * WARP_SIZE);
    round = meeting.round % 2;
    memcpy(meeting.brought[round][lane], mine, bytes);
    if (++meeting.arrived == lanes) {
        meeting.arrived = 0;
        meeting.round += 1;
        for (unsigned i = warp * WARP_SIZE; i < warp * WARP_SIZE + lanes; ++i)
            if (fibers[i]->wait == Wait::Warp) fibers[i]->wait = Wait::Nothing;
    } else {
        current->wait = Wait::Warp;
        yield_fiber();
    }
    return meeting;
}

template <class T>
T from_lane(T mine, unsigned source) {
    unsigned round;
    const Meeting& meeting = meet(&mine, sizeof mine, round);
    memcpy(&mine, meeting.brought[round][source % WARP_SIZE], sizeof mine);
    return mine;
}

// A parameter, whose bytes lie anywhere.
template <class T>
T parameter(const void* bytes) {
    T value;
    memcpy(&value, bytes, sizeof value);
    return value;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(parameter<A>(arguments[I])...);
}

template <class... A>
int launch(void (*kernel)(A...), void** arguments, size_t n_arguments, const size_t* sizes) {
    const size_t expected[] = {sizeof(A)...};
    if (n_arguments != sizeof...(A)) {
        problem = "the kernel has " + std::to_string(sizeof...(A)) + " parameters, not " +
                  std::to_string(n_arguments);
        return 1;
    }
    for (size_t i = 0; i < n_arguments; ++i)
        if (expected[i] != sizes[i]) {
            problem = "parameter " + std::to_string(i) + " has " + std::to_string(expected[i]) +
                      " bytes, not " + std::to_string(sizes[i]);
            return 1;
        }
    struct Call {
        void (*kernel)(A...);
        void** arguments;
    } bound{kernel, arguments};
    body = [](void* bound) {
        Call* call_of = static_cast<Call*>(bound);
        call(call_of->kernel, call_of->arguments, std::index_sequence_for<A...>());
    };
    body_arguments = &bound;
    n_threads = block_size.x * block_size.y * block_size.z;
    while (fibers.size() < n_threads) {
        fibers.push_back(new Fiber);
        fibers.back()->index = fibers.size() - 1;
    }
    for (unsigned i = 0; i < n_threads; ++i) {
        const unsigned row = i / block_size.x;
        fibers[i]->place = {i % block_size.x, row % block_size.y, row / block_size.y};
    }
    const uint64_t n_blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
    // Blocks in no particular order either: from a random one on.
    const uint64_t turn = n_blocks ? random_word() % n_blocks : 0;
    for (uint64_t n = 0; n < n_blocks && problem.empty(); ++n) {
        const uint64_t block = (n + turn) % n_blocks;
        block_index.x = block % grid_size.x;
        block_index.y = block / grid_size.x % grid_size.y;
        block_index.z = block / grid_size.x / grid_size.y;
        run_block();
    }
    return problem.empty() ? 0 : 1;
}

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

#define SHARED(type, name, count) \
    static char name##_site;      \
    type* name = static_cast<type*>(emulator::shared(&name##_site, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name)                                            \
    type* name = static_cast<type*>(emulator::shared(&emulator::dynamic_bytes, \
                                                     emulator::dynamic_bytes))

inline void __syncthreads() {
    emulator::current->wait = emulator::Wait::Barrier;
    emulator::at_barrier += 1;
    emulator::yield_fiber();
}
inline void __syncwarp(unsigned = 0xffffffff) { emulator::from_lane(0, 0); }

// Threads run one at a time, and blocks one after the other.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
    return emulator::from_lane(value, emulator::current->index % emulator::WARP_SIZE ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned source) {
    return emulator::from_lane(value, source);
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// The twins of cuda/mma.cuh.

inline void copy_async(void* shared, const void* global, bool valid, size_t bytes = 16) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % bytes)
        emulator::fail("an asynchronous copy that is not aligned");
    emulator::current->copies.back().push_back({shared, global, bytes, valid ? bytes : 0});
}
inline void copy_word_async(void* shared, const void* global, bool valid) { copy_async(shared, global, valid, 4); }
inline void copy_async_commit() { emulator::current->copies.emplace_back(); }
template <int GROUPS>
void copy_async_wait() {
    auto& copies = emulator::current->copies;
    while (copies.size() > size_t(GROUPS) + 1) {
        for (const emulator::AsyncCopy& copy : copies.front()) {
            memset(copy.to, 0, copy.bytes);
            memcpy(copy.to, copy.from, copy.valid);
        }
        copies.erase(copies.begin());
    }
}

// The twins of cuda/common.cuh.
inline uint4 load_16_bytes(const void* from) {
    uint4 loaded = {};
    if (reinterpret_cast<uintptr_t>(from) % 16) return emulator::fail("a vector load that is not aligned"), loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}
inline uint4 stream_16_bytes(const void* from) { return load_16_bytes(from); }
inline void store_16_bytes(void* to, uint4 bits) {
    if (reinterpret_cast<uintptr_t>(to) % 16) return emulator::fail("a vector store that is not aligned");
    memcpy(to, &bits, sizeof bits);
}
inline unsigned load_4_bytes(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 4) return emulator::fail("a load that is not aligned"), 0;
    unsigned loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
}
inline void store_4_bytes(void* to, unsigned bits) {
    if (reinterpret_cast<uintptr_t>(to) % 4) return emulator::fail("a store that is not aligned");
    memcpy(to, &bits, sizeof bits);
}

namespace emulator {

inline void load_matrices(unsigned (&to)[4], const void* row, bool transposed) {
    unsigned round;
    const Meeting& meeting = meet(&row, sizeof row, round);
    const unsigned lane = current->index % WARP_SIZE;
    for (unsigned i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned at_row = transposed ? lane % 4 * 2 + half : lane / 4;
            const unsigned at_col = transposed ? lane / 4 : lane % 4 * 2 + half;
            const uint16_t* address;
            memcpy(&address, meeting.brought[round][i * 8 + at_row], sizeof address);
            if (reinterpret_cast<uintptr_t>(address) % 16) fail("a row of a matrix that is not aligned");
            pair[half] = address[at_col];
        }
        to[i] = pair[0] | unsigned(pair[1]) << 16;
    }
}

inline double half_of(const unsigned char* brought, unsigned word, unsigned half) {
    unsigned bits;
    memcpy(&bits, brought + 4 * word, 4);
    bits = (bits >> (16 * half) & 0xffff) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace emulator

inline void load_matrices(unsigned (&to)[4], const void* row) { emulator::load_matrices(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
    emulator::load_matrices(to, row, true);
}

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    unsigned round;
    const emulator::Meeting& meeting = emulator::meet(mine, sizeof mine, round);
    const auto& brought = meeting.brought[round];
    const unsigned lane = emulator::current->index % emulator::WARP_SIZE, g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned high = i / 2, col = 2 * t + i % 2;
        double sum = 0.0;
        for (unsigned k = 0; k < 16; ++k) {
            const double left = emulator::half_of(brought[g * 4 + k % 8 / 2], high + 2 * (k / 8), k % 2);
            const double right = emulator::half_of(brought[col * 4 + k % 8 / 2], 4 + k / 8, k % 2);
            sum += left * right;
        }
        c[i] = float(double(c[i]) + sum);
    }
}

// The twins of cuda/hopper.cuh.

struct TensorMap;

namespace emulator {

// What the emulated device keeps in a TensorMap: see `tensor_map` in mod.rs.
struct Box {
    uint64_t address, rows, cols, box_rows, box_cols;
};

struct BoxCopy {
    unsigned char* to;
    Box box;
    unsigned col, row;
    const void* barrier;
};

inline std::vector<BoxCopy> boxes;  // On their way.

inline unsigned address_of(const void* shared) {
    const size_t offset = static_cast<const unsigned char*>(shared) - shared_memory;
    if (offset >= sizeof shared_memory) fail("an address that is not of shared memory");
    return unsigned(offset);
}

// "128B swizzle": bits 4 to 6 of an address in shared memory are exchanged by bits 7 to 9.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline PhaseBarrier& barrier_at(const void* place) {
    for (PhaseBarrier& barrier : barriers)
        if (barrier.place == place) return barrier;
    fail("a barrier that is not set up");
    static PhaseBarrier none;
    return none = {place, 1, 1, 0, 0};
}

inline void end_phase_if_done(PhaseBarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    barrier.phase += 1;
}

inline bool has_ended(const void* place, unsigned parity) { return barrier_at(place).phase % 2 != parity; }

inline void drop_boxes() { boxes.clear(); }

inline void bring(const BoxCopy& copy) {
    const Box& box = copy.box;
    const unsigned to = address_of(copy.to), line_bytes = unsigned(2 * box.box_cols);
    for (unsigned row = 0; row < box.box_rows; ++row)
        for (unsigned col = 0; col < box.box_cols; ++col) {
            const uint64_t at_row = uint64_t(copy.row) + row, at_col = uint64_t(copy.col) + col;
            uint16_t value = 0;
            if (at_row < box.rows && at_col < box.cols)
                value = reinterpret_cast<const uint16_t*>(box.address)[at_row * box.cols + at_col];
            memcpy(shared_memory + swizzled(to + row * line_bytes + 2 * col), &value, 2);
        }
    PhaseBarrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= int64_t(box.box_rows) * line_bytes;
    end_phase_if_done(barrier);
}

// Brings about half of what is on its way to a barrier; whether there was any.
inline bool bring_boxes(const void* place) {
    bool any = false;
    for (size_t i = 0; i < boxes.size();) {
        any |= boxes[i].barrier == place;
        if (boxes[i].barrier == place && random_word() % 2) {
            const BoxCopy copy = boxes[i];
            boxes.erase(boxes.begin() + i);
            bring(copy);
        } else {
            ++i;
        }
    }
    return any;
}

// Where element (row, depth) of an operand of a product lies. "Canonical layouts" of the PTX ISA, in elements of
// 128 bits, T = 8 numbers each: depth contiguous ((8, m), (T, 2)) : ((8 T, SBO), (1, T)), else
// ((T, 8, m), (8, k)) : ((1, T, LBO), (8 T, SBO)).
inline uint16_t element(uint64_t descriptor, bool depth_contiguous, unsigned row, unsigned depth) {
    const unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                   stride = (descriptor >> 32 & 0x3fff) << 4;
    unsigned at = start;
    if (depth_contiguous)
        at += row % 8 * 128 + row / 8 * stride + depth * 2;
    else
        at += row % 64 * 2 + row / 64 * leading + depth % 8 * 128 + depth / 8 * stride;
    at = swizzled(at);
    if (at + 2 > sizeof shared_memory) {
        fail("a product reads past shared memory");
        return 0;
    }
    uint16_t value;
    memcpy(&value, shared_memory + at, 2);
    return value;
}

inline double wide(uint16_t bits) {
    const uint32_t wide_bits = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide_bits, 4);
    return value;
}

// This thread's part of d [64, n] += left [64, 16] * right [16, n].
inline void multiply(const Product& product, unsigned thread) {
    const unsigned warp = thread / WARP_SIZE % 4, lane = thread % WARP_SIZE;
    double left[2][16];
    for (unsigned high = 0; high < 2; ++high)
        for (unsigned k = 0; k < 16; ++k)
            left[high][k] = wide(element(product.left, true, warp * 16 + high * 8 + lane / 4, k));
    for (unsigned j = 0; j < product.n / 8; ++j)
        for (unsigned odd = 0; odd < 2; ++odd) {
            double right[16];
            const unsigned col = j * 8 + lane % 4 * 2 + odd;
            for (unsigned k = 0; k < 16; ++k) right[k] = wide(element(product.right, product.transposed, col, k));
            for (unsigned high = 0; high < 2; ++high) {
                double sum = 0.0;
                for (unsigned k = 0; k < 16; ++k) sum += left[high][k] * right[k];
                float& to = product.sums[4 * j + 2 * high + odd];
                to = float(double(to) + sum);
            }
        }
}

template <size_t COUNT>
void start_product(float (&sums)[COUNT], uint64_t left, uint64_t right, bool transposed) {
    const uint64_t mine[2] = {left, right};
    unsigned round;
    const Meeting& meeting = meet(mine, sizeof mine, round);
    if (memcmp(meeting.brought[round][0], mine, sizeof mine)) fail("a product whose threads differ in its operands");
    for (const uint64_t descriptor : mine)
        if (descriptor >> 62 != 1 || descriptor >> 46 & 0xffff) fail("an operand without the 128-byte swizzle");
    current->products.back().push_back({sums, 2 * COUNT, transposed, left, right});
}

}  // namespace emulator

inline unsigned shared_address(const void* shared) { return emulator::address_of(shared); }

inline void barrier_init(unsigned long long* place, unsigned arrivals) {
    if (reinterpret_cast<uintptr_t>(place) % 8) emulator::fail("a barrier that is not aligned");
    emulator::barriers.push_back({place, arrivals, arrivals, 0, 0});
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(unsigned long long* place, unsigned bytes) {
    emulator::PhaseBarrier& barrier = emulator::barrier_at(place);
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) emulator::fail("more bytes than a barrier counts");
    if (barrier.pending == 0) return emulator::fail("one more arrives at a barrier than it waits for");
    barrier.pending -= 1;
    emulator::end_phase_if_done(barrier);
}
inline void barrier_arrive(unsigned long long* place) { barrier_arrive_expect(place, 0); }
inline void barrier_wait(unsigned long long* place, unsigned parity) {
    emulator::current->wait = emulator::Wait::Phase;
    emulator::current->barrier = place;
    emulator::current->parity = parity;
    emulator::yield_fiber();
}

inline void copy_box(void* shared, const TensorMap& map, unsigned col, unsigned row, unsigned long long* place) {
    emulator::BoxCopy copy{static_cast<unsigned char*>(shared), {}, col, row, place};
    memcpy(&copy.box, &map, sizeof copy.box);
    if (emulator::address_of(shared) % 1024 || copy.box.box_cols != 64 || copy.box.box_rows > 256)
        return emulator::fail("a box that is no whole lines of 128 bytes, or not where their swizzle starts");
    emulator::boxes.push_back(copy);
    if (emulator::random_word() % 2) emulator::bring_boxes(place);
}

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::current->products.emplace_back(); }
template <int GROUPS>
void wgmma_wait() {
    auto& products = emulator::current->products;
    while (products.size() > size_t(GROUPS) + 1) {
        for (const emulator::Product& product : products.front())
            emulator::multiply(product, emulator::current->index);
        products.erase(products.begin());
    }
    __syncwarp();
}
template <unsigned COUNT>
void wgmma_settle(float (&)[COUNT]) {}
template <bool TRANSPOSED, size_t COUNT>
void wgmma(float (&sums)[COUNT], unsigned long long left, unsigned long long right) {
    emulator::start_product(sums, left, right, TRANSPOSED);
}
template <int COUNT>
void registers_up_to() {}
template <int COUNT>
void registers_down_to() {}
