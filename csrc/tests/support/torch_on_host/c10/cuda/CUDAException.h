// Stands in for torch's header where the CUDA launchers run on the CPU (hooks.cpp).
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                     \
  do {                                                                           \
    const cudaError_t status = call;                                             \
    TORCH_CHECK(status == cudaSuccess, "CUDA error ", static_cast<int>(status)); \
  } while (0)
