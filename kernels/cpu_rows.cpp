// Hash, segment sums, combine and their backward passes on the CPU: one row after the other, features in vector registers.
// Compiled once per instruction set, with -ffp-contract=off so that products and sums round as torch's do.
#include "arithmetic.h"
#include "cpu_loops.h"

namespace megatron_lsh {
namespace {

constexpr int64_t kBlock = 512;   // features accumulated at a time: they stay in the first-level cache
constexpr int64_t kPrefetch = 4;  // rows to ask for ahead of their use: gathers are too irregular for the hardware

template <class T>
void prefetch(const T* x, int64_t width) {
    for (int64_t f = 0; f < width; f += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + f);
}

void hash_rows(const HashArgs& a, int64_t begin, int64_t end) {
    int64_t expert = upper_bound(a.row_ends, a.experts, begin);
    for (int64_t n = begin; n < end; ++n) {
        while (expert < a.experts && n >= a.row_ends[expert]) ++expert;
        uint64_t key = uint64_t(expert);
        const float* p = a.projection + source_of(a.index, n) * a.num_hashes * a.width;
        for (int q = 0; q < a.num_hashes; ++q, p += a.width) {
            int64_t largest = -1;
#pragma omp simd reduction(max : largest)
            for (int64_t w = 0; w < a.width; ++w) {
                const int64_t candidate = axis_candidate(p[w], w);
                largest = candidate > largest ? candidate : largest;
            }
            const int64_t axis = axis_of(largest);
            key = append_code(key, code_of(axis, p[axis]), a.code_bits);
        }
        a.key[n] = key;
    }
}

template <class T>
void segment_rows(const SegmentArgs& a, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const T* source = static_cast<const T*>(a.source);
    const A* weight = static_cast<const A*>(a.weight);
    T* residual = static_cast<T*>(a.residual);
    const auto source_row = [&](int64_t n) { return source + source_of(a.index, n) * a.features; };
    const int64_t* last = a.order + a.rows;
    for (int64_t c = begin; c < end; ++c) {
        const int64_t* rows = a.order + a.offsets[c];
        const int64_t size = a.sizes[c];
        for (int64_t f0 = 0; f0 < a.features; f0 += kBlock) {
            const int64_t width = a.features - f0 < kBlock ? a.features - f0 : kBlock;
            A acc[kBlock];
            for (int64_t f = 0; f < width; ++f) acc[f] = 0;
            for (int64_t i = 0; i < size; ++i) {
                const T* x = source_row(rows[i]) + f0;
                if (rows + i + kPrefetch < last) prefetch(source_row(rows[i + kPrefetch]) + f0, width);
                if (weight) {
                    const A w = weight[rows[i]];
                    for (int64_t f = 0; f < width; ++f) acc[f] = add_product(acc[f], w, widen(x[f]));
                } else {
                    for (int64_t f = 0; f < width; ++f) acc[f] += widen(x[f]);
                }
            }
            if (a.mean && size > 1) {
                for (int64_t f = 0; f < width; ++f) acc[f] = divide(acc[f], size);
            }
            T* out = static_cast<T*>(a.out) + c * a.features + f0;
            for (int64_t f = 0; f < width; ++f) narrow(acc[f], out[f]);
            for (int64_t i = 0; residual && i < size; ++i) {
                const T* x = source_row(rows[i]) + f0;
                T* r = residual + rows[i] * a.features + f0;
                for (int64_t f = 0; f < width; ++f) narrow(widen(x[f]) - widen(out[f]), r[f]);
            }
        }
    }
}

template <class T>
void choose_members(const MembersArgs& a, int64_t begin, int64_t end) {
    using A = Acc<T>;
    for (int64_t c = begin; c < end; ++c) {
        const int64_t offset = a.offsets[c], size = a.sizes[c], *rows = a.order + offset;
        A *energy = static_cast<A*>(a.energy) + 2 * c, *distance = static_cast<A*>(a.distance) + offset;
        energy[0] = energy[1] = 0;
        if (size == 0) {
            a.member[c] = a.order[offset < a.num_rows ? offset : a.num_rows - 1];
            continue;
        }
        for (int64_t i = 0; i < size; ++i) distance[i] = 0;
        for (int64_t f0 = 0; f0 < a.features; f0 += kBlock) {
            const int64_t width = a.features - f0 < kBlock ? a.features - f0 : kBlock;
            const auto row = [&](int64_t i) { return static_cast<const T*>(a.rows) + rows[i] * a.features + f0; };
            A mean[kBlock];
            for (int64_t f = 0; f < width; ++f) mean[f] = 0;
            for (int64_t i = 0; i < size; ++i) {
                const T* x = row(i);
                if (offset + i + kPrefetch < a.num_rows) prefetch(row(i + kPrefetch), width);
                for (int64_t f = 0; f < width; ++f) mean[f] += widen(x[f]);
            }
            for (int64_t f = 0; f < width && size > 1; ++f) mean[f] = divide(mean[f], size);
            for (int64_t i = 0; i < size; ++i) {
                const T* x = row(i);
                A square = 0, apart = 0;
#pragma omp simd reduction(+ : square, apart)
                for (int64_t f = 0; f < width; ++f) {
                    const A number = widen(x[f]), off = number - mean[f];
                    square += number * number;
                    apart += off * off;
                }
                distance[i] += apart;
                energy[1] += square;
            }
        }
        int64_t place = 0;
        for (int64_t i = 0; i < size; ++i) {
            energy[0] += distance[i];
            if (size > 2 && nearer(distance[i], distance[place])) place = i;  // two rows are equally near
        }
        a.member[c] = rows[place];
        energy[0] = around_member(energy[0], distance[place], size);
    }
}

template <class T>
void combine_tokens(const CombineArgs& a, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const A* weight = static_cast<const A*>(a.weight);
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t f0 = 0; f0 < a.features; f0 += kBlock) {
            const int64_t width = a.features - f0 < kBlock ? a.features - f0 : kBlock;
            const T* row = a.row ? static_cast<const T*>(a.row) + t * a.features + f0 : nullptr;
            A acc[kBlock];
            for (int64_t f = 0; f < width; ++f) acc[f] = 0;
            for (int64_t k = 0; k < a.slots; ++k) {
                const int64_t i = a.index[t * a.slots + k];
                if (i < 0) continue;
                const A w = weight ? weight[t * a.slots + k] : A(1);
                const T* x = static_cast<const T*>(a.source) + i * a.features + f0;
                if (a.centroid) {
                    const T* c = static_cast<const T*>(a.centroid) + i * a.features + f0;
                    for (int64_t f = 0; f < width; ++f)
                        acc[f] = add_product(acc[f], w, restored(widen(x[f]), widen(row[f]), widen(c[f])));
                } else if (row) {
                    for (int64_t f = 0; f < width; ++f) acc[f] = add_product(acc[f], w, widen(x[f]) + widen(row[f]));
                } else {
                    for (int64_t f = 0; f < width; ++f) acc[f] = add_product(acc[f], w, widen(x[f]));
                }
            }
            T* out = static_cast<T*>(a.out) + t * a.features + f0;
            for (int64_t f = 0; f < width; ++f) narrow(acc[f], out[f]);
        }
    }
}

