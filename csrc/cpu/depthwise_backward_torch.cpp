// mnet_cpu::depthwise_backward: checks, allocates, spreads the kernel's units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../depthwise_backward_checks.h"
#include "depthwise_backward.h"

namespace mnet::cpu {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& coef, int64_t y_act,
    const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& offset, const at::Tensor& x,
    const at::Tensor& weight, const std::optional<at::Tensor>& bn, int64_t act, int64_t stride,
    const std::optional<at::Tensor>& residual, bool needs_dx, bool needs_dw) {
  const DepthwiseBackwardCall call = prepare_depthwise_backward(grad, y, y_bn, coef, y_act, gate, offset, x, weight, bn, act,
                                                                stride, residual, needs_dx, needs_dw);
  const DepthwiseBackwardParams& p = call.params;
  if (!needs_dx && !needs_dw) return {call.gx, call.sums, call.dw};

  const DepthwiseBackwardPlan plan = plan_depthwise_backward(p);
  const at::Tensor workspace = at::empty({depthwise_backward_workspace(p, plan)}, x.options().dtype(at::kDouble));
  double* partials = workspace.mutable_data_ptr<double>();
  const Capability isa = capability();
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    depthwise_backward_units(p, call.dtype, plan, begin, end, partials, isa);
  });
  depthwise_backward_finish(p, plan, partials);
  return {call.gx, call.sums, call.dw};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) { m.impl("depthwise_backward", &mnet::cpu::depthwise_backward); }
