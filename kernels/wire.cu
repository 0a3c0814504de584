// Rows to bytes and back: a block per row, which it reads twice (the second time from the cache) and writes once.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) encode_kernel(const EncodeArgs a) {
    __shared__ unsigned warp_magnitudes[kThreads / kWarpSize];
    const int64_t bytes = number_bytes(a.format, a.features), c = blockIdx.x;
    const T* x = static_cast<const T*>(a.rows) + c * a.features;
    unsigned magnitude = 0;
    for (int64_t f = threadIdx.x; f < a.features; f += kThreads) {
        const unsigned bits = magnitude_bits(widen(x[f]));
        magnitude = bits > magnitude ? bits : magnitude;
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const unsigned other = __shfl_xor_sync(kFullWarp, magnitude, step);
        magnitude = other > magnitude ? other : magnitude;
    }
    if (threadIdx.x % kWarpSize == 0) warp_magnitudes[threadIdx.x / kWarpSize] = magnitude;
    __syncthreads();
    for (int w = 0; w < kThreads / kWarpSize; ++w)
        magnitude = warp_magnitudes[w] > magnitude ? warp_magnitudes[w] : magnitude;

    const float scale = bit_cast<float>(uint32_t(magnitude)) / largest_number(a.format);
    const float divisor = scale == 0.0f ? 1.0f : scale;
    uint8_t* out = a.payload + c * (bytes + 4);
    const auto value = [&](int64_t f) { return widen(x[f]) / divisor; };
    const auto noise = [&](int64_t f) { return a.noise ? a.noise[c * a.features + f] : 0.5f; };
    for (int64_t b = threadIdx.x; b < bytes; b += kThreads) out[b] = encoded_byte(a.format, b, a.features, value, noise);
    if (threadIdx.x < 4) out[bytes + threadIdx.x] = uint8_t(bit_cast<uint32_t>(scale) >> (8 * threadIdx.x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) decode_kernel(const DecodeArgs a) {
    const int64_t bytes = number_bytes(a.format, a.features), c = blockIdx.x;
    const uint8_t* from = a.payload + c * (bytes + 4);
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= uint32_t(from[bytes + i]) << (8 * i);
    const float scale = bit_cast<float>(bits);
    T* out = static_cast<T*>(a.rows) + c * a.features;
    for (int64_t f = threadIdx.x; f < a.features; f += kThreads) narrow(decoded_number(a.format, from, f) * scale, out[f]);
}

template <class Args, class Launch>
int launch(const Args& a, const Launch& body) {
    switch (a.dtype) {
        case kFloat32:
            body(float{});
            break;
        case kFloat16:
            body(Half{});
            break;
        case kBFloat16:
            body(BFloat16{});
            break;
        default:
            return int(cudaErrorInvalidValue);
    }
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int lsh_encode_cuda(const EncodeArgs& a, void* stream) {
    return launch(a, [&](auto type) {
        const auto kernel = encode_kernel<decltype(type)>;
        LSH_LAUNCH(kernel, unsigned(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_decode_cuda(const DecodeArgs& a, void* stream) {
    return launch(a, [&](auto type) {
        const auto kernel = decode_kernel<decltype(type)>;
        LSH_LAUNCH(kernel, unsigned(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

}  // namespace megatron_lsh
