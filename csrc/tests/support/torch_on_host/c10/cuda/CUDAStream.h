// Stands in for torch's header where the CUDA launchers run on the CPU (hooks.cpp).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cstdint>

namespace c10::cuda {

struct CUDAStream {
  cudaStream_t stream() const { return reinterpret_cast<cudaStream_t>(uintptr_t{64}); }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda

// The launchers say CUDA; here they serve CPU tensors.
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, library) _TORCH_LIBRARY_IMPL(ns, CPU, library, C10_UID)
