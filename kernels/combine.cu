// Restore and its derivatives: every token gathers the K rows it needs, so nothing is scattered and nothing added
// atomically.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256;

// The V numbers at `feature` of row i of a [., D] array.
template <int V, class T>
LSH_DEVICE Pack<T, V> row_pack(const void* rows, int64_t i, int64_t features, int64_t feature) {
    return load_pack<V>(static_cast<const T*>(rows) + i * features + feature);
}

// A thread owns V features of one token and writes them once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineArgs a) {
    const int64_t t = grid_row(), f = grid_feature(V);
    if (t >= a.tokens || f >= a.features) return;
    Pack<T, V> row{};
    if (a.row) row = row_pack<V, T>(a.row, t, a.features, f);
    float acc[V] = {};
#pragma unroll 4
    for (int64_t k = 0; k < a.slots; ++k) {
        const int64_t i = a.index[t * a.slots + k];
        if (i < 0) continue;
        const float w = a.weight ? static_cast<const float*>(a.weight)[t * a.slots + k] : 1.0f;
        const Pack<T, V> x = row_pack<V, T>(a.source, i, a.features, f);
        Pack<T, V> c{};
        if (a.centroid) c = row_pack<V, T>(a.centroid, i, a.features, f);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[v] = add_product(acc[v], w, restored(widen(x.v[v]), widen(row.v[v]), widen(c.v[v])));
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(acc[v], out.v[v]);
    store_pack(static_cast<T*>(a.out) + t * a.features + f, out);
}

// A warp per token, which reads the token's gradient once for four choices.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) dots_kernel(const DotsArgs a) {
    constexpr int kSlots = 4;
    const int64_t t = flat_index() / kWarpSize;
    if (t >= a.tokens) return;  // a whole warp leaves
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t first = 0; first < a.slots; first += kSlots) {
        int64_t source[kSlots];
        float sum[kSlots] = {};
#pragma unroll
        for (int k = 0; k < kSlots; ++k) source[k] = first + k < a.slots ? a.index[t * a.slots + first + k] : -1;
        for (int64_t f = int64_t(lane) * V; f < a.features; f += kWarpSize * V) {
            const Pack<T, V> g = row_pack<V, T>(a.grad, t, a.features, f);
            Pack<T, V> row{};
            if (a.row) row = row_pack<V, T>(a.row, t, a.features, f);
#pragma unroll
            for (int k = 0; k < kSlots; ++k) {
                if (source[k] < 0) continue;  // the same for the whole warp
                const Pack<T, V> x = row_pack<V, T>(a.source, source[k], a.features, f);
                Pack<T, V> c{};
                if (a.row) c = row_pack<V, T>(a.centroid, source[k], a.features, f);
#pragma unroll
                for (int v = 0; v < V; ++v)
                    sum[k] += widen(g.v[v]) * restored(widen(x.v[v]), widen(row.v[v]), widen(c.v[v]));
            }
        }
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
            for (int step = kWarpSize / 2; step > 0; step /= 2) sum[k] += __shfl_xor_sync(kFullWarp, sum[k], step);
            if (lane == 0 && first + k < a.slots) static_cast<float*>(a.out)[t * a.slots + first + k] = sum[k];
        }
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) spread_kernel(const SpreadArgs a) {
    const int64_t t = grid_row(), f = grid_feature(V);
    if (t >= a.tokens || f >= a.features) return;
    Pack<T, V> g{};
    if (a.grad) g = row_pack<V, T>(a.grad, t, a.features, f);
    float acc[V] = {};
#pragma unroll 4
    for (int64_t k = 0; k < a.slots; ++k) {
        const int64_t i = a.index[t * a.slots + k];
        if (i < 0) continue;
        const float scale = divide(1.0f, a.sizes[i]);
        if (a.grad && a.sizes[i] > 1) {
            const float w = a.weight ? static_cast<const float*>(a.weight)[t * a.slots + k] : 1.0f;
            const Pack<T, V> s = row_pack<V, T>(a.sum, i, a.features, f);
#pragma unroll
            for (int v = 0; v < V; ++v) acc[v] += around_expert(w * widen(g.v[v]), widen(s.v[v]), scale);
        }
        if (a.grad_centroid) {
            const Pack<T, V> c = row_pack<V, T>(a.grad_centroid, i, a.features, f);
#pragma unroll
            for (int v = 0; v < V; ++v) acc[v] += widen(c.v[v]) * scale;
        }
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(acc[v], out.v[v]);
    store_pack(static_cast<T*>(a.out) + t * a.features + f, out);
}

}  // namespace

extern "C" int lsh_combine_cuda(const CombineArgs& a, void* stream) {
    const bool aligned = aligned_16(a.source, a.row, a.centroid, a.out);
    return by_dtype(a.dtype, a.features, aligned, [&](auto type, auto width) {
        constexpr int V = decltype(width)::value;
        const auto kernel = combine_kernel<decltype(type), V>;
        const RowGrid grid(a.tokens, a.features, V);
        LSH_LAUNCH(kernel, grid.blocks, grid.threads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_dots_cuda(const DotsArgs& a, void* stream) {
    const bool aligned = aligned_16(a.grad, a.source, a.row, a.centroid);
    return by_dtype(a.dtype, a.features, aligned, [&](auto type, auto width) {
        const auto kernel = dots_kernel<decltype(type), decltype(width)::value>;
        LSH_LAUNCH(kernel, unsigned(ceil_div(a.tokens, kThreads / kWarpSize)), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_spread_cuda(const SpreadArgs& a, void* stream) {
    const bool aligned = aligned_16(a.grad, a.sum, a.grad_centroid, a.out);
    return by_dtype(a.dtype, a.features, aligned, [&](auto type, auto width) {
        constexpr int V = decltype(width)::value;
        const auto kernel = spread_kernel<decltype(type), V>;
        const RowGrid grid(a.tokens, a.features, V);
        LSH_LAUNCH(kernel, grid.blocks, grid.threads, cudaStream_t(stream), a);
    });
}

}  // namespace megatron_lsh
