// Nearest centroid: tiles of a matrix product whose epilogue keeps the best column of each row, so that the [N, C] scores
// never exist in memory. A block owns kRows rows of one expert and runs over all its centroids.
//
// bf16 and fp16 use the tensor cores (mma.sync m16n8k16, fp32 accumulation); fp32, and widths that are no multiple of 8, use
// ordinary fused multiply-adds.
#include <type_traits>

#include "device.cuh"
#include "mma.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256;

// scratch[c] = |c|^2 / 2 of each centroid, then |x|^2 of each row of the source: a warp per row. A source is a token, which
// is a row of several experts.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) norm_kernel(const NearestArgs a) {
    const int64_t n = flat_index() / kWarpSize;
    if (n >= a.clusters + a.sources) return;  // a whole warp leaves
    const bool centroid = n < a.clusters;
    const T* x = centroid ? static_cast<const T*>(a.centroids) + n * a.features
                          : static_cast<const T*>(a.source) + (n - a.clusters) * a.features;
    float sum = 0.0f;
    for (int64_t d = int64_t(threadIdx.x % kWarpSize) * V; d < a.features; d += kWarpSize * V) {
        const Pack<T, V> pack = load_pack<V>(x + d);
#pragma unroll
        for (int v = 0; v < V; ++v) sum += widen(pack.v[v]) * widen(pack.v[v]);
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (threadIdx.x % kWarpSize == 0) static_cast<float*>(a.scratch)[n] = centroid ? sum / 2 : sum;
}

// The rows of one block, and the centroids they are compared to.
struct Task {
    int64_t first_row, num_rows, first_cluster, num_clusters;
};

// Find the block's tile by walking the experts' numbers of tiles, 32 at a time. num_rows is 0 for a block too many.
template <int kRows>
LSH_DEVICE Task find_task(const NearestArgs& a) {
    __shared__ Task task;
    if (threadIdx.x < kWarpSize) {
        const int lane = threadIdx.x;
        const int64_t tile = blockIdx.x;
        if (lane == 0) task.num_rows = 0;
        __syncwarp();
        int64_t before = 0;
        for (int64_t first = 0; first < a.experts; first += kWarpSize) {
            const int64_t e = first + lane;
            const int64_t row = e < a.experts ? begin_of(a.row_ends, e, a.rows) : 0;
            const int64_t rows = e < a.experts ? end_of(a.row_ends, e, a.rows) - row : 0;
            const int64_t tiles = ceil_div(rows, kRows);
            long long end = tiles;
            for (int step = 1; step < kWarpSize; step *= 2) {
                const long long other = __shfl_up_sync(kFullWarp, end, step);
                if (lane >= step) end += other;
            }
            end += before;
            if (tile < end && tile >= end - tiles) {
                const int64_t skip = (tile - (end - tiles)) * kRows;
                task.first_row = row + skip;
                task.num_rows = rows - skip < kRows ? rows - skip : kRows;
                task.first_cluster = begin_of(a.cluster_ends, e, a.clusters);
                task.num_clusters = end_of(a.cluster_ends, e, a.clusters) - task.first_cluster;
            }
            before = __shfl_sync(kFullWarp, end, kWarpSize - 1);
        }
    }
    __syncthreads();
    return task;
}

// The best column so far of one row, to begin with no_column(). Columns come in ascending order within a thread.
struct Best {
    float score;
    int column;

    LSH_MEMBER void offer(float other_score, int other_column) {
        const bool better = other_score > score || (other_score == score && other_column < column);
        score = better ? other_score : score;
        column = better ? other_column : column;
    }
    // The best among lanes that differ in the given bits only.
    LSH_MEMBER void reduce(int lanes) {
        for (int step = 1; step < lanes; step *= 2) {
            const float other_score = __shfl_xor_sync(kFullWarp, score, step);
            const int other_column = __shfl_xor_sync(kFullWarp, column, step);
            offer(other_score, other_column);
        }
    }
};

LSH_DEVICE Best no_column() { return {-INFINITY, 0}; }

