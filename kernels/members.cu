// Members: of each cluster the row nearest to its mean, and how far the others are from it. A block per cluster reads its rows
// from memory once, for the mean, and once more from the cache, for the distances to it; the mean stays in shared memory, a
// part of the features at a time.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kUnroll = 4;

template <class T, int V>
struct Cluster {
    const MembersArgs& a;
    int64_t begin, size;

    LSH_MEMBER const T* row(int64_t i) const { return static_cast<const T*>(a.rows) + a.order[begin + i] * a.features; }
    LSH_MEMBER float* distance() const { return static_cast<float*>(a.distance) + begin; }

    // The mean of V features from `f` on.
    LSH_MEMBER Pack<float, V> mean(int64_t f) const {
        Pack<float, V> sum{};
        for (int64_t i = 0; i < size; i += kUnroll) {
            Pack<T, V> x[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) x[u] = load_pack<V>(row(i + u < size ? i + u : size - 1) + f);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                if (i + u >= size) break;
#pragma unroll
                for (int v = 0; v < V; ++v) sum.v[v] += widen(x[u].v[v]);
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum.v[v] = size > 1 ? divide(sum.v[v], size) : sum.v[v];
        return sum;
    }

    // One warp: the place of the nearest row, and the sum of all distances.
    LSH_MEMBER int64_t nearest(float* sum) const {
        const int lane = threadIdx.x % kWarpSize;
        const float* d = distance();
        long long best = lane < size ? lane : 0;
        float all = 0.0f, least = d[best];
        for (int64_t i = lane; i < size; i += kWarpSize) {
            all += d[i];
            if (nearer(d[i], least)) best = i, least = d[i];
        }
        *sum = warp_sum(all);
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            const long long other = __shfl_xor_sync(kFullWarp, best, step);
            const float its = __shfl_xor_sync(kFullWarp, least, step);
            if (nearer(its, least) || (!nearer(least, its) && other < best)) best = other, least = its;
        }
        return size > 2 ? best : 0;  // two rows are equally near
    }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) members_kernel(const MembersArgs a) {
    constexpr int kPart = kThreads * V;
    alignas(32) __shared__ float mean[kPart];
    __shared__ float squares[kWarps];
    const int64_t c = blockIdx.x;
    const Cluster<T, V> cluster{a, a.offsets[c], a.sizes[c]};
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    float* energy = static_cast<float*>(a.energy) + 2 * c;
    if (cluster.size == 0) {  // the whole block leaves
        if (threadIdx.x == 0) {
            a.member[c] = a.order[cluster.begin < a.num_rows ? cluster.begin : a.num_rows - 1];
            energy[0] = energy[1] = 0.0f;
        }
        return;
    }
    float square = 0.0f;
    for (int64_t part = 0; part < a.features; part += kPart) {
        const int64_t width = a.features - part < kPart ? a.features - part : kPart, f = int64_t(threadIdx.x) * V;
        if (f < width) store_pack(mean + f, cluster.mean(part + f));
        __syncthreads();
        // A row is always the same warp's, whose first lane adds up the parts of its distance.
        for (int64_t i = warp; i < cluster.size; i += kWarps) {
            const T* row = cluster.row(i) + part;
            float distance = 0.0f;
            for (int64_t d = int64_t(lane) * V; d < width; d += kWarpSize * V) {
                const Pack<T, V> x = load_pack<V>(row + d);
                const Pack<float, V> m = load_pack<V>(mean + d);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float number = widen(x.v[v]), off = number - m.v[v];
                    distance += off * off;
                    square += number * number;
                }
            }
            distance = warp_sum(distance);
            if (lane == 0) cluster.distance()[i] = part ? cluster.distance()[i] + distance : distance;
        }
        __syncthreads();  // before the next part overwrites the mean
    }
    square = warp_sum(square);
    if (lane == 0) squares[warp] = square;
    __syncthreads();
    if (warp > 0) return;
    float sum;
    const int64_t place = cluster.nearest(&sum);
    if (lane > 0) return;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += squares[w];
    a.member[c] = a.order[cluster.begin + place];
    energy[0] = around_member(sum, cluster.distance()[place], cluster.size);
    energy[1] = total;
}

}  // namespace

extern "C" int lsh_members_cuda(const MembersArgs& a, void* stream) {
    return by_dtype(a.dtype, a.features, aligned_16(a.rows), [&](auto type, auto width) {
        const auto kernel = members_kernel<decltype(type), decltype(width)::value>;
        LSH_LAUNCH(kernel, unsigned(a.clusters), kThreads, cudaStream_t(stream), a);
    });
}

}  // namespace megatron_lsh
