// From tensors to DepthwiseBackwardParams: the checks and allocations that all launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "maps.h"
#include "stage_checks.h"

namespace mnet {

struct DepthwiseBackwardCall {
  at::Tensor gx, sums, dw;
  DepthwiseBackwardParams params;
  Dtype dtype;
};

inline DepthwiseBackwardCall prepare_depthwise_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef, int64_t y_act,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& offset, const at::Tensor& x,
    const at::Tensor& weight, const std::optional<at::Tensor>& bn, int64_t act, int64_t stride,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_dw) {
  constexpr auto kOp = "depthwise_backward";
  DepthwiseBackwardCall call{};
  call.dtype = storage_dtype(kOp, x);
  check_map(kOp, "x", x);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  check_depthwise_weight(kOp, weight, c, x);
  TORCH_CHECK(stride == 1 || stride == 2, kOp, ": stride is ", stride, ", expected 1 or 2");
  const int64_t out_h = (h - 1) / stride + 1, out_w = (w - 1) / stride + 1;
  check_map_like(kOp, "grad", grad, {n, c, out_h, out_w}, "x", x);
  check_map_like(kOp, "y", y, {n, c, out_h, out_w}, "x", x);
  check_activation(kOp, "y_act", y_act);
  check_activation(kOp, "act", act);
  TORCH_CHECK(bn.has_value() || act == 0, kOp, ": act is ", act, " without bn, expected 0 (identity): the activation ",
              "belongs to the batch norm of x; pass bn");
  TORCH_CHECK(!(bn.has_value() && residual.has_value()), kOp, ": got bn and residual, expected one of them: a residual is ",
              "added to the gradient of the block's own input, which has no batch norm before it");

  DepthwiseBackwardParams& p = call.params;
  p.grad = grad.const_data_ptr();
  p.y = y.const_data_ptr();
  p.y_bn = check_table(kOp, "y_bn", y_bn, {5, c}, x);
  p.coef = check_table(kOp, "coef", coef, {2, c}, x);
  p.gate = check_table(kOp, "gate", gate, {n, c}, x);
  p.offset = check_table(kOp, "offset", offset, {n, c}, x);
  p.x = x.const_data_ptr();
  p.bn = check_table(kOp, "bn", bn, {5, c}, x);
  if (residual.has_value()) {
    check_map_like(kOp, "residual", *residual, x.sizes(), "x", x);
    p.residual = residual->const_data_ptr();
  }
  set_depthwise_geometry(p, x, weight, act, stride);
  p.y_act = static_cast<Activation>(y_act);

  const auto statistics = x.options().dtype(at::kFloat);
  call.gx = needs_dx ? empty_map(x.sizes(), x)
                     : at::empty({0}, x.options());
  const bool needs_sums = needs_dx && bn.has_value();
  call.sums = needs_sums ? at::empty({2, c}, statistics) : at::empty({0}, statistics);
  call.dw = needs_dw ? at::empty(weight.sizes(), statistics) : at::empty({0}, statistics);
  if (needs_dx) p.gx = call.gx.mutable_data_ptr();
  if (needs_sums) p.sums = call.sums.mutable_data_ptr<float>();
  if (needs_dw) p.dw = call.dw.mutable_data_ptr<float>();
  return call;
}

}  // namespace mnet