template <class T>
void dots_tokens(const DotsArgs& a, int64_t begin, int64_t end) {
    using A = Acc<T>;
    for (int64_t t = begin; t < end; ++t) {
        const T* grad = static_cast<const T*>(a.grad) + t * a.features;
        const T* row = a.row ? static_cast<const T*>(a.row) + t * a.features : nullptr;
        for (int64_t k = 0; k < a.slots; ++k) {
            const int64_t i = a.index[t * a.slots + k];
            A sum = 0;
            if (i >= 0) {
                const T* x = static_cast<const T*>(a.source) + i * a.features;
                const T* c = a.centroid ? static_cast<const T*>(a.centroid) + i * a.features : nullptr;
                if (row) {
#pragma omp simd reduction(+ : sum)
                    for (int64_t f = 0; f < a.features; ++f)
                        sum += widen(grad[f]) * restored(widen(x[f]), widen(row[f]), widen(c[f]));
                } else {
#pragma omp simd reduction(+ : sum)
                    for (int64_t f = 0; f < a.features; ++f) sum += widen(grad[f]) * widen(x[f]);
                }
            }
            static_cast<A*>(a.out)[t * a.slots + k] = sum;
        }
    }
}

template <class T>
void spread_tokens(const SpreadArgs& a, int64_t begin, int64_t end) {
    using A = Acc<T>;
    const A* weight = static_cast<const A*>(a.weight);
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t f0 = 0; f0 < a.features; f0 += kBlock) {
            const int64_t width = a.features - f0 < kBlock ? a.features - f0 : kBlock;
            A acc[kBlock];
            for (int64_t f = 0; f < width; ++f) acc[f] = 0;
            for (int64_t k = 0; k < a.slots; ++k) {
                const int64_t i = a.index[t * a.slots + k];
                if (i < 0) continue;
                const A scale = divide(A(1), a.sizes[i]);
                if (a.grad && a.sizes[i] > 1) {
                    const T* g = static_cast<const T*>(a.grad) + t * a.features + f0;
                    const T* s = static_cast<const T*>(a.sum) + i * a.features + f0;
                    const A w = weight ? weight[t * a.slots + k] : A(1);
                    for (int64_t f = 0; f < width; ++f) acc[f] += around_expert(w * widen(g[f]), widen(s[f]), scale);
                }
                if (a.grad_centroid) {
                    const T* g = static_cast<const T*>(a.grad_centroid) + i * a.features + f0;
                    for (int64_t f = 0; f < width; ++f) acc[f] += widen(g[f]) * scale;
                }
            }
            T* out = static_cast<T*>(a.out) + t * a.features + f0;
            for (int64_t f = 0; f < width; ++f) narrow(acc[f], out[f]);
        }
    }
}

