// Rows to bytes and back: a block per row, which it reads twice (the second time from the cache) and writes once, eight
// numbers to a thread where the width allows it.
#include <type_traits>

#include "device.cuh"

namespace megatron_lsh {
namespace {

constexpr int kThreads = 256;

// Numbers that a thread takes at a time where rows allow it: 16 bytes of bf16, and whole words of bytes.
constexpr int kWide = 8;

// V neighbouring numbers as fp32: V is 1, or several loads of 16 bytes.
template <int V, class T>
LSH_DEVICE Pack<float, V> numbers_at(const T* x) {
    constexpr int each = V * sizeof(T) < 16 ? V : 16 / sizeof(T);
    Pack<float, V> out;
#pragma unroll
    for (int first = 0; first < V; first += each) {
        const Pack<T, each> part = load_pack<each>(x + first);
#pragma unroll
        for (int v = 0; v < each; ++v) out.v[first + v] = widen(part.v[v]);
    }
    return out;
}

// The bytes of V numbers, of which the last may be alone in its byte (int4).
template <WireFormat format, int V>
constexpr int kBytes = format == kInt4 ? (V + 1) / 2 : V;

// Bytes, as whole words where there are several. (A row of a payload is aligned to words, no further.)
template <int B>
LSH_DEVICE void store_bytes(uint8_t* to, const Pack<uint8_t, B>& bytes) {
    if constexpr (B % 4 == 0) {
#pragma unroll
        for (int w = 0; w < B / 4; ++w) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) word |= uint32_t(bytes.v[4 * w + i]) << (8 * i);
            *reinterpret_cast<uint32_t*>(to + 4 * w) = word;
        }
    } else {
#pragma unroll
        for (int i = 0; i < B; ++i) to[i] = bytes.v[i];
    }
}
template <int B>
LSH_DEVICE Pack<uint8_t, B> load_bytes(const uint8_t* from) {
    Pack<uint8_t, B> bytes;
    if constexpr (B % 4 == 0) {
#pragma unroll
        for (int w = 0; w < B / 4; ++w) {
            const uint32_t word = *reinterpret_cast<const uint32_t*>(from + 4 * w);
#pragma unroll
            for (int i = 0; i < 4; ++i) bytes.v[4 * w + i] = uint8_t(word >> (8 * i));
        }
    } else {
#pragma unroll
        for (int i = 0; i < B; ++i) bytes.v[i] = from[i];
    }
    return bytes;
}

template <class T, WireFormat format, int V>
__global__ void __launch_bounds__(kThreads) encode_kernel(const EncodeArgs a) {
    __shared__ unsigned warp_magnitudes[kThreads / kWarpSize];
    // Without wide accesses a thread makes one byte at a time: of two numbers in int4.
    constexpr int numbers = V > 1 ? V : format == kInt4 ? 2 : 1;
    const int64_t bytes = number_bytes(format, a.features), c = blockIdx.x;
    const T* x = static_cast<const T*>(a.rows) + c * a.features;
    unsigned magnitude = 0;
    for (int64_t f = int64_t(threadIdx.x) * V; f < a.features; f += kThreads * V) {
        const Pack<float, V> pack = numbers_at<V>(x + f);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const unsigned bits = magnitude_bits(pack.v[v]);
            magnitude = bits > magnitude ? bits : magnitude;
        }
    }
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const unsigned other = __shfl_xor_sync(kFullWarp, magnitude, step);
        magnitude = other > magnitude ? other : magnitude;
    }
    if (threadIdx.x % kWarpSize == 0) warp_magnitudes[threadIdx.x / kWarpSize] = magnitude;
    __syncthreads();
    for (int w = 0; w < kThreads / kWarpSize; ++w)
        magnitude = warp_magnitudes[w] > magnitude ? warp_magnitudes[w] : magnitude;

    const float scale = bit_cast<float>(uint32_t(magnitude)) / largest_number(format);
    const float divisor = scale == 0.0f ? 1.0f : scale;
    uint8_t* out = a.payload + c * (bytes + 4);
    const float* noise = a.noise ? a.noise + c * a.features : nullptr;
    for (int64_t f = int64_t(threadIdx.x) * numbers; f < a.features; f += kThreads * numbers) {
        const int64_t left = a.features - f;  // less than `numbers` behind an odd row of int4 only
        Pack<float, numbers> pack, up;
        if constexpr (V > 1) {
            pack = numbers_at<V>(x + f);
            if (noise) up = numbers_at<V>(noise + f);
        } else {
            for (int i = 0; i < numbers; ++i) pack.v[i] = i < left ? widen(x[f + i]) : 0.0f;
            for (int i = 0; i < numbers && noise; ++i) up.v[i] = i < left ? noise[f + i] : 0.0f;
        }
        const auto value = [&](int64_t i) { return pack.v[i] / divisor; };
        const auto rounds = [&](int64_t i) { return noise ? up.v[i] : 0.5f; };
        Pack<uint8_t, kBytes<format, numbers>> coded;
#pragma unroll
        for (int b = 0; b < kBytes<format, numbers>; ++b) coded.v[b] = encoded_byte(format, b, left, value, rounds);
        store_bytes(out + (format == kInt4 ? f / 2 : f), coded);
    }
    if (threadIdx.x < 4) out[bytes + threadIdx.x] = uint8_t(bit_cast<uint32_t>(scale) >> (8 * threadIdx.x));
}

