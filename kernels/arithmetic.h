// The arithmetic of every kernel, once, for the GPU and for its CPU twin.
//
// Nothing here touches memory layout, threads or torch: numbers in, numbers out. The .cu and .cpp files beside it decide who
// computes what. Everything has internal linkage, because the CPU files are compiled several times for different
// instruction sets and must not share a definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LSH_HD static __host__ __device__ __forceinline__
#else
#define LSH_HD static inline __attribute__((always_inline))
#endif

namespace megatron_lsh {

// Storage formats. Arithmetic is done in Acc<T>: fp32, or fp64 for fp64.

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class To, class From>
LSH_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

LSH_HD double widen(double x) { return x; }
LSH_HD float widen(float x) { return x; }
LSH_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
LSH_HD float widen(Half x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    // Shift exponent and mantissa into place and rescale; subnormals come out right by subtracting a magic number.
    const uint32_t w = uint32_t(x.bits) << 16, two_w = w + w;
    const float normal = bit_cast<float>((two_w >> 4) + (0xE0u << 23)) * bit_cast<float>(0x7800000u);
    const float subnormal = bit_cast<float>((two_w >> 17) | (126u << 23)) - 0.5f;
    const uint32_t magnitude = bit_cast<uint32_t>(two_w < (1u << 27) ? subnormal : normal);
    return bit_cast<float>((w & 0x80000000u) | magnitude);
#endif
}

// Round to nearest even.
LSH_HD void narrow(double x, double& to) { to = x; }
LSH_HD void narrow(float x, float& to) { to = x; }
LSH_HD void narrow(float x, BFloat16& to) {
#if defined(__CUDA_ARCH__)
    to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    to.bits = uint16_t(x == x ? rounded : 0x7FC0u);
#endif
}
LSH_HD void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
    to.bits = __half_as_ushort(__float2half_rn(x));
#else
    // Scaling up and down overflows to infinity where fp16 does; adding a power of two rounds at fp16's last bit.
    const uint32_t w = bit_cast<uint32_t>(x), sign = w & 0x80000000u, two_w = w + w;
    float base = bit_cast<float>(w & 0x7FFFFFFFu) * bit_cast<float>(0x77800000u) * bit_cast<float>(0x08800000u);
    uint32_t bias = two_w & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = bit_cast<float>((bias >> 1) + 0x07800000u) + base;
    const uint32_t bits = bit_cast<uint32_t>(base);
    const uint32_t magnitude = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    to.bits = uint16_t((sign >> 16) | (two_w > 0xFF000000u ? 0x7E00u : magnitude));
#endif
}

// acc + w * x, rounded twice, as a product and a sum of tensors are.
LSH_HD float add_product(float acc, float w, float x) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(acc, __fmul_rn(w, x));
#else
    return acc + w * x;  // the CPU files are compiled with -ffp-contract=off
#endif
}
LSH_HD double add_product(double acc, double w, double x) { return acc + w * x; }

// x / count for a whole number of rows. On the GPU without the subroutine of a general division; exact for a count of one.
LSH_HD float divide(float x, int64_t count) {
#if defined(__CUDA_ARCH__)
    const float n = float(count), r = __fdividef(1.0f, n), q = x * r, rest = fmaf(-q, n, x);
    return rest == rest ? fmaf(rest, r, q) : q;  // nothing is left of what is infinite
#else
    return x / float(count);
#endif
}
LSH_HD double divide(double x, int64_t count) { return x / double(count); }

// The source row of row n, see kernels.h.
LSH_HD int64_t source_of(const int64_t* index, int64_t n) { return index ? index[n] : n; }

// Hash.

// Magnitude and axis in one number, so that the maximum over axes is the largest |projection|, and the first among equals.
// All that is no number is equal, and larger than infinity.
LSH_HD int64_t axis_candidate(float projection, int64_t axis) {
    const uint32_t bits = bit_cast<uint32_t>(projection) & 0x7FFFFFFFu, nan = 0x7F800001u;
    return (int64_t(bits < nan ? bits : nan) << 32) | (0xFFFFFFFFll - axis);
}
LSH_HD int64_t axis_of(int64_t candidate) { return 0xFFFFFFFFll - (candidate & 0xFFFFFFFFll); }

// The code of a cross-polytope hash, from that axis and the projection on it.
LSH_HD uint64_t code_of(int64_t axis, float projection) { return uint64_t(2 * axis) + (projection > 0.0f ? 1 : 0); }

// A key is the expert, then the codes in order, `code_bits` each.
LSH_HD uint64_t append_code(uint64_t key, uint64_t code, int code_bits) { return (key << code_bits) | code; }

LSH_HD int leading_zeros(uint64_t x) {
#if defined(__CUDA_ARCH__)
    return __clzll(static_cast<long long>(x));
#else
    return x ? __builtin_clzll(x) : 64;
#endif
}

// How many leading codes two keys of the same expert share.
LSH_HD int common_codes(uint64_t a, uint64_t b, int num_hashes, int code_bits) {
    const int differing_bits = 64 - leading_zeros(a ^ b);
    return num_hashes - (differing_bits + code_bits - 1) / code_bits;
}

// Plan.

// How strongly a row is tied to its predecessor. The gap takes off at most 1, so it decides among equal prefixes only. A gap
// that is infinite or no number takes off 1: it must not come out weaker than kNoLink, nor as a NaN of either sign.
LSH_HD double link_strength(int common, double gap) {
    const double off = gap / (gap + 1.0);
    return common - (off == off ? off : 1.0);
}

