// mnet_cpu::stem and stem_backward: spread the kernels' units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../stem_checks.h"
#include "stem.h"

namespace mnet::cpu {

static std::tuple<at::Tensor, at::Tensor> stem(const at::Tensor& x, const at::Tensor& weight, int64_t stride,
                                               bool moments) {
  const StemCall call = prepare_stem(x, weight, stride, moments);
  const StemParams& params = call.params;
  const Capability isa = capability();
  const StemPlan plan = plan_stem(params.image, params.e, isa);
  const at::Tensor sums = at::empty({moments ? plan.sums_size() : 0}, x.options().dtype(at::kDouble));
  double* const table = moments ? sums.mutable_data_ptr<double>() : nullptr;
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    stem_units(params, call.dtype, plan, begin, end, table, isa);
  });
  if (moments) stem_finish(params, plan, table);
  return {call.y, call.moments};
}

static std::tuple<at::Tensor, at::Tensor> stem_backward(const at::Tensor& grad, const at::Tensor& y,
                                                        const at::Tensor& y_bn, const at::Tensor& coef, int64_t y_act,
                                                        const at::Tensor& x, int64_t stride, bool needs_dy,
                                                        bool needs_dw) {
  const StemBackwardCall call = prepare_stem_backward(grad, y, y_bn, coef, y_act, x, stride, needs_dy, needs_dw);
  if (!needs_dy && !needs_dw) return {call.dy, call.dw};
  const StemBackwardParams& params = call.params;
  const Capability isa = capability();
  const StemPlan plan = plan_stem(params.image, params.e, isa);
  const at::Tensor parts = at::empty({needs_dw ? plan.partials_size() : 0}, x.options().dtype(at::kFloat));
  float* const partials = needs_dw ? parts.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    stem_backward_units(params, call.dtype, plan, begin, end, partials, isa);
  });
  if (needs_dw) stem_backward_finish(params, plan, partials);
  return {call.dy, call.dw};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("stem", &mnet::cpu::stem);
  m.impl("stem_backward", &mnet::cpu::stem_backward);
}
