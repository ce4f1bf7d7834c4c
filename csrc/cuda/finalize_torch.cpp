// mnet_cuda::finalize, finalize_backward and update_running_stats: check, allocate, launch on torch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "../finalize_checks.h"
#include "check_device.h"
#include "finalize.h"

namespace mnet::cuda {

static at::Tensor finalize_op(const at::Tensor& moments, const std::optional<at::Tensor>& gamma,
                              const std::optional<at::Tensor>& beta, double eps, int64_t count) {
  const c10::cuda::CUDAGuard guard(moments.device());
  check_device("finalize", moments.device());
  const FinalizeCall call = prepare_finalize(moments, gamma, beta, eps, count);
  check_launch("finalize", finalize(call.params, c10::cuda::getCurrentCUDAStream().stream()));
  return call.bn;
}

static std::tuple<at::Tensor, at::Tensor, at::Tensor> finalize_backward_op(const at::Tensor& sums, const at::Tensor& bn,
                                                                           int64_t count, bool batch_stats) {
  const c10::cuda::CUDAGuard guard(sums.device());
  check_device("finalize_backward", sums.device());
  const FinalizeBackwardCall call = prepare_finalize_backward(sums, bn, count, batch_stats);
  check_launch("finalize_backward", finalize_backward(call.params, c10::cuda::getCurrentCUDAStream().stream()));
  return {call.coef, call.dgamma, call.dbeta};
}

static RunningStat running_stat(const char* name, at::Tensor& t, const float* fresh) {
  const auto dtype = [&] {
    switch (t.scalar_type()) {
      case at::kFloat:
        return RunningDtype::kFloat32;
      case at::kDouble:
        return RunningDtype::kFloat64;
      case at::kBFloat16:
        return RunningDtype::kBFloat16;
      case at::kHalf:
        return RunningDtype::kFloat16;
      default:
        TORCH_CHECK(false, "update_running_stats: ", name, " has dtype ", t.scalar_type(),
                    ", expected float32, float64, bfloat16 or float16");
    }
  }();
  return {t.mutable_data_ptr(), t.stride(0), dtype, fresh};
}

static void update_running_stats_op(at::Tensor& running_mean, at::Tensor& running_var,
                                    std::optional<at::Tensor> num_batches_tracked, const at::Tensor& mean,
                                    const at::Tensor& var, std::optional<double> momentum) {
  constexpr auto kOp = "update_running_stats";
  const c10::cuda::CUDAGuard guard(mean.device());
  check_device(kOp, mean.device());
  const FreshStats fresh = check_running_stats(running_mean, running_var, num_batches_tracked, mean, var, momentum);
  RunningStatsParams p{};
  p.mean = running_stat("running_mean", running_mean, fresh.mean);
  p.var = running_stat("running_var", running_var, fresh.var);
  p.c = fresh.c;
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0.0);
  if (num_batches_tracked.has_value()) {
    const at::Tensor& t = *num_batches_tracked;
    TORCH_CHECK(t.scalar_type() == at::kLong && t.device() == mean.device(), kOp, ": num_batches_tracked has dtype ",
                t.scalar_type(), " on ", t.device(), ", expected int64 on mean's ", mean.device());
    p.batches = t.mutable_data_ptr<int64_t>();
  }
  check_launch(kOp, update_running_stats(p, c10::cuda::getCurrentCUDAStream().stream()));
  mark_changed(running_mean);
  mark_changed(running_var);
  if (num_batches_tracked.has_value()) mark_changed(*num_batches_tracked);
}

}  // namespace mnet::cuda

TORCH_LIBRARY_IMPL(mnet_cuda, CUDA, m) {
  m.impl("finalize", &mnet::cuda::finalize_op);
  m.impl("finalize_backward", &mnet::cuda::finalize_backward_op);
  m.impl("update_running_stats", &mnet::cuda::update_running_stats_op);
}
