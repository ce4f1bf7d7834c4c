// Backward of expand layer and depthwise convolution in one (B2) on the CPU, free of torch; see expand.h.
//
// A unit is a run of input rows (counted over the whole batch) of all expanded channels, which it takes block by block.
#pragma once

#include <cstdint>

#include "../common/expand_params.h"
#include "capability.h"

namespace mnet::cpu {

struct ExpandBackwardPlan {
  int64_t rows;            // n * h
  int64_t rows_per_chunk;
  int64_t chunks;
  int strip_rows;  // input rows that a unit works on at a time
  int panel;
  int panels;            // of the expanded channels
  int panels_per_block;
  int blocks;
  int dx_panels;         // of the block's input channels
  int taps;
  int c;

  int64_t padded() const { return int64_t{panels} * panel; }
  int64_t dx_padded() const { return int64_t{dx_panels} * panel; }
  // Doubles a chunk sums up: by panel of expanded channels [c][panel] of G, then rows of e: sum g1, dW by tap.
  int64_t table_size() const { return padded() * (c + 1 + taps); }
  int64_t workspace() const { return chunks * table_size(); }
};

// Floats of the packed weights: expand [panels][c][panel], project [panels][project.c][panel], and for dx the scaled expand
// weight [dx_panels][e][panel].
struct ExpandBackwardPacked {
  float* expand;
  float* project;
  float* scaled;
};

ExpandBackwardPlan plan_expand_backward(const ExpandBackwardParams& params, Capability capability);
// Panels [begin, end) of panels + dx_panels; every one before the first unit.
void expand_backward_pack(const ExpandBackwardParams& params, Dtype dtype, const ExpandBackwardPlan& plan, int64_t begin,
                          int64_t end, const ExpandBackwardPacked& packed, Capability capability);
void expand_backward_units(const ExpandBackwardParams& params, Dtype dtype, const ExpandBackwardPlan& plan, int64_t begin,
                           int64_t end, const ExpandBackwardPacked& packed, double* workspace, Capability capability);
// Writes params.gramgrad and params.depthwise.dw of panels [begin, end) of the expanded channels, once every unit is done.
void expand_backward_combine(const ExpandBackwardParams& params, const ExpandBackwardPlan& plan, int64_t begin,
                             int64_t end, const double* workspace);

struct ExpandBackwardUnit {
  int64_t row_begin;
  int64_t row_end;
  double* table;
};

// The same kernel compiled for each capability.
#define MNET_EXPAND_BACKWARD_KERNELS(name)                                                                              \
  namespace name {                                                                                                      \
  void expand_backward_pack_panel(const ExpandBackwardParams& params, Dtype dtype, const ExpandBackwardPlan& plan,      \
                                  int64_t panel, const ExpandBackwardPacked& packed);                                   \
  void expand_backward_unit(const ExpandBackwardParams& params, Dtype dtype, const ExpandBackwardPlan& plan,            \
                            const ExpandBackwardUnit& unit, const ExpandBackwardPacked& packed);                        \
  }
MNET_EXPAND_BACKWARD_KERNELS(baseline)
MNET_EXPAND_BACKWARD_KERNELS(avx2)
MNET_EXPAND_BACKWARD_KERNELS(avx512)

}  // namespace mnet::cpu