// Write the results of a block's rows.
LSH_DEVICE void write_results(const NearestArgs& a, const Task& task, const Best* best) {
    for (int r = threadIdx.x; r < task.num_rows; r += kThreads) {
        const int64_t n = task.first_row + r;
        const float square = static_cast<const float*>(a.scratch)[a.clusters + source_of(a.index, n)];
        a.cluster[n] = task.first_cluster + best[r].column;
        static_cast<float*>(a.distance)[n] = square - 2.0f * best[r].score;
    }
}

// Plain version: 64 rows x 64 columns per step, 4 x 4 per thread, 16 features at a time through shared memory.
constexpr int kPlainTile = 64, kPlainDepth = 16;

template <class T>
__global__ void __launch_bounds__(kThreads) plain_kernel(const NearestArgs a) {
    __shared__ float rows[kPlainDepth][kPlainTile + 4], columns[kPlainDepth][kPlainTile + 4];
    __shared__ Best best_of[kPlainTile];
    const Task task = find_task<kPlainTile>(a);
    if (task.num_rows == 0) return;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    Best best[4] = {no_column(), no_column(), no_column(), no_column()};
    for (int64_t column = 0; column < task.num_clusters; column += kPlainTile) {
        float acc[4][4] = {};
        for (int64_t depth = 0; depth < a.features; depth += kPlainDepth) {
            for (int i = threadIdx.x; i < kPlainTile * kPlainDepth; i += kThreads) {
                const int r = i / kPlainDepth, d = i % kPlainDepth;
                const bool inside = depth + d < a.features;
                const bool row_there = inside && r < task.num_rows, column_there = inside && column + r < task.num_clusters;
                const int64_t source = row_there ? source_of(a.index, task.first_row + r) : 0;
                const int64_t centroid = task.first_cluster + column + r;
                rows[d][r] = row_there ? widen(static_cast<const T*>(a.source)[source * a.features + depth + d]) : 0.0f;
                columns[d][r] =
                    column_there ? widen(static_cast<const T*>(a.centroids)[centroid * a.features + depth + d]) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int d = 0; d < kPlainDepth; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) acc[i][j] += rows[d][ty * 4 + i] * columns[d][tx * 4 + j];
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int64_t c = column + tx * 4 + j;
            if (c >= task.num_clusters) continue;
            const float half_norm = static_cast<const float*>(a.scratch)[task.first_cluster + c];
#pragma unroll
            for (int i = 0; i < 4; ++i) best[i].offer(acc[i][j] - half_norm, int(c));
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        best[i].reduce(16);
        if (tx == 0) best_of[ty * 4 + i] = best[i];
    }
    __syncthreads();
    write_results(a, task, best_of);
}

// Tensor-core version: 128 rows x 128 columns per step, 8 warps of 32 x 64, 32 features at a time, loads one step ahead.
constexpr int kTile = 128, kDepth = 32;
constexpr int kPitch = kDepth + 8;  // 80 bytes: eight neighbouring rows of 16 bytes touch all banks once
constexpr int kStages = 2;

template <class T>
__global__ void __launch_bounds__(kThreads, 2) mma_kernel(const NearestArgs a) {
    alignas(16) __shared__ T rows[kStages][kTile][kPitch];
    alignas(16) __shared__ T columns[kStages][kTile][kPitch];
    const Task task = find_task<kTile>(a);
    if (task.num_rows == 0) return;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;

    // Each thread copies two pieces of 16 bytes of either matrix per step. Surplus rows repeat the last one.
    constexpr int pieces = kDepth / 8;  // per row
    const T* row_source[2];
    for (int i = 0; i < 2; ++i) {
        const int r = (threadIdx.x + i * kThreads) / pieces;
        const int64_t n = task.first_row + (r < task.num_rows ? r : task.num_rows - 1);
        row_source[i] = static_cast<const T*>(a.source) + source_of(a.index, n) * a.features;
    }
    const auto copy = [&](int stage, int64_t column, int64_t depth) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int piece = threadIdx.x + i * kThreads, r = piece / pieces, d = piece % pieces * 8;
            const int64_t last = task.num_clusters - 1, c = column + r < last ? column + r : last;
            const T* centroid = static_cast<const T*>(a.centroids) + (task.first_cluster + c) * a.features;
            const bool inside = depth + d < a.features;
            copy_16_bytes(&rows[stage][r][d], row_source[i] + (inside ? depth + d : 0), inside);
            copy_16_bytes(&columns[stage][r][d], centroid + (inside ? depth + d : 0), inside);
        }
        commit_copies();
    };

    // Rows lane / 4 and lane / 4 + 8 of two 16-row tiles.
    Best best[2][2] = {{no_column(), no_column()}, {no_column(), no_column()}};
    for (int64_t column = 0; column < task.num_clusters; column += kTile) {
        float acc[2][8][4] = {};
        copy(0, column, 0);
        int stage = 0;
        for (int64_t depth = 0; depth < a.features; depth += kDepth, stage ^= 1) {
            if (depth + kDepth < a.features) {
                copy(stage ^ 1, column, depth + kDepth);
                wait_for_copies<1>();
            } else {
                wait_for_copies<0>();
            }
            __syncthreads();
#pragma unroll
            for (int d = 0; d < kDepth; d += 16) {
                uint32_t row_fragment[2][4], column_fragment[8][2];
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    load_matrices(row_fragment[m], &rows[stage][warp_row + m * 16 + lane % 16][d + lane / 16 * 8]);
#pragma unroll
                for (int n = 0; n < 8; n += 2) {
                    uint32_t four[4];
                    const int r = warp_column + n * 8 + lane / 16 * 8 + lane % 8;
                    load_matrices(four, &columns[stage][r][d + lane / 8 % 2 * 8]);
                    column_fragment[n][0] = four[0];
                    column_fragment[n][1] = four[1];
                    column_fragment[n + 1][0] = four[2];
                    column_fragment[n + 1][1] = four[3];
                }
#pragma unroll
                for (int m = 0; m < 2; ++m) {
#pragma unroll
                    for (int n = 0; n < 8; ++n) multiply_accumulate(acc[m][n], row_fragment[m], column_fragment[n], T{});
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int64_t c = column + warp_column + n * 8 + lane % 4 * 2 + j;
                if (c >= task.num_clusters) continue;
                const float half_norm = static_cast<const float*>(a.scratch)[task.first_cluster + c];
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    best[m][0].offer(acc[m][n][j] - half_norm, int(c));
                    best[m][1].offer(acc[m][n][2 + j] - half_norm, int(c));
                }
            }
        }
    }
    // Four lanes share a row, then two warps.
    __shared__ Best best_of[2][kTile];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            best[m][half].reduce(4);
            if (lane % 4 == 0) best_of[warp % 2][warp_row + m * 16 + half * 8 + lane / 4] = best[m][half];
        }
    }
    __syncthreads();
    for (int r = threadIdx.x; r < kTile; r += kThreads) best_of[0][r].offer(best_of[1][r].score, best_of[1][r].column);
    __syncthreads();
    write_results(a, task, best_of[0]);
}

