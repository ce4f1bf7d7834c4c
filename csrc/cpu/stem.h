// The stem (dense 3x3 convolution of an image) and its backward on the CPU, free of torch: a plan, units of work that run
// in any order, and their combination.
//
// A unit is a chunk: a run of output rows, counted over the whole batch, of all channels.  The plan depends on the shape
// and the panel's width alone, never on the number of threads, and the units' sums are combined in the order of the
// chunks: the result is the same, bit for bit, however the units are spread over threads.
#pragma once

#include <cstdint>

#include "../common/stem_params.h"
#include "capability.h"

namespace mnet::cpu {

struct StemPlan {
  int64_t rows;  // n * out_h
  int64_t rows_per_chunk;
  int64_t chunks;
  int depth;  // taps: 9 values an image channel
  int panel;  // output channels of a panel
  int panels;

  int padded_columns() const { return panels * panel; }
  int64_t packed_size() const { return int64_t{panels} * panel * depth; }  // floats of a weight in panels
  int64_t sums_size() const { return chunks * 2 * padded_columns(); }      // doubles of the chunks' means and M2
  int64_t partials_size() const { return chunks * packed_size(); }         // floats of the weight gradient's parts
};

StemPlan plan_stem(const StemImage& image, int channels, Capability capability);

// Chunks [begin, end).  `sums` is nullptr when no moments are wanted.
void stem_units(const StemParams& params, Dtype dtype, const StemPlan& plan, int64_t begin, int64_t end,
                double* sums, Capability capability);
// Writes params.moments, once every unit is done.
void stem_finish(const StemParams& params, const StemPlan& plan, const double* sums);

// `partials` is nullptr when no weight gradient is wanted.
void stem_backward_units(const StemBackwardParams& params, Dtype dtype, const StemPlan& plan, int64_t begin, int64_t end,
                         float* partials, Capability capability);
// Writes params.dw, once every unit is done.
void stem_backward_finish(const StemBackwardParams& params, const StemPlan& plan, const float* partials);

struct StemUnit {
  int64_t row_begin;
  int64_t row_end;
  double* mean;    // of the unit's positions, then their M2, padded_columns() apart; nullptr: not wanted
  float* partial;  // of the weight's gradient, [panel][tap][plan.panel]; nullptr: not wanted
};

// The same kernels compiled for each capability.
#define MNET_STEM_KERNELS(name)                                                                                          \
  namespace name {                                                                                                       \
  void stem_unit(const StemParams& params, Dtype dtype, const StemPlan& plan, const StemUnit& unit);                     \
  void stem_backward_unit(const StemBackwardParams& params, Dtype dtype, const StemPlan& plan, const StemUnit& unit);    \
  }
MNET_STEM_KERNELS(baseline)
MNET_STEM_KERNELS(avx2)
MNET_STEM_KERNELS(avx512)

}  // namespace mnet::cpu
