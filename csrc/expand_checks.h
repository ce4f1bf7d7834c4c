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

// The depthwise layer behind an expand layer of e channels; x is the input of the expand layer.
template <typename Params>
void prepare_expanded(const char* op, Params& p, const at::Tensor& x, const at::Tensor& weight, int64_t e, int64_t act,
                      int64_t stride) {
  check_depthwise_weight(op, weight, e, x);
  check_activation(op, "act", act);
  TORCH_CHECK(stride == 1 || stride == 2, op, ": stride is ", stride, ", expected 1 or 2");
  set_depthwise_geometry(p, x, weight, act, stride);
}

}  // namespace mnet
