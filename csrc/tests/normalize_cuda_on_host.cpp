// normalize, normalize_gram, normalize_backward and squeeze in CUDA, run on the CPU (cuda_host.h) under every schedule, against loops in
// double.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"
#include "../cuda/expand_gram.cu"
#include "../cuda/normalize.cu"
#include "../cuda/normalize_gram.cu"
#include "gram_reference.h"
#include "normalize_reference.h"

using namespace mnet;
using namespace mnet::test;

static void run(NormalizeProblem& problem, bool residual) {
  NormalizeParams p = problem.params;
  if (!residual) p.operand = nullptr;
  const cuda::Tile maps = cuda::choose_tile(cuda::Kernel::kNormalize, problem.dtype, p.c, 80);
  const cuda::Tile sums = cuda::choose_tile(cuda::Kernel::kNormalizeSums, problem.dtype, p.c, 80);
  if (cuda::normalize(p, problem.dtype, maps, nullptr) != cudaSuccess) ++failures;
  p = problem.with_table(problem.sums);
  std::vector<float> workspace(cuda::normalize_backward_workspace(p, problem.dtype, sums), std::nanf(""));
  if (cuda::normalize_backward(p, problem.dtype, sums, workspace.data(), nullptr) != cudaSuccess) ++failures;
  p = problem.with_table(problem.squeezed);
  workspace.assign(cuda::squeeze_workspace(p, problem.dtype, sums), std::nanf(""));
  if (cuda::squeeze(p, problem.dtype, sums, workspace.data(), nullptr) != cudaSuccess) ++failures;
}

static void check_normalize(int n, int c, int area, int act, int skew, Dtype dtype, uint64_t seed) {
  NormalizeProblem problem(n, c, area, act, skew, dtype, seed);
  const bool residual = seed % 3 != 0;
  std::vector<double> first_out;
  std::vector<float> first_sums, first_squeezed;
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    run(problem, residual);
    std::vector<double> out;
    for (int64_t i = 0; i < int64_t{n} * area * c; ++i) out.push_back(problem.out.get(i));
    if (schedule == host::Schedule::kForward) {
      problem.check("CUDA kernel on the CPU", residual);
      first_out = out;
      first_sums = problem.sums;
      first_squeezed = problem.squeezed;
    } else if (out != first_out || problem.sums != first_sums || problem.squeezed != first_squeezed) {
      std::printf("%s: the result depends on the order of the threads\n", problem.describe("CUDA").c_str());
      ++failures;
    }
  }
}

// The output is normalize's, to the bit, and its gram is gram's and right.
static void check_normalize_gram(int positions, int c, int act, int skew, bool residual, Dtype dtype, uint64_t seed) {
  NormalizeProblem problem(1, c, positions, act, skew, dtype, seed);
  for (int i = 0; i < c; i += 3) problem.bn[c + i] += 40.f;  // some channels far from zero
  std::vector<float> table((c + 2) * c), read((c + 2) * c);
  NormalizeParams p = problem.with_table(table);
  if (!residual) p.operand = nullptr;
  const cuda::Tile maps = cuda::choose_tile(cuda::Kernel::kNormalize, dtype, c, 80);
  const cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kGram, dtype, c, 80);
  const auto output = [&] {
    std::vector<double> out;
    for (int64_t i = 0; i < int64_t{positions} * c; ++i) out.push_back(problem.out.get(i));
    return out;
  };
  host::schedule = host::Schedule::kForward;
  failures += cuda::normalize(p, dtype, maps, nullptr) != cudaSuccess;
  const std::vector<double> want = output();
  const GramParams of_output{p.output, read.data(), positions, c};
  std::vector<double> workspace(cuda::gram_workspace(of_output, dtype, tile) / 8 + 1, std::nan(""));
  failures += cuda::gram(of_output, dtype, tile, workspace.data(), nullptr) != cudaSuccess;

  Check check(problem.describe("CUDA kernel on the CPU, with gram,"));
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    for (int64_t i = 0; i < int64_t{positions} * c; ++i) problem.out.set(i, std::nan(""));
    std::fill(table.begin(), table.end(), -1.f);
    workspace.assign(cuda::normalize_gram_workspace(p, dtype, tile) / 8 + 1, std::nan(""));
    failures += cuda::normalize_gram(p, dtype, tile, workspace.data(), nullptr) != cudaSuccess;
    check("output that differs from normalize's under schedule", static_cast<int>(schedule), output() != want, 0, 0);
    check("gram that differs from gram's under schedule", static_cast<int>(schedule), table != read, 0, 0);
  }
  check_gram(check, dtype, problem.out, positions, c, table);
}

int main() try {
  uint64_t seed = 1;
  int checks = 0;
  for (const Dtype dtype : kDtypes) {
    for (int act = 0; act < kNumActivations; ++act) {
      for (const int c : {1, 8, 19, 24, 300}) {
        check_normalize(2, c, 1 + 33 * c % 211, act, c == 8, dtype, seed + checks++);
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
    for (const int c : {1, 8, 19, 24, 64}) {
      for (const bool residual : {false, true}) {
        check_normalize_gram(c == 24 ? 3000 : 2 + 9 * c, c, (c + residual) % kNumActivations, c == 8, residual, dtype, seed + checks++);
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
    check_normalize_gram(0, 5, 2, 0, false, dtype, seed + checks++);
    check_normalize(3, 24, 2500, 2, 0, dtype, seed + checks++);   // several parts of an image
    check_normalize(1, 520, 49, 3, 0, dtype, seed + checks++);    // several channel blocks
    check_normalize(150, 600, 3, 1, 0, dtype, seed + checks++);   // an image is never split
    check_normalize(0, 8, 5, 2, 0, dtype, seed + checks++);
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
