// Backward of the depthwise convolution on the CPU, free of torch: input and weight gradient in one pass.
//
// As for depthwise.h: a unit is a run of input rows (counted over the whole batch) of one block of channels; the plan
// depends on the shape alone, and the units' sums are combined in the units' order, in double.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "capability.h"

namespace mnet::cpu {

struct DepthwiseBackwardPlan {
  int64_t rows;            // n * h
  int64_t rows_per_chunk;
  int64_t chunks;
  int64_t channel_blocks;  // of `channels` channels, the last perhaps less
  int channels;

  static constexpr int kChannelBlock = 512;  // at most

  int64_t units() const { return chunks * channel_blocks; }
};

DepthwiseBackwardPlan plan_depthwise_backward(const DepthwiseBackwardParams& params);

// Doubles of workspace: per chunk [kernel * kernel + 2, c], the weight gradient by tap and the two sums.
int64_t depthwise_backward_workspace(const DepthwiseBackwardParams& params, const DepthwiseBackwardPlan& plan);

// Runs units [begin, end).
void depthwise_backward_units(const DepthwiseBackwardParams& params, Dtype dtype, const DepthwiseBackwardPlan& plan,
                              int64_t begin, int64_t end, double* workspace, Capability capability);

// Writes params.dw and params.sums, where wanted, from the workspace, once every unit is done.
void depthwise_backward_finish(const DepthwiseBackwardParams& params, const DepthwiseBackwardPlan& plan,
                               const double* workspace);

// One unit: input rows [row_begin, row_end) of channels [channel_begin, channel_end); `totals` is its chunk's table.
struct DepthwiseBackwardUnit {
  int64_t row_begin;
  int64_t row_end;
  int channel_begin;
  int channel_end;
  double* totals;
};

// The same kernel compiled for each capability.
namespace baseline {
void depthwise_backward_unit(const DepthwiseBackwardParams& params, Dtype dtype, const DepthwiseBackwardUnit& unit);
}
namespace avx2 {
void depthwise_backward_unit(const DepthwiseBackwardParams& params, Dtype dtype, const DepthwiseBackwardUnit& unit);
}
namespace avx512 {
void depthwise_backward_unit(const DepthwiseBackwardParams& params, Dtype dtype, const DepthwiseBackwardUnit& unit);
}

}  // namespace mnet::cpu
