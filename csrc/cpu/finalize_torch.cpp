// mnet_cpu::finalize, finalize_backward and update_running_stats: small tables.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <tuple>

#include "../finalize_checks.h"

namespace mnet::cpu {

static at::Tensor finalize(const at::Tensor& moments, const std::optional<at::Tensor>& gamma,
                           const std::optional<at::Tensor>& beta, double eps, int64_t count) {
  const FinalizeCall call = prepare_finalize(moments, gamma, beta, eps, count);
  for (int64_t i = 0; i < call.params.c; ++i) finalize_channel(call.params, i);
  return call.bn;
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize_backward(const at::Tensor& sums, const at::Tensor& bn,
                                                                        int64_t count, bool batch_stats) {
  const FinalizeBackwardCall call = prepare_finalize_backward(sums, bn, count, batch_stats);
  for (int64_t i = 0; i < call.params.c; ++i) finalize_backward_channel(call.params, i);
  return {call.coef, call.dgamma, call.dbeta};
}

static void update(at::Tensor& running, const float* fresh, double momentum) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, running.scalar_type(), "update_running_stats", [&] {
    auto values = running.accessor<scalar_t, 1>();
    for (int64_t i = 0; i < values.size(0); ++i) {
      values[i] = static_cast<scalar_t>((1.0 - momentum) * static_cast<double>(values[i]) + momentum * fresh[i]);
    }
  });
  mark_changed(running);
}

static void update_running_stats(at::Tensor& running_mean, at::Tensor& running_var,
                                 std::optional<at::Tensor> num_batches_tracked, const at::Tensor& mean,
                                 const at::Tensor& var, std::optional<double> momentum) {
  const FreshStats fresh =
      check_running_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum);
  if (num_batches_tracked.has_value()) num_batches_tracked->add_(1);
  const double m = momentum.has_value() ? *momentum : 1.0 / num_batches_tracked->item<double>();
  update(running_mean, fresh.mean, m);
  update(running_var, fresh.var, m);
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("finalize", &mnet::cpu::finalize);
  m.impl("finalize_backward", &mnet::cpu::finalize_backward);
  m.impl("update_running_stats", &mnet::cpu::update_running_stats);
}
