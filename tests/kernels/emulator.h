// CUDA on a CPU, for tests: just enough of the language to compile the .cu files as C++ and run them. Every thread of a
// block is a coroutine; it runs until it meets a barrier or a warp-wide instruction, where it waits for the others. Blocks
// run one after the other. Threads are resumed in random order, and some warps only when the others can go no further, so
// that a missing barrier shows up as a wrong number sooner or later.
//
// This checks indexing, tiling, fragment layouts and synchronisation. It says nothing about speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;
enum class Waiting { kNo, kWarp, kBlock, kDone };

struct Thread {
    dim3 index;
    Waiting waiting = Waiting::kNo;
    uint64_t offer[4] = {};  // what this thread shows to its warp
    ucontext_t start;
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<char[]> stack;
};

struct Machine {
    dim3 grid, block, block_index;
    std::vector<Thread> threads;
    std::function<void()> body;
    int current = 0;
    jmp_buf scheduler;
    std::mt19937 random{12345};

    Thread& me() { return threads[current]; }
    Thread& lane(int l) { return threads[current / 32 * 32 + l]; }
};
inline Machine& machine() {
    static Machine m;
    return m;
}

// Leave this coroutine until the scheduler resumes it.
__attribute__((noinline)) inline void wait(Waiting what) {
    Machine& m = machine();
    m.me().waiting = what;
    if (_setjmp(m.me().resume) == 0) _longjmp(m.scheduler, 1);
}

inline void enter() {
    Machine& m = machine();
    m.body();
    m.me().waiting = Waiting::kDone;
    _longjmp(m.scheduler, 1);
}

__attribute__((noinline)) inline void run_thread(int t) {
    Machine& m = machine();
    m.current = t;
    if (_setjmp(m.scheduler) != 0) return;
    Thread& thread = m.threads[t];
    thread.waiting = Waiting::kNo;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    setcontext(&thread.start);
}

// Whether all threads of [begin, end) that are not done wait at the same kind of barrier; then let them go on.
inline bool release(int begin, int end, Waiting what) {
    Machine& m = machine();
    bool any = false;
    for (int t = begin; t < end; ++t) {
        const Waiting w = m.threads[t].waiting;
        if (w == Waiting::kDone) continue;
        if (w != what) return false;
        any = true;
    }
    for (int t = begin; t < end && any; ++t)
        if (m.threads[t].waiting == what) m.threads[t].waiting = Waiting::kNo;
    return any;
}

inline void run_block() {
    Machine& m = machine();
    const int count = int(m.block.x * m.block.y * m.block.z);
    std::vector<int> order(count);
    for (int t = 0; t < count; ++t) {
        Thread& thread = m.threads[t];
        order[t] = t;
        thread.index = dim3(t % m.block.x, t / m.block.x % m.block.y, t / m.block.x / m.block.y);
        thread.waiting = Waiting::kNo;
        thread.started = false;
        if (!thread.stack) thread.stack.reset(new char[kStackBytes]);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = kStackBytes;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, enter, 0);
    }
    unsigned lagging = m.random() & m.random();  // one bit for each warp
    while (true) {
        std::shuffle(order.begin(), order.end(), m.random);
        bool ran = false, held_back = false;
        for (const int t : order) {
            if (m.threads[t].waiting != Waiting::kNo) continue;
            const bool lags = lagging >> (t / 32 % 32) & 1;
            ran |= !lags;
            held_back |= lags;
            if (!lags) run_thread(t);
        }
        for (int w = 0; w < count; w += 32) ran |= release(w, std::min(w + 32, count), Waiting::kWarp);
        if (release(0, count, Waiting::kBlock)) {
            ran = true;
            lagging = m.random() & m.random();
        }
        if (ran) continue;
        if (held_back) {  // the others can go no further
            lagging = 0;
            continue;
        }
        const bool done = std::all_of(m.threads.begin(), m.threads.begin() + count,
                                      [](const Thread& t) { return t.waiting == Waiting::kDone; });
        if (done) return;
        std::fprintf(stderr, "emulator: deadlock, threads of one block wait at different barriers\n");
        std::abort();
    }
}

