// Launchers of the second level of every reduction: the blocks' partial results, combined in the blocks' order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mnet::cuda {

// workspace [chunks, 3, c] of count, mean, M2 -> moments [2, c] of mean, biased variance; zero where nothing was counted.
cudaError_t combine_moments(const float* workspace, int64_t chunks, int32_t c, float* moments, cudaStream_t stream);

// Tables of sums: out[segment, row, channel] = sum over parts of partials[segment, part, row, channel], zero without parts.
struct PartialSums {
  const float* partials;  // [segments, parts] tables of [rows, c], part_pitch floats apart
  int64_t segments;
  int64_t parts;
  int64_t part_pitch;
  int32_t rows;
  int32_t c;

  float* out;
  int64_t segment_stride;
  int64_t row_stride;
  int64_t channel_stride;
};

cudaError_t combine_sums(const PartialSums& sums, cudaStream_t stream);

}  // namespace mnet::cuda
