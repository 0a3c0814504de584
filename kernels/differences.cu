// Restoration by differences: everything around its grouped products, which are the library's. Formulas and letters are in
// megatron_lsh/lsh/tensor_cores.py, plain PyTorch in megatron_lsh/ops/differences.py. A warp per row of what is [N, B] or
// [G, B, B]; sums are fp32.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
// exp of it times the least K that is not zero is finite.
constexpr float kMostRise = 80.0f;

unsigned warp_blocks(int64_t rows) { return unsigned(ceil_div(rows, kWarps)); }

// offset[n] = row - representative of its cluster, and the offset's square.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) differences_kernel(const DifferencesArgs a) {
    const int64_t n = flat_index() / kWarpSize;
    if (n >= a.num_rows) return;  // a whole warp leaves
    const int lane = threadIdx.x % kWarpSize;
    const T* row = static_cast<const T*>(a.rows) + (a.order ? a.order[n] : n) * a.features;
    const T* own = static_cast<const T*>(a.representatives) + a.cluster[n] * a.features;
    T* out = static_cast<T*>(a.offset) + n * a.features;
    float square = 0.0f;
    for (int64_t f = int64_t(lane) * V; f < a.features; f += kWarpSize * V) {
        const Pack<T, V> x = load_pack<V>(row + f), c = load_pack<V>(own + f);
        Pack<T, V> d;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            narrow(widen(x.v[v]) - widen(c.v[v]), d.v[v]);
            square += widen(d.v[v]) * widen(d.v[v]);
        }
        store_pack(out + f, d);
    }
    square = warp_sum(square);
    if (lane == 0) a.square[n] = square;
}

// out[g, i] = source[start of g + i], less the mean of g; zero beyond the width of g.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads) place_kernel(const PlaceArgs a) {
    const int64_t p = grid_row(), f = grid_feature(V);
    if (p >= a.groups * a.places || f >= a.features) return;
    const int64_t g = p / a.places, i = p - g * a.places;
    Pack<T, V> out{};
    if (i < a.widths[g]) {
        out = load_pack<V>(static_cast<const T*>(a.source) + (a.starts[g] + i) * a.features + f);
        if (a.mean) {
            const Pack<T, V> mean = load_pack<V>(static_cast<const T*>(a.mean) + g * a.features + f);
#pragma unroll
            for (int v = 0; v < V; ++v) narrow(widen(out.v[v]) - widen(mean.v[v]), out.v[v]);
        }
    }
    store_pack(static_cast<T*>(a.out) + p * a.features + f, out);
}

// s, K and K + ridge I of each block, from its products.
__global__ void __launch_bounds__(kThreads) fit_kernel(const FitArgs a) {
    const int64_t g = blockIdx.y, i = flat_index() / kWarpSize, width = a.widths[g];
    const int lane = threadIdx.x % kWarpSize;
    if (i >= a.places) return;  // a whole warp leaves
    const float* products = a.products + g * a.places * a.places;
    float sum = 0.0f;
    for (int64_t j = lane; j < width; j += kWarpSize) sum += products[j * a.places + j];
    const float mean = 2.0f * a.kernel_width / float(width) * warp_sum(sum), scale = mean > 1e-20f ? mean : 1e-20f;
    if (i == 0 && lane == 0) a.scale[g] = mean == mean ? scale : mean;
    const int64_t begin = (g * a.places + i) * a.places;
    const float norm = products[i * a.places + i];
    for (int64_t j = lane; j < a.places; j += kWarpSize) {
        const bool valid = i < width && j < width;
        const float other = products[j * a.places + j];
        const float k = valid ? expf((2.0f * products[i * a.places + j] - norm - other) / scale) : 0.0f;
        a.among[begin + j] = k;
        a.system[begin + j] = k + (i != j ? 0.0f : i < width ? a.ridge : 1.0f);
    }
}

// T of a positive definite matrix of at most kMostHalf rows: lower triangular, and T^T T is the inverse. Elimination turns
// [A, I] into [U, L^-1] with A = L U, in place: at step k the columns after k hold U, those before L^-1; T = diag(U)^-1/2 L^-1.
// A thread holds the rows ty, ty + 16, ... and columns tx, tx + 16, ... in registers; beyond the matrix it is the identity.
constexpr int kSide = 16, kTile = int(kMostHalf) / kSide;

