// Plan and regroup: from keys (or nearest centroids) to clusters in order. One block per expert, whose rows are contiguous,
// so experts need nothing from each other and the host needs to know nothing.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

#if !defined(LSH_PLAN_THREADS)
#define LSH_PLAN_THREADS 1024
#endif
constexpr int kThreads = LSH_PLAN_THREADS;
constexpr int kLinkThreads = 256;

using Memory = SortMemory<kThreads>;

// One expert's rows and clusters, and its part of the scratch: [6 N + C] words of 8 bytes.
struct Group {
    int64_t first_row, num_rows, first_cluster, num_clusters;
    uint64_t* keys[2];
    uint32_t* values[4];
    uint64_t* per_cluster;
};

template <class Args>
LSH_DEVICE Group group_of(const Args& a, int64_t expert) {
    Group g;
    g.first_row = begin_of(a.row_ends, expert, a.rows);
    g.num_rows = end_of(a.row_ends, expert, a.rows) - g.first_row;
    g.first_cluster = begin_of(a.cluster_ends, expert, a.clusters);
    g.num_clusters = end_of(a.cluster_ends, expert, a.clusters) - g.first_cluster;
    for (int i = 0; i < 2; ++i) g.keys[i] = a.scratch + i * a.rows + g.first_row;
    for (int i = 0; i < 4; ++i) g.values[i] = reinterpret_cast<uint32_t*>(a.scratch + (2 + i) * a.rows) + g.first_row;
    g.per_cluster = a.scratch + 6 * a.rows + g.first_cluster;
    return g;
}

// The values in the buffer that sort_pairs ended in. (Not values[buffer]: an array indexed at run time lies in local
// memory.)
LSH_DEVICE const uint32_t* sorted_values(const Group& g, int buffer) { return buffer ? g.values[1] : g.values[0]; }

// What the ends leave over belongs to no expert: rows behind the last one's stay in order, clusters behind its are empty.
template <class Args>
LSH_DEVICE void settle_rest(const Args& a) {
    for (int64_t n = end_of(a.row_ends, a.experts - 1, a.rows) + threadIdx.x; n < a.rows; n += kThreads) {
        a.cluster[n] = 0;
        a.order[n] = n;
    }
    for (int64_t c = end_of(a.cluster_ends, a.experts - 1, a.clusters) + threadIdx.x; c < a.clusters; c += kThreads) {
        a.sizes[c] = 0;
        a.offsets[c] = a.rows;
    }
}

// Bits needed to write numbers below `count`.
LSH_DEVICE int bit_length(uint64_t count) { return count > 1 ? 64 - leading_zeros(count - 1) : 0; }

LSH_DEVICE void add_one(int64_t* counter) { atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull); }

// Given the cluster of each row, fill sizes, offsets and order (rows by cluster; within one, as they were).
template <class Args>
LSH_DEVICE void order_group(const Args& a, const Group& g, Memory& memory) {
    int64_t* sizes = a.sizes + g.first_cluster;
    for (int64_t c = threadIdx.x; c < g.num_clusters; c += kThreads) sizes[c] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
        const int64_t cluster = a.cluster[g.first_row + i] - g.first_cluster;
        add_one(sizes + cluster);
        g.keys[0][i] = uint64_t(cluster);
        g.values[0][i] = uint32_t(i);
    }
    __syncthreads();
    const Pairs pairs{{g.keys[0], g.keys[1]}, {g.values[0], g.values[1]}};
    const int sorted = sort_pairs<kThreads>(pairs, g.num_rows, bit_length(g.num_clusters), memory);
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads)
        a.order[g.first_row + i] = g.first_row + sorted_values(g, sorted)[i];
    int64_t offset = g.first_row;
    for (int64_t first = 0; first < g.num_clusters; first += kThreads) {
        const int64_t c = first + threadIdx.x;
        unsigned total;
        const unsigned before = exclusive_sum<kThreads>(c < g.num_clusters ? unsigned(sizes[c]) : 0, &total);
        if (c < g.num_clusters) a.offsets[g.first_cluster + c] = offset + before;
        offset += total;
    }
}

// Sort each expert's rows by key: keys into keys[0], rows into values[2].
__global__ void __launch_bounds__(kThreads, 1) sort_kernel(const PlanArgs a) {
    __shared__ Memory memory;
    const Group g = group_of(a, blockIdx.x);
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
        g.keys[0][i] = a.key[g.first_row + i];
        g.values[0][i] = uint32_t(i);
    }
    __syncthreads();
    const Pairs pairs{{g.keys[0], g.keys[1]}, {g.values[0], g.values[1]}};
    const int sorted = sort_pairs<kThreads>(pairs, g.num_rows, a.num_hashes * a.code_bits, memory);
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
        if (sorted) g.keys[0][i] = g.keys[1][i];
        g.values[2][i] = sorted_values(g, sorted)[i];
    }
}

