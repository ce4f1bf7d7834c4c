// The CUDA pointwise kernels, run on the CPU (cuda_host.h) under every schedule, against sums in double.
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"
#include "../cuda/pointwise.cu"  // the launcher itself, its launches replaced
#include "pointwise_reference.h"

using namespace mnet;

// Bytes of 16-byte alignment, as torch allocates them; exactly as many as asked for.
static std::unique_ptr<char[]> allocate(int64_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

static bool check(const test::PointwiseCase& shape, Dtype dtype, bool tf32, const cuda::Tile& tile, uint64_t seed) {
  test::PointwiseProblem problem(shape, dtype, seed);
  const PointwiseParams p = problem.forward();
  const bool curved = p.act >= Activation::kHardswish;  // its own multiply-adds may be fused there and not here
  const test::PointwiseSlack slack{curved ? 1.0 : 0.0, tf32 && dtype == Dtype::kFloat32 ? 0x1p-11 : 0.0};
  std::vector<double> first_y;
  std::vector<float> first_moments;
  const bool small = problem.positions * shape.c * shape.e < 200000;
  for (const host::Schedule schedule : host::kSchedules) {
    if (!small && schedule != host::Schedule::kForward && schedule != host::Schedule::kRandomWarps) continue;
    host::schedule = schedule;
    const auto workspace = allocate(cuda::pointwise_workspace(p, dtype, tile));
    for (int64_t i = 0; i < problem.positions * shape.e; ++i) problem.y.set(i, std::nan(""));
    if (cuda::pointwise(p, dtype, tile, tf32, workspace.get(), nullptr) != cudaSuccess) return false;
    std::vector<double> y;
    for (int64_t i = 0; i < problem.positions * shape.e; ++i) y.push_back(problem.y.get(i));
    if (schedule == host::Schedule::kForward) {
      if (!problem.check_forward(tf32 ? "tensor cores" : "multiply-adds", slack)) return false;
      first_y = y;
      first_moments = problem.moments;
    } else if (y != first_y || problem.moments != first_moments) {
      std::printf("%s c%d e%d: the result depends on the order of the threads\n", test::name(dtype), shape.c, shape.e);
      return false;
    }
  }
  return true;
}

int main() try {
  std::vector<test::PointwiseCase> cases = {
      {1, 150, 40, 24, 2, false, false},  // the narrow tile, two rows of tiles, a tail of depth
      {2, 65, 72, 40, 2, false, false},   // the medium one, two steps; and the wide one
      {2, 65, 72, 136, 2, false, false},
      {7, 19, 136, 16, 3, true, false},   // images within a tile; three steps
      {3, 1, 8, 8, 1, true, false},
      {2, 20, 16, 8, 4, true, false},
      {2, 70, 24, 72, -1, false, false},  // copied as it is
      {1, 33, 13, 21, 2, true, false},    // channels that are no multiple of 16 bytes
      {1, 33, 13, 21, -1, false, false},
      {0, 4, 16, 8, 2, false, false},
      {1, 1100, 8, 9, 2, false, false},   // more tiles in a run than slots
      {1, 1, 1, 1, 0, false, false},
      {1, 60, 16, 8, -1, false, false, 100.0},
  };
  test::PointwiseCase unaligned{1, 40, 16, 16, 2, true, false}, transposed{1, 40, 16, 40, 2, false, false};
  test::PointwiseCase constant{1, 300, 16, 24, -1, false, false};
  unaligned.skew = 1;
  transposed.weight_transposed = true;
  constant.constant = true;
  cases.push_back(unaligned);
  cases.push_back(transposed);
  cases.push_back(constant);
  int failures = 0, checks = 0;
  for (const bool tf32 : {true, false}) {
    for (const Dtype dtype : test::kDtypes) {
      if (!tf32 && dtype != Dtype::kFloat32) continue;
      for (const auto& shape : cases) {
        cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kPointwise, dtype, shape.e, 80);
        const int chosen = tile.index, tiles = cuda::compiled_tiles(cuda::Kernel::kPointwise, cuda::storage_bits(dtype));
        tile.runs = 2;  // blocks walk over several tiles of small maps
        for (tile.index = 0; tile.index < tiles; ++tile.index) {
          // the others, which an override may choose, for what is small
          if (tile.index == chosen || shape.images * shape.area < 200) failures += !check(shape, dtype, tf32, tile, ++checks);
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
