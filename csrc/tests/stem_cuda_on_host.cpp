// The CUDA kernels of the stem and its backward, run on the CPU (cuda_host.h) under every schedule, against sums in double.
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"
#include "../cuda/stem.cu"  // the launchers themselves, their launches replaced
#include "stem_reference.h"

using namespace mnet;

// Blocks walk over several tiles of small maps.
static cuda::Tile two_runs(cuda::Kernel kernel, Dtype dtype, int channels) {
  cuda::Tile tile = cuda::choose_tile(kernel, dtype, channels, 80);
  tile.runs = 2;
  return tile;
}

// Exactly as many as asked for, of 16-byte alignment, NaN.
static std::unique_ptr<float[]> allocate(int64_t floats) {
  std::unique_ptr<float[]> memory(new float[floats]);
  std::memset(memory.get(), 0xff, floats * sizeof(float));
  return memory;
}

static void poison(test::Buffer& buffer, int64_t size) {
  for (int64_t i = 0; i < size; ++i) buffer.set(i, std::nan(""));
}

static std::vector<double> values(test::Buffer& buffer, int64_t size) {
  std::vector<double> found;
  for (int64_t i = 0; i < size; ++i) found.push_back(buffer.get(i));
  return found;
}

static bool check(const test::StemCase& shape, Dtype dtype, bool tf32, uint64_t seed) {
  test::StemProblem problem(shape, dtype, seed);
  const int64_t size = problem.positions * shape.e;
  const double rounding = tf32 && dtype == Dtype::kFloat32 ? 0x1p-11 : 0.0;
  const char* const label = tf32 ? "tensor cores" : "multiply-adds";
  const std::vector<double> given = values(problem.y, size);
  const StemParams p = problem.forward();
  const StemBackwardParams b = problem.backward();
  const cuda::Tile tile = two_runs(cuda::Kernel::kStem, dtype, p.e), back = two_runs(cuda::Kernel::kStemBackward, dtype, b.e);
  std::vector<double> first_y, first_dy;
  std::vector<float> first_moments, first_dw;
  for (const host::Schedule schedule : host::kSchedules) {
    host::schedule = schedule;
    const bool first = schedule == host::Schedule::kForward;
    poison(problem.y, size);
    const auto forward = allocate(cuda::stem_workspace(p, tile));
    if (cuda::stem(p, dtype, tile, tf32, forward.get(), nullptr) != cudaSuccess) return false;
    const std::vector<double> y = values(problem.y, size);
    if (first) problem.check_forward(label, rounding);

    for (int64_t i = 0; i < size; ++i) problem.y.set(i, given[i]);
    poison(problem.dy, size);
    const auto backward = allocate(cuda::stem_backward_workspace(b, back));
    if (cuda::stem_backward(b, dtype, back, tf32, backward.get(), nullptr) != cudaSuccess) return false;
    const std::vector<double> dy = values(problem.dy, size);
    if (first) {
      problem.check_backward(label, rounding);
      if (test::failures > 0) return false;
      first_y = y, first_dy = dy;
      first_moments = problem.moments, first_dw = problem.dw;
    } else if (y != first_y || dy != first_dy || problem.moments != first_moments || problem.dw != first_dw) {
      std::printf("%s c%d e%d %dx%d: the result depends on the order of the threads\n", test::name(dtype), shape.c, shape.e,
                  shape.h, shape.w);
      return false;
    }
  }
  return true;
}

// What is not asked for is not written, and changes nothing else.
static bool check_parts(Dtype dtype) {
  host::schedule = host::Schedule::kRandomWarps;
  test::StemProblem problem({2, 3, 19, 21, 40, 2}, dtype, 99);
  const int64_t size = problem.positions * problem.s.e;
  StemBackwardParams b = problem.backward();
  const cuda::Tile back = two_runs(cuda::Kernel::kStemBackward, dtype, b.e);
  const auto run = [&](bool dy, bool dw) {
    poison(problem.dy, size);
    std::fill(problem.dw.begin(), problem.dw.end(), std::nanf(""));
    b.dy = dy ? problem.dy.data() : nullptr;
    b.dw = dw ? problem.dw.data() : nullptr;
    const auto workspace = allocate(cuda::stem_backward_workspace(b, back));
    return cuda::stem_backward(b, dtype, back, true, workspace.get(), nullptr) == cudaSuccess;
  };
  bool good = run(true, true);
  const std::vector<double> dy = values(problem.dy, size);
  const std::vector<float> dw = problem.dw;
  good &= run(true, false) && values(problem.dy, size) == dy && std::isnan(problem.dw[0]);
  good &= run(false, true) && problem.dw == dw && (size == 0 || std::isnan(problem.dy.get(0)));
  StemParams p = problem.forward();
  p.moments = nullptr;
  const cuda::Tile tile = two_runs(cuda::Kernel::kStem, dtype, p.e);
  good &= cuda::stem_workspace(p, tile) == 0 && cuda::stem(p, dtype, tile, true, nullptr, nullptr) == cudaSuccess;
  good &= !std::isnan(problem.y.get(0)) && std::isnan(problem.moments[0]);
  if (!good) std::printf("%s: a part of the results is wrong by itself\n", test::name(dtype));
  return good;
}

int main() try {
  std::vector<test::StemCase> cases = test::stem_cases();
  cases.push_back({1, 3, 40, 70, 16, 2, test::Layout::kNchw, 2});   // several tiles down and across, edges in both
  cases.push_back({9, 2, 17, 33, 8, 2, test::Layout::kNhwc, 0});    // more tiles of a block than the backward's run
  cases.push_back({2, 7, 9, 18, 40, 1, test::Layout::kNchw, 3});    // two slices of taps
  int failures = 0, checks = 0;
  for (const bool tf32 : {true, false}) {
    for (const Dtype dtype : test::kDtypes) {
      if (!tf32 && dtype != Dtype::kFloat32) continue;
      for (const auto& shape : cases) {
        failures += !check(shape, dtype, tf32, ++checks);
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
      failures += !check_parts(dtype);
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
