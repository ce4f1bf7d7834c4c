// From tensors to the pointwise stages' params: the checks and allocations that all launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/pointwise_params.h"
#include "maps.h"
#include "stage_checks.h"

namespace mnet {

// A 1x1 convolution's weight [e, c, 1, 1] of x's dtype, any strides.
inline void check_pointwise_weight(const char* op, const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) && weight.size(2) == 1 &&
                  weight.size(3) == 1,
              op, ": weight has shape ", weight.sizes(), ", expected [E, ", x.size(1), ", 1, 1] with E of at least 1");
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight has dtype ", weight.scalar_type(),
              ", expected x's ", x.scalar_type(), "; cast it (weight.to(x.dtype))");
  TORCH_CHECK(weight.device() == x.device(), op, ": weight is on ", weight.device(), ", expected x's ", x.device());
}

inline void check_prologue(const char* op, const std::optional<at::Tensor>& bn, int64_t act) {
  check_activation(op, "act", act);
  TORCH_CHECK(bn.has_value() || act == 0, op, ": act is ", act, " without bn, expected 0 (identity): the activation ",
              "belongs to the batch norm of x; pass bn");
}

struct PointwiseCall {
  at::Tensor y, moments;
  PointwiseParams params;
  Dtype dtype;
};

inline PointwiseCall prepare_pointwise(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bn,
                                       int64_t act, const std::optional<at::Tensor>& gate, bool moments) {
  const char* op = "pointwise";
  PointwiseCall call{};
  call.dtype = storage_dtype(op, x);
  check_map(op, "x", x);
  check_pointwise_weight(op, weight, x);
  check_prologue(op, bn, act);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), e = weight.size(0);

  PointwiseParams& p = call.params;
  p.bn = check_table(op, "bn", bn, {5, c}, x);
  p.gate = check_table(op, "gate", gate, {n, c}, x);
  call.y = empty_map({n, e, h, w}, x);
  const auto statistics = x.options().dtype(at::kFloat);
  call.moments = moments ? at::empty({2, e}, statistics) : at::empty({0}, statistics);
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = call.y.mutable_data_ptr();
  p.moments = moments ? call.moments.mutable_data_ptr<float>() : nullptr;
  p.weight_stride_e = weight.stride(0);
  p.weight_stride_c = weight.stride(1);
  p.images = n;
  p.image_positions = h * w;
  p.c = static_cast<int32_t>(c);
  p.e = static_cast<int32_t>(e);
  p.act = static_cast<Activation>(act);
  return call;
}

struct PointwiseBackwardCall {
  at::Tensor gx, sums, dw;
  PointwiseBackwardParams params;
  Dtype dtype;
};

inline PointwiseBackwardCall prepare_pointwise_backward(
    const std::optional<at::Tensor>& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef,
    int64_t y_act, const std::optional<at::Tensor>& offset, const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& bn, int64_t act, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_sums, bool needs_dw) {
  const char* op = "pointwise_backward";
  PointwiseBackwardCall call{};
  call.dtype = storage_dtype(op, x);
  check_map(op, "x", x);
  check_pointwise_weight(op, weight, x);
  check_prologue(op, bn, act);
  check_activation(op, "y_act", y_act);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), e = weight.size(0);
  TORCH_CHECK(grad.has_value() != offset.has_value(), op, ": got ", grad.has_value() ? "both" : "neither",
              " of grad and offset, expected one of them: offset is the gradient where it is the same at every position");
  if (grad.has_value()) check_map_like(op, "grad", *grad, {n, e, h, w}, "x", x);
  check_map_like(op, "y", y, {n, e, h, w}, "x", x);
  TORCH_CHECK(!residual.has_value() || (!bn.has_value() && !gate.has_value()), op, ": residual is given together with ",
              bn.has_value() ? "bn" : "gate", ", expected at most one of them: a residual is added to the gradient at x ",
              "itself, which a batch norm or gate of x does not yield");
  if (residual.has_value()) check_map_like(op, "residual", *residual, {n, c, h, w}, "x", x);

  PointwiseBackwardParams& p = call.params;
  p.y_bn = check_table(op, "y_bn", y_bn, {5, e}, x);
  p.coef = check_table(op, "coef", coef, {2, e}, x);
  p.offset = check_table(op, "offset", offset, {n, e}, x);
  p.bn = check_table(op, "bn", bn, {5, c}, x);
  p.gate = check_table(op, "gate", gate, {n, c}, x);
  const auto tables = x.options().dtype(at::kFloat);
  call.gx = needs_dx ? empty_map({n, c, h, w}, x)
                     : at::empty({0}, x.options());
  const bool sums = needs_sums && bn.has_value();
  call.sums = !sums ? at::empty({0}, tables) : gate.has_value() ? at::empty({3, n, c}, tables) : at::empty({2, c}, tables);
  call.dw = needs_dw ? at::empty(weight.sizes(), tables) : at::empty({0}, tables);
  p.grad = grad.has_value() ? grad->const_data_ptr() : nullptr;
  p.y = y.const_data_ptr();
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  p.gx = needs_dx ? call.gx.mutable_data_ptr() : nullptr;
  p.sums = sums ? call.sums.mutable_data_ptr<float>() : nullptr;
  p.dw = needs_dw ? call.dw.mutable_data_ptr<float>() : nullptr;
  p.weight_stride_e = weight.stride(0);
  p.weight_stride_c = weight.stride(1);
  p.images = n;
  p.image_positions = h * w;
  p.c = static_cast<int32_t>(c);
  p.e = static_cast<int32_t>(e);
  p.y_act = static_cast<Activation>(y_act);
  p.act = static_cast<Activation>(act);
  return call;
}

}  // namespace mnet
