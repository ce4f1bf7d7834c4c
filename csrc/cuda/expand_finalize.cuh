// The expand layer's batch norm from gram.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/expand_params.h"
#include "../common/plant.h"
#include "device.h"

namespace mnet::cuda {

// Memory plan.  A warp makes a channel: W Cov W^T in double, a lane every 32nd column of the covariance, whose rows it reads
// in lines; the table is 16 KiB at most and stays in the caches.  A product of a million terms: what it costs is its launch.
struct ExpandFinalizeTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
};

template <typename T>
__global__ void __launch_bounds__(ExpandFinalizeTraits::kThreads) expand_finalize_kernel(const ExpandFinalizeParams p) {
  const int lane = threadIdx.x % 32;
  const int e = blockIdx.x * ExpandFinalizeTraits::kWarps + threadIdx.x / 32;
  if (e >= MNET_PLANT(70, p.e, p.e - 1)) return;  // the whole warp
  const T* const row = static_cast<const T*>(p.weight) + e * p.weight_stride_e;
  const auto weight = [&](int c) { return static_cast<double>(to_float(row[c * p.weight_stride_c])); };
  const float* const mean = p.gram + int64_t{p.c} * p.c;
  ExpandedMoments sums{};
  for (int j = lane; j < p.c; j += 32) {
    double wide = 0.0;
    MNET_UNROLL_BY(4)
    for (int k = 0; k < p.c; ++k) wide = fma(weight(k), static_cast<double>(p.gram[k * p.c + j]), wide);
    add_channel(sums, weight(j), wide, mean[j], mean[p.c + j]);
  }
  MNET_UNROLL_BY(1)
  for (int flip = 16; flip > 0; flip /= 2) {
    sums.variance += __shfl_xor_sync(~0u, sums.variance, MNET_PLANT(71, flip, 1));
    sums.mean_k += __shfl_xor_sync(~0u, sums.mean_k, flip);
    sums.mean += __shfl_xor_sync(~0u, sums.mean, flip);
  }
  if (lane == 0) write_expanded(p, e, sums);
}

}  // namespace mnet::cuda
