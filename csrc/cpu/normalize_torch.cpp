// mnet_cpu::normalize, normalize_backward and squeeze: spreads the kernels' units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../normalize_checks.h"
#include "normalize.h"

namespace mnet::cpu {

static at::Tensor normalize(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                            const std::optional<at::Tensor>& residual) {
  const NormalizeCall call = prepare_normalize(y, bn, act, residual);
  const NormalizePlan plan = plan_normalize(call.params);
  const Capability isa = capability();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    normalize_chunks(call.params, call.dtype, plan, begin, end, isa);
  });
  return call.result;
}

static at::Tensor normalize_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const NormalizeCall call = prepare_normalize_backward(grad, y, bn, act);
  const NormalizePlan plan = plan_normalize(call.params);
  const at::Tensor workspace =
      at::empty({normalize_backward_workspace(call.params, plan)}, y.options().dtype(at::kDouble));
  double* partials = workspace.mutable_data_ptr<double>();
  const Capability isa = capability();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    normalize_backward_chunks(call.params, call.dtype, plan, begin, end, partials, isa);
  });
  normalize_backward_finish(call.params, plan, partials);
  return call.result;
}

static at::Tensor squeeze(const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const NormalizeCall call = prepare_squeeze(y, bn, act);
  const NormalizePlan plan = plan_normalize(call.params);
  const Capability isa = capability();
  at::parallel_for(0, call.params.n * plan.channel_blocks, 1, [&](int64_t begin, int64_t end) {
    squeeze_units(call.params, call.dtype, plan, begin, end, isa);
  });
  return call.result;
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("normalize", &mnet::cpu::normalize);
  m.impl("normalize_backward", &mnet::cpu::normalize_backward);
  m.impl("squeeze", &mnet::cpu::squeeze);
}
