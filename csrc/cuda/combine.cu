#include "combine.cuh"

#include "launch.h"

namespace mnet::cuda {

cudaError_t combine_moments(const float* workspace, int64_t chunks, int32_t c, float* moments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(divide_up(c, CombineTraits::kLanes));
  MNET_LAUNCH(combine_moments_kernel, blocks, CombineTraits::kThreads, stream, workspace, chunks, c, moments);
  return launch_status();
}

cudaError_t combine_sums(const PartialSums& sums, cudaStream_t stream) {
  const int64_t results = sums.segments * sums.rows * sums.c;
  if (results == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(divide_up(results, CombineTraits::kLanes));
  MNET_LAUNCH(combine_sums_kernel, blocks, CombineTraits::kThreads, stream, sums);
  return launch_status();
}

}  // namespace mnet::cuda
