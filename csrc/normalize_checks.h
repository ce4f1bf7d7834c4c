// From tensors to NormalizeParams: the checks and allocations that all launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "maps.h"
#include "stage_checks.h"

namespace mnet {

struct NormalizeCall {
  at::Tensor result;  // normalize: like y; normalize_backward: sums [2, C]; squeeze: table [3, N, C]
  at::Tensor gram;    // [C + 2, C], of normalize_gram alone
  NormalizeParams params;
  Dtype dtype;
};

inline NormalizeCall prepare_normalized_map(const char* op, const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  NormalizeCall call{};
  call.dtype = storage_dtype(op, y);
  check_map(op, "y", y);
  check_activation(op, "act", act);
  NormalizeParams& p = call.params;
  p.bn = check_table(op, "bn", bn, {5, y.size(1)}, y);
  p.y = y.const_data_ptr();
  p.n = y.size(0);
  p.area = y.size(2) * y.size(3);
  p.c = static_cast<int32_t>(y.size(1));
  p.act = static_cast<Activation>(act);
  return call;
}

inline NormalizeCall prepare_normalize(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                                       const std::optional<at::Tensor>& residual, const char* op = "normalize") {
  NormalizeCall call = prepare_normalized_map(op, y, bn, act);
  if (residual.has_value()) {
    check_map_like(op, "residual", *residual, y.sizes(), "y", y);
    call.params.operand = residual->const_data_ptr();
  }
  call.result = empty_map(y.sizes(), y);
  call.params.output = call.result.mutable_data_ptr();
  return call;
}

inline NormalizeCall prepare_normalize_gram(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                                            const std::optional<at::Tensor>& residual) {
  NormalizeCall call = prepare_normalize(y, bn, act, residual, "normalize_gram");
  call.gram = at::empty({y.size(1) + 2, y.size(1)}, y.options().dtype(at::kFloat));
  call.params.table = call.gram.mutable_data_ptr<float>();
  return call;
}

inline NormalizeCall prepare_normalize_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& bn,
                                                int64_t act) {
  NormalizeCall call = prepare_normalized_map("normalize_backward", y, bn, act);
  check_map_like("normalize_backward", "grad", grad, y.sizes(), "y", y);
  call.params.operand = grad.const_data_ptr();
  call.result = at::empty({2, y.size(1)}, y.options().dtype(at::kFloat));
  call.params.table = call.result.mutable_data_ptr<float>();
  return call;
}

inline NormalizeCall prepare_squeeze(const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  NormalizeCall call = prepare_normalized_map("squeeze", y, bn, act);
  call.result = at::empty({3, y.size(0), y.size(1)}, y.options().dtype(at::kFloat));
  call.params.table = call.result.mutable_data_ptr<float>();
  return call;
}

}  // namespace mnet