template <class Kernel, class Args>
void launch(Kernel kernel, dim3 grid, dim3 block, const Args& args) {
    Machine& m = machine();
    m.grid = grid;
    m.block = block;
    m.threads.resize(std::max<size_t>(m.threads.size(), block.x * block.y * block.z));
    m.body = [&] { kernel(args); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                m.block_index = dim3(x, y, z);
                run_block();
            }
}

// Show a value to the warp and read those of all lanes. Lanes that have left show nothing.
template <class T>
uint64_t to_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class Read>
auto exchange(std::initializer_list<uint64_t> offers, const Read& read) {
    std::copy(offers.begin(), offers.end(), machine().me().offer);
    wait(Waiting::kWarp);
    auto result = read();
    wait(Waiting::kWarp);  // nobody overwrites an offer before all have read it
    return result;
}
inline int lane_id() { return machine().current % 32; }

}  // namespace emulator

#define threadIdx (emulator::machine().me().index)
#define blockIdx (emulator::machine().block_index)
#define blockDim (emulator::machine().block)
#define gridDim (emulator::machine().grid)
#define LSH_LAUNCH(kernel, grid, block, stream, args) ((void)(stream), emulator::launch(kernel, grid, block, args))

inline void __syncthreads() { emulator::wait(emulator::Waiting::kBlock); }
inline void __syncwarp() { emulator::wait(emulator::Waiting::kWarp); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    return emulator::exchange({emulator::to_bits(value)},
                              [&] { return emulator::from_bits<T>(emulator::machine().lane(from).offer[0]); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, emulator::lane_id() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
    const int from = emulator::lane_id() - step;
    return __shfl_sync(mask, value, from < 0 ? emulator::lane_id() : from);
}
inline unsigned __match_any_sync(unsigned, unsigned value) {
    return emulator::exchange({value}, [&] {
        unsigned same = 0;
        for (int l = 0; l < 32; ++l) same |= unsigned(emulator::machine().lane(l).offer[0] == value) << l;
        return same;
    });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}
template <class T>
T atomicMin(T* to, T value) {
    const T before = *to;
    *to = std::min(before, value);
    return before;
}
template <class T>
T atomicMax(T* to, T value) {
    const T before = *to;
    *to = std::max(before, value);
    return before;
}

// The instructions of mma.cuh.
namespace megatron_lsh {

inline void copy_16_bytes(void* to, const void* from, bool inside) {
    if (inside) {
        std::memcpy(to, from, 16);
    } else {
        std::memset(to, 0, 16);
    }
}
inline void commit_copies() {}
template <int pending>
void wait_for_copies() {}

// Lane l receives columns 2 (l % 4) and the next of row l / 4 of each matrix.
inline void load_matrices(uint32_t (&to)[4], const void* row) {
    emulator::exchange({emulator::to_bits(row)}, [&] {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const int l = emulator::lane_id();
            const auto bits = emulator::machine().lane(matrix * 8 + l / 4).offer[0];
            std::memcpy(&to[matrix], emulator::from_bits<const char*>(bits) + l % 4 * 4, 4);
        }
        return 0;
    });
}

// Fragments as the PTX manual lays them out for mma.m16n8k16.
template <class T>
void multiply_accumulate(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
    const auto pair = [](uint32_t low, uint32_t high) { return uint64_t(high) << 32 | low; };
    emulator::exchange({pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1])}, [&] {
        const int lane = emulator::lane_id();
        const auto number = [](int l, int word, int half) {
            const uint32_t bits = uint32_t(emulator::machine().lane(l).offer[word / 2] >> (word % 2 * 32));
            return widen(T{uint16_t(bits >> (half * 16))});
        };
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
                const float left = number(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
                const float right = number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
                acc[i] += left * right;
            }
        }
        return 0;
    });
}

}  // namespace megatron_lsh