// Links weaker than any other: an expert's first row always starts a cluster.
constexpr double kNoLink = -2.0;

// Unsigned integers in the order of the numbers. NaN of either sign is the largest, as torch sorts it.
LSH_HD uint64_t ordered(double x) {
    const uint64_t bits = bit_cast<uint64_t>(x);
    if (x != x) return ~uint64_t(0);
    return (bits >> 63) ? ~bits : bits | (uint64_t(1) << 63);
}
LSH_HD uint32_t ordered(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return ~uint32_t(0);
    return (bits >> 31) ? ~bits : bits | (uint32_t(1) << 31);
}

// The first of `count` ascending numbers that is larger than x. The expert of row n is the first whose rows end beyond n.
LSH_HD int64_t upper_bound(const int64_t* ascending, int64_t count, int64_t x) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (ascending[middle] > x) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// Where an expert's rows or clusters end and begin. No further than the array, whatever the ends say.
LSH_HD int64_t end_of(const int64_t* ends, int64_t expert, int64_t total) {
    return ends[expert] < total ? ends[expert] : total;
}
LSH_HD int64_t begin_of(const int64_t* ends, int64_t expert, int64_t total) {
    return expert ? end_of(ends, expert - 1, total) : 0;
}

// Members.

// Whether a distance is less than another. What is no number is farther than infinity.
template <class A>
LSH_HD bool nearer(A distance, A than) {
    return distance < than || (than != than && distance == distance);
}

// The sum of |x - m|^2 over n rows, m one of them, from the sum of their |x - mean|^2 and that of m.
template <class A>
LSH_HD A around_member(A around_mean, A of_member, int64_t n) {
    return around_mean + A(n) * of_member;
}

// Restore.

// What the residual adds to a centroid's expert output. A row that is its own centroid adds nothing, exactly.
template <class A>
LSH_HD A restored(A expert_out, A row, A centroid) {
    return expert_out + (row - centroid);
}

// The part of a row's gradient that passes around the expert, and its share of the centroid's gradient. A cluster of one
// row has exactly its gradient as the mean.
template <class A>
LSH_HD A around_expert(A grad, A cluster_sum, A one_over_size) {
    return one_over_size == A(1) ? A(0) : grad - cluster_sum * one_over_size;
}

// Wire formats.

// Bytes of `features` numbers without their scale, and with it.
LSH_HD int64_t number_bytes(WireFormat format, int64_t features) { return format == kInt4 ? (features + 1) / 2 : features; }
LSH_HD int64_t wire_bytes(WireFormat format, int64_t features) { return number_bytes(format, features) + 4; }

LSH_HD float largest_number(WireFormat format) { return format == kFp8 ? 448.0f : format == kInt8 ? 127.0f : 7.0f; }

// |x| as an integer: in the order of the magnitudes, with NaN above all.
LSH_HD uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & 0x7FFFFFFFu; }

// e4m3 (OCP FP8, no infinity), to nearest even; too large numbers become NaN.
LSH_HD uint8_t to_fp8(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t result;
    if (magnitude >= (1087u << 20)) {
        result = 0x7F;
    } else if (magnitude < (121u << 23)) {  // subnormal: adding a power of two rounds at the last bit
        result = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(141u << 23)) - (141u << 23);
    } else {
        result = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
    }
    return uint8_t(result | (sign >> 24));
}
LSH_HD float from_fp8(uint8_t x) {
    const uint32_t sign = uint32_t(x & 0x80) << 24, magnitude = x & 0x7F;
    const float normal = bit_cast<float>((magnitude << 20) + (120u << 23));
    const float subnormal = float(magnitude) * bit_cast<float>(118u << 23);  // steps of 2^-9
    const float value = magnitude == 0x7F ? bit_cast<float>(0x7FC00000u) : magnitude < 8 ? subnormal : normal;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

// To the next whole number within +-largest, or up with probability `up` of the remainder. NaN becomes 0; its scale tells.
LSH_HD int to_integer(float x, float up, float largest) {
    float rounded = x + up;
    rounded = floorf(rounded);
    rounded = rounded != rounded ? 0.0f : rounded;
    rounded = rounded > largest ? largest : rounded < -largest ? -largest : rounded;
    return int(rounded);
}

// The byte at position b of a row of numbers: value(i) gives number i, which is there for i < features, noise(i) its noise.
template <class Value, class Noise>
LSH_HD uint8_t encoded_byte(WireFormat format, int64_t b, int64_t features, const Value& value, const Noise& noise) {
    const float largest = largest_number(format);
    if (format == kFp8) return to_fp8(value(b));
    if (format == kInt8) return uint8_t(int8_t(to_integer(value(b), noise(b), largest)));
    const int low = to_integer(value(2 * b), noise(2 * b), largest) + 8;
    const int high = 2 * b + 1 < features ? to_integer(value(2 * b + 1), noise(2 * b + 1), largest) + 8 : 0;
    return uint8_t(low | (high << 4));
}

// Number i of a row of bytes, before it is scaled.
LSH_HD float decoded_number(WireFormat format, const uint8_t* bytes, int64_t i) {
    if (format == kFp8) return from_fp8(bytes[i]);
    if (format == kInt8) return float(int8_t(bytes[i]));
    return float(int(i % 2 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15) - 8);
}

}  // namespace megatron_lsh
