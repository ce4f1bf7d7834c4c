// The rule of the CUDA kernels' tile table: first fit, overrides first.
#include <cstdio>

#include "../cuda/tiles.h"

using namespace mnet;
using namespace mnet::cuda;

static int failures = 0;

static void expect(const char* what, bool holds) {
  if (holds) return;
  std::printf("%s\n", what);
  ++failures;
}

int main() {
  const auto index = [](int64_t channels, int architecture, Dtype dtype = Dtype::kBFloat16) {
    return choose_tile(Kernel::kPointwise, dtype, channels, architecture).index;
  };
  expect("by columns", index(1, 80) == 0 && index(32, 90) == 0 && index(33, 90) == 1 && index(64, 120) == 1);
  expect("beyond the last bound", index(65, 80) == 2 && index(int64_t{1} << 40, 80) == 2);
  expect("by dtype", index(8, 80, Dtype::kFloat32) == 0 && index(999, 80, Dtype::kFloat32) == 0);
  expect("float16 as bfloat16", index(48, 80, Dtype::kFloat16) == 1);

  tile_overrides() = {{Kernel::kPointwise, 16, 90, 48, {2, 7, 0, 3, 1}, "", nullptr}};
  expect("an override within its bounds", index(8, 90) == 2 && index(48, 100) == 2);
  expect("an override's numbers", choose_tile(Kernel::kPointwise, Dtype::kFloat16, 8, 90).blocks == 7);
  expect("beyond them", index(49, 90) == 1 && index(8, 80) == 0 && index(8, 90, Dtype::kFloat32) == 0);
  expect("of another kernel", choose_tile(Kernel::kGram, Dtype::kFloat16, 8, 90).blocks == 528);
  tile_overrides().push_back({Kernel::kStem, 0, 80, 0, {0, 5, 0, 2, 1}, "", nullptr});
  expect("of the stem alone", choose_tile(Kernel::kStem, Dtype::kFloat32, 32, 80).runs == 2 &&
                                  choose_tile(Kernel::kStemBackward, Dtype::kFloat32, 32, 80).runs == 2048);
  tile_overrides().clear();
  expect("cleared", index(8, 90) == 0);

  TileRow row = kTileTable[0];
  expect("a row of the table", valid(row));
  row.tile.index = 1;
  expect("a tile that is not compiled", !valid(row));
  row = kTileTable[0];
  row.tile.blocks = 0;
  expect("no blocks", !valid(row));
  row = kTileTable[0];
  row.bits = 8;
  expect("no such dtype", !valid(row));
  std::printf("%d failures\n", failures);
  return failures != 0;
}
