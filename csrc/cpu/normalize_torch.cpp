// mnet_cpu::normalize, normalize_backward and squeeze: spreads the kernels' units over torch's threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../stage_checks.h"
#include "normalize.h"

namespace mnet::cpu {

static NormalizeParams prepare(const char* op, const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  check_map(op, "y", y);
  check_activation(op, "act", act);
  NormalizeParams p{};
  p.bn = check_table(op, "bn", bn, {5, y.size(1)}, y);
  p.y = y.const_data_ptr();
  p.n = y.size(0);
  p.area = y.size(2) * y.size(3);
  p.c = static_cast<int32_t>(y.size(1));
  p.act = static_cast<Activation>(act);
  return p;
}

static at::Tensor normalize(const at::Tensor& y, const at::Tensor& bn, int64_t act,
                            const std::optional<at::Tensor>& residual) {
  const Dtype dtype = storage_dtype("normalize", y);
  NormalizeParams params = prepare("normalize", y, bn, act);
  if (residual.has_value()) {
    check_map_like("normalize", "residual", *residual, y.sizes(), "y", y);
    params.operand = residual->const_data_ptr();
  }
  at::Tensor out = at::empty(y.sizes(), y.options().memory_format(at::MemoryFormat::ChannelsLast));
  params.output = out.mutable_data_ptr();
  const NormalizePlan plan = plan_normalize(params);
  const Capability isa = capability();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    normalize_chunks(params, dtype, plan, begin, end, isa);
  });
  return out;
}

static at::Tensor normalize_backward(const at::Tensor& grad, const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const Dtype dtype = storage_dtype("normalize_backward", y);
  NormalizeParams params = prepare("normalize_backward", y, bn, act);
  check_map_like("normalize_backward", "grad", grad, y.sizes(), "y", y);
  params.operand = grad.const_data_ptr();
  at::Tensor sums = at::empty({2, y.size(1)}, y.options().dtype(at::kFloat));
  params.table = sums.mutable_data_ptr<float>();
  const NormalizePlan plan = plan_normalize(params);
  const at::Tensor workspace =
      at::empty({normalize_backward_workspace(params, plan)}, y.options().dtype(at::kDouble));
  double* partials = workspace.mutable_data_ptr<double>();
  const Capability isa = capability();
  at::parallel_for(0, plan.chunks, 1, [&](int64_t begin, int64_t end) {
    normalize_backward_chunks(params, dtype, plan, begin, end, partials, isa);
  });
  normalize_backward_finish(params, plan, partials);
  return sums;
}

static at::Tensor squeeze(const at::Tensor& y, const at::Tensor& bn, int64_t act) {
  const Dtype dtype = storage_dtype("squeeze", y);
  NormalizeParams params = prepare("squeeze", y, bn, act);
  at::Tensor table = at::empty({3, y.size(0), y.size(1)}, y.options().dtype(at::kFloat));
  params.table = table.mutable_data_ptr<float>();
  const NormalizePlan plan = plan_normalize(params);
  const Capability isa = capability();
  at::parallel_for(0, params.n * plan.channel_blocks, 1, [&](int64_t begin, int64_t end) {
    squeeze_units(params, dtype, plan, begin, end, isa);
  });
  return table;
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("normalize", &mnet::cpu::normalize);
  m.impl("normalize_backward", &mnet::cpu::normalize_backward);
  m.impl("squeeze", &mnet::cpu::squeeze);
}
