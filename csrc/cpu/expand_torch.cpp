// mnet_cpu's stages of algebraic mode but for the large backward one: checks, allocates, spreads the units over torch's
// threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../expand_checks.h"
#include "expand.h"

namespace mnet::cpu {

static at::Tensor gram(const at::Tensor& x) {
  const Dtype dtype = storage_dtype("gram", x);
  check_map("gram", "x", x);
  const int64_t c = x.size(1);
  at::Tensor table = at::empty({c + 2, c}, x.options().dtype(at::kFloat));
  GramParams params{};
  params.x = x.const_data_ptr();
  params.gram = table.mutable_data_ptr<float>();
  params.positions = x.size(0) * x.size(2) * x.size(3);
  params.c = static_cast<int32_t>(c);
  const Capability isa = capability();
  const GramPlan plan = plan_gram(params, isa);
  const at::Tensor workspace = at::empty({plan.workspace()}, x.options().dtype(at::kDouble));
  double* tables = workspace.mutable_data_ptr<double>();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    gram_units(params, dtype, plan, begin, end, tables, isa);
  });
  gram_finish(params, dtype, plan, tables, isa);
  return table;
}

static std::tuple<at::Tensor, at::Tensor> expand_depthwise(const at::Tensor& x, const at::Tensor& shift,
                                                           const at::Tensor& expand_weight, const at::Tensor& bn,
                                                           int64_t act, const at::Tensor& weight, int64_t stride,
                                                           bool moments) {
  constexpr auto kOp = "expand_depthwise";
  const Dtype dtype = storage_dtype(kOp, x);
  ExpandDepthwiseParams params{};
  params.expand = prepare_expand(kOp, x, shift, expand_weight);
  const int64_t e = expand_weight.size(0);
  DepthwiseParams& p = params.depthwise;
  prepare_expanded(kOp, p, x, weight, e, act, stride);
  p.bn = check_table(kOp, "bn", bn, {5, e}, x);
  at::Tensor y = at::empty({p.n, e, p.out_h, p.out_w}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  p.y = y.mutable_data_ptr();
  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor statistics = moments ? at::empty({2, e}, floats) : at::empty({0}, floats);
  p.moments = moments ? statistics.mutable_data_ptr<float>() : nullptr;

  const Capability isa = capability();
  const ExpandPlan plan = plan_expand_depthwise(params, isa);
  const at::Tensor packed_weight = at::empty({plan.padded() * params.expand.c}, floats);
  const at::Tensor workspace = at::empty({moments ? plan.moments_size() : 0}, x.options().dtype(at::kDouble));
  float* packed = packed_weight.mutable_data_ptr<float>();
  double* table = moments ? workspace.mutable_data_ptr<double>() : nullptr;
  at::parallel_for(0, plan.panels, 4, [&](int64_t begin, int64_t end) {
    expand_pack(params.expand, p.c, dtype, begin, end, packed, isa);
  });
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    expand_depthwise_units(params, dtype, plan, begin, end, packed, table, isa);
  });
  if (moments) expand_depthwise_finish(params, plan, table);
  return {y, statistics};
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
  at::Tensor dx = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
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
