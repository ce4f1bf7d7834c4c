// The few words of CUDA that differ when a kernel's source is run on the CPU by the tests (csrc/tests/cuda_host.h).
//
// The rules that keep a kernel runnable there: shared memory is declared with MNET_SHARED or MNET_DYNAMIC_SHARED, kernels
// are launched with MNET_LAUNCH or MNET_LAUNCH_DYNAMIC, inline PTX stands in mma.cuh alone, and every thread of a block
// reaches every __syncthreads.
#pragma once

#if defined(MNET_CUDA_ON_HOST)
#include "../tests/cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define MNET_DEVICE __device__ __forceinline__
// Aligned for 16-byte accesses.  `dims` are the array's brackets: MNET_SHARED(float, sums, [2][32]);
#define MNET_SHARED(type, name, dims) __shared__ __align__(16) type name dims
#define MNET_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__)
// As many bytes as MNET_LAUNCH_DYNAMIC gives (allow_shared first), once a kernel, as a pointer to `type`.
#define MNET_DYNAMIC_SHARED(type, name)                     \
  extern __shared__ __align__(128) char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#define MNET_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  (kernel)<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__)

namespace mnet::cuda {

inline cudaError_t launch_status() { return cudaGetLastError(); }

// Lets a kernel have more than 48 KiB of shared memory.  Allowed while a graph is captured.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
}  // namespace mnet::cuda
#endif

#include <cstdint>

#include "../common/portability.h"

namespace mnet::cuda {

MNET_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MNET_HD int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// 16 bytes of a storage dtype, moved by one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T lane[kSize];
};
static_assert(sizeof(Pack<float>) == 16 && sizeof(Pack<__half>) == 16 && sizeof(Pack<__nv_bfloat16>) == 16,
              "one 16-byte access");

// Conversions of the storage dtypes, rounding to nearest even.
MNET_DEVICE float to_float(float v) { return v; }
MNET_DEVICE float to_float(__half v) { return __half2float(v); }
MNET_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
MNET_DEVICE T from_float(float v);
template <>
MNET_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
MNET_DEVICE __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
MNET_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace mnet::cuda
