// What a launcher hands to a kernel: plain data, free of torch.
//
// Activations are NHWC in memory without gaps (torch's channels_last).  Sizes and strides are in elements, not bytes;
// whatever multiplies into an offset is 64 bits wide.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation.h"

namespace mnet {

// Storage dtype of the activations and of the convolution weight.
enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct DepthwiseParams {
  const void* x;       // [n, h, w, c]
  const void* weight;  // [c, kernel, kernel], any strides
  const float* bn;     // rows of c: scale, shift, ... ; nullptr: x is read as it is
  void* y;             // [n, out_h, out_w, c]
  float* moments;      // [2, c]: mean, biased variance of the stored y; nullptr: not wanted

  int64_t weight_stride_c;
  int64_t weight_stride_h;
  int64_t weight_stride_w;

  int64_t n;
  int32_t c;
  int32_t h;
  int32_t w;
  int32_t out_h;
  int32_t out_w;
  int32_t kernel;  // 3 or 5; zero padding kernel / 2
  int32_t stride;  // 1 or 2
  Activation act;  // of the prologue act(scale * x + shift)
};

static_assert(std::is_trivially_copyable_v<DepthwiseParams>, "passed to kernels by value");
static_assert(sizeof(DepthwiseParams) <= 256, "kernel arguments live in constant memory: keep them small");

// normalize (operand: residual, output: out), normalize_gram (the same, table: gram), normalize_backward (operand: grad,
// table: sums) and squeeze (table).
struct NormalizeParams {
  const void* y;        // [n, area, c]
  const void* operand;  // like y; nullptr: none
  void* output;         // like y
  const float* bn;      // rows of c: scale, shift, mean, ...
  float* table;         // [2, c] sums, [3, n, c] squeeze table, or [c + 2, c] gram

  int64_t n;
  int64_t area;  // h * w
  int32_t c;
  Activation act;  // of act(scale * y + shift)
};

static_assert(std::is_trivially_copyable_v<NormalizeParams>, "passed to kernels by value");

struct DepthwiseBackwardParams {
  // The upstream: g = (gate * grad + offset) * y_act'(y_bn.scale * y + y_bn.shift)
  const void* grad;     // [n, out_h, out_w, c]
  const void* y;        // like grad
  const float* y_bn;    // rows of c: scale, shift, mean, ...
  const float* coef;    // rows of c: b, c of dy = scale * g + b * (y - mean) + c
  const float* gate;    // [n, c]; nullptr: 1
  const float* offset;  // [n, c]; nullptr: 0

  const void* x;         // [n, h, w, c]
  const void* weight;    // [c, kernel, kernel], any strides
  const float* bn;       // of x, rows of c: scale, shift, mean, ...; nullptr: x is read as it is
  const void* residual;  // like x, added to gx where there is no bn; nullptr: none
  void* gx;              // like x; nullptr: not wanted
  float* sums;           // [2, c]: sum gx, sum gx * (x - mean); nullptr: not wanted
  float* dw;             // [c, kernel, kernel], contiguous; nullptr: not wanted

  int64_t weight_stride_c;
  int64_t weight_stride_h;
  int64_t weight_stride_w;

  int64_t n;
  int32_t c;
  int32_t h;
  int32_t w;
  int32_t out_h;
  int32_t out_w;
  int32_t kernel;  // 3 or 5; zero padding kernel / 2
  int32_t stride;  // 1 or 2
  Activation y_act;
  Activation act;  // of the prologue act(scale * x + shift)
};

static_assert(std::is_trivially_copyable_v<DepthwiseBackwardParams>, "passed to kernels by value");
static_assert(sizeof(DepthwiseBackwardParams) <= 256, "kernel arguments live in constant memory: keep them small");

}  // namespace mnet
