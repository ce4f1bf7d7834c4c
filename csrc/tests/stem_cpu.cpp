// The CPU stem of every capability this machine has, against sums in double, element by element.
#include <cstdio>
#include <cstdlib>

#include "../cpu/stem.h"
#include "stem_reference.h"

using namespace mnet;

static void check(const test::StemCase& shape, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  test::StemProblem problem(shape, dtype, seed);
  const StemParams p = problem.forward();
  const cpu::StemPlan plan = cpu::plan_stem(p.image, p.e, capability);
  std::vector<double> sums(plan.sums_size());
  for (int64_t i = plan.chunks - 1; i >= 0; --i) {  // any order
    cpu::stem_units(p, dtype, plan, i, i + 1, sums.data(), capability);
  }
  cpu::stem_finish(p, plan, sums.data());
  problem.check_forward(cpu::capability_name(capability));

  const StemBackwardParams b = problem.backward();
  std::vector<float> partials(plan.partials_size());
  for (int64_t i = plan.chunks - 1; i >= 0; --i) {
    cpu::stem_backward_units(b, dtype, plan, i, i + 1, partials.data(), capability);
  }
  cpu::stem_backward_finish(b, plan, partials.data());
  problem.check_backward(cpu::capability_name(capability));
}

int main() {
  int checks = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    for (const Dtype dtype : test::kDtypes) {
      for (const auto& shape : test::stem_cases()) {
        check(shape, dtype, static_cast<cpu::Capability>(level), ++checks);
        if (test::failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, test::failures,
              cpu::capability_name(cpu::supported_capability()));
  return test::failures != 0;
}
