// Depthwise convolution on the CPU, free of torch: a plan, units of work that run in any order, and their combination.
//
// A unit is a run of output rows (counted over the whole batch) of one block of channels.  The plan depends on the
// shape alone, never on the number of threads, and the units' moments are combined in the units' order: the result is
// the same, bit for bit, however the units are spread over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/params.h"
#include "capability.h"

namespace mnet::cpu {

struct DepthwisePlan {
  int64_t rows;            // n * out_h
  int64_t rows_per_chunk;
  int64_t chunks;
  int64_t channel_blocks;  // of kChannelBlock channels

  static constexpr int kChannelBlock = 512;

  int64_t units() const { return chunks * channel_blocks; }
};

DepthwisePlan plan_depthwise(const DepthwiseParams& params);

// Doubles of workspace the units write their moments to: per chunk a row of means and a row of M2.
int64_t depthwise_workspace(const DepthwiseParams& params, const DepthwisePlan& plan);

// Runs units [begin, end).  `workspace` is not read, and is nullptr when no moments are wanted.
void depthwise_units(const DepthwiseParams& params, Dtype dtype, const DepthwisePlan& plan, int64_t begin, int64_t end,
                     double* workspace, Capability capability);

// Writes params.moments from the workspace, once every unit is done.
void depthwise_finish(const DepthwiseParams& params, const DepthwisePlan& plan, const double* workspace);

// One unit: output rows [row_begin, row_end) of channels [channel_begin, channel_end); mean and m2 by channel, or null.
struct DepthwiseUnit {
  int64_t row_begin;
  int64_t row_end;
  int channel_begin;
  int channel_end;
  double* mean;
  double* m2;
};

// The same kernel compiled for each capability.
namespace baseline {
void depthwise_unit(const DepthwiseParams& params, Dtype dtype, const DepthwiseUnit& unit);
}
namespace avx2 {
void depthwise_unit(const DepthwiseParams& params, Dtype dtype, const DepthwiseUnit& unit);
}
namespace avx512 {
void depthwise_unit(const DepthwiseParams& params, Dtype dtype, const DepthwiseUnit& unit);
}

}  // namespace mnet::cpu
