// normalize, normalize_backward and squeeze by loops in double, and the inputs that the tests share.
#pragma once

#include <cstdio>

#include "stage_data.h"

namespace mnet::test {

struct NormalizeProblem {
  int n, c, area, act;
  Dtype dtype;
  Buffer y, operand, out;
  std::vector<float> bn, sums, squeezed;
  NormalizeParams params{};

  NormalizeProblem(int n, int c, int area, int act, int skew, Dtype dtype, uint64_t seed)
      : n(n),
        c(c),
        area(area),
        act(act),
        dtype(dtype),
        y(dtype, int64_t{n} * area * c, skew),
        operand(dtype, int64_t{n} * area * c, skew),
        out(dtype, int64_t{n} * area * c, skew),
        sums(2 * c, -1.f),
        squeezed(3 * n * c, -1.f) {
    Data data(seed);
    data.fill(y, int64_t{n} * area * c);
    data.fill(operand, int64_t{n} * area * c);
    bn = data.table(5 * c);
    params.y = y.data();
    params.operand = operand.data();
    params.output = out.data();
    params.bn = bn.data();
    params.n = n;
    params.area = area;
    params.c = c;
    params.act = static_cast<Activation>(act);
  }

  NormalizeParams with_table(std::vector<float>& table) const {
    NormalizeParams p = params;
    p.table = table.data();
    return p;
  }

  std::string describe(const std::string& runner) const {
    char label[160];
    std::snprintf(label, sizeof label, "%s normalize %s n%d c%d area %d act %d", runner.c_str(), name(dtype), n, c, area, act);
    return label;
  }

  // `residual`: out has operand added.
  void check(const std::string& runner, bool residual = true) {
    Check check(describe(runner));
    const double unit = std::ldexp(1.0, -significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);
    for (int i = 0; i < c; ++i) {
      double sum = 0, sum_y = 0, size_y = 0, all = 0;
      for (int64_t image = 0; image < n; ++image) {
        double mean = 0, slope = 0, slope_y = 0, big = 0, big_y = 0;
        for (int64_t position = 0; position < area; ++position) {
          const int64_t at = (image * area + position) * c + i;
          const auto value = static_cast<float>(y.get(at));
          const float u = std::fmaf(bn[i], value, bn[c + i]);
          const double z = act_value(act, u), d = act_slope(act, u), other = operand.get(at), added = residual ? other : 0;
          const double scale = std::fabs(double{bn[i]} * value) + std::fabs(bn[c + i]) + 1;
          check("out", at, out.get(at), z + added,
                (unit + 4 * unit32) * (std::fabs(z) + std::fabs(added)) + 4 * unit32 * scale);
          const double centred = double{value} - bn[2 * c + i];
          sum += other * d;
          sum_y += other * d * centred;
          all += 2 * std::fabs(other);
          size_y += 2 * std::fabs(other * centred);
          mean += z / area;
          slope += d;
          slope_y += d * centred;
          big += scale;
          big_y += 2 * std::fabs(centred);
        }
        const float* at = squeezed.data() + image * c + i;
        check("mean z", i, at[0], mean, 16 * unit32 * big / area);
        check("sum of slopes", i, at[n * c], slope, 16 * unit32 * 2 * area);
        check("sum of slopes times y", i, at[2 * n * c], slope_y, 16 * unit32 * big_y);
      }
      check("sum g", i, sums[i], sum, 16 * unit32 * all);
      check("sum g y", i, sums[c + i], sum_y, 16 * unit32 * size_y);
    }
  }
};

}  // namespace mnet::test