// How strongly each sorted row is tied to its predecessor, into keys[1]: a warp per row.
__global__ void __launch_bounds__(kLinkThreads) link_kernel(const PlanArgs a) {
    const int64_t n = flat_index() / kWarpSize;
    if (n >= a.rows) return;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t expert = upper_bound(a.row_ends, a.experts, n);
    if (expert == a.experts) return;  // a row behind the last expert's
    const Group g = group_of(a, expert);
    const int64_t i = n - g.first_row;
    double gap = 0;
    if (i > 0) {
        const int64_t row = g.first_row + g.values[2][i], previous = g.first_row + g.values[2][i - 1];
        const float* x = a.projection + source_of(a.index, row) * a.features;
        const float* y = a.projection + source_of(a.index, previous) * a.features;
        for (int64_t p = lane; p < a.features; p += kWarpSize) {
            const double difference = x[p] - y[p];
            gap += difference * difference;
        }
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) gap += __shfl_xor_sync(kFullWarp, gap, step);
    if (lane == 0) {
        const int common = i > 0 ? common_codes(g.keys[0][i], g.keys[0][i - 1], a.num_hashes, a.code_bits) : 0;
        g.keys[1][i] = ordered(i > 0 ? link_strength(common, gap) : kNoLink);
    }
}

// The `wanted`-th smallest of `count` keys, by eight passes over them that look at one byte each, and in *equals how many of
// the wanted keys equal it. Nothing is moved. Ends with a barrier.
LSH_DEVICE uint64_t select_key(const uint64_t* keys, int64_t count, int64_t wanted, int64_t* equals, Memory& memory) {
    __shared__ uint64_t chosen;
    __shared__ int64_t remaining;
    if (threadIdx.x == 0) chosen = 0, remaining = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int d = threadIdx.x; d < kDigits; d += kThreads) memory.base[d] = 0;
        __syncthreads();
        const uint64_t prefix = chosen, above = shift == 56 ? 0 : ~uint64_t(0) << (shift + 8);
        const int64_t rest = remaining;
        for (int64_t i = threadIdx.x; i < count; i += kThreads)
            if ((keys[i] & above) == prefix) atomicAdd(&memory.base[(keys[i] >> shift) & 255], 1u);
        __syncthreads();
        scan_digits(memory.base);
        __syncthreads();
        for (int d = threadIdx.x; d < kDigits; d += kThreads) {
            const int64_t begin = memory.base[d], end = d + 1 < kDigits ? int64_t(memory.base[d + 1]) : rest;
            if (begin < rest && rest <= end) {  // true of one digit
                chosen |= uint64_t(d) << shift;
                remaining = rest - begin;
            }
        }
        __syncthreads();
    }
    *equals = remaining;
    return chosen;
}

// Mark the `wanted` smallest keys with ones, of equal ones the first. Ends with a barrier.
LSH_DEVICE void mark_smallest(const uint64_t* keys, int64_t count, int64_t wanted, uint32_t* marks, Memory& memory) {
    int64_t equals;
    const uint64_t largest = select_key(keys, count, wanted, &equals, memory);
    int64_t taken = 0;
    for (int64_t first = 0; first < count; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        const unsigned equal = i < count && keys[i] == largest;
        unsigned total;
        const int64_t before = taken + exclusive_sum<kThreads>(equal, &total);
        if (i < count) marks[i] = keys[i] < largest || (equal && before < equals);
        taken += total;
    }
    __syncthreads();
}

// Start a cluster at each of the budget's weakest links, and number clusters by their first rows.
__global__ void __launch_bounds__(kThreads, 1) cut_kernel(const PlanArgs a) {
    __shared__ Memory memory;
    const Group g = group_of(a, blockIdx.x);
    uint64_t* first_row_of = g.per_cluster;
    int64_t* number_of = a.sizes + g.first_cluster;  // until sizes are known
    const uint32_t* row_at = g.values[2];
    uint32_t* starts = g.values[3];
    for (int64_t c = threadIdx.x; c < g.num_clusters; c += kThreads) first_row_of[c] = ~uint64_t(0);
    __syncthreads();
    mark_smallest(g.keys[1], g.num_rows, g.num_clusters, starts, memory);
    int64_t carry = -1;
    for (int64_t first = 0; first < g.num_rows; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        const unsigned start = i < g.num_rows ? starts[i] : 0;
        unsigned total;
        const int64_t cluster = carry + exclusive_sum<kThreads>(start, &total) + start;
        if (i < g.num_rows) {
            a.cluster[g.first_row + row_at[i]] = cluster;
            atomicMin(reinterpret_cast<unsigned long long*>(first_row_of + cluster), (unsigned long long)(row_at[i]));
        }
        carry += total;
    }
    __syncthreads();
    int64_t numbered = 0;
    for (int64_t first = 0; first < g.num_rows; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        const int64_t cluster = i < g.num_rows ? a.cluster[g.first_row + i] : 0;
        const unsigned is_first = i < g.num_rows && first_row_of[cluster] == uint64_t(i);
        unsigned total;
        const int64_t number = numbered + exclusive_sum<kThreads>(is_first, &total);
        if (is_first) number_of[cluster] = number;
        numbered += total;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads)
        a.cluster[g.first_row + i] = g.first_cluster + number_of[a.cluster[g.first_row + i]];
    __syncthreads();
    order_group(a, g, memory);
    if (blockIdx.x + 1 == gridDim.x) settle_rest(a);
}

