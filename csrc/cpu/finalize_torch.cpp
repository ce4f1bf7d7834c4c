// mnet_cpu::finalize, finalize_backward and update_running_stats: small tables, computed in double and rounded once.
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../stage_checks.h"

namespace mnet::cpu {

static void check_count(const char* op, int64_t count) {
  TORCH_CHECK(count >= 0, op, ": count is ", count, ", expected the number of positions N*H*W");
}

static int64_t table_channels(const char* op, const char* name, const at::Tensor& t, int64_t rows) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows, op, ": ", name, " has shape ", t.sizes(), ", expected [", rows, ", C]");
  return t.size(1);
}

static at::Tensor finalize(const at::Tensor& moments, const std::optional<at::Tensor>& gamma,
                           const std::optional<at::Tensor>& beta, double eps, int64_t count) {
  const int64_t c = table_channels("finalize", "moments", moments, 2);
  const float* mean = check_table("finalize", "moments", moments, {2, c}, moments);
  const float* var = mean + c;
  const float* weight = check_table("finalize", "gamma", gamma, {c}, moments);
  const float* bias = check_table("finalize", "beta", beta, {c}, moments);
  check_count("finalize", count);
  at::Tensor bn = at::empty({5, c}, moments.options());
  float* out = bn.mutable_data_ptr<float>();
  const double correction = static_cast<double>(count) / static_cast<double>(std::max<int64_t>(count - 1, 1));
  for (int64_t i = 0; i < c; ++i) {
    const double rstd = 1.0 / std::sqrt(static_cast<double>(var[i]) + eps);
    // shift goes with the scale as it is stored, so that act(scale * y + shift) is centred whatever its rounding
    const float scale = static_cast<float>(weight == nullptr ? rstd : rstd * weight[i]);
    const double centre = static_cast<double>(mean[i]) * scale;
    out[i] = scale;
    out[c + i] = static_cast<float>((bias == nullptr ? 0.0 : bias[i]) - centre);
    out[2 * c + i] = mean[i];
    out[3 * c + i] = static_cast<float>(rstd);
    out[4 * c + i] = static_cast<float>(var[i] * correction);
  }
  return bn;
}

static at::Tensor finalize_backward(const at::Tensor& sums, const at::Tensor& bn, int64_t count, bool batch_stats) {
  const int64_t c = table_channels("finalize_backward", "bn", bn, 5);
  const float* scale = check_table("finalize_backward", "bn", bn, {5, c}, bn);
  const float* rstd = scale + 3 * c;
  const float* s = check_table("finalize_backward", "sums", sums, {2, c}, bn);
  const float* sy = s + c;
  check_count("finalize_backward", count);
  at::Tensor coef = at::empty({4, c}, bn.options());
  float* out = coef.mutable_data_ptr<float>();
  for (int64_t i = 0; i < c; ++i) {
    const double r = rstd[i], per = batch_stats ? -static_cast<double>(scale[i]) / static_cast<double>(count) : 0.0;
    out[i] = batch_stats ? static_cast<float>(per * r * r * sy[i]) : 0.f;
    out[c + i] = batch_stats ? static_cast<float>(per * s[i]) : 0.f;
    out[2 * c + i] = static_cast<float>(r * sy[i]);
    out[3 * c + i] = s[i];
  }
  return coef;
}

static void update(at::Tensor& running, const float* fresh, double momentum) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, running.scalar_type(), "update_running_stats", [&] {
    auto values = running.accessor<scalar_t, 1>();
    for (int64_t i = 0; i < values.size(0); ++i) {
      values[i] = static_cast<scalar_t>((1.0 - momentum) * static_cast<double>(values[i]) + momentum * fresh[i]);
    }
  });
  if (!running.is_inference()) running.unsafeGetTensorImpl()->bump_version();
}

static void check_running(const char* name, const at::Tensor& t, int64_t c) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == c && at::isFloatingType(t.scalar_type()), "update_running_stats: ", name,
              " has shape ", t.sizes(), " and dtype ", t.scalar_type(), ", expected [", c, "] of a floating dtype");
  TORCH_CHECK(t.device().is_cpu(), "update_running_stats: ", name, " is on ", t.device(), ", expected cpu");
}

static void update_running_stats(at::Tensor& running_mean, at::Tensor& running_var,
                                 std::optional<at::Tensor> num_batches_tracked, const at::Tensor& mean,
                                 const at::Tensor& var, std::optional<double> momentum) {
  TORCH_CHECK(mean.dim() == 1, "update_running_stats: mean has shape ", mean.sizes(), ", expected [C]");
  const int64_t c = mean.size(0);
  const float* fresh_mean = check_table("update_running_stats", "mean", mean, {c}, mean);
  const float* fresh_var = check_table("update_running_stats", "var", var, {c}, mean);
  check_running("running_mean", running_mean, c);
  check_running("running_var", running_var, c);
  TORCH_CHECK(momentum.has_value() || num_batches_tracked.has_value(),
              "update_running_stats: momentum None (a cumulative average) needs num_batches_tracked");
  if (num_batches_tracked.has_value()) {
    TORCH_CHECK(num_batches_tracked->numel() == 1, "update_running_stats: num_batches_tracked has shape ",
                num_batches_tracked->sizes(), ", expected one element");
    num_batches_tracked->add_(1);
  }
  const double m = momentum.has_value() ? *momentum : 1.0 / num_batches_tracked->item<double>();
  update(running_mean, fresh_mean, m);
  update(running_var, fresh_var, m);
}

}  // namespace mnet::cpu

TORCH_LIBRARY_IMPL(mnet_cpu, CPU, m) {
  m.impl("finalize", &mnet::cpu::finalize);
  m.impl("finalize_backward", &mnet::cpu::finalize_backward);
  m.impl("update_running_stats", &mnet::cpu::update_running_stats);
}
