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

}  // namespace mnet
