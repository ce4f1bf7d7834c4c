// 1x1 convolution and its backward on the CPU, free of torch: a plan, units of work that run in any order, and their
// combination.
//
// A unit is a run of positions (a chunk) of a block of the output's column panels.  The chunks depend on the shape, the
// dtype and the capability alone, and their sums are combined in their order: the result is the same, bit for bit, for
// every number of threads.  This decides only into how many blocks the columns are split, each of which repeats the
// element-wise work on the chunk's other operand.
#pragma once

#include <cstdint>

#include "../common/pointwise_params.h"
#include "capability.h"

namespace mnet::cpu {

// Of a product [positions, depth] x [depth, columns], and (backward) of its weight gradient.
struct PointwisePlan {
  int64_t positions;
  int64_t rows_per_chunk;
  int64_t chunks;
  int tile_rows;         // positions that a unit works on at a time
  int depth;
  int packed_depth;      // rows of a panel of the packed weight and of the weight gradient
  int columns;
  int panel;             // columns of a panel
  int panels;
  int panels_per_block;
  int blocks;
  int64_t slots;         // rows of the table of sums: one a chunk, or one an image a chunk has a part in

  int64_t units() const { return chunks * blocks; }
  int padded_columns() const { return panels * panel; }
  int64_t packed_size() const { return int64_t{panels} * panel * packed_depth; }  // floats of the packed weight
  int64_t sums_size() const { return slots * 3 * padded_columns(); }       // doubles
  int64_t partials_size() const { return chunks * packed_size(); }         // floats of the weight gradient's parts
};

PointwisePlan plan_pointwise(const PointwiseParams& params, Dtype dtype, Capability capability, int threads);
PointwisePlan plan_pointwise_backward(const PointwiseBackwardParams& params, Dtype dtype, Capability capability,
                                      int threads);

// Memory the caller provides; what a call does not need may be nullptr.
struct PointwiseWorkspace {
  float* packed;    // packed_size()
  double* sums;     // sums_size()
  float* partials;  // partials_size()
};

// What a folded layer writes instead of the raw product and its moments: act(scale * y + shift) [+ residual].
struct PointwiseEpilogue {
  const float* table;    // rows of e: scale, shift, ...
  const void* residual;  // [positions, e]; nullptr: none
  Activation act;
};

// Panels [begin, end) of the packed weight; every one before the first unit.
void pointwise_pack(const PointwiseParams& params, Dtype dtype, const PointwisePlan& plan, int64_t begin, int64_t end,
                    float* packed, Capability capability);
// epilogue: nullptr: y and its moments are wanted.
void pointwise_units(const PointwiseParams& params, Dtype dtype, const PointwisePlan& plan, int64_t begin, int64_t end,
                     const PointwiseWorkspace& workspace, const PointwiseEpilogue* epilogue, Capability capability);
// Writes params.moments, once every unit is done.
void pointwise_finish(const PointwiseParams& params, const PointwisePlan& plan, const double* sums);

void pointwise_backward_pack(const PointwiseBackwardParams& params, Dtype dtype, const PointwisePlan& plan,
                             int64_t begin, int64_t end, float* packed, Capability capability);
void pointwise_backward_units(const PointwiseBackwardParams& params, Dtype dtype, const PointwisePlan& plan,
                              int64_t begin, int64_t end, const PointwiseWorkspace& workspace, Capability capability);
// Writes params.sums, once every unit is done.
void pointwise_backward_finish(const PointwiseBackwardParams& params, const PointwisePlan& plan, const double* sums);
// Writes columns of panels [begin, end) of params.dw, once every unit is done.
void pointwise_backward_combine(const PointwiseBackwardParams& params, const PointwisePlan& plan, int64_t begin,
                                int64_t end, const float* partials);

struct PointwiseUnit {
  int64_t chunk;
  int64_t row_begin;
  int64_t row_end;
  int panel_begin;
  int panel_end;
};

// The same kernels compiled for each capability.
#define MNET_POINTWISE_KERNELS(name)                                                                                    \
  namespace name {                                                                                                      \
  void pointwise_pack_panel(const void* weight, Dtype dtype, int64_t stride_k, int64_t stride_n, int depth, int first,  \
                            int columns, float* packed);                                                                \
  void pointwise_unit(const PointwiseParams& params, Dtype dtype, const PointwisePlan& plan, const PointwiseUnit& unit, \
                      const PointwiseWorkspace& workspace, const PointwiseEpilogue* epilogue);                          \
  void pointwise_backward_unit(const PointwiseBackwardParams& params, Dtype dtype, const PointwisePlan& plan,           \
                               const PointwiseUnit& unit, const PointwiseWorkspace& workspace);                         \
  }
MNET_POINTWISE_KERNELS(baseline)
MNET_POINTWISE_KERNELS(avx2)
MNET_POINTWISE_KERNELS(avx512)
MNET_POINTWISE_KERNELS(avx512bf16)  // of bfloat16 alone, as
MNET_POINTWISE_KERNELS(amx)

}  // namespace mnet::cpu
