// What the bindings of both files share: checked arguments, results, and how to run.
//
// Only torch's stable interface is used (plain C underneath), so one build serves every torch from 2.11 on, and the CUDA
// bindings compile without a CUDA build of torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "kernels.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace megatron_lsh {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return kFloat32;
        case ScalarType::Half:
            return kFloat16;
        case ScalarType::BFloat16:
            return kBFloat16;
        case ScalarType::Double:
            return kFloat64;
        default:
            STD_TORCH_CHECK(false, "rows must be fp32, fp16, bf16 or fp64");
    }
}

inline ScalarType accumulator(const Tensor& t) {
    return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels read pointers, which do not say where they point to.
inline void check_device(const Tensor& t, const char* name, const Tensor& home) {
    STD_TORCH_CHECK(t.is_cuda() == home.is_cuda() && t.get_device_index() == home.get_device_index(), name,
                    " must be on the same device as the rows");
}

// A contiguous tensor of the wanted dtype (the input itself where it is one), its sizes checked; -1 is any size. All tensors
// of an operation are on the device of one of them, `home`.
inline Tensor checked(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
               const Tensor& home) {
    check_device(t, name, home);
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
    STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), name, " must have ", sizes.size(), " dimensions, has ", t.dim());
    int64_t d = 0;
    for (const int64_t size : sizes) {
        STD_TORCH_CHECK(size < 0 || t.size(d) == size, name, ": size ", t.size(d), " of dimension ", d, " must be ", size);
        ++d;
    }
    return torch::stable::contiguous(t);
}

inline Tensor integers(const Tensor& t, const char* name, int64_t size, const Tensor& home) {
    return checked(t, name, ScalarType::Long, {size}, home);
}

inline OptionalTensor checked(const OptionalTensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
                       const Tensor& home) {
    return t ? OptionalTensor(checked(*t, name, dtype, sizes, home)) : std::nullopt;
}

template <class T = void>
T* data(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}
template <class T = void>
T* data(const OptionalTensor& t) {
    return t ? data<T>(*t) : nullptr;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, sizes, dtype);
}

constexpr auto kLong = ScalarType::Long;

// How to run: on a GPU, the tensors' device and its current stream.
#if defined(LSH_ON_GPU)
#define LSH_RUN(name, tensor, args)                                                                       \
    do {                                                                                                  \
        const torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index());                 \
        void* stream = nullptr;                                                                           \
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream((tensor).get_device_index(), &stream)); \
        const int error = lsh_##name##_cuda(args, stream);                                                \
        STD_TORCH_CHECK(error == 0, "megatron_lsh::" #name " failed to launch: CUDA error ", error);      \
    } while (false)
#elif defined(LSH_EMULATED)
#define LSH_RUN(name, tensor, args) STD_TORCH_CHECK(lsh_##name##_cuda(args, nullptr) == 0, "megatron_lsh::" #name " failed")
#else
#define LSH_RUN(name, tensor, args) lsh_##name##_cpu(args)
#endif

#if defined(LSH_ON_GPU) || defined(LSH_EMULATED)
constexpr bool kOnGpu = true;
#else
constexpr bool kOnGpu = false;
#endif

}  // namespace megatron_lsh
