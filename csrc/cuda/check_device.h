// What a launcher asks of the device: its tiles; and its errors, said in the user's words.
#pragma once

#include <c10/core/Device.h>
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

#include "tiles.h"

namespace mnet::cuda {

// The architecture, 10 x compute capability.
inline int check_device(const char* op, c10::Device device) {
  int major = 0, minor = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  TORCH_CHECK(major >= 8, op, ": ", device, " has compute capability ", major, ".", minor,
              ", expected 8.0 or higher; use the native or the triton backend on this card");
  return 10 * major + minor;
}

inline void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, op, ": the extension was not built for this card (see ",
              "mnet_kernels.build_info()); rebuild it with TORCH_CUDA_ARCH_LIST naming the card's compute capability");
  C10_CUDA_CHECK(error);
}

}  // namespace mnet::cuda
