// Compress: the mean (or weighted sum) of each cluster's rows, read where they lie and written where they travel from. A
// thread owns 16 bytes' worth of one cluster's features and walks the cluster's rows in order, four loads in flight.
//
// A cluster may hold thousands of rows (think of padding). So that no thread walks them alone, windows of kWindow rows in
// cluster order that lie within one cluster are summed first, by threads of their own; the walk then takes a window for a
// row.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kUnroll = 4;

template <class T, int V>
struct Walker {
    const SegmentArgs& a;
    int64_t feature;  // the first of this thread's V
    float acc[V];

    LSH_MEMBER const T* source_row(int64_t n) const {
        return static_cast<const T*>(a.source) + source_of(a.index, n) * a.features + feature;
    }
    LSH_MEMBER float weight(int64_t n) const { return static_cast<const float*>(a.weight)[n]; }

    // Add the rows at positions [begin, end) of the cluster order.
    LSH_MEMBER void add_rows(int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + kUnroll <= end; i += kUnroll) {
            Pack<T, V> x[kUnroll];
            float w[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int64_t n = a.order[i + u];
                x[u] = load_pack<V>(source_row(n));
                w[u] = a.weight ? weight(n) : 1.0f;
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) add(x[u], w[u]);
        }
        for (; i < end; ++i) {
            const int64_t n = a.order[i];
            add(load_pack<V>(source_row(n)), a.weight ? weight(n) : 1.0f);
        }
    }
    LSH_MEMBER void add(const Pack<T, V>& x, float w) {
#pragma unroll
        for (int v = 0; v < V; ++v) acc[v] = add_product(acc[v], w, widen(x.v[v]));
    }
};

// scratch[i] = sum of the rows at positions [i kWindow, (i + 1) kWindow), if one cluster holds them all.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 4) window_kernel(const SegmentArgs a) {
    const int64_t window = grid_row(), feature = grid_feature(V);
    const int64_t begin = window * kWindow, end = begin + kWindow;
    if (end > a.rows || feature >= a.features) return;
    const int64_t cluster = upper_bound(a.offsets, a.clusters, begin) - 1;
    if (end > a.offsets[cluster] + a.sizes[cluster]) return;
    Walker<T, V> walker{a, feature, {}};
    walker.add_rows(begin, end);
    Pack<float, V> sum;
#pragma unroll
    for (int v = 0; v < V; ++v) sum.v[v] = walker.acc[v];
    store_pack(a.scratch + window * a.features + walker.feature, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(kRowThreads, 4) segment_kernel(const SegmentArgs a) {
    const int64_t cluster = grid_row(), feature = grid_feature(V);
    if (cluster >= a.clusters || feature >= a.features) return;
    Walker<T, V> walker{a, feature, {}};
    const int64_t begin = a.offsets[cluster], size = a.sizes[cluster], end = begin + size;
    for (int64_t i = begin; i < end;) {
        const int64_t next = (i / kWindow + 1) * kWindow;  // where a window may begin
        if (i % kWindow == 0 && next <= end) {
            const Pack<float, V> sum = load_pack<V>(a.scratch + i / kWindow * a.features + walker.feature);
#pragma unroll
            for (int v = 0; v < V; ++v) walker.acc[v] += sum.v[v];
            i = next;
        } else {
            const int64_t stop = next < end ? next : end;
            walker.add_rows(i, stop);
            i = stop;
        }
    }
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(a.mean && size > 1 ? divide(walker.acc[v], size) : walker.acc[v], out.v[v]);
    store_pack(static_cast<T*>(a.out) + cluster * a.features + walker.feature, out);
    if (!a.residual) return;
    for (int64_t i = begin; i < end; ++i) {
        const Pack<T, V> x = load_pack<V>(walker.source_row(a.order[i]));
        Pack<T, V> r;
#pragma unroll
        for (int v = 0; v < V; ++v) narrow(widen(x.v[v]) - widen(out.v[v]), r.v[v]);
        store_pack(static_cast<T*>(a.residual) + a.order[i] * a.features + walker.feature, r);
    }
}

}  // namespace

extern "C" int lsh_segment_cuda(const SegmentArgs& a, void* stream) {
    const auto s = cudaStream_t(stream);
    const bool aligned = aligned_16(a.source, a.out, a.residual, a.scratch);
    return by_dtype(a.dtype, a.features, aligned, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int V = decltype(width)::value;
        if (a.rows >= kWindow) {
            const RowGrid windows(a.rows / kWindow, a.features, V);
            const auto kernel = window_kernel<T, V>;
            LSH_LAUNCH(kernel, windows.blocks, windows.threads, s, a);
        }
        const RowGrid clusters(a.clusters, a.features, V);
        const auto kernel = segment_kernel<T, V>;
        LSH_LAUNCH(kernel, clusters.blocks, clusters.threads, s, a);
    });
}

}  // namespace megatron_lsh
