// The CUDA kernels of the pointwise backward, run on the CPU (cuda_host.h) under every schedule, against sums in double.
#include <cstdio>
#include <cstdlib>
#include <tuple>

#include "../cuda/combine.cu"
#include "../cuda/pointwise_backward.cu"  // the launcher itself, its launches replaced
#include "pointwise_reference.h"

using namespace mnet;

// Which results are asked for.
enum Wanted { kAll, kNoDw, kOnlyDw, kOnlySums };

struct BackwardCase {
  test::PointwiseCase shape;
  Wanted wanted = kAll;
};

// Bytes of 16-byte alignment, as torch allocates them; exactly as many as asked for.
static std::unique_ptr<char[]> allocate(int64_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

static bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;  // what is not wanted stays a NaN
}

static bool check(const BackwardCase& k, Dtype dtype, bool tf32, const cuda::PointwiseBackwardTiles& tiles, uint64_t seed) {
  test::PointwiseProblem problem(k.shape, dtype, seed);
  PointwiseBackwardParams p = problem.backward();
  if (k.wanted == kNoDw) p.dw = nullptr;
  if (k.wanted == kOnlyDw) p.gx = nullptr, p.sums = nullptr;
  if (k.wanted == kOnlySums) p.gx = nullptr, p.dw = nullptr;
  const bool curved = p.act >= Activation::kHardswish;  // its own multiply-adds may be fused there and not here
  const test::PointwiseSlack slack{curved ? 1.0 : 0.0, tf32 && dtype == Dtype::kFloat32 ? 0x1p-11 : 0.0};
  const int64_t size = problem.positions * k.shape.c;
  std::vector<double> first_gx;
  std::vector<float> first_sums, first_dw;
  const bool small = size * k.shape.e < 200000;
  for (const host::Schedule schedule : host::kSchedules) {
    if (!small && schedule != host::Schedule::kForward && schedule != host::Schedule::kRandomWarps) continue;
    host::schedule = schedule;
    const auto workspace = allocate(cuda::pointwise_backward_workspace(p, dtype, tiles));
    for (int64_t i = 0; i < size; ++i) problem.gx.set(i, std::nan(""));
    if (cuda::pointwise_backward(p, dtype, tiles, tf32, workspace.get(), nullptr) != cudaSuccess) return false;
    std::vector<double> gx;
    for (int64_t i = 0; p.gx != nullptr && i < size; ++i) gx.push_back(problem.gx.get(i));
    if (schedule == host::Schedule::kForward) {
      const bool sums = p.sums != nullptr;
      if (!problem.check_backward(tf32 ? "tensor cores" : "multiply-adds", slack, p.gx != nullptr, sums, p.dw != nullptr)) {
        return false;
      }
      first_gx = gx;
      first_sums = problem.sums;
      first_dw = problem.dw;
    } else if (gx != first_gx || !same(problem.sums, first_sums) || !same(problem.dw, first_dw)) {
      std::printf("%s c%d e%d: the result depends on the order of the threads\n", test::name(dtype), k.shape.c, k.shape.e);
      return false;
    }
  }
  return true;
}

int main() try {
  std::vector<BackwardCase> cases = {
      {{1, 150, 40, 24, 2, false, false}},   // the narrow tile, tails of positions, depth and columns
      {{2, 35, 136, 72, 1, false, false}},   // the wide one, several blocks, two steps
      {{2, 35, 24, 136, -1, false, true}},   // with a residual
      {{1, 40, 16, 24, -1, false, false}},
      {{3, 130, 17, 150, 2, false, false}},  // both gradients in one pass: three steps, several tiles and runs
      {{1, 700, 70, 100, -1, false, true}},  // two steps, two blocks of columns
      {{3, 70, 24, 16, 3, true, false}},     // the image table, two tiles an image
      {{5, 1, 8, 8, 2, true, false}},
      {{2, 20, 16, 8, 4, true, false}},
      {{1, 33, 13, 21, 2, true, false}},     // channels that are no multiple of 16 bytes
      {{1, 33, 21, 13, -1, false, true}},
      {{0, 4, 16, 8, 2, false, false}},
      {{0, 4, 16, 8, 2, true, false}},
      {{1, 1, 1, 1, 0, false, false}},
      {{1, 1500, 8, 8, 2, false, false}},    // more tiles in a run than slots
      {{1, 4200, 8, 9, 0, false, false}, kOnlyDw},
      {{2, 30, 24, 16, 2, false, false}, kNoDw},
      {{2, 30, 24, 16, 2, false, false}, kOnlySums},
      {{2, 30, 24, 16, 2, true, false}, kOnlySums},
      {{2, 30, 24, 16, 2, true, false}, kOnlyDw},
  };
  test::PointwiseCase unaligned{1, 40, 16, 16, 2, false, false}, transposed{1, 40, 16, 40, 2, false, false};
  unaligned.skew = 1;
  transposed.weight_transposed = true;
  for (const auto& [images, area, e] : {std::tuple{5, 33, 40}, {40, 1, 16}, {3, 70, 21}, {2, 35, 200}, {0, 4, 16}}) {
    test::PointwiseCase pooled{images, area, 24, e, 2, false, false};
    pooled.pooled = true;
    cases.push_back({pooled});
  }
  cases.push_back({unaligned});
  cases.push_back({transposed});
  int failures = 0, checks = 0;
  for (const bool tf32 : {true, false}) {
    for (const Dtype dtype : test::kDtypes) {
      if (!tf32 && dtype != Dtype::kFloat32) continue;
      for (const BackwardCase& k : cases) {
        cuda::PointwiseBackwardTiles tiles{
            cuda::choose_tile(cuda::Kernel::kPointwiseInputGradient, dtype, k.shape.c, 80),
            cuda::choose_tile(cuda::Kernel::kPointwiseWeightGradient, dtype, k.shape.c, 80),
            cuda::choose_tile(cuda::Kernel::kPointwiseBothGradients, dtype, k.shape.c, 80)};
        const int chosen = tiles.input.index;
        const int compiled = cuda::compiled_tiles(cuda::Kernel::kPointwiseInputGradient, cuda::storage_bits(dtype));
        tiles.input.runs = tiles.weight.runs = tiles.both.runs = 5;  // blocks walk over several tiles of small maps
        tiles.both.least = 1;
        if (tiles.both.index == 1) {
          failures += !check(k, dtype, tf32, tiles, ++checks);
          tiles.both.index = 0;
        }
        for (tiles.input.index = 0; tiles.input.index < compiled; ++tiles.input.index) {
          // the others, which an override may choose, for what is small
          const bool small = k.wanted != kOnlyDw && k.shape.images * k.shape.area < 200;
          if (tiles.input.index == chosen || small) failures += !check(k, dtype, tf32, tiles, ++checks);
        }
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