template <class T, WireFormat format, int V>
__global__ void __launch_bounds__(kThreads) decode_kernel(const DecodeArgs a) {
    constexpr int numbers = V > 1 ? V : format == kInt4 ? 2 : 1;
    const int64_t bytes = number_bytes(format, a.features), c = blockIdx.x;
    const uint8_t* from = a.payload + c * (bytes + 4);
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= uint32_t(from[bytes + i]) << (8 * i);
    const float scale = bit_cast<float>(bits);
    T* out = static_cast<T*>(a.rows) + c * a.features;
    for (int64_t f = int64_t(threadIdx.x) * numbers; f < a.features; f += kThreads * numbers) {
        const auto coded = load_bytes<kBytes<format, numbers>>(from + (format == kInt4 ? f / 2 : f));
        Pack<T, numbers> pack;
#pragma unroll
        for (int i = 0; i < numbers; ++i) narrow(decoded_number(format, coded.v, i) * scale, pack.v[i]);
        if constexpr (V > 1) {
            constexpr int each = 16 / sizeof(T);
#pragma unroll
            for (int first = 0; first < V; first += each) {
                Pack<T, each> part;
#pragma unroll
                for (int v = 0; v < each; ++v) part.v[v] = pack.v[first + v];
                store_pack(out + f + first, part);
            }
        } else {
            for (int i = 0; i < numbers && f + i < a.features; ++i) out[f + i] = pack.v[i];
        }
    }
}

// By format, and by whether rows of 8 numbers at a time can be read and written. Rows of a payload end with a scale of 4 bytes,
// so they begin at whole words.
template <class T, class Body>
void by_format(WireFormat format, bool wide, const Body& body) {
    const auto with = [&](auto fixed) {
        if (wide) {
            body(T{}, fixed, std::integral_constant<int, kWide>{});
        } else {
            body(T{}, fixed, std::integral_constant<int, 1>{});
        }
    };
    switch (format) {
        case kFp8:
            return with(std::integral_constant<WireFormat, kFp8>{});
        case kInt8:
            return with(std::integral_constant<WireFormat, kInt8>{});
        case kInt4:
            return with(std::integral_constant<WireFormat, kInt4>{});
    }
}

template <class Body>
int launch(DType dtype, WireFormat format, bool wide, const Body& body) {
    switch (dtype) {
        case kFloat32:
            by_format<float>(format, wide, body);
            break;
        case kFloat16:
            by_format<Half>(format, wide, body);
            break;
        case kBFloat16:
            by_format<BFloat16>(format, wide, body);
            break;
        default:
            return int(cudaErrorInvalidValue);
    }
    return int(cudaGetLastError());
}

}  // namespace

extern "C" int lsh_encode_cuda(const EncodeArgs& a, void* stream) {
    const bool wide = a.features % kWide == 0 && aligned_16(a.rows, a.noise, a.payload);
    return launch(a.dtype, a.format, wide, [&](auto type, auto format, auto width) {
        const auto kernel = encode_kernel<decltype(type), decltype(format)::value, decltype(width)::value>;
        LSH_LAUNCH(kernel, unsigned(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

extern "C" int lsh_decode_cuda(const DecodeArgs& a, void* stream) {
    const bool wide = a.features % kWide == 0 && aligned_16(a.rows, a.payload);
    return launch(a.dtype, a.format, wide, [&](auto type, auto format, auto width) {
        const auto kernel = decode_kernel<decltype(type), decltype(format)::value, decltype(width)::value>;
        LSH_LAUNCH(kernel, unsigned(a.num_rows), kThreads, cudaStream_t(stream), a);
    });
}

}  // namespace megatron_lsh