template <class T, WireFormat format>
void encode_format(const EncodeArgs& a, int64_t begin, int64_t end) {
    const int64_t bytes = number_bytes(format, a.features);
    for (int64_t c = begin; c < end; ++c) {
        const T* x = static_cast<const T*>(a.rows) + c * a.features;
        uint32_t magnitude = 0;
#pragma omp simd reduction(max : magnitude)
        for (int64_t f = 0; f < a.features; ++f) {
            const uint32_t bits = magnitude_bits(widen(x[f]));
            magnitude = bits > magnitude ? bits : magnitude;
        }
        const float scale = bit_cast<float>(magnitude) / largest_number(format), divisor = scale == 0.0f ? 1.0f : scale;
        const float* noise = a.noise ? a.noise + c * a.features : nullptr;
        uint8_t* out = a.payload + c * (bytes + 4);
        const auto value = [&](int64_t f) { return widen(x[f]) / divisor; };
        if (noise) {
            for (int64_t b = 0; b < bytes; ++b)
                out[b] = encoded_byte(format, b, a.features, value, [&](int64_t f) { return noise[f]; });
        } else {
            for (int64_t b = 0; b < bytes; ++b)
                out[b] = encoded_byte(format, b, a.features, value, [](int64_t) { return 0.5f; });
        }
        memcpy(out + bytes, &scale, 4);
    }
}

template <class T>
void encode_rows(const EncodeArgs& a, int64_t begin, int64_t end) {
    (a.format == kFp8    ? encode_format<T, kFp8>
     : a.format == kInt8 ? encode_format<T, kInt8>
                         : encode_format<T, kInt4>)(a, begin, end);
}

template <class T, WireFormat format>
void decode_format(const DecodeArgs& a, int64_t begin, int64_t end) {
    const int64_t bytes = number_bytes(format, a.features);
    for (int64_t c = begin; c < end; ++c) {
        const uint8_t* from = a.payload + c * (bytes + 4);
        T* out = static_cast<T*>(a.rows) + c * a.features;
        float scale;
        memcpy(&scale, from + bytes, 4);
        for (int64_t f = 0; f < a.features; ++f) narrow(decoded_number(format, from, f) * scale, out[f]);
    }
}

template <class T>
void decode_rows(const DecodeArgs& a, int64_t begin, int64_t end) {
    (a.format == kFp8    ? decode_format<T, kFp8>
     : a.format == kInt8 ? decode_format<T, kInt8>
                         : decode_format<T, kInt4>)(a, begin, end);
}

// Payloads are for the training dtypes only.
template <class Args>
void refuse(const Args&, int64_t, int64_t) {}

template <class Args>
using Loop = void(const Args&, int64_t, int64_t);

template <class Args, Loop<Args>* F32, Loop<Args>* F16, Loop<Args>* BF16, Loop<Args>* F64>
void by_dtype(const Args& a, int64_t begin, int64_t end) {
    (a.dtype == kFloat32 ? F32 : a.dtype == kFloat16 ? F16 : a.dtype == kBFloat16 ? BF16 : F64)(a, begin, end);
}

#define LSH_BY_DTYPE(Args, loop) by_dtype<Args, loop<float>, loop<Half>, loop<BFloat16>, loop<double>>

}  // namespace

extern const RowLoops LSH_JOIN(row_loops_, LSH_ISA) = {
    hash_rows,
    LSH_BY_DTYPE(SegmentArgs, segment_rows),
    LSH_BY_DTYPE(MembersArgs, choose_members),
    LSH_BY_DTYPE(CombineArgs, combine_tokens),
    LSH_BY_DTYPE(DotsArgs, dots_tokens),
    LSH_BY_DTYPE(SpreadArgs, spread_tokens),
    by_dtype<EncodeArgs, encode_rows<float>, encode_rows<Half>, encode_rows<BFloat16>, refuse<EncodeArgs>>,
    by_dtype<DecodeArgs, decode_rows<float>, decode_rows<Half>, decode_rows<BFloat16>, refuse<DecodeArgs>>,
};

}  // namespace megatron_lsh
