// From tensors to the params of algebraic mode: the checks and allocations of its launchers.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/expand_params.h"
#include "finalize_checks.h"
#include "maps.h"
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

struct GramCall {
  at::Tensor gram;
  GramParams params;
  Dtype dtype;
};

inline GramCall prepare_gram(const at::Tensor& x) {
  GramCall call{};
  call.dtype = storage_dtype("gram", x);
  check_map("gram", "x", x);
  const int64_t c = x.size(1);
  call.gram = at::empty({c + 2, c}, x.options().dtype(at::kFloat));
  call.params.x = x.const_data_ptr();
  call.params.gram = call.gram.mutable_data_ptr<float>();
  call.params.positions = x.size(0) * x.size(2) * x.size(3);
  call.params.c = static_cast<int32_t>(c);
  return call;
}

// A table of gram; returns its data.
inline const float* check_gram(const char* op, const at::Tensor& gram, const at::Tensor& like) {
  TORCH_CHECK(gram.dim() == 2 && gram.size(1) > 0 && gram.size(0) == gram.size(1) + 2, op, ": gram has shape ",
              gram.sizes(), ", expected [C + 2, C], the output of gram");
  return check_table(op, "gram", gram, gram.sizes(), like);
}

// The expand layer's weight [e, c, 1, 1] where no map is given that it goes with.
inline Dtype check_expand_weight(const char* op, const at::Tensor& weight, int64_t c, const at::Tensor& like) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == c && weight.size(2) == 1 && weight.size(3) == 1,
              op, ": weight has shape ", weight.sizes(), ", expected [E, ", c, ", 1, 1] with E of at least 1");
  TORCH_CHECK(weight.device() == like.device(), op, ": weight is on ", weight.device(), ", expected ", like.device());
  return storage_dtype(op, weight);
}

struct ExpandFinalizeCall {
  at::Tensor bn, mean;
  ExpandFinalizeParams params;
  Dtype dtype;  // of the weight
};

inline ExpandFinalizeCall prepare_expand_finalize(const at::Tensor& gram, const at::Tensor& weight,
                                                  const std::optional<at::Tensor>& gamma,
                                                  const std::optional<at::Tensor>& beta, double eps, int64_t count) {
  constexpr auto kOp = "expand_finalize";
  ExpandFinalizeCall call{};
  ExpandFinalizeParams& p = call.params;
  p.gram = check_gram(kOp, gram, gram);
  call.dtype = check_expand_weight(kOp, weight, gram.size(1), gram);
  check_count(kOp, count);
  const int64_t e = weight.size(0);
  p.gamma = check_table(kOp, "gamma", gamma, {e}, gram);
  p.beta = check_table(kOp, "beta", beta, {e}, gram);
  call.bn = at::empty({5, e}, gram.options());
  call.mean = at::empty({e}, gram.options());
  p.weight = weight.const_data_ptr();
  p.bn = call.bn.mutable_data_ptr<float>();
  p.mean = call.mean.mutable_data_ptr<float>();
  p.weight_stride_e = weight.stride(0);
  p.weight_stride_c = weight.stride(1);
  p.eps = eps;
  p.correction = bessel_correction(count);
  p.c = static_cast<int32_t>(gram.size(1));
  p.e = static_cast<int32_t>(e);
  return call;
}

struct ExpandDepthwiseCall {
  at::Tensor y, moments;
  ExpandDepthwiseParams params;
  Dtype dtype;
};

inline ExpandDepthwiseCall prepare_expand_depthwise(const at::Tensor& x, const at::Tensor& shift,
                                                    const at::Tensor& expand_weight, const at::Tensor& bn, int64_t act,
                                                    const at::Tensor& weight, int64_t stride, bool moments) {
  constexpr auto kOp = "expand_depthwise";
  ExpandDepthwiseCall call{};
  call.dtype = storage_dtype(kOp, x);
  call.params.expand = prepare_expand(kOp, x, shift, expand_weight);
  const int64_t e = expand_weight.size(0);
  DepthwiseParams& p = call.params.depthwise;
  prepare_expanded(kOp, p, x, weight, e, act, stride);
  p.bn = check_table(kOp, "bn", bn, {5, e}, x);
  call.y = empty_map({p.n, e, p.out_h, p.out_w}, x);
  p.y = call.y.mutable_data_ptr();
  const auto floats = x.options().dtype(at::kFloat);
  call.moments = moments ? at::empty({2, e}, floats) : at::empty({0}, floats);
  p.moments = moments ? call.moments.mutable_data_ptr<float>() : nullptr;
  return call;
}

}  // namespace mnet
