// What a launcher hands to the kernels of the stem, the dense 3x3 convolution of an image (see params.h for the
// conventions).
//
// The image is read by its strides: a data loader's NCHW as well as channels_last.  All other maps are NHWC.
#pragma once

#include "params.h"

namespace mnet {

constexpr int kStemKernel = 3;       // zero padding 1
constexpr int kStemMaxChannels = 8;  // of the image

struct StemImage {
  const void* x;
  int64_t stride_n;
  int64_t stride_c;
  int64_t stride_h;
  int64_t stride_w;

  int64_t n;
  int32_t c;
  int32_t h;
  int32_t w;
  int32_t out_h;
  int32_t out_w;
  int32_t stride;  // 1 or 2

  MNET_HD int64_t rows() const { return n * out_h; }
  MNET_HD int64_t positions() const { return rows() * out_w; }
};

struct StemParams {
  StemImage image;
  const void* weight;  // [e, c, 3, 3], any strides
  void* y;             // [n, out_h, out_w, e]
  float* moments;      // [2, e]: mean, biased variance of the stored y; nullptr: not wanted

  int64_t weight_stride_e;
  int64_t weight_stride_c;
  int64_t weight_stride_h;
  int64_t weight_stride_w;
  int32_t e;
};

struct StemBackwardParams {
  StemImage image;
  // The upstream: g = grad * y_act'(y_bn.scale * y + y_bn.shift), dy = scale * g + b * (y - mean) + c
  const void* grad;   // [n, out_h, out_w, e]
  const void* y;      // like grad
  const float* y_bn;  // rows of e: scale, shift, mean, ...
  const float* coef;  // rows of e: b, c, ...
  void* dy;           // like grad; nullptr: not wanted
  float* dw;          // [e, c, 3, 3], contiguous; nullptr: not wanted
  int32_t e;
  Activation y_act;
};

static_assert(std::is_trivially_copyable_v<StemParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<StemBackwardParams>, "passed to kernels by value");
static_assert(sizeof(StemParams) <= 256 && sizeof(StemBackwardParams) <= 256,
              "kernel arguments live in constant memory: keep them small");

}  // namespace mnet
