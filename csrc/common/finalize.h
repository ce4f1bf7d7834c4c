// Batch norm's tables, channel by channel, computed in double and rounded once: the CPU and the CUDA stages share this.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "portability.h"

namespace mnet {

struct FinalizeParams {
  const float* moments;  // [2, c]: mean, biased variance
  const float* gamma;    // [c]; nullptr: 1
  const float* beta;     // [c]; nullptr: 0
  float* bn;             // [5, c]: scale, shift, mean, rstd, unbiased variance
  double eps;
  double correction;  // unbiased / biased variance
  int64_t c;
};

struct FinalizeBackwardParams {
  const float* sums;  // [2, c]: sum g, sum g * (y - mean)
  const float* bn;    // [5, c]
  float* coef;        // [2, c]: b, c of dy = scale * g + b * (y - mean) + c
  float* dgamma;      // [c]
  float* dbeta;       // [c]
  double count;
  bool batch_stats;  // false: the statistics were constants
  int64_t c;
};

static_assert(std::is_trivially_copyable_v<FinalizeParams>, "passed to kernels by value");
static_assert(std::is_trivially_copyable_v<FinalizeBackwardParams>, "passed to kernels by value");

// Positions over positions - 1; of a single position, as torch has it in eval mode, 1.
inline double bessel_correction(int64_t count) {
  return static_cast<double>(count) / static_cast<double>(count > 2 ? count - 1 : 1);
}

MNET_HD void finalize_channel(const FinalizeParams& p, int64_t i) {
  const float mean = p.moments[i], var = p.moments[p.c + i];
  const double rstd = 1.0 / sqrt(static_cast<double>(var) + p.eps);
  // shift goes with the scale as it is stored, so that act(scale * y + shift) is centred whatever its rounding
  const float scale = static_cast<float>(p.gamma == nullptr ? rstd : rstd * p.gamma[i]);
  const double centre = static_cast<double>(mean) * scale;
  p.bn[i] = scale;
  p.bn[p.c + i] = static_cast<float>((p.beta == nullptr ? 0.0 : p.beta[i]) - centre);
  p.bn[2 * p.c + i] = mean;
  p.bn[3 * p.c + i] = static_cast<float>(rstd);
  p.bn[4 * p.c + i] = static_cast<float>(var * p.correction);
}

MNET_HD void finalize_backward_channel(const FinalizeBackwardParams& p, int64_t i) {
  const double scale = p.bn[i], rstd = p.bn[3 * p.c + i], s = p.sums[i], sy = p.sums[p.c + i];
  const double per = p.batch_stats ? -scale / p.count : 0.0;
  p.coef[i] = p.batch_stats ? static_cast<float>(per * rstd * rstd * sy) : 0.f;
  p.coef[p.c + i] = p.batch_stats ? static_cast<float>(per * s) : 0.f;
  p.dgamma[i] = static_cast<float>(rstd * sy);
  p.dbeta[i] = p.sums[i];
}

}  // namespace mnet
