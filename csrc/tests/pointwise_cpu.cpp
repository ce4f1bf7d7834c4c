// The CPU pointwise kernels of every capability this machine has, against sums in double, element by element.
#include <cstdio>
#include <utility>

#include "../cpu/pointwise.h"
#include "pointwise_reference.h"

using namespace mnet;

static bool check(const test::PointwiseCase& shape, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  test::PointwiseProblem problem(shape, dtype, seed);
  // Without a fused multiply-add an activated value may round to its other neighbour.
  const test::PointwiseSlack slack{capability == cpu::Capability::kDefault ? 2.0 : 1.0, 0.0};
  const int threads = seed % 2 == 0 ? 1 : 16;  // more split the columns

  const PointwiseParams p = problem.forward();
  const cpu::PointwisePlan plan = cpu::plan_pointwise(p, dtype, capability, threads);
  std::vector<float> packed(plan.packed_size());
  std::vector<double> workspace(plan.sums_size());
  cpu::pointwise_pack(p, dtype, plan, 0, plan.panels, packed.data(), capability);
  for (int64_t i = plan.units() - 1; i >= 0; --i) {  // any order
    cpu::pointwise_units(p, dtype, plan, i, i + 1, {packed.data(), workspace.data(), nullptr}, nullptr, capability);
  }
  cpu::pointwise_finish(p, plan, workspace.data());
  if (!problem.check_forward(cpu::capability_name(capability), slack)) return false;

  const PointwiseBackwardParams b = problem.backward();
  const cpu::PointwisePlan back = cpu::plan_pointwise_backward(b, dtype, capability, threads);
  std::vector<float> packed_back(back.packed_size()), partials(back.partials_size());
  std::vector<double> table(back.sums_size());
  cpu::pointwise_backward_pack(b, dtype, back, 0, back.panels, packed_back.data(), capability);
  for (int64_t i = back.units() - 1; i >= 0; --i) {
    cpu::pointwise_backward_units(b, dtype, back, i, i + 1, {packed_back.data(), table.data(), partials.data()}, capability);
  }
  if (b.sums != nullptr) cpu::pointwise_backward_finish(b, back, table.data());
  cpu::pointwise_backward_combine(b, back, 0, back.panels, partials.data());
  return problem.check_backward(cpu::capability_name(capability), slack);
}

int main() {
  std::vector<test::PointwiseCase> shapes = {
      {3, 1, 5, 3, -1, true, false},  {2, 49, 40, 70, -1, false, true}, {0, 4, 5, 6, 2, false, false},
      {1, 1, 1, 1, 2, false, false},  {3, 130, 24, 33, 2, true, false}, {1, 50, 530, 9, 1, false, false},
      {1, 50, 9, 530, 3, false, false}, {9, 97, 17, 130, 2, false, false}};
  for (int act = -1; act < kNumActivations; ++act) {
    for (const bool gate : {false, true}) shapes.push_back({5, 63, 19, 26, act, gate, false});
  }
  for (const auto& [images, area] : {std::pair{5, 63}, {90, 1}, {2, 130}, {0, 4}}) {
    test::PointwiseCase pooled{images, area, 19, 37, 2, false, false};
    pooled.pooled = true;
    shapes.push_back(pooled);
  }
  int failures = 0, checks = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    for (const Dtype dtype : test::kDtypes) {
      for (const auto& shape : shapes) failures += !check(shape, dtype, static_cast<cpu::Capability>(level), ++checks);
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
