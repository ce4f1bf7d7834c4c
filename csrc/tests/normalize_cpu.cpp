// normalize, normalize_backward and squeeze of every capability this machine has, against loops in double.
#include <cstdio>

#include "../cpu/normalize.h"
#include "normalize_reference.h"

using namespace mnet;
using namespace mnet::test;

static void check_normalize(int n, int c, int area, int act, int skew, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  NormalizeProblem problem(n, c, area, act, skew, dtype, seed);
  const NormalizeParams p = problem.with_table(problem.sums);
  const cpu::NormalizePlan plan = cpu::plan_normalize(p);
  cpu::normalize_chunks(p, dtype, plan, 0, plan.chunks, capability);
  std::vector<double> workspace(cpu::normalize_backward_workspace(p, plan));
  for (int64_t i = plan.chunks; i-- > 0;) {
    cpu::normalize_backward_chunks(p, dtype, plan, i, i + 1, workspace.data(), capability);
  }
  cpu::normalize_backward_finish(p, plan, workspace.data());
  cpu::squeeze_units(problem.with_table(problem.squeezed), dtype, plan, 0, p.n * plan.channel_blocks, capability);
  problem.check(cpu::capability_name(capability));
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
