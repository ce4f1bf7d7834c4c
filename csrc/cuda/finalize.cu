#include "finalize.cuh"

#include "launch.h"

namespace mnet::cuda {

cudaError_t finalize(const FinalizeParams& p, cudaStream_t stream) {
  if (p.c == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(p.c, FinalizeTraits::kThreads));
  MNET_LAUNCH(finalize_kernel, blocks, FinalizeTraits::kThreads, stream, p);
  return launch_status();
}

cudaError_t finalize_backward(const FinalizeBackwardParams& p, cudaStream_t stream) {
  if (p.c == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(p.c, FinalizeTraits::kThreads));
  MNET_LAUNCH(finalize_backward_kernel, blocks, FinalizeTraits::kThreads, stream, p);
  return launch_status();
}

cudaError_t update_running_stats(const RunningStatsParams& p, cudaStream_t stream) {
  MNET_LAUNCH(update_running_stats_kernel, 1u, FinalizeTraits::kRunningThreads, stream, p);
  return launch_status();
}

}  // namespace mnet::cuda
