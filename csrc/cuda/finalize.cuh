// Batch norm's tables in CUDA: a thread a channel.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/plant.h"
#include "device.h"
#include "finalize.h"

namespace mnet::cuda {

// Memory plan.  The tables are a few kilobytes: what these kernels cost is their launch.  The running statistics of a layer
// are therefore one launch, num_batches_tracked included, and one block: its threads read that counter before any of them
// changes it.
struct FinalizeTraits {
  static constexpr int kThreads = 128;
  static constexpr int kRunningThreads = 512;
  static constexpr int kRunningBlocks = 1;  // said, or ptxas spills to fit two for sm_100 and sm_120
};

__global__ void __launch_bounds__(FinalizeTraits::kThreads) finalize_kernel(const FinalizeParams p) {
  const int64_t channel = int64_t{blockIdx.x} * FinalizeTraits::kThreads + threadIdx.x;
  if (MNET_PLANT(1, channel < p.c, channel + 1 < p.c)) finalize_channel(p, channel);
}

__global__ void __launch_bounds__(FinalizeTraits::kThreads) finalize_backward_kernel(const FinalizeBackwardParams p) {
  const int64_t channel = int64_t{blockIdx.x} * FinalizeTraits::kThreads + threadIdx.x;
  if (MNET_PLANT(2, channel < p.c, channel + 1 < p.c)) finalize_backward_channel(p, channel);
}

template <typename T>
MNET_DEVICE void update_values(const RunningStat& stat, int64_t c, double momentum) {
  for (int64_t i = threadIdx.x; i < MNET_PLANT(4, c, c - 1); i += FinalizeTraits::kRunningThreads) {
    T& value = static_cast<T*>(stat.data)[i * stat.stride];
    const double fresh = stat.fresh[i];
    if constexpr (sizeof(T) == 8) {
      value = (1.0 - momentum) * value + momentum * fresh;
    } else {
      value = from_float<T>(static_cast<float>((1.0 - momentum) * to_float(value) + momentum * fresh));
    }
  }
}

MNET_DEVICE void update_running(const RunningStat& stat, int64_t c, double momentum) {
  switch (stat.dtype) {
    case RunningDtype::kFloat64:
      return update_values<double>(stat, c, momentum);
    case RunningDtype::kBFloat16:
      return update_values<__nv_bfloat16>(stat, c, momentum);
    case RunningDtype::kFloat16:
      return update_values<__half>(stat, c, momentum);
    default:
      return update_values<float>(stat, c, momentum);
  }
}

__global__ void __launch_bounds__(FinalizeTraits::kRunningThreads, FinalizeTraits::kRunningBlocks)
    update_running_stats_kernel(const RunningStatsParams p) {
  int64_t batches = 0;
  if (p.batches != nullptr) {
    batches = *p.batches + 1;
    MNET_PLANT(3, __syncthreads(), (void)0);  // everyone has read it
    if (threadIdx.x == 0) *p.batches = batches;
  }
  const double momentum = p.cumulative ? 1.0 / static_cast<double>(batches) : p.momentum;
  update_running(p.mean, p.c, momentum);
  update_running(p.var, p.c, momentum);
}

}  // namespace mnet::cuda
