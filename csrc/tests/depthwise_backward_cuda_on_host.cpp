// The CUDA depthwise backward kernels, run on the CPU (cuda_host.h) under every schedule, against loops in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"
#include "../cuda/depthwise_backward.cu"
#include "depthwise_backward_reference.h"

using namespace mnet;
using namespace mnet::test;

static void run(BackwardProblem& problem, const DepthwiseBackwardParams& p) {
  const cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kDepthwiseBackward, problem.dtype, p.c, 80);
  std::vector<float> workspace(cuda::depthwise_backward_workspace(p, problem.dtype, tile), std::nanf(""));
  if (cuda::depthwise_backward(p, problem.dtype, tile, workspace.data(), nullptr) != cudaSuccess) ++failures;
}

// What is not asked for is not written, and the rest is the same without it.
static void check_parts(BackwardProblem& problem) {
  const std::vector<float> dw = problem.dw, sums = problem.sums;
  DepthwiseBackwardParams p = problem.params;
  p.dw = nullptr;
  std::fill(problem.dw.begin(), problem.dw.end(), -2.f);
  run(problem, p);
  failures += problem.sums != sums || problem.dw != std::vector<float>(dw.size(), -2.f);
  p = problem.params;
  p.gx = nullptr;
  p.sums = nullptr;
  run(problem, p);
  failures += problem.dw != dw;
}

static void check_backward(const BackwardShape& s, Dtype dtype, uint64_t seed) {
  BackwardProblem problem(s, dtype, seed);
  std::vector<double> first_gx;
  std::vector<float> first_dw, first_sums;
  for (const host::Schedule schedule : host::kSchedules) {
    const bool small = problem.inputs() < 5000;
    if (!small && schedule != host::Schedule::kForward && schedule != host::Schedule::kRandomWarps) continue;
    host::schedule = schedule;
    run(problem, problem.params);
    std::vector<double> gx;
    for (int64_t i = 0; i < problem.inputs(); ++i) gx.push_back(problem.gx.get(i));
    if (schedule == host::Schedule::kForward) {
      problem.check("CUDA kernel on the CPU");
      first_gx = gx;
      first_dw = problem.dw;
      first_sums = problem.sums;
    } else if (gx != first_gx || problem.dw != first_dw || problem.sums != first_sums) {
      std::printf("%s: the result depends on the order of the threads\n", problem.describe("CUDA").c_str());
      ++failures;
    }
  }
  check_parts(problem);
}

int main() try {
  uint64_t seed = 1;
  int checks = 0;
  for (const Dtype dtype : kDtypes) {
    std::vector<BackwardShape> shapes = {
        {180, 8, 9, 2, 3, 1, 2, 0, true, 0},    // runs of several steps, across images
        {3, 72, 9, 5, 5, 1, 2, 3, true, 0},     // blocks of a quarter of a line
        {2, 16, 6, 150, 3, 2, 2, 2, false, 0},  // several stripes
    };
    for (const BackwardShape& s : backward_shapes()) shapes.push_back(s);
    for (const BackwardShape& s : shapes) {
      check_backward(s, dtype, seed + checks++);
      if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
