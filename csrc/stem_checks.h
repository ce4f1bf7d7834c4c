// From tensors to the stem stages' params: the checks and allocations that all launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "common/stem_params.h"
#include "maps.h"
#include "stage_checks.h"

namespace mnet {

// x [N, C, H, W] of any strides, C of at most kStemMaxChannels.
inline StemImage stem_image(const char* op, const at::Tensor& x, int64_t stride) {
  TORCH_CHECK(x.dim() == 4, op, ": x has shape ", x.sizes(), ", expected [N, C, H, W]");
  TORCH_CHECK(x.size(1) > 0 && x.size(1) <= kStemMaxChannels, op, ": x has shape ", x.sizes(), ", expected 1 to ",
              kStemMaxChannels, " channels (it is an image); use torch.nn.functional.conv2d for more");
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max() / 32;  // a padded row of values has an int as its size
  TORCH_CHECK(x.size(2) > 0 && x.size(2) <= kMaxSize && x.size(3) > 0 && x.size(3) <= kMaxSize, op, ": x has shape ",
              x.sizes(), ", expected H and W from 1 to ", kMaxSize);
  TORCH_CHECK(stride == 1 || stride == 2, op, ": stride is ", stride, ", expected 1 or 2");
  StemImage image{};
  image.x = x.const_data_ptr();
  image.stride_n = x.stride(0);
  image.stride_c = x.stride(1);
  image.stride_h = x.stride(2);
  image.stride_w = x.stride(3);
  image.n = x.size(0);
  image.c = static_cast<int32_t>(x.size(1));
  image.h = static_cast<int32_t>(x.size(2));
  image.w = static_cast<int32_t>(x.size(3));
  image.out_h = static_cast<int32_t>((x.size(2) - 1) / stride + 1);
  image.out_w = static_cast<int32_t>((x.size(3) - 1) / stride + 1);
  image.stride = static_cast<int32_t>(stride);
  return image;
}

struct StemCall {
  at::Tensor y, moments;
  StemParams params;
  Dtype dtype;
};

inline StemCall prepare_stem(const at::Tensor& x, const at::Tensor& weight, int64_t stride, bool moments) {
  const char* op = "stem";
  StemCall call{};
  call.dtype = storage_dtype(op, x);
  StemParams& p = call.params;
  p.image = stem_image(op, x, stride);
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) && weight.size(2) == kStemKernel &&
                  weight.size(3) == kStemKernel,
              op, ": weight has shape ", weight.sizes(), ", expected [E, ", x.size(1), ", 3, 3] with E of at least 1");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight has dtype ", weight.scalar_type(),
              ", expected x's ", x.scalar_type(), "; cast it (weight.to(x.dtype))");
  TORCH_CHECK(weight.device() == x.device(), op, ": weight is on ", weight.device(), ", expected x's ", x.device());
  const int64_t e = weight.size(0);
  call.y = empty_map({p.image.n, e, p.image.out_h, p.image.out_w}, x);
  const auto statistics = x.options().dtype(at::kFloat);
  call.moments = moments ? at::empty({2, e}, statistics) : at::empty({0}, statistics);
  p.weight = weight.const_data_ptr();
  p.y = call.y.mutable_data_ptr();
  p.moments = moments ? call.moments.mutable_data_ptr<float>() : nullptr;
  p.weight_stride_e = weight.stride(0);
  p.weight_stride_c = weight.stride(1);
  p.weight_stride_h = weight.stride(2);
  p.weight_stride_w = weight.stride(3);
  p.e = static_cast<int32_t>(e);
  return call;
}

struct StemBackwardCall {
  at::Tensor dy, dw;
  StemBackwardParams params;
  Dtype dtype;
};

inline StemBackwardCall prepare_stem_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& y_bn,
                                              const at::Tensor& coef, int64_t y_act, const at::Tensor& x, int64_t stride,
                                              bool needs_dy, bool needs_dw) {
  const char* op = "stem_backward";
  StemBackwardCall call{};
  call.dtype = storage_dtype(op, x);
  StemBackwardParams& p = call.params;
  p.image = stem_image(op, x, stride);
  check_activation(op, "y_act", y_act);
  TORCH_CHECK(y.dim() == 4, op, ": y has shape ", y.sizes(), ", expected [N, E, H', W']");
  const int64_t e = y.size(1);
  const int64_t shape[] = {p.image.n, e, p.image.out_h, p.image.out_w};
  check_map_like(op, "grad", grad, shape, "x", x);
  check_map_like(op, "y", y, shape, "x", x);
  p.y_bn = check_table(op, "y_bn", y_bn, {5, e}, x);
  p.coef = check_table(op, "coef", coef, {2, e}, x);
  call.dy = needs_dy ? empty_map(shape, x)
                     : at::empty({0}, x.options());
  const auto tables = x.options().dtype(at::kFloat);
  call.dw = needs_dw ? at::empty({e, p.image.c, kStemKernel, kStemKernel}, tables) : at::empty({0}, tables);
  p.grad = grad.const_data_ptr();
  p.y = y.const_data_ptr();
  p.dy = needs_dy ? call.dy.mutable_data_ptr() : nullptr;
  p.dw = needs_dw ? call.dw.mutable_data_ptr<float>() : nullptr;
  p.e = static_cast<int32_t>(e);
  p.y_act = static_cast<Activation>(y_act);
  return call;
}

}  // namespace mnet
