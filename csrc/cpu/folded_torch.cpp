// The layers of a folded copy (mnet_kernels.fold): weights packed once, batch norm, activation and residual applied as a
// product is stored.  Inference alone: nothing is gathered, nothing is saved.  Ops of this backend only; not traced.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../expand_checks.h"
#include "../pointwise_checks.h"
#include "expand.h"
#include "pointwise.h"

namespace mnet::cpu {

namespace {

// What depends on the weight alone of a call's params.
PointwiseParams of_weight(const at::Tensor& weight) {
  PointwiseParams p{};
  p.weight = weight.const_data_ptr();
  p.weight_stride_e = weight.stride(0);
  p.weight_stride_c = weight.stride(1);
  p.e = static_cast<int32_t>(weight.size(0));
  p.c = static_cast<int32_t>(weight.size(1));
  return p;
}

at::Tensor empty_floats(int64_t size, const at::Tensor& like) { return at::empty({size}, like.options().dtype(at::kFloat)); }

const float* check_packed(const char* op, const at::Tensor& packed, int64_t size) {
  const bool floats = packed.device().is_cpu() && packed.scalar_type() == at::kFloat && packed.is_contiguous();
  TORCH_CHECK(floats && packed.numel() == size, op, ": packed has ", packed.numel(), " values of ", packed.scalar_type(),
              ", expected ", size, " of float32: what folded_pack gave for this weight in this process");
  return packed.const_data_ptr<float>();
}

void check_weight(const char* op, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0 && weight.size(2) == 1 && weight.size(3) == 1, op,
              ": weight has shape ", weight.sizes(), ", expected [E, C, 1, 1]");
}

}  // namespace

// expands: for folded_expand_depthwise, else for folded_pointwise.
static at::Tensor folded_pack(const at::Tensor& weight, bool expands) {
  constexpr auto kOp = "folded_pack";
  const Dtype dtype = storage_dtype(kOp, weight);
  check_weight(kOp, weight);
  const Capability isa = capability();
  if (!expands) {
    const PointwiseParams p = of_weight(weight);
    const PointwisePlan plan = plan_pointwise(p, dtype, isa, 1);
    const at::Tensor packed = empty_floats(plan.packed_size(), weight);
    pointwise_pack(p, dtype, plan, 0, plan.panels, packed.mutable_data_ptr<float>(), isa);
    return packed;
  }
  ExpandDepthwiseParams p{};
  p.expand.weight = weight.const_data_ptr();
  p.expand.weight_stride_e = weight.stride(0);
  p.expand.weight_stride_c = weight.stride(1);
  p.expand.c = static_cast<int32_t>(weight.size(1));
  p.depthwise.c = static_cast<int32_t>(weight.size(0));
  const int64_t panels = expand_panels(p.depthwise.c, isa);
  const at::Tensor packed = empty_floats(expand_packed_size(p.expand, p.depthwise.c, isa), weight);
  expand_pack(p.expand, p.depthwise.c, dtype, 0, panels, packed.mutable_data_ptr<float>(), isa);
  return packed;
}

// out_act(out_bn(W act(bn(x)) [* gate])) [+ residual]; of the tables only scale and shift are read.
static at::Tensor folded_pointwise(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& packed,
                                   const std::optional<at::Tensor>& bn, int64_t act, const std::optional<at::Tensor>& gate,
                                   const at::Tensor& out_bn, int64_t out_act, const std::optional<at::Tensor>& residual) {
  constexpr auto kOp = "folded_pointwise";
  const PointwiseCall call = prepare_pointwise(x, weight, bn, act, gate, false);
  const PointwiseParams& params = call.params;
  const Capability isa = capability();
  const PointwisePlan plan = plan_pointwise(params, call.dtype, isa, at::get_num_threads());
  check_activation(kOp, "out_act", out_act);
  if (residual.has_value()) check_map_like(kOp, "residual", *residual, call.y.sizes(), "x", x);
  PointwiseEpilogue epilogue{};
  epilogue.table = check_table(kOp, "out_bn", out_bn, {5, params.e}, x);
  epilogue.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  epilogue.act = static_cast<Activation>(out_act);
  PointwiseWorkspace workspace{};
  workspace.packed = const_cast<float*>(check_packed(kOp, packed, plan.packed_size()));  // read alone
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    pointwise_units(params, call.dtype, plan, begin, end, workspace, &epilogue, isa);
  });
  return call.y;
}

// Stage expand_depthwise without moments.
static at::Tensor folded_expand_depthwise(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& expand_weight,
                                          const at::Tensor& packed, const at::Tensor& bn, int64_t act,
                                          const at::Tensor& weight, int64_t stride) {
  constexpr auto kOp = "folded_expand_depthwise";
  const ExpandDepthwiseCall call = prepare_expand_depthwise(x, shift, expand_weight, bn, act, weight, stride, false);
  const ExpandDepthwiseParams& params = call.params;
  const Capability isa = capability();
  const ExpandPlan plan = plan_expand_depthwise(params, isa);
  const float* from = check_packed(kOp, packed, expand_packed_size(params.expand, params.depthwise.c, isa));
  at::parallel_for(0, plan.units(), 1, [&](int64_t begin, int64_t end) {
    expand_depthwise_units(params, call.dtype, plan, begin, end, from, nullptr, isa);
  });
  return call.y;
}

}  // namespace mnet::cpu

TORCH_LIBRARY_FRAGMENT(mnet_cpu, m) {
  m.def("folded_pack(Tensor weight, bool expands) -> Tensor");
  m.def("folded_pointwise(Tensor x, Tensor weight, Tensor packed, Tensor? bn, int act, Tensor? gate, Tensor out_bn, "
        "int out_act, Tensor? residual) -> Tensor");
  m.def("folded_expand_depthwise(Tensor x, Tensor shift, Tensor expand_weight, Tensor packed, Tensor bn, int act, "
        "Tensor weight, int stride) -> Tensor");
}

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("folded_pack", &mnet::cpu::folded_pack);
  m.impl("folded_pointwise", &mnet::cpu::folded_pointwise);
  m.impl("folded_expand_depthwise", &mnet::cpu::folded_expand_depthwise);
}
