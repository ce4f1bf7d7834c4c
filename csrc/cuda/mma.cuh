// Tensor cores and asynchronous copies: the only inline PTX.  Compute capability 8.0 or higher; emulated on the CPU by
// csrc/tests/mma_host.h.
//
// Fragments are those of the PTX documentation ("Matrix fragments for mma.m16n8k16" and ".m16n8k8").  With g = lane / 4 and
// t = lane % 4, every register being one 32-bit word of a row (two 16-bit values or one tf32) and w the word's place in
// 32 bytes of depth:
//   a[0..3]  rows g, g + 8, g, g + 8; words t, t, t + 4, t + 4        b[0..1]  column g; words t, t + 4
//   c[0..3]  rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
#pragma once

#include "device.h"

#if defined(MNET_CUDA_ON_HOST)
#include "../tests/mma_host.h"
#else

namespace mnet::cuda {

// 16 bytes from global to shared memory past the registers and the first level of cache; zeros, and nothing read, where
// they do not exist.  `from` is a valid address in any case.  The target is undefined until waited for.
MNET_DEVICE void cp_async16(void* to, const void* from, bool exists) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
}
MNET_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's newest groups are under way.
template <int kPending>
MNET_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane 8 i + r names the 16 bytes of row r of matrix i.
template <bool kTransposed>
MNET_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
  }
}

// To the nearest value of tf32, which a tensor core would otherwise truncate to.
MNET_DEVICE uint32_t to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// c += a b over 32 bytes of depth (m16n8k16; float32 as tf32: m16n8k8), accumulated in float32.
#define MNET_MMA(type, shape, operands)                                                                        \
  template <>                                                                                                  \
  MNET_DEVICE void mma<type>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                  \
    asm("mma.sync.aligned." shape ".row.col.f32." operands "." operands                                        \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                 \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                   \
  }
template <typename T>
MNET_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
MNET_MMA(__nv_bfloat16, "m16n8k16", "bf16")
MNET_MMA(__half, "m16n8k16", "f16")
MNET_MMA(float, "m16n8k8", "tf32")
#undef MNET_MMA

}  // namespace mnet::cuda
#endif
