// Algebraic mode on the CPU, free of torch: the covariance of x (gram), the expand layer and the depthwise convolution
// in one kernel (F1), and the last pass of the backward (mix).  expand_backward.h has B2.
//
// As for pointwise.h: units run in any order, their plan depends on the shape and the capability alone, and their sums
// are combined in the units' order, in double.
#pragma once

#include <cstdint>

#include "../common/expand_params.h"
#include "capability.h"

namespace mnet::cpu {

// ---- gram ----------------------------------------------------------------------------------------------------------

struct GramPlan {
  int64_t rows_per_chunk;
  int64_t chunks;
  int panel;
  int panels;

  static constexpr int kTileRows = 128;

  int64_t padded() const { return int64_t{panels} * panel; }
  int64_t blocks() const { return int64_t{panels} * (panels + 1) / 2; }  // of the lower triangle, panel x panel
  int64_t table_size() const { return padded() + blocks() * panel * panel; }
  int64_t workspace() const { return chunks * table_size(); }  // doubles: means and sums of products of every chunk
};

GramPlan plan_gram(const GramParams& params, Capability capability);
void gram_units(const GramParams& params, Dtype dtype, const GramPlan& plan, int64_t begin, int64_t end, double* workspace,
                Capability capability);
// Writes params.gram, once every unit is done; merges the workspace in place.
void gram_finish(const GramParams& params, Dtype dtype, const GramPlan& plan, double* workspace, Capability capability);

// ---- mix -----------------------------------------------------------------------------------------------------------

struct ExpandMixPlan {
  int64_t chunks;
  int panel;
  int panels;

  static constexpr int kTileRows = 84;  // a multiple of every capability's block of rows
  static constexpr int64_t kChunkRows = 8 * kTileRows;

  int64_t packed_size() const { return int64_t{panels} * panel; }  // times c: floats of the packed M
};

ExpandMixPlan plan_expand_mix(const ExpandMixParams& params, Capability capability);
void expand_mix_pack(const ExpandMixParams& params, const ExpandMixPlan& plan, float* packed, Capability capability);
void expand_mix_units(const ExpandMixParams& params, Dtype dtype, const ExpandMixPlan& plan, int64_t begin, int64_t end,
                      const float* packed, Capability capability);

// ---- small tables --------------------------------------------------------------------------------------------------

// c[rows, columns] = a b in double: a's element (r, k) at r * row_stride + k * depth_stride; b [depth, columns] and c
// have rows of a multiple of 16 doubles, which columns counts.
void multiply_double(const double* a, int64_t row_stride, int64_t depth_stride, const double* b, int rows, int depth,
                     int64_t columns, double* c, Capability capability);

// ---- F1 ------------------------------------------------------------------------------------------------------------

// Positions of x that an expanded strip is made for: a panel of them stays in the first-level cache.
constexpr int kStripPositions = 128;

struct ExpandPlan {
  int64_t rows;            // n * out_h
  int64_t rows_per_chunk;  // of the output
  int64_t chunks;
  int strip_rows;  // output rows that a unit works on at a time
  int panel;
  int panels;
  int panels_per_block;
  int blocks;

  int64_t units() const { return chunks * blocks; }
  int64_t padded() const { return int64_t{panels} * panel; }
  int64_t moments_size() const { return chunks * 2 * padded(); }  // doubles: means and M2 of every chunk
};

// Rows of a chunk of `images` maps of `height` rows, at most max_chunks of them: whole images where there are enough.
int64_t rows_per_chunk(int64_t images, int64_t height, int64_t strip_rows, int64_t max_chunks);

ExpandPlan plan_expand_depthwise(const ExpandDepthwiseParams& params, Capability capability);
// Of the packed expand weight, for e expanded channels: panels, and floats.
int expand_panels(int e, Capability capability);
int64_t expand_packed_size(const ExpandLayer& expand, int e, Capability capability);
// Panels [begin, end) of it; every one before the first unit.
void expand_pack(const ExpandLayer& expand, int e, Dtype dtype, int64_t begin, int64_t end, float* packed,
                 Capability capability);
// `moments` may be nullptr.
void expand_depthwise_units(const ExpandDepthwiseParams& params, Dtype dtype, const ExpandPlan& plan, int64_t begin,
                            int64_t end, const float* packed, double* moments, Capability capability);
// Writes params.depthwise.moments, once every unit is done.
void expand_depthwise_finish(const ExpandDepthwiseParams& params, const ExpandPlan& plan, const double* moments);

struct ExpandUnit {
  int64_t row_begin;
  int64_t row_end;
  int panel_begin;
  int panel_end;
  double* mean;  // by channel, from the first of all; or nullptr
  double* m2;
};

// The same kernels compiled for each capability.
#define MNET_EXPAND_KERNELS(name)                                                                                        \
  namespace name {                                                                                                       \
  void gram_unit(const GramParams& params, Dtype dtype, const GramPlan& plan, int64_t chunk, double* table);             \
  void gram_table(const GramParams& params, Dtype dtype, const GramPlan& plan, double* tables);                          \
  void expand_mix_pack(const ExpandMixParams& params, float* packed);                                                    \
  void expand_mix_chunk(const ExpandMixParams& params, Dtype dtype, int64_t chunk, const float* packed);                 \
  void multiply_double(const double* a, int64_t row_stride, int64_t depth_stride, const double* b, int rows, int depth,  \
                       int64_t columns, double* c);                                                                      \
  void expand_pack_panel(const ExpandLayer& expand, int e, Dtype dtype, int64_t panel, float* packed);                   \
  void expand_depthwise_unit(const ExpandDepthwiseParams& params, Dtype dtype, const ExpandPlan& plan,                   \
                             const ExpandUnit& unit, const float* packed);                                               \
  }
MNET_EXPAND_KERNELS(baseline)
MNET_EXPAND_KERNELS(avx2)
MNET_EXPAND_KERNELS(avx512)

}  // namespace mnet::cpu
