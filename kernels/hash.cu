// Hash: a warp per row reads the projection once and leaves one 64-bit key.
#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) hash_kernel(const HashArgs a) {
    const int64_t n = flat_index() / kWarpSize;
    if (n >= a.rows) return;  // a whole warp leaves
    const int lane = threadIdx.x % kWarpSize;
    uint64_t key = uint64_t(upper_bound(a.row_ends, a.experts, n));
    const float* p = a.projection + source_of(a.index, n) * a.num_hashes * a.width;
    for (int q = 0; q < a.num_hashes; ++q, p += a.width) {
        long long largest = -1;
        for (int64_t w = lane; w < a.width; w += kWarpSize) {
            const long long candidate = axis_candidate(p[w], w);
            largest = candidate > largest ? candidate : largest;
        }
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            const long long other = __shfl_xor_sync(kFullWarp, largest, step);
            largest = other > largest ? other : largest;
        }
        const int64_t axis = axis_of(largest);
        key = append_code(key, code_of(axis, p[axis]), a.code_bits);
    }
    if (lane == 0) a.key[n] = key;
}

}  // namespace

extern "C" int lsh_hash_cuda(const HashArgs& a, void* stream) {
    const unsigned blocks = unsigned(ceil_div(a.rows, kThreads / kWarpSize));
    LSH_LAUNCH(hash_kernel, blocks, kThreads, cudaStream_t(stream), a);
    return int(cudaGetLastError());
}

}  // namespace megatron_lsh
