// normalize, normalize_backward and squeeze on the CPU, free of torch: maps read once, position by position.
//
// As for depthwise.h: a plan that depends on the shape alone, units that run in any order, and their combination in
// the units' order, so that the result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "capability.h"

namespace mnet::cpu {

struct NormalizePlan {
  int64_t positions;            // n * area
  int64_t positions_per_chunk;  // a unit of normalize and normalize_backward
  int64_t chunks;
  // A unit of squeeze is an image, or where there are few images a block of `channels` of its channels.
  int64_t channel_blocks;
  int channels;
};

NormalizePlan plan_normalize(const NormalizeParams& params);

void normalize_chunks(const NormalizeParams& params, Dtype dtype, const NormalizePlan& plan, int64_t begin, int64_t end,
                      Capability capability);

// Doubles the chunks of normalize_backward write their sums to: [chunks, 2, c].
int64_t normalize_backward_workspace(const NormalizeParams& params, const NormalizePlan& plan);
void normalize_backward_chunks(const NormalizeParams& params, Dtype dtype, const NormalizePlan& plan, int64_t begin,
                               int64_t end, double* workspace, Capability capability);
// Writes params.table from the workspace, once every chunk is done.
void normalize_backward_finish(const NormalizeParams& params, const NormalizePlan& plan, const double* workspace);

// Units [begin, end) of n * channel_blocks.
void squeeze_units(const NormalizeParams& params, Dtype dtype, const NormalizePlan& plan, int64_t begin, int64_t end,
                   Capability capability);

// The kernels compiled for each capability.  Positions count over the whole batch.
#define MNET_DECLARE_NORMALIZE(capability)                                                                        \
  namespace capability {                                                                                          \
  void normalize_positions(const NormalizeParams& params, Dtype dtype, int64_t begin, int64_t end);               \
  void normalize_backward_positions(const NormalizeParams& params, Dtype dtype, int64_t begin, int64_t end,       \
                                    double* sums);                                                                \
  void squeeze_image(const NormalizeParams& params, Dtype dtype, int64_t image, int channel_begin, int channel_end); \
  }
MNET_DECLARE_NORMALIZE(baseline)
MNET_DECLARE_NORMALIZE(avx2)
MNET_DECLARE_NORMALIZE(avx512)
#undef MNET_DECLARE_NORMALIZE

}  // namespace mnet::cpu
