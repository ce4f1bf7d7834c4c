// Batch norm's tables as the CUDA kernels compute them, run on the CPU (cuda_host.h) under every schedule.
#include <cmath>
#include <cstdio>

#include "../cuda/finalize.cu"
#include "stage_data.h"

using namespace mnet;
using namespace mnet::test;

constexpr double kUnit = 6e-8;  // 2^-24

static void check_tables(int c, bool affine, bool batch_stats, int64_t count, uint64_t seed) {
  Data data(seed);
  std::vector<float> moments = data.table(2 * c), gamma = data.table(c), beta = data.table(c), bn(5 * c, -1.f);
  const std::vector<float> sums = data.table(2 * c);
  std::vector<float> coef(2 * c, -1.f), dgamma(c, -1.f), dbeta(c, -1.f);
  for (int i = 0; i < c; ++i) moments[c + i] = i % 3 ? std::fabs(moments[c + i]) : 0.f;
  char label[80];
  std::snprintf(label, sizeof label, "tables of %d channels, affine %d, batch stats %d", c, affine, batch_stats);
  Check check(label);
  const double eps = 1e-5;
  FinalizeParams p{moments.data(), affine ? gamma.data() : nullptr, affine ? beta.data() : nullptr, bn.data(), eps,
                   bessel_correction(count), c};
  FinalizeBackwardParams b{sums.data(),   bn.data(),    coef.data(),
                           dgamma.data(), dbeta.data(), static_cast<double>(count),
                           batch_stats,   c};
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    if (cuda::finalize(p, nullptr) != cudaSuccess || cuda::finalize_backward(b, nullptr) != cudaSuccess) ++failures;
    for (int i = 0; i < c; ++i) {
      const double rstd = 1 / std::sqrt(moments[c + i] + eps), scale = affine ? rstd * gamma[i] : rstd;
      const double shift = (affine ? beta[i] : 0.0) - moments[i] * scale, bessel = count > 1 ? count / (count - 1.0) : count;
      const double want[] = {scale, shift, moments[i], rstd, moments[c + i] * bessel};
      const double size = std::fabs(moments[i] * scale) + (affine ? std::fabs(beta[i]) : 0);
      for (int row = 0; row < 5; ++row) {
        check("bn", row * c + i, bn[row * c + i], want[row], 2 * kUnit * (row == 1 ? size : std::fabs(want[row])));
      }
      const double s = sums[i], sy = sums[c + i], a = bn[i], r = bn[3 * c + i];
      const double coefs[] = {batch_stats ? -a * r * r * sy / count : 0, batch_stats ? -a * s / count : 0};
      for (int row = 0; row < 2; ++row) check("coef", row * c + i, coef[row * c + i], coefs[row], kUnit * std::fabs(coefs[row]));
      check("dgamma", i, dgamma[i], r * sy, kUnit * std::fabs(r * sy));
      check("dbeta", i, dbeta[i], s, 0);
    }
  }
}

template <typename T>
static void check_running(cuda::RunningDtype dtype, double unit, int c, int64_t stride, bool cumulative, uint64_t seed) {
  Data data(seed);
  const std::vector<float> fresh = data.table(2 * c);
  char label[80];
  std::snprintf(label, sizeof label, "running statistics of %d channels, dtype %d, cumulative %d", c, static_cast<int>(dtype),
                cumulative);
  Check check(label);
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    std::vector<T> values(2 * c * stride);
    for (T& v : values) v = static_cast<T>(static_cast<float>(data.normal(data.random)));
    const std::vector<T> before = values;
    int64_t batches = 6;
    cuda::RunningStatsParams p{};
    p.mean = {values.data(), stride, dtype, fresh.data()};
    p.var = {values.data() + c * stride, stride, dtype, fresh.data() + c};
    p.batches = c % 2 || cumulative ? &batches : nullptr;
    p.momentum = 0.3;
    p.cumulative = cumulative;
    p.c = c;
    if (cuda::update_running_stats(p, nullptr) != cudaSuccess) ++failures;
    const double m = cumulative ? 1.0 / 7 : 0.3;
    for (int64_t i = 0; i < 2 * c * stride; ++i) {
      const double old = static_cast<double>(static_cast<float>(before[i])), got = static_cast<double>(values[i]);
      const double want = i % stride ? old : (1 - m) * old + m * fresh[i / stride];
      check("value", i, got, want, i % stride ? 0 : unit * (std::fabs(old) + std::fabs(want)));
    }
    if (batches != (p.batches ? 7 : 6)) ++failures;
  }
}

int main() try {
  uint64_t seed = 1;
  int checks = 0;
  for (const int c : {1, 37, 128, 300}) {
    for (const int64_t count : {1, 2, 4711}) check_tables(c, count != 2, count != 1, count, seed + checks++);
    for (const bool cumulative : {false, true}) {
      check_running<float>(cuda::RunningDtype::kFloat32, kUnit, c, 1, cumulative, seed + checks++);
      check_running<double>(cuda::RunningDtype::kFloat64, 1e-7, c, 2, cumulative, seed + checks++);
      check_running<__nv_bfloat16>(cuda::RunningDtype::kBFloat16, std::ldexp(1.0, -8), c, 1, cumulative, seed + checks++);
      check_running<__half>(cuda::RunningDtype::kFloat16, std::ldexp(1.0, -11), c, 3, cumulative, seed + checks++);
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
