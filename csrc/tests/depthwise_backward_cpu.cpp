// The CPU depthwise backward kernel of every capability this machine has, against loops in double.
#include <cstdio>

#include "../cpu/depthwise_backward.h"
#include "depthwise_backward_reference.h"

using namespace mnet;
using namespace mnet::test;

static void check_backward(const BackwardShape& s, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  BackwardProblem problem(s, dtype, seed);
  const DepthwiseBackwardParams& p = problem.params;
  const cpu::DepthwiseBackwardPlan plan = cpu::plan_depthwise_backward(p);
  const auto run = [&](bool backwards) {
    std::vector<double> workspace(cpu::depthwise_backward_workspace(p, plan));
    for (int64_t i = 0; i < plan.units(); ++i) {
      const int64_t unit = backwards ? plan.units() - 1 - i : i;
      cpu::depthwise_backward_units(p, dtype, plan, unit, unit + 1, workspace.data(), capability);
    }
    cpu::depthwise_backward_finish(p, plan, workspace.data());
  };
  run(true);
  const std::vector<float> dw_once = problem.dw, sums_once = problem.sums;
  run(false);
  if (problem.dw != dw_once || problem.sums != sums_once) {
    std::printf("%s: the result depends on the order of the units\n", problem.describe("CPU").c_str());
    ++failures;
  }
  problem.check(cpu::capability_name(capability));
}

int main() {
  uint64_t seed = 1;
  int checks = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    const auto capability = static_cast<cpu::Capability>(level);
    for (const Dtype dtype : kDtypes) {
      for (const BackwardShape& s : backward_shapes()) check_backward(s, dtype, capability, seed + checks++);
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