__global__ void __launch_bounds__(kSide * kSide) half_inverse_kernel(const HalfInverseArgs a) {
    __shared__ float row[kMostHalf], column[kMostHalf], pivots[kMostHalf];
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide, size = int(a.size);
    const int64_t begin = int64_t(blockIdx.x) * size * size;
    float x[kTile][kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
            const int i = ty + kSide * r, j = tx + kSide * c;
            x[r][c] = i < size && j < size ? a.matrices[begin + int64_t(i) * size + j] : i == j ? 1.0f : 0.0f;
        }
#pragma unroll
    for (int part = 0; part < kTile; ++part) {
        for (int step = 0; step < kSide && part * kSide + step < size; ++step) {
            const int k = part * kSide + step;
            if (ty == step)
#pragma unroll
                for (int c = 0; c < kTile; ++c) row[tx + kSide * c] = x[part][c];
            if (tx == step)
#pragma unroll
                for (int r = 0; r < kTile; ++r) column[ty + kSide * r] = x[r][part];
            __syncthreads();
            const float pivot = row[k], factor = 1.0f / pivot;
            if (threadIdx.x == 0) pivots[k] = pivot;
            float above[kTile], left[kTile];
#pragma unroll
            for (int c = 0; c < kTile; ++c) above[c] = row[tx + kSide * c];
#pragma unroll
            for (int r = 0; r < kTile; ++r) left[r] = ty + kSide * r > k ? column[ty + kSide * r] * factor : 0.0f;
#pragma unroll
            for (int r = 0; r < kTile; ++r)
#pragma unroll
                for (int c = 0; c < kTile; ++c) x[r][c] -= left[r] * above[c];
            if (tx == step)
#pragma unroll
                for (int r = 0; r < kTile; ++r)
                    if (ty + kSide * r > k) x[r][part] = -left[r];
            __syncthreads();  // before the next step overwrites row and column
        }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
        const int i = ty + kSide * r;
        if (i >= size) continue;
        const float scale = 1.0f / sqrtf(pivots[i]);
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
            const int j = tx + kSide * c;
            if (j < size) a.out[begin + int64_t(i) * size + j] = j < i ? x[r][c] * scale : j == i ? scale : 0.0f;
        }
    }
}

// M' of each block in two numbers of T: rows (high, low, high) as the forward product wants them, and the transposed ones
// (high, low) for the backward pass.
template <class T>
__global__ void __launch_bounds__(kThreads) split_kernel(const SplitArgs a) {
    const int64_t g = blockIdx.y, j = flat_index() / kWarpSize, width = a.widths[g], places = a.places;
    const int lane = threadIdx.x % kWarpSize;
    if (j >= places) return;  // a whole warp leaves
    const float* row = a.inverse + (g * places + j) * places;
    float sum = 0.0f;
    for (int64_t i = lane; i < width; i += kWarpSize) sum += row[i];
    const float mean = warp_sum(sum) / float(width);
    T *forward = static_cast<T*>(a.forward) + g * 3 * places * places, *backward = static_cast<T*>(a.backward) + g * 2 * places * places;
    for (int64_t i = lane; i < places; i += kWarpSize) {
        const float x = j >= width ? 0.0f : i < width ? row[i] - mean : i == places - 1 ? mean : 0.0f;
        T high, low;
        narrow(x, high);
        narrow(x - widen(high), low);
        forward[j * places + i] = forward[(2 * places + j) * places + i] = high;
        forward[(places + j) * places + i] = low;
        backward[i * places + j] = high;
        backward[(places + i) * places + j] = low;
    }
}

// What a row's change is made of: exp t - 1 and K_own at V places from b on.
template <class T, int V>
struct Rise {
    const ChangesArgs& a;
    int64_t n, slot, group, own;
    float factor, shift;
    bool moves;

