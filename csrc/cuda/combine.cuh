// The second level of every reduction (combine.h).  Compute capability 8.0 or higher; free of torch.
//
// Memory plan.  A block of 512 threads owns 32 neighbouring results, so that a warp reads 128 bytes of a partial table; its
// 16 warps take every sixteenth table each, four loads in flight, and are added up by the first.  Sums are taken in double
// and in a fixed order: deterministic, and no worse than the partials themselves.
#pragma once

#include "../common/moments.h"
#include "../common/plant.h"
#include "combine.h"
#include "device.h"

namespace mnet::cuda {

struct CombineTraits {
  static constexpr int kLanes = 32;  // results of a block
  static constexpr int kRuns = 16;   // of partials, interleaved
  static constexpr int kThreads = kLanes * kRuns;

  static_assert(3 * kThreads * sizeof(double) <= 48 * 1024, "static shared memory");
};

// The partials are summed shifted by the first one's mean (moments.h): unlike Chan's formula this divides only at the end,
// and equal means still give exactly zero.
__global__ void __launch_bounds__(CombineTraits::kThreads)
    combine_moments_kernel(const float* __restrict__ workspace, int64_t chunks, int32_t c, float* __restrict__ moments) {
  MNET_SHARED(double, sums, [3][CombineTraits::kRuns][CombineTraits::kLanes]);
  const int lane = threadIdx.x % CombineTraits::kLanes, run = threadIdx.x / CombineTraits::kLanes;
  const int64_t channel = int64_t{blockIdx.x} * CombineTraits::kLanes + lane;
  const bool exists = channel < c && chunks > 0;
  const double shift = exists ? static_cast<double>(workspace[c + channel]) : 0.0;
  double count = 0.0, sum1 = 0.0, sum2 = 0.0;
  if (exists) {
    MNET_UNROLL_BY(4)
    for (int64_t chunk = run; chunk < MNET_PLANT(1, chunks, chunks - 1); chunk += CombineTraits::kRuns) {
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
  MNET_PLANT(2, __syncthreads(), (void)0);
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

__global__ void __launch_bounds__(CombineTraits::kThreads) combine_sums_kernel(const PartialSums p) {
  MNET_SHARED(double, sums, [CombineTraits::kRuns][CombineTraits::kLanes]);
  const int lane = threadIdx.x % CombineTraits::kLanes, run = threadIdx.x / CombineTraits::kLanes;
  const int64_t table = int64_t{p.rows} * p.c;
  const int64_t index = int64_t{blockIdx.x} * CombineTraits::kLanes + lane;
  const bool exists = index < p.segments * table;
  const int64_t segment = index / table, at = index % table;
  double sum = 0.0;
  if (exists) {
    const float* partials = p.partials + segment * p.parts * p.part_pitch + at;
    MNET_UNROLL_BY(4)
    for (int64_t part = run; part < MNET_PLANT(3, p.parts, p.parts - 1); part += CombineTraits::kRuns) {
      sum += static_cast<double>(partials[part * p.part_pitch]);
    }
  }
  sums[run][lane] = sum;
  MNET_PLANT(4, __syncthreads(), (void)0);
  if (run != 0 || !exists) return;
  for (int r = 1; r < CombineTraits::kRuns; ++r) sum += sums[r][lane];
  const int64_t row = at / p.c, channel = at % p.c;
  p.out[segment * p.segment_stride + row * p.row_stride + channel * p.channel_stride] = static_cast<float>(sum);
}

}  // namespace mnet::cuda
