// From tensors to the params of algebraic mode: the checks and allocations of its launchers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "common/expand_params.h"
#include "pointwise_checks.h"
#include "stage_checks.h"

namespace mnet {

// The expand layer; weight is [e, c, 1, 1].
inline ExpandLayer prepare_expand(const char* op, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& weight) {
  check_map(op, "x", x);
  check_pointwise_weight(op, weight, x);
  ExpandLayer layer{};
  layer.x = x.const_data_ptr();
  layer.shift = check_table(op, "shift", shift, {x.size(1)}, x);
  layer.weight = weight.const_data_ptr();
  layer.weight_stride_e = weight.stride(0);
  layer.weight_stride_c = weight.stride(1);
  layer.c = static_cast<int32_t>(x.size(1));
  return layer;
}

// The depthwise weight [e, 1, k, k] behind an expand layer of e channels.
inline void check_expanded_weight(const char* op, const at::Tensor& weight, int64_t e, const at::Tensor& x) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == e && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                  (weight.size(2) == 3 || weight.size(2) == 5),
              op, ": weight has shape ", weight.sizes(), ", expected [", e, ", 1, k, k] with k 3 or 5");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight has dtype ", weight.scalar_type(),
              ", expected x's ", x.scalar_type(), "; cast it (weight.to(x.dtype))");
  TORCH_CHECK(weight.device() == x.device(), op, ": weight is on ", weight.device(), ", expected x's ", x.device());
}

// The geometry that DepthwiseParams and DepthwiseBackwardParams share; x is the input of the expand layer.
template <typename Params>
void prepare_expanded(const char* op, Params& p, const at::Tensor& x, const at::Tensor& weight, int64_t e, int64_t act,
                      int64_t stride) {
  check_expanded_weight(op, weight, e, x);
  check_activation(op, "act", act);
  TORCH_CHECK(stride == 1 || stride == 2, op, ": stride is ", stride, ", expected 1 or 2");
  p.weight = weight.const_data_ptr();
  p.weight_stride_c = weight.stride(0);
  p.weight_stride_h = weight.stride(2);
  p.weight_stride_w = weight.stride(3);
  p.n = x.size(0);
  p.c = static_cast<int32_t>(e);
  p.h = static_cast<int32_t>(x.size(2));
  p.w = static_cast<int32_t>(x.size(3));
  p.out_h = static_cast<int32_t>((x.size(2) - 1) / stride + 1);
  p.out_w = static_cast<int32_t>((x.size(3) - 1) / stride + 1);
  p.kernel = static_cast<int32_t>(weight.size(2));
  p.stride = static_cast<int32_t>(stride);
  p.act = static_cast<Activation>(act);
}

}  // namespace mnet
