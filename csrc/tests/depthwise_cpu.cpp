// The CPU depthwise kernel of every capability this machine has, against the double reference.
#include <cstdio>
#include <cstdlib>

#include "../cpu/depthwise.h"
#include "depthwise_reference.h"

using namespace mnet;

static std::vector<float> run(test::Problem& problem, cpu::Capability capability, bool backwards) {
  const cpu::DepthwisePlan plan = cpu::plan_depthwise(problem.params);
  std::vector<double> workspace(cpu::depthwise_workspace(problem.params, plan));
  double* partials = problem.shape.moments ? workspace.data() : nullptr;
  for (int64_t i = 0; i < plan.units(); ++i) {
    const int64_t unit = backwards ? plan.units() - 1 - i : i;
    cpu::depthwise_units(problem.params, problem.dtype, plan, unit, unit + 1, partials, capability);
  }
  if (problem.shape.moments) cpu::depthwise_finish(problem.params, plan, partials);
  return problem.moments;
}

int main() {
  int failures = 0, checks = 0;
  std::vector<test::Case> cases = test::cases();
  cases.push_back({3, 66, 41, 70, 3, 1, 2});  // several chunks, several channel blocks
  cases.push_back({40, 64, 7, 7, 5, 1, 3});
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    const auto capability = static_cast<cpu::Capability>(level);
    for (const Dtype dtype : test::kDtypes) {
      for (const test::Case& shape : cases) {
        test::Problem problem(shape, dtype, 1 + checks);
        const std::vector<float> moments = run(problem, capability, false);
        failures += !problem.check(cpu::capability_name(capability), 128, capability != cpu::Capability::kDefault);
        if (run(problem, capability, true) != moments) {
          std::printf("%s: the moments depend on the order of the units\n", test::describe(shape, dtype).c_str());
          ++failures;
        }
        ++checks;
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
