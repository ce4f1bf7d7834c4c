// Launchers of batch norm's tables in CUDA: plain C++, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/finalize.h"

namespace mnet::cuda {

// Dtype of a running statistic: also those that no activation has.
enum class RunningDtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct RunningStat {
  void* data;  // [c]
  int64_t stride;
  RunningDtype dtype;
  const float* fresh;  // [c]
};

struct RunningStatsParams {
  RunningStat mean;
  RunningStat var;
  int64_t* batches;  // num_batches_tracked; nullptr: none
  double momentum;
  bool cumulative;  // the momentum is 1 / num_batches_tracked
  int64_t c;
};

cudaError_t finalize(const FinalizeParams& params, cudaStream_t stream);
cudaError_t finalize_backward(const FinalizeBackwardParams& params, cudaStream_t stream);
cudaError_t update_running_stats(const RunningStatsParams& params, cudaStream_t stream);

}  // namespace mnet::cuda