    LSH_MEMBER explicit Rise(const ChangesArgs& a, int64_t n) : a(a), n(n) {
        slot = a.slot[n];
        group = slot / a.places;
        own = slot - group * a.places;
        factor = 2.0f / a.scale[group];
        moves = a.moves[n];
        shift = (widen(products()[own]) + 0.5f * a.square[n]) * factor;
    }
    LSH_MEMBER const T* products() const { return static_cast<const T*>(a.products) + n * a.places; }
    LSH_MEMBER void at(int64_t b, float* rise, float* among) const {
        const Pack<T, V> x = load_pack<V>(products() + b);
        const Pack<float, V> k = load_pack<V>(a.among + slot * a.places + b);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float t = widen(x.v[v]) * factor - shift;
            rise[v] = moves ? expm1f(t > kMostRise ? kMostRise : t) : 0.0f;
            among[v] = k.v[v];
        }
    }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) changes_kernel(const ChangesArgs a) {
    const int64_t n = flat_index() / kWarpSize;
    if (n >= a.num_rows) return;  // a whole warp leaves
    const Rise<T, V> of(a, n);
    T* out = static_cast<T*>(a.out) + n * 3 * a.places;
    for (int64_t b = int64_t(threadIdx.x % kWarpSize) * V; b < a.places; b += kWarpSize * V) {
        float rise[V], among[V];
        of.at(b, rise, among);
        Pack<T, V> high, low;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float x = rise[v] * among[v];
            narrow(x, high.v[v]);
            narrow(x - widen(high.v[v]), low.v[v]);
        }
        store_pack(out + b, high);
        store_pack(out + a.places + b, high);
        store_pack(out + 2 * a.places + b, low);
    }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) changes_backward_kernel(const ChangesBackwardArgs a) {
    const int64_t n = flat_index() / kWarpSize, begin = n * a.of.places;
    if (n >= a.of.num_rows) return;  // a whole warp leaves
    const Rise<T, V> of(a.of, n);
    float pull = 0.0f, own = 0.0f;
    bool mine = false;
    for (int64_t b = int64_t(threadIdx.x % kWarpSize) * V; b < a.of.places; b += kWarpSize * V) {
        float rise[V], among[V];
        of.at(b, rise, among);
        Pack<T, V> grad = load_pack<V>(static_cast<const T*>(a.grad) + begin + b), difference, around;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            narrow(of.moves ? widen(grad.v[v]) : 0.0f, grad.v[v]);
            const float weight = widen(grad.v[v]) * of.factor * among[v], less = weight * rise[v], whole = weight + less;
            narrow(less, difference.v[v]);
            narrow(whole, around.v[v]);
            pull += whole;
            if (b + v == of.own) mine = true, own = whole;
        }
        store_pack(static_cast<T*>(a.moving) + begin + b, grad);
        store_pack(static_cast<T*>(a.difference) + begin + b, difference);
        store_pack(static_cast<T*>(a.around) + begin + b, around);
        store_pack(static_cast<T*>(a.to_own) + begin + b, around);
    }
    pull = warp_sum(pull);
    // Only the lane that has written around its own representative writes there again.
    if (mine) narrow(own - pull, static_cast<T*>(a.to_own)[begin + of.own]);
    if (threadIdx.x % kWarpSize == 0) a.pull[n] = pull;
}

// What pairs of representatives get: a matrix whose product with them is their gradient.
template <class T>
__global__ void __launch_bounds__(kThreads) pairs_kernel(const PairsArgs a) {
    const int64_t g = blockIdx.y, i = flat_index() / kWarpSize, width = a.widths[g], places = a.places;
    const int lane = threadIdx.x % kWarpSize;
    if (i >= places) return;  // a whole warp leaves
    const T *by_own = static_cast<const T*>(a.by_own) + a.starts[g] * places,
            *difference = static_cast<const T*>(a.difference) + a.starts[g] * places,
            *by_inverse = static_cast<const T*>(a.by_inverse) + g * places * places;
    const float* among = a.among + g * places * places;
    const float factor = 2.0f / a.scale[g];
    T* out = static_cast<T*>(a.out) + (g * places + i) * places;
    const int64_t last = (places - 1) * places;
    float sum = 0.0f, diagonal = 0.0f;
    bool mine = false;
    for (int64_t j = lane; j < places; j += kWarpSize) {
        float x = 0.0f;
        if (i < width && j < width) {
            const float there = factor * among[j * places + i] * (widen(by_inverse[j * places + i]) + widen(by_inverse[last + i]));
            const float here = factor * among[i * places + j] *
                               (widen(by_inverse[i * places + j]) + widen(by_inverse[last + j]) + widen(by_own[i * places + j]));
            x = widen(difference[j * places + i]) - there - here;
        }
        narrow(x, out[j]);
        sum += x;
        if (j == i) mine = true, diagonal = x;
    }
    sum = warp_sum(sum);
    if (mine) narrow(diagonal - sum, out[i]);
}

