// Sums over blocks in a fixed order.  Free of torch.
#pragma once

#include "../common/plant.h"
#include "device.h"

namespace mnet::cuda {

struct CombineSumsTraits {
  static constexpr int kColumns = 32;  // a warp reads 128 bytes of each partial
  static constexpr int kMaxLanes = 32;
};

// partials [spans, runs, rows, c] -> sums [rows, spans, c], in double.  A block: 32 columns of one row of one span, by
// blockDim / 32 interleaved parts of its runs.
static __global__ void __launch_bounds__(CombineSumsTraits::kColumns* CombineSumsTraits::kMaxLanes)
    combine_sums(const float* __restrict__ partials, int64_t spans, int64_t runs, int32_t rows, int64_t c,
                 float* __restrict__ sums) {
  MNET_SHARED(double, parts, [CombineSumsTraits::kMaxLanes][CombineSumsTraits::kColumns]);
  constexpr int kColumns = CombineSumsTraits::kColumns;
  const int lanes = static_cast<int>(blockDim.x) / kColumns, column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int64_t blocks = (c + kColumns - 1) / kColumns, row = blockIdx.x / blocks % rows, span = blockIdx.x / blocks / rows;
  const int64_t channel = blockIdx.x % blocks * kColumns + column;
  double sum = 0.0;
  if (channel < c) {
    MNET_UNROLL_BY(8)
    for (int64_t run = part; run < runs; run += lanes) {
      sum += partials[((span * runs + run) * rows + row) * c + channel];
    }
  }
  parts[part][column] = sum;
  MNET_PLANT(9, __syncthreads(), (void)0);
  if (part != 0 || channel >= c) return;
  for (int p = 1; p < MNET_PLANT(10, lanes, lanes - 1); ++p) sum += parts[p][column];
  sums[(row * spans + span) * c + channel] = static_cast<float>(sum);
}

}  // namespace mnet::cuda
