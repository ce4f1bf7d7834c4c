// The moments of a convolution's output from those its blocks gathered: the last step of the depthwise and of the
// pointwise forward.
#pragma once

#include "../common/moments.h"
#include "../common/plant.h"
#include "device.h"

namespace mnet::cuda {

struct CombineTraits {
  static constexpr int kChannels = 32;  // a warp reads 128 bytes of each partial
  static constexpr int kRuns = 16;      // of partials, interleaved
  static constexpr int kThreads = kChannels * kRuns;
};

// workspace [chunks, 3, c] of count, mean, M2 -> moments [2, c] of mean, biased variance.
//
// The partials are summed in double, shifted by the first one's mean (moments.h): unlike Chan's formula this divides
// only at the end, and equal means still give exactly zero.  The order is fixed.
static __global__ void __launch_bounds__(CombineTraits::kThreads)
    combine_moments(const float* __restrict__ workspace, int64_t chunks, int32_t c, float* __restrict__ moments) {
  MNET_SHARED(double, sums, [3][CombineTraits::kRuns][CombineTraits::kChannels]);
  const int lane = threadIdx.x % CombineTraits::kChannels, run = threadIdx.x / CombineTraits::kChannels;
  const int64_t channel = int64_t{blockIdx.x} * CombineTraits::kChannels + lane;
  const bool exists = channel < c && chunks > 0;
  const double shift = exists ? static_cast<double>(workspace[c + channel]) : 0.0;
  double count = 0.0, sum1 = 0.0, sum2 = 0.0;
  if (exists) {
    MNET_UNROLL_BY(4)
    for (int64_t chunk = run; chunk < MNET_PLANT(10, chunks, chunks - 1); chunk += CombineTraits::kRuns) {
      const float* partial = workspace + chunk * 3 * c + channel;
      const double n = partial[0], d = partial[c] - shift;
      count += n;
      sum1 += n * d;
      sum2 += partial[2 * int64_t{c}] + n * d * d;
    }
  }
  sums[0][run][lane] = count;
  sums[1][run][lane] = sum1;
  sums[2][run][lane] = sum2;
  MNET_PLANT(11, __syncthreads(), (void)0);
  if (run != 0 || channel >= c) return;
  for (int r = 1; r < CombineTraits::kRuns; ++r) {
    count += sums[0][r][lane];
    sum1 += sums[1][r][lane];
    sum2 += sums[2][r][lane];
  }
  Moments<double> total{0.0, 0.0, 0.0};
  if (count > 0.0) total = from_shifted(count, shift, sum1, sum2);
  moments[channel] = static_cast<float>(total.mean);
  moments[c + channel] = count > 0.0 ? static_cast<float>(total.m2 / count) : 0.f;
}

}  // namespace mnet::cuda
