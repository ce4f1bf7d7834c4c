// normalize, normalize_backward and squeeze of every capability this machine has, against loops in double.
#include <cstdio>

#include "../cpu/normalize.h"
#include "stage_data.h"

using namespace mnet;
using namespace mnet::test;

static void check_normalize(int n, int c, int area, int act, int skew, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  const int64_t size = int64_t{n} * area * c;
  Data data(seed);
  Buffer y(dtype, size, skew), operand(dtype, size, skew), out(dtype, size, skew);
  data.fill(y, size);
  data.fill(operand, size);
  const std::vector<float> bn = data.table(5 * c);
  std::vector<float> sums(2 * c, -1.f), squeezed(3 * n * c, -1.f);
  NormalizeParams p{};
  p.y = y.data();
  p.operand = operand.data();
  p.output = out.data();
  p.bn = bn.data();
  p.table = sums.data();
  p.n = n;
  p.area = area;
  p.c = c;
  p.act = static_cast<Activation>(act);
  const cpu::NormalizePlan plan = cpu::plan_normalize(p);
  cpu::normalize_chunks(p, dtype, plan, 0, plan.chunks, capability);
  std::vector<double> workspace(cpu::normalize_backward_workspace(p, plan));
  for (int64_t i = plan.chunks; i-- > 0;) {
    cpu::normalize_backward_chunks(p, dtype, plan, i, i + 1, workspace.data(), capability);
  }
  cpu::normalize_backward_finish(p, plan, workspace.data());
  p.table = squeezed.data();
  cpu::squeeze_units(p, dtype, plan, 0, p.n * plan.channel_blocks, capability);

  char label[160];
  std::snprintf(label, sizeof label, "%s normalize %s n%d c%d area %d act %d skew %d", cpu::capability_name(capability),
                name(dtype), n, c, area, act, skew);
  Check check(label);
  const double unit = std::ldexp(1.0, -significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);
  for (int i = 0; i < c; ++i) {
    double sum = 0, sum_y = 0, size_y = 0, all = 0;
    for (int64_t image = 0; image < n; ++image) {
      double mean = 0, slope = 0, slope_y = 0, big = 0, big_y = 0;
      for (int64_t position = 0; position < area; ++position) {
        const int64_t at = (image * area + position) * c + i;
        const auto value = static_cast<float>(y.get(at));
        const float u = std::fmaf(bn[i], value, bn[c + i]);
        const double z = act_value(act, u), d = act_slope(act, u), other = operand.get(at);
        const double scale = std::fabs(double{bn[i]} * value) + std::fabs(bn[c + i]) + 1;
        check("out", at, out.get(at), z + other, (unit + 4 * unit32) * (std::fabs(z) + std::fabs(other)) + 4 * unit32 * scale);
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

int main() {
  uint64_t seed = 1;
  int checks = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    const auto capability = static_cast<cpu::Capability>(level);
    for (const Dtype dtype : kDtypes) {
      for (int act = 0; act < kNumActivations; ++act) {
        for (const int c : {1, 8, 19, 300}) check_normalize(2, c, 1 + 33 * c % 211, act, c == 19, dtype, capability, seed + checks++);
      }
      check_normalize(3, 24, 4000, 2, 0, dtype, capability, seed + checks++);  // several chunks
      check_normalize(0, 8, 5, 2, 0, dtype, capability, seed + checks++);
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
