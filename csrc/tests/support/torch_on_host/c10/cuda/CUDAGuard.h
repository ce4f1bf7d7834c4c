// Stands in for torch's header where the CUDA launchers run on the CPU (hooks.cpp).
#pragma once

#include <c10/core/Device.h>

#include "../../../../launch_host.h"
#include "CUDAStream.h"

namespace c10::cuda {

// Kernels may be launched while there is one, and no earlier.
class CUDAGuard {
 public:
  explicit CUDAGuard(c10::Device) { mnet::host::current_stream = getCurrentCUDAStream().stream(); }
  ~CUDAGuard() { mnet::host::current_stream = nullptr; }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
};

}  // namespace c10::cuda
