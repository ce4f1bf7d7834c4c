// What a launcher hands to the pointwise kernels (see params.h for the conventions).
//
// Activations are matrices of `positions` rows (n * h * w, NHWC in memory) by channels.  Tables keep the rows of
// mnet_kernels/schema.py.
#pragma once

#include "params.h"

namespace mnet {

struct PointwiseParams {
  const void* x;       // [positions, c]
  const void* weight;  // [e, c], any strides
  const float* bn;     // [5, c] of x; nullptr: x is read as it is
  const float* gate;   // [images, c]; nullptr: none
  void* y;             // [positions, e]
  float* moments;      // [2, e]: mean, biased variance of the stored y; nullptr: not wanted

  int64_t weight_stride_e;
  int64_t weight_stride_c;

  int64_t images;
  int64_t image_positions;  // h * w
  int32_t c;
  int32_t e;
  Activation act;

  int64_t positions() const { return images * image_positions; }
};

struct PointwiseBackwardParams {
  const void* grad;     // [positions, e]; nullptr: offset takes its place
  const void* y;        // [positions, e]
  const float* y_bn;    // [5, e]
  const float* coef;    // [2, e]
  const float* offset;  // [images, e], the gradient at every position of an image; nullptr: grad
  const void* x;      // [positions, c]
  const void* weight;
  const float* bn;       // [5, c] or nullptr
  const float* gate;     // [images, c] or nullptr
  const void* residual;  // [positions, c] or nullptr
  void* gx;              // [positions, c]; nullptr: not wanted
  float* sums;           // [2, c], with a gate [3, images, c]; nullptr: not wanted
  float* dw;             // [e, c]; nullptr: not wanted

  int64_t weight_stride_e;
  int64_t weight_stride_c;

  int64_t images;
  int64_t image_positions;
  int32_t c;
  int32_t e;
  Activation y_act;
  Activation act;

  int64_t positions() const { return images * image_positions; }
};

static_assert(std::is_trivially_copyable_v<PointwiseParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<PointwiseBackwardParams>, "passed to kernels by value");
static_assert(sizeof(PointwiseBackwardParams) <= 256, "kernel arguments live in constant memory: keep them small");

}  // namespace mnet
