// The three PTX instructions behind a tensor-core tile: copy to shared memory, load fragments, multiply. Fragment layouts
// are those of the PTX manual for mma.m16n8k16; tests/kernels/emulator.h has them again in plain C++.
#pragma once

#include "arithmetic.h"

#if !defined(LSH_EMULATED)

namespace megatron_lsh {

// 16 bytes from global to shared memory, asynchronously; zeros if not `inside` (`from` must be readable memory even so).
static __device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool inside) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(inside ? 16 : 0));
}
static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n"); }

// Wait until at most `pending` groups of this thread's copies are under way.
template <int pending>
static __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// acc [16, 8] += a [16, 16] * b [16, 8]
static __device__ __forceinline__ void multiply_accumulate(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                           BFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ void multiply_accumulate(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                           Half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace megatron_lsh

#endif
