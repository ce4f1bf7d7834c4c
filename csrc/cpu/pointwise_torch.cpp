// mnet_cpu::pointwise and pointwise_backward: spread the kernels' units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../pointwise_checks.h"
#include "pointwise.h"

namespace mnet::cpu {

static std::tuple<at::Tensor, at::Tensor> pointwise(const at::Tensor& x, const at::Tensor& weight,
                                                    const std::optional<at::Tensor>& bn, int64_t act,
                                                    const std::optional<at::Tensor>& gate, bool moments) {
  const PointwiseCall call = prepare_pointwise(x, weight, bn, act, gate, moments);
  const PointwiseParams& params = call.params;
  const Capability isa = capability();
  const PointwisePlan plan = plan_pointwise(params, call.dtype, isa, at::get_num_threads());
  const at::Tensor packed = at::empty({plan.packed_size()}, x.options().dtype(at::kFloat));
  const at::Tensor sums = at::empty({moments ? plan.sums_size() : 0}, x.options().dtype(at::kDouble));
  PointwiseWorkspace workspace{};
  workspace.packed = packed.mutable_data_ptr<float>();
  workspace.sums = moments ? sums.mutable_data_ptr<double>() : nullptr;
  at::parallel_for(0, plan.panels, 4, [&](int64_t begin, int64_t end) {
    pointwise_pack(params, call.dtype, plan, begin, end, workspace.packed, isa);
  });
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    pointwise_units(params, call.dtype, plan, begin, end, workspace, nullptr, isa);
  });
  if (moments) pointwise_finish(params, plan, workspace.sums);
  return {call.y, call.moments};
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> pointwise_backward(
    const std::optional<at::Tensor>& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef,
    int64_t y_act, const std::optional<at::Tensor>& offset, const at::Tensor& x, const at::Tensor& weight,
    const std::optional<at::Tensor>& bn, int64_t act, const std::optional<at::Tensor>& gate,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_sums, bool needs_dw) {
  const PointwiseBackwardCall call = prepare_pointwise_backward(grad, y, y_bn, coef, y_act, offset, x, weight, bn, act,
                                                                gate, residual, needs_dx, needs_sums, needs_dw);
  const PointwiseBackwardParams& params = call.params;
  const Capability isa = capability();
  const PointwisePlan plan = plan_pointwise_backward(params, call.dtype, isa, at::get_num_threads());
  const bool product = params.gx != nullptr || params.sums != nullptr;
  if (!product && params.dw == nullptr) return {call.gx, call.sums, call.dw};
  const auto floats = x.options().dtype(at::kFloat);
  const at::Tensor packed = at::empty({product ? plan.packed_size() : 0}, floats);
  const at::Tensor partials = at::empty({params.dw != nullptr ? plan.partials_size() : 0}, floats);
  const at::Tensor sums = at::empty({params.sums != nullptr ? plan.sums_size() : 0}, x.options().dtype(at::kDouble));
  const PointwiseWorkspace workspace{packed.mutable_data_ptr<float>(), sums.mutable_data_ptr<double>(),
                                     partials.mutable_data_ptr<float>()};
  if (product) {
    at::parallel_for(0, plan.panels, 4, [&](int64_t begin, int64_t end) {
      pointwise_backward_pack(params, call.dtype, plan, begin, end, workspace.packed, isa);
    });
  }
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    pointwise_backward_units(params, call.dtype, plan, begin, end, workspace, isa);
  });
  if (params.sums != nullptr) pointwise_backward_finish(params, plan, workspace.sums);
  if (params.dw != nullptr) {
    at::parallel_for(0, plan.panels, 1, [&](int64_t begin, int64_t end) {
      pointwise_backward_combine(params, plan, begin, end, workspace.partials);
    });
  }
  return {call.gx, call.sums, call.dw};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("pointwise", &mnet::cpu::pointwise);
  m.impl("pointwise_backward", &mnet::cpu::pointwise_backward);
}
