// Mean, covariance and shift of a map's channels in double: the check that the tests of gram and of normalize_gram share.
#pragma once

#include "stage_data.h"

namespace mnet::test {

// `table` [c + 2, c], of the map x [positions, c].
inline void check_gram(Check& check, Dtype dtype, Buffer& x, int64_t positions, int c, const std::vector<float>& table) {
  const double unit = std::ldexp(1.0, -significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);
  const auto count = static_cast<double>(positions);
  std::vector<double> values(positions * c), mean(c, 0.0);
  for (int64_t i = 0; i < positions * c; ++i) mean[i % c] += (values[i] = x.get(i)) / count;
  for (int64_t i = 0; i < positions * c; ++i) values[i] -= mean[i % c];
  for (int i = 0; i < c; ++i) {
    for (int j = 0; j < c; ++j) {
      double want = 0.0, magnitude = 0.0;
      for (int64_t p = 0; p < positions; ++p) {
        const double term = values[p * c + i] * values[p * c + j] / count;
        want += term;
        magnitude += std::fabs(term);
      }
      check("covariance", i * c + j, table[i * c + j], want, 16 * unit32 * magnitude + 1e-30);
      if (i != j) continue;
      const double ratio = std::fabs(mean[i]) / std::sqrt(want + 1e-30), k = table[(c + 1) * c + i];
      if (positions > 0 && ratio > 4.1) check("shift", i, k, round_to(dtype, mean[i]), 2 * unit * std::fabs(mean[i]));
      if (ratio < 3.9) check("shift", i, k, 0.0, 0.0);
    }
    check("mean", i, table[c * c + i], mean[i], 4 * unit32 * (std::fabs(mean[i]) + 1));
  }
}

}  // namespace mnet::test