template <class T, bool kTensorCores>
int launch(const NearestArgs& a, cudaStream_t s) {
    const bool aligned = aligned_16(a.source, a.centroids);
    with_width<T>(a.features, aligned, [&](auto, auto width) {
        const auto norms = norm_kernel<T, decltype(width)::value>;
        LSH_LAUNCH(norms, unsigned(ceil_div(a.clusters + a.sources, kThreads / kWarpSize)), kThreads, s, a);
    });
    // At most one partly filled tile per expert; surplus blocks find nothing to do.
    constexpr int tile = kTensorCores ? kTile : kPlainTile;
    const unsigned blocks = unsigned(a.rows / tile + a.experts);
    if constexpr (kTensorCores) {
        const auto kernel = mma_kernel<T>;
        LSH_LAUNCH(kernel, blocks, kThreads, s, a);
    } else {
        const auto kernel = plain_kernel<T>;
        LSH_LAUNCH(kernel, blocks, kThreads, s, a);
    }
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int lsh_nearest_cuda(const NearestArgs& a, void* stream) {
    const auto s = cudaStream_t(stream);
    const bool tensor_cores = a.features % 8 == 0 && aligned_16(a.source, a.centroids);
    switch (a.dtype) {
        case kFloat32:
            return launch<float, false>(a, s);
        case kFloat16:
            return tensor_cores ? launch<Half, true>(a, s) : launch<Half, false>(a, s);
        case kBFloat16:
            return tensor_cores ? launch<BFloat16, true>(a, s) : launch<BFloat16, false>(a, s);
        default:
            return int(cudaErrorInvalidValue);
    }
}

}  // namespace megatron_lsh
