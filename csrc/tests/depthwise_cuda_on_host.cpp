// The CUDA depthwise kernels, run on the CPU (cuda_host.h) under every schedule, against the double reference.
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"  // the launchers themselves, their launches replaced
#include "../cuda/depthwise.cu"
#include "depthwise_reference.h"

using namespace mnet;

int main() try {
  int failures = 0, checks = 0;
  std::vector<test::Case> cases = test::cases();
  cases.push_back({70, 8, 33, 66, 3, 1, 2});  // more tiles than chunks: blocks walk over several
  for (const Dtype dtype : test::kDtypes) {
    for (const test::Case& shape : cases) {
      test::Problem problem(shape, dtype, 1 + checks);
      const int64_t size = int64_t{shape.n} * problem.params.out_h * problem.params.out_w * shape.c;
      std::vector<double> first_y;
      std::vector<float> first_moments;
      const bool small = size < 20000;
      const cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kDepthwise, dtype, shape.c, 80);
      for (const host::Schedule schedule : host::kSchedules) {
        if (!small && schedule != host::Schedule::kForward && schedule != host::Schedule::kRandomWarps) continue;
        host::schedule = schedule;
        std::vector<float> workspace(cuda::depthwise_workspace(problem.params, dtype, tile), std::nanf(""));
        if (cuda::depthwise(problem.params, dtype, tile, workspace.data(), nullptr) != cudaSuccess) ++failures;
        std::vector<double> y;
        for (int64_t i = 0; i < size; ++i) y.push_back(problem.y.get(i));
        if (schedule == host::Schedule::kForward) {
          failures += !problem.check("CUDA kernel on the CPU", 4);
          first_y = y;
          first_moments = problem.moments;
        } else if (y != first_y || problem.moments != first_moments) {
          std::printf("%s: the result depends on the order of the threads\n", test::describe(shape, dtype).c_str());
          ++failures;
        }
      }
      ++checks;
      if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
