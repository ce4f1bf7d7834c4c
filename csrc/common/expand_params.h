// What a launcher hands to the kernels of algebraic mode (see params.h for the conventions).
//
// The expanded map y1 = W (x - shift) has e channels and is never in memory: where a stage of the depthwise convolution is
// named below, its input is act(bn(y1)), and its params' own `x` is nullptr.
#pragma once

#include <cmath>

#include "params.h"

namespace mnet {

struct GramParams {
  const void* x;  // [positions, c]
  float* gram;    // [c + 2, c]
  int64_t positions;
  int32_t c;
};

// Batch norm of y1 = W (x - shift) from gram; the statistics' unrounded values are doubles.
struct ExpandFinalizeParams {
  const float* gram;    // [c + 2, c]
  const void* weight;   // [e, c], any strides
  const float* gamma;   // [e]; nullptr: 1
  const float* beta;    // [e]; nullptr: 0
  float* bn;            // [5, e]
  float* mean;          // [e]: of W x
  int64_t weight_stride_e;
  int64_t weight_stride_c;
  double eps;
  double correction;  // unbiased / biased variance
  int32_t c;
  int32_t e;
};

// What a row w of the weight makes of gram: w Cov w^T, w (mean - shift), w mean.
struct ExpandedMoments {
  double variance;
  double mean_k;
  double mean;
};

// Adds channel j: its weight, element j of w Cov, mean and shift of x.
MNET_HD void add_channel(ExpandedMoments& sums, double weight, double wide, float mean, float shift) {
  sums.variance += weight * wide;
  sums.mean_k += weight * (static_cast<double>(mean) - shift);
  sums.mean += weight * mean;
}

MNET_HD void write_expanded(const ExpandFinalizeParams& p, int64_t i, const ExpandedMoments& sums) {
  const int64_t e = p.e;
  const double variance = sums.variance < 0.0 ? 0.0 : sums.variance;
  const double rstd = 1.0 / sqrt(variance + p.eps);
  // shift goes with scale and mean as they are stored, so that act(scale * y + shift) is centred whatever their rounding
  const auto scale = static_cast<float>(p.gamma == nullptr ? rstd : rstd * p.gamma[i]);
  const auto mean_k = static_cast<float>(sums.mean_k);
  p.bn[i] = scale;
  p.bn[e + i] = static_cast<float>((p.beta == nullptr ? 0.0 : p.beta[i]) - static_cast<double>(mean_k) * scale);
  p.bn[2 * e + i] = mean_k;
  p.bn[3 * e + i] = static_cast<float>(rstd);
  p.bn[4 * e + i] = static_cast<float>(variance * p.correction);
  p.mean[i] = static_cast<float>(sums.mean);
}

// dx = partial + M (x - shift) + v [+ residual]
struct ExpandMixParams {
  const void* partial;   // [positions, c]
  const void* x;         // like partial
  const float* shift;    // [c]
  const float* mix;      // [c + 1, c]: M by output channel, v
  const void* residual;  // like partial; nullptr: none
  void* dx;              // like partial
  int64_t positions;
  int32_t c;
};

// The expand layer: y1 = W (x - shift).
struct ExpandLayer {
  const void* x;       // [n, h, w, c]
  const float* shift;  // [c]
  const void* weight;  // [e, c], any strides
  int64_t weight_stride_e;
  int64_t weight_stride_c;
  int32_t c;
};

struct ExpandDepthwiseParams {
  ExpandLayer expand;
  DepthwiseParams depthwise;  // its c is e, its bn and act the expand layer's
};

// The project layer's upstream, from which the gradient at z2 = act(bn(y2)) is rebuilt: dz2 = W3^T dy3.
struct ProjectUpstream {
  const void* grad;    // [n, out_h, out_w, c]
  const void* y;       // like grad
  const float* bn;     // [5, c] of y
  const float* coef;   // [2, c]
  const void* weight;  // [c, e], any strides
  int64_t weight_stride_c;
  int64_t weight_stride_e;
  int32_t c;
  Activation act;  // of y's batch norm
};

struct ExpandBackwardParams {
  ExpandLayer expand;
  ProjectUpstream project;
  DepthwiseBackwardParams depthwise;  // its c is e; grad, residual, gx and sums are nullptr: none of them is in memory
  void* dx;                           // like x: sum over e of g1 W~, W~ = bn.scale W rounded to storage; nullptr: not wanted
  float* gramgrad;                    // [e, c + 1]: sum g1 (x - shift)^T, sum g1
};

static_assert(std::is_trivially_copyable_v<GramParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<ExpandFinalizeParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<ExpandDepthwiseParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<ExpandBackwardParams>, "passed to kernels by value");

}  // namespace mnet
