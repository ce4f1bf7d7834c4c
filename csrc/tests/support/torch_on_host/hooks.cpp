// The CUDA backend on the CPU: csrc/cuda's launchers for torch (*_torch.cpp) and kernels (*.cu), whole and unchanged, with
// c10's CUDA headers replaced by those beside this file and launches by cuda_host.h, as a library that registers the ops of
// mnet_cuda for CPU tensors.  CMake builds it (mnet_cuda_on_host), tests/test_cuda_on_host.py loads it and sets what is below.
#include <cuda_runtime_api.h>

#include "../../launch_host.h"

static int capability[2] = {9, 0};

extern "C" {

// The one call of the runtime that the launchers make themselves.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = capability[attribute == cudaDevAttrComputeCapabilityMinor];
  return cudaSuccess;
}

__attribute__((visibility("default"))) void mnet_host_capability(int major, int minor) {
  capability[0] = major;
  capability[1] = minor;
}

// In which order the threads of a block run: an index into cuda_host.h's kSchedules.
__attribute__((visibility("default"))) void mnet_host_schedule(int index) {
  mnet::host::schedule = static_cast<mnet::host::Schedule>(index);
}

// The launch after `good` good ones fails; -1: none does.
__attribute__((visibility("default"))) void mnet_host_fail(int good, int error) {
  mnet::host::good_launches = good;
  mnet::host::launch_error = static_cast<cudaError_t>(error);
  mnet::host::last_error = cudaSuccess;
}

}  // extern "C"
