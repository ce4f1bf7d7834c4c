// mnet_cpu's stages of algebraic mode but for the large backward one: checks, allocates, spreads the units over torch's
// threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../expand_checks.h"
#include "expand.h"

namespace mnet::cpu {

static at::Tensor gram(const at::Tensor& x) {
  const GramCall call = prepare_gram(x);
  const Capability isa = capability();
  const GramPlan plan = plan_gram(call.params, isa);
  const at::Tensor workspace = at::empty({plan.workspace()}, x.options().dtype(at::kDouble));
  double* tables = workspace.mutable_data_ptr<double>();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    gram_units(call.params, call.dtype, plan, begin, end, tables, isa);
  });
  gram_finish(call.params, call.dtype, plan, tables, isa);
  return call.gram;
}

static std::tuple<at::Tensor, at::Tensor> expand_depthwise(const at::Tensor& x, const at::Tensor& shift,
                                                           const at::Tensor& expand_weight, const at::Tensor& bn,
                                                           int64_t act, const at::Tensor& weight, int64_t stride,
                                                           bool moments) {
  const ExpandDepthwiseCall call = prepare_expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, moments);
  const ExpandDepthwiseParams& params = call.params;
  const Dtype dtype = call.dtype;
  const auto floats = x.options().dtype(at::kFloat);
  const Capability isa = capability();
  const ExpandPlan plan = plan_expand_depthwise(params, isa);
  const at::Tensor packed_weight = at::empty({expand_packed_size(params.expand, params.depthwise.c, isa)}, floats);
  const at::Tensor workspace = at::empty({moments ? plan.moments_size() : 0}, x.options().dtype(at::kDouble));
  float* packed = packed_weight.mutable_data_ptr<float>();
  double* table = moments ? workspace.mutable_data_ptr<double>() : nullptr;
  at::parallel_for(0, plan.panels, 4, [&](int64_t begin, int64_t end) {
    expand_pack(params.expand, params.depthwise.c, dtype, begin, end, packed, isa);
  });
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    expand_depthwise_units(params, dtype, plan, begin, end, packed, table, isa);
  });
  if (moments) expand_depthwise_finish(params, plan, table);
  return {call.y, call.moments};
}

static at::Tensor expand_mix(const at::Tensor& dx_partial, const at::Tensor& x, const at::Tensor& shift,
                             const at::Tensor& mix, const std::optional<at::Tensor>& residual) {
  constexpr auto kOp = "expand_mix";
  const Dtype dtype = storage_dtype(kOp, x);
  check_map(kOp, "x", x);
  check_map_like(kOp, "dx_partial", dx_partial, x.sizes(), "x", x);
  if (residual.has_value()) check_map_like(kOp, "residual", *residual, x.sizes(), "x", x);
  const int64_t c = x.size(1);
  ExpandMixParams params{};
  params.partial = dx_partial.const_data_ptr();
  params.x = x.const_data_ptr();
  params.shift = check_table(kOp, "shift", shift, {c}, x);
  params.mix = check_table(kOp, "mix", mix, {c + 1, c}, x);
  params.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  at::Tensor dx = empty_map(x.sizes(), x);
  params.dx = dx.mutable_data_ptr();
  params.positions = x.size(0) * x.size(2) * x.size(3);
  params.c = static_cast<int32_t>(c);
  const Capability isa = capability();
  const ExpandMixPlan plan = plan_expand_mix(params, isa);
  const at::Tensor packed = at::empty({plan.packed_size() * c}, x.options().dtype(at::kFloat));
  expand_mix_pack(params, plan, packed.mutable_data_ptr<float>(), isa);
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    expand_mix_units(params, dtype, plan, begin, end, packed.const_data_ptr<float>(), isa);
  });
  return dx;
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("gram", &mnet::cpu::gram);
  m.impl("expand_depthwise", &mnet::cpu::expand_depthwise);
  m.impl("expand_mix", &mnet::cpu::expand_mix);
}