// out[order[n]] = x[n] - weight[n] * offset[n].
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads) less_kernel(const LessArgs a) {
    const int64_t n = grid_row(), f = grid_feature(V);
    if (n >= a.num_rows || f >= a.features) return;
    Pack<T, V> x = load_pack<V>(static_cast<const T*>(a.x) + n * a.features + f);
    const Pack<T, V> d = load_pack<V>(static_cast<const T*>(a.offset) + n * a.features + f);
    const float weight = a.weight[n];
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(widen(x.v[v]) - weight * widen(d.v[v]), x.v[v]);
    store_pack(static_cast<T*>(a.out) + (a.order ? a.order[n] : n) * a.features + f, x);
}

// For kernels that read single numbers.
template <class Body>
int by_type(DType dtype, const Body& body) {
    return by_dtype(dtype, 1, false, [&](auto type, auto) { body(type); });
}

}  // namespace

extern "C" int lsh_differences_cuda(const DifferencesArgs& a, void* stream) {
    const bool aligned = aligned_16(a.rows, a.representatives, a.offset);
    return by_dtype(a.dtype, a.features, aligned, [&](auto type, auto width) {
        const auto kernel = differences_kernel<decltype(type), decltype(width)::value>;
        LSH_LAUNCH(kernel, warp_blocks(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_place_cuda(const PlaceArgs& a, void* stream) {
    return by_dtype(a.dtype, a.features, aligned_16(a.source, a.mean, a.out), [&](auto type, auto width) {
        constexpr int V = decltype(width)::value;
        const auto kernel = place_kernel<decltype(type), V>;
        const RowGrid grid(a.groups * a.places, a.features, V);
        LSH_LAUNCH(kernel, grid.blocks, grid.threads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_fit_cuda(const FitArgs& a, void* stream) {
    LSH_LAUNCH(fit_kernel, dim3(warp_blocks(a.places), unsigned(a.groups)), kThreads, cudaStream_t(stream), a);
    return int(cudaGetLastError());
}

extern "C" int lsh_half_inverse_cuda(const HalfInverseArgs& a, void* stream) {
    LSH_LAUNCH(half_inverse_kernel, unsigned(a.groups), kSide * kSide, cudaStream_t(stream), a);
    return int(cudaGetLastError());
}

extern "C" int lsh_split_cuda(const SplitArgs& a, void* stream) {
    return by_type(a.dtype, [&](auto type) {
        const auto kernel = split_kernel<decltype(type)>;
        LSH_LAUNCH(kernel, dim3(warp_blocks(a.places), unsigned(a.groups)), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_changes_cuda(const ChangesArgs& a, void* stream) {
    return by_dtype(a.dtype, a.places, aligned_16(a.products, a.among, a.out), [&](auto type, auto width) {
        const auto kernel = changes_kernel<decltype(type), decltype(width)::value>;
        LSH_LAUNCH(kernel, warp_blocks(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_changes_backward_cuda(const ChangesBackwardArgs& a, void* stream) {
    const bool aligned = aligned_16(a.of.products, a.of.among, a.grad, a.moving, a.difference, a.around, a.to_own);
    return by_dtype(a.of.dtype, a.of.places, aligned, [&](auto type, auto width) {
        const auto kernel = changes_backward_kernel<decltype(type), decltype(width)::value>;
        LSH_LAUNCH(kernel, warp_blocks(a.of.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_pairs_cuda(const PairsArgs& a, void* stream) {
    return by_type(a.dtype, [&](auto type) {
        const auto kernel = pairs_kernel<decltype(type)>;
        LSH_LAUNCH(kernel, dim3(warp_blocks(a.places), unsigned(a.groups)), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_less_cuda(const LessArgs& a, void* stream) {
    return by_dtype(a.dtype, a.features, aligned_16(a.x, a.offset, a.out), [&](auto type, auto width) {
        constexpr int V = decltype(width)::value;
        const auto kernel = less_kernel<decltype(type), V>;
        const RowGrid grid(a.num_rows, a.features, V);
        LSH_LAUNCH(kernel, grid.blocks, grid.threads, cudaStream_t(stream), a);
    });
}

}  // namespace megatron_lsh
