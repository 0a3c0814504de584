// What the CUDA files share: launching, vector access, and the few block-wide algorithms that planning needs.
//
// Everything is deterministic: sums run in a fixed order, and the only atomics are on integers. The tests compile these
// files as C++ against tests/kernels/emulator.h (LSH_EMULATED), which runs the threads of a block as coroutines.
#pragma once

#if defined(LSH_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#define LSH_LAUNCH(kernel, grid, block, stream, args) (kernel)<<<(grid), (block), 0, stream>>>(args)
#endif

#include "arithmetic.h"
#include "kernels.h"

#define LSH_MEMBER __device__ __forceinline__
#define LSH_DEVICE static LSH_MEMBER

namespace megatron_lsh {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;
constexpr int kWarpSize = 32;

LSH_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The position of this thread in a flat grid.
LSH_DEVICE int64_t flat_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// The sum over the lanes of a warp, in every lane.
LSH_DEVICE float warp_sum(float x) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
    return x;
}

// A grid with a thread for each V features of each row: neighbouring threads along x, rows along y where a row does not fill
// a block. No thread divides.
constexpr int kRowThreads = 256;

struct RowGrid {
    dim3 blocks, threads;
    RowGrid(int64_t rows, int64_t features, int width) {
        const int64_t chunks = features / width, x = ceil_div(chunks, kWarpSize) * kWarpSize;
        threads = dim3(unsigned(x < kRowThreads ? x : kRowThreads));
        threads.y = kRowThreads / threads.x;
        blocks = dim3(unsigned(ceil_div(rows, threads.y)), unsigned(ceil_div(chunks, threads.x)));
    }
};
LSH_DEVICE int64_t grid_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
LSH_DEVICE int64_t grid_feature(int width) { return (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * width; }

// V neighbouring numbers, read or written in one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
};
template <int V, class T>
LSH_DEVICE Pack<T, V> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
LSH_DEVICE void store_pack(T* p, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Call body(T{}, width) with the element type of a dtype, and 16 bytes' worth of elements if all rows allow such accesses,
// else 1. fp64 is the CPU's business.
template <class T, class Body>
int with_width(int64_t features, bool aligned, const Body& body) {
    constexpr int wide = 16 / sizeof(T);
    if (aligned && features % wide == 0) {
        body(T{}, std::integral_constant<int, wide>{});
    } else {
        body(T{}, std::integral_constant<int, 1>{});
    }
    return int(cudaGetLastError());
}
template <class Body>
int by_dtype(DType dtype, int64_t features, bool aligned, const Body& body) {
    switch (dtype) {
        case kFloat32:
            return with_width<float>(features, aligned, body);
        case kFloat16:
            return with_width<Half>(features, aligned, body);
        case kBFloat16:
            return with_width<BFloat16>(features, aligned, body);
        default:
            return int(cudaErrorInvalidValue);
    }
}
template <class... P>
bool aligned_16(P... pointers) {
    return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

// Block-wide algorithms. All threads of the block call them together; kThreads is a multiple of 32.

// The sum of `value` over the threads before this one, and in *total over all.
template <int kThreads>
LSH_DEVICE unsigned exclusive_sum(unsigned value, unsigned* total) {
    __shared__ unsigned warp_sums[kThreads / kWarpSize];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    unsigned sum = value;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    unsigned before = 0, all = 0;
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
        before += w < warp ? warp_sums[w] : 0;
        all += warp_sums[w];
    }
    __syncthreads();  // the next call overwrites warp_sums
    *total = all;
    return before + sum - value;
}

constexpr int kDigits = 256;

template <int kThreads>
struct SortMemory {
    unsigned base[kDigits];
    unsigned count[kThreads / kWarpSize][kDigits];
    int trivial;
};

// Pairs to sort, twice: a pass reads one buffer and writes the other.
struct Pairs {
    uint64_t* keys[2];
    uint32_t* values[2];
};

// Where each digit's pairs begin, from how many there are. Done by the first warp.
LSH_DEVICE void scan_digits(unsigned* base) {
    constexpr int each = kDigits / kWarpSize;
    if (threadIdx.x >= kWarpSize) return;
    unsigned mine = 0;
    for (int i = 0; i < each; ++i) mine += base[threadIdx.x * each + i];
    unsigned sum = mine;
    for (int step = 1; step < kWarpSize; step *= 2) {
        const unsigned other = __shfl_up_sync(kFullWarp, sum, step);
        if (int(threadIdx.x) >= step) sum += other;
    }
    unsigned begin = sum - mine;
    for (int i = 0; i < each; ++i) {
        const unsigned count = base[threadIdx.x * each + i];
        base[threadIdx.x * each + i] = begin;
        begin += count;
    }
}

template <class T>
LSH_DEVICE void swap_pointers(T*& a, T*& b) {
    T* const other = a;
    a = b;
    b = other;
}

// Sort `count` pairs by the lowest `bits` of their keys, stably (radix sort, 8 bits a pass; passes in which all digits agree
// are skipped). Pairs start in buffer 0; returns the buffer they end in. Ends with a barrier.
template <int kThreads>
LSH_DEVICE int sort_pairs(const Pairs& pairs, int64_t count, int bits, SortMemory<kThreads>& memory) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    // Pointers that change places; an array indexed by the pass would lie in local memory.
    uint64_t *keys = pairs.keys[0], *other_keys = pairs.keys[1];
    uint32_t *values = pairs.values[0], *other_values = pairs.values[1];
    int current = 0;
    for (int shift = 0; shift < bits; shift += 8) {
        for (int d = threadIdx.x; d < kDigits; d += kThreads) memory.base[d] = 0;
        if (threadIdx.x == 0) memory.trivial = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < count; i += kThreads) atomicAdd(&memory.base[(keys[i] >> shift) & 255], 1u);
        __syncthreads();
        for (int d = threadIdx.x; d < kDigits; d += kThreads)
            if (memory.base[d] == count) memory.trivial = 1;
        __syncthreads();
        if (memory.trivial) {
            __syncthreads();  // memory.trivial is reset by the next pass
            continue;
        }
        scan_digits(memory.base);
        for (int64_t first = 0; first < count; first += kThreads) {
            for (int d = threadIdx.x; d < kThreads / kWarpSize * kDigits; d += kThreads) (&memory.count[0][0])[d] = 0;
            __syncthreads();
            const int64_t i = first + threadIdx.x;
            const uint64_t key = i < count ? keys[i] : 0;
            const unsigned digit = i < count ? unsigned(key >> shift) & 255u : unsigned(kDigits);
            const unsigned same = __match_any_sync(kFullWarp, digit);
            const int rank = __popc(same & ((1u << lane) - 1));
            if (i < count && rank == 0) memory.count[warp][digit] = __popc(same);
            __syncthreads();
            for (int d = threadIdx.x; d < kDigits; d += kThreads) {
                unsigned next = memory.base[d];
                for (int w = 0; w < kThreads / kWarpSize; ++w) {
                    const unsigned here = memory.count[w][d];
                    memory.count[w][d] = next;
                    next += here;
                }
                memory.base[d] = next;
            }
            __syncthreads();
            if (i < count) {
                const unsigned to = memory.count[warp][digit] + rank;
                other_keys[to] = key;
                other_values[to] = values[i];
            }
            __syncthreads();
        }
        swap_pointers(keys, other_keys);
        swap_pointers(values, other_values);
        current = 1 - current;
    }
    __syncthreads();
    return current;
}

}  // namespace megatron_lsh
