// mnet_cpu::depthwise: spreads the kernel's units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../depthwise_checks.h"
#include "depthwise.h"

namespace mnet::cpu {

static std::tuple<at::Tensor, at::Tensor> depthwise(const at::Tensor& x, const at::Tensor& weight,
                                                    const std::optional<at::Tensor>& bn, int64_t act, int64_t stride,
                                                    bool moments) {
  const DepthwiseCall call = prepare_depthwise(x, weight, bn, act, stride, moments);
  const DepthwiseParams& params = call.params;
  const DepthwisePlan plan = plan_depthwise(params);
  at::Tensor workspace;
  if (moments) workspace = at::empty({depthwise_workspace(params, plan)}, x.options().dtype(at::kDouble));
  double* partials = moments ? workspace.mutable_data_ptr<double>() : nullptr;
  const Capability isa = capability();
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    depthwise_units(params, call.dtype, plan, begin, end, partials, isa);
  });
  if (moments) depthwise_finish(params, plan, partials);
  return {call.y, call.moments};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) { m.impl("depthwise", &mnet::cpu::depthwise); }
