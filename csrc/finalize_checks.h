// From tensors to the parameters of batch norm's tables: the checks and allocations that all launchers share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>

#include "common/finalize.h"
#include "stage_checks.h"

namespace mnet {

inline void check_count(const char* op, int64_t count) {
  TORCH_CHECK(count >= 0, op, ": count is ", count, ", expected the number of positions N*H*W");
}

inline int64_t table_channels(const char* op, const char* name, const at::Tensor& t, int64_t rows) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) == rows, op, ": ", name, " has shape ", t.sizes(), ", expected [", rows, ", C]");
  return t.size(1);
}

struct FinalizeCall {
  at::Tensor bn;
  FinalizeParams params;
};

inline FinalizeCall prepare_finalize(const at::Tensor& moments, const std::optional<at::Tensor>& gamma,
                                     const std::optional<at::Tensor>& beta, double eps, int64_t count) {
  FinalizeCall call{};
  FinalizeParams& p = call.params;
  p.c = table_channels("finalize", "moments", moments, 2);
  p.moments = check_table("finalize", "moments", moments, {2, p.c}, moments);
  p.gamma = check_table("finalize", "gamma", gamma, {p.c}, moments);
  p.beta = check_table("finalize", "beta", beta, {p.c}, moments);
  check_count("finalize", count);
  call.bn = at::empty({5, p.c}, moments.options());
  p.bn = call.bn.mutable_data_ptr<float>();
  p.eps = eps;
  p.correction = bessel_correction(count);
  return call;
}

// gamma's and beta's gradients become their .grad: a storage each.
struct FinalizeBackwardCall {
  at::Tensor coef, dgamma, dbeta;
  FinalizeBackwardParams params;
};

inline FinalizeBackwardCall prepare_finalize_backward(const at::Tensor& sums, const at::Tensor& bn, int64_t count,
                                                      bool batch_stats) {
  FinalizeBackwardCall call{};
  FinalizeBackwardParams& p = call.params;
  p.c = table_channels("finalize_backward", "bn", bn, 5);
  p.bn = check_table("finalize_backward", "bn", bn, {5, p.c}, bn);
  p.sums = check_table("finalize_backward", "sums", sums, {2, p.c}, bn);
  check_count("finalize_backward", count);
  call.coef = at::empty({2, p.c}, bn.options());
  call.dgamma = at::empty({p.c}, bn.options());
  call.dbeta = at::empty({p.c}, bn.options());
  p.coef = call.coef.mutable_data_ptr<float>();
  p.dgamma = call.dgamma.mutable_data_ptr<float>();
  p.dbeta = call.dbeta.mutable_data_ptr<float>();
  p.count = static_cast<double>(count);
  p.batch_stats = batch_stats;
  return call;
}

// New statistics for the running ones.
struct FreshStats {
  const float* mean;
  const float* var;
  int64_t c;
};

inline void check_running(const char* name, const at::Tensor& t, const at::Tensor& mean) {
  TORCH_CHECK(t.dim() == 1 && t.size(0) == mean.size(0) && at::isFloatingType(t.scalar_type()), "update_running_stats: ",
              name, " has shape ", t.sizes(), " and dtype ", t.scalar_type(), ", expected [", mean.size(0),
              "] of a floating dtype");
  TORCH_CHECK(t.device() == mean.device(), "update_running_stats: ", name, " is on ", t.device(), ", expected mean's ",
              mean.device());
}

inline FreshStats check_running_stats(const at::Tensor& running_mean, const at::Tensor& running_var,
                                      const std::optional<at::Tensor>& num_batches_tracked, const at::Tensor& mean,
                                      const at::Tensor& var, const std::optional<double>& momentum) {
  constexpr auto kOp = "update_running_stats";
  TORCH_CHECK(mean.dim() == 1, kOp, ": mean has shape ", mean.sizes(), ", expected [C]");
  FreshStats fresh{};
  fresh.c = mean.size(0);
  fresh.mean = check_table(kOp, "mean", mean, {fresh.c}, mean);
  fresh.var = check_table(kOp, "var", var, {fresh.c}, mean);
  check_running("running_mean", running_mean, mean);
  check_running("running_var", running_var, mean);
  TORCH_CHECK(momentum.has_value() || num_batches_tracked.has_value(), kOp,
              ": momentum None (a cumulative average) needs num_batches_tracked");
  TORCH_CHECK(!num_batches_tracked.has_value() || num_batches_tracked->numel() == 1, kOp,
              ": num_batches_tracked has shape ", num_batches_tracked->sizes(), ", expected one element");
  return fresh;
}

// Tells autograd that a kernel has written to t.
inline void mark_changed(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace mnet