// Put the rows, farthest first, into the empty clusters, one each. The last row of each cluster in this order stays, so that
// no cluster is emptied to fill another. Ends with a barrier.
LSH_DEVICE void move_farthest(const RegroupArgs& a, const Group& g, const uint32_t* farthest, const uint64_t* empty,
                              int64_t empties) {
    int64_t* last_of = a.offsets;  // position of each cluster's last row; offsets are not known yet
    for (int64_t c = threadIdx.x; c < g.num_clusters; c += kThreads) last_of[g.first_cluster + c] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
        int64_t* last = last_of + a.nearest[g.first_row + farthest[i]];
        atomicMax(reinterpret_cast<unsigned long long*>(last), (unsigned long long)(i));
    }
    __syncthreads();
    int64_t moved = 0;
    for (int64_t first = 0; first < g.num_rows && moved < empties; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        const int64_t n = i < g.num_rows ? g.first_row + farthest[i] : 0;
        const unsigned may_move = i < g.num_rows && last_of[a.nearest[n]] != i;
        unsigned total;
        const int64_t position = moved + exclusive_sum<kThreads>(may_move, &total);
        if (may_move && position < empties) a.cluster[n] = int64_t(empty[position]);
        moved += total;
    }
    __syncthreads();
}

// Give the k empty clusters of an expert k of its farthest rows, then put its clusters in order.
__global__ void __launch_bounds__(kThreads, 1) regroup_kernel(const RegroupArgs a) {
    __shared__ Memory memory;
    const Group g = group_of(a, blockIdx.x);
    int64_t* sizes = a.sizes + g.first_cluster;
    uint64_t* empty = g.per_cluster;
    for (int64_t c = threadIdx.x; c < g.num_clusters; c += kThreads) sizes[c] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
        const int64_t cluster = a.nearest[g.first_row + i];
        a.cluster[g.first_row + i] = cluster;
        add_one(sizes + (cluster - g.first_cluster));
    }
    __syncthreads();
    int64_t empties = 0;
    for (int64_t first = 0; first < g.num_clusters; first += kThreads) {
        const int64_t c = first + threadIdx.x;
        const unsigned is_empty = c < g.num_clusters && sizes[c] == 0;
        unsigned total;
        const int64_t position = empties + exclusive_sum<kThreads>(is_empty, &total);
        if (is_empty) empty[position] = uint64_t(g.first_cluster + c);
        empties += total;
    }
    __syncthreads();
    if (empties > 0) {  // the same for all threads
        for (int64_t i = threadIdx.x; i < g.num_rows; i += kThreads) {
            g.keys[0][i] = ~ordered(a.distance[g.first_row + i]);
            g.values[0][i] = uint32_t(i);
        }
        __syncthreads();
        const Pairs pairs{{g.keys[0], g.keys[1]}, {g.values[0], g.values[1]}};
        const int sorted = sort_pairs<kThreads>(pairs, g.num_rows, 32, memory);
        move_farthest(a, g, sorted_values(g, sorted), empty, empties);
    }
    order_group(a, g, memory);
    if (blockIdx.x + 1 == gridDim.x) settle_rest(a);
}

}  // namespace

extern "C" int lsh_plan_cuda(const PlanArgs& a, void* stream) {
    const auto s = cudaStream_t(stream);
    LSH_LAUNCH(sort_kernel, unsigned(a.experts), kThreads, s, a);
    LSH_LAUNCH(link_kernel, unsigned(ceil_div(a.rows, kLinkThreads / kWarpSize)), kLinkThreads, s, a);
    LSH_LAUNCH(cut_kernel, unsigned(a.experts), kThreads, s, a);
    return int(cudaGetLastError());
}

extern "C" int lsh_regroup_cuda(const RegroupArgs& a, void* stream) {
    LSH_LAUNCH(regroup_kernel, unsigned(a.experts), kThreads, cudaStream_t(stream), a);
    return int(cudaGetLastError());
}

}  // namespace megatron_lsh
