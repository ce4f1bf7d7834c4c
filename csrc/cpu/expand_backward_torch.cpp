// mnet_cpu::expand_depthwise_backward: checks, allocates, spreads the kernel's units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "../expand_checks.h"
#include "expand_backward.h"

namespace mnet::cpu {

static std::tuple<at::Tensor, at::Tensor, at::Tensor> expand_depthwise_backward(
    const at::Tensor& grad, const at::Tensor& y3, const at::Tensor& y3_bn, const at::Tensor& y3_coef, int64_t y3_act,
    const at::Tensor& project_weight, const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& offset,
    const at::Tensor& y, const at::Tensor& y_bn, const at::Tensor& y_coef, int64_t y_act, const at::Tensor& x,
    const at::Tensor& shift, const at::Tensor& expand_weight, const at::Tensor& bn, int64_t act, const at::Tensor& weight,
    int64_t stride, bool needs_dx, bool needs_dw) {
  constexpr auto kOp = "expand_depthwise_backward";
  const Dtype dtype = storage_dtype(kOp, x);
  ExpandBackwardParams params{};
  params.expand = prepare_expand(kOp, x, shift, expand_weight);
  const int64_t n = x.size(0), e = expand_weight.size(0), c = x.size(1);
  DepthwiseBackwardParams& d = params.depthwise;
  prepare_expanded(kOp, d, x, weight, e, act, stride);
  check_map_like(kOp, "y", y, {n, e, d.out_h, d.out_w}, "x", x);
  check_activation(kOp, "y_act", y_act);
  d.y = y.const_data_ptr();
  d.y_bn = check_table(kOp, "y_bn", y_bn, {5, e}, x);
  d.coef = check_table(kOp, "y_coef", y_coef, {2, e}, x);
  d.gate = check_table(kOp, "gate", gate, {n, e}, x);
  d.offset = check_table(kOp, "offset", offset, {n, e}, x);
  d.bn = check_table(kOp, "bn", bn, {5, e}, x);
  d.y_act = static_cast<Activation>(y_act);

  TORCH_CHECK(project_weight.dim() == 4 && project_weight.size(0) > 0 && project_weight.size(1) == e &&
                  project_weight.size(2) == 1 && project_weight.size(3) == 1,
              kOp, ": project_weight has shape ", project_weight.sizes(), ", expected [O, ", e, ", 1, 1] with O of at least 1");
  TORCH_CHECK(project_weight.scalar_type() == x.scalar_type(), kOp, ": project_weight has dtype ",
              project_weight.scalar_type(), ", expected x's ", x.scalar_type(), "; cast it (weight.to(x.dtype))");
  TORCH_CHECK(project_weight.device() == x.device(), kOp, ": project_weight is on ", project_weight.device(),
              ", expected x's ", x.device());
  const int64_t o = project_weight.size(0);
  check_map_like(kOp, "grad", grad, {n, o, d.out_h, d.out_w}, "x", x);
  check_map_like(kOp, "y3", y3, {n, o, d.out_h, d.out_w}, "x", x);
  check_activation(kOp, "y3_act", y3_act);
  ProjectUpstream& project = params.project;
  project.grad = grad.const_data_ptr();
  project.y = y3.const_data_ptr();
  project.bn = check_table(kOp, "y3_bn", y3_bn, {5, o}, x);
  project.coef = check_table(kOp, "y3_coef", y3_coef, {2, o}, x);
  project.weight = project_weight.const_data_ptr();
  project.weight_stride_c = project_weight.stride(0);
  project.weight_stride_e = project_weight.stride(1);
  project.c = static_cast<int32_t>(o);
  project.act = static_cast<Activation>(y3_act);

  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor dx = needs_dx ? empty_map(x.sizes(), x)
                           : at::empty({0}, x.options());
  at::Tensor gramgrad = at::empty({e, c + 1}, floats);
  at::Tensor dw = needs_dw ? at::empty(weight.sizes(), floats) : at::empty({0}, floats);
  params.dx = needs_dx ? dx.mutable_data_ptr() : nullptr;
  params.gramgrad = gramgrad.mutable_data_ptr<float>();
  d.dw = needs_dw ? dw.mutable_data_ptr<float>() : nullptr;

  const Capability isa = capability();
  const ExpandBackwardPlan plan = plan_expand_backward(params, isa);
  const at::Tensor weights = at::empty({plan.padded() * (c + o) + (needs_dx ? plan.dx_padded() * e : 0)}, floats);
  const at::Tensor workspace = at::empty({plan.workspace()}, x.options().dtype(at::kDouble));
  ExpandBackwardPacked packed{};
  packed.expand = weights.mutable_data_ptr<float>();
  packed.project = packed.expand + plan.padded() * c;
  packed.scaled = packed.project + plan.padded() * o;
  at::parallel_for(0, plan.panels + (needs_dx ? plan.dx_panels : 0), 4, [&](int64_t begin, int64_t end) {
    expand_backward_pack(params, dtype, plan, begin, end, packed, isa);
  });
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    expand_backward_units(params, dtype, plan, begin, end, packed, workspace.mutable_data_ptr<double>(), isa);
  });
  at::parallel_for(0, plan.panels, 1, [&](int64_t begin, int64_t end) {
    expand_backward_combine(params, plan, begin, end, workspace.const_data_ptr<double>());
  });
  return {dx, gramgrad, dw};
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("expand_depthwise_backward", &mnet::cpu::expand_depthwise_backward);
}
