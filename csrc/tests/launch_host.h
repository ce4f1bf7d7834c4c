// What a launch on the CPU depends on beside its arguments: set by tests.
#pragma once

#include <cuda_runtime_api.h>

namespace mnet::host {

enum class Schedule { kForward, kReverse, kRandomThreads, kRandomWarps };
inline Schedule schedule = Schedule::kForward;

inline cudaStream_t current_stream = nullptr;  // kernels must be launched on it

inline int good_launches = -1;  // until one fails; -1: none does
inline cudaError_t launch_error = cudaSuccess;  // of the launch that fails
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t take_error() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

}  // namespace mnet::host
