// The one table of how the CUDA kernels' work is cut: which of a kernel's tiles, how many blocks, how many partial results.
// Plain C++, free of CUDA and torch: the Python module prints it and overrides it in every build.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/params.h"

namespace mnet::cuda {

enum class Kernel {
  kDepthwise,
  kDepthwiseBackward,
  kNormalize,
  kNormalizeSums,  // of normalize_backward and squeeze
  kPointwise,
  kPointwiseInputGradient,
  kPointwiseWeightGradient,
  kPointwiseBothGradients,  // index 0: by the two kernels above, 1: by one, where it can
  kGram,  // and of normalize_gram
  kExpandDepthwise,
  kStem,
  kStemBackward,
};
constexpr int kKernels = 12;

constexpr const char* kKernelNames[kKernels] = {
    "depthwise",
    "depthwise_backward",
    "normalize",
    "normalize_sums",
    "pointwise",
    "pointwise_input_gradient",
    "pointwise_weight_gradient",
    "pointwise_both_gradients",
    "gram",
    "expand_depthwise",
    "stem",
    "stem_backward",
};

// How many tiles of a kernel are compiled for a storage dtype of so many bits: `Tile::index` counts them.
constexpr int compiled_tiles(Kernel kernel, int bits) {
  if (bits != 16) return 1;
  switch (kernel) {
    case Kernel::kPointwise:
      return 3;
    case Kernel::kPointwiseInputGradient:
    case Kernel::kPointwiseBothGradients:
      return 2;
    default:
      return 1;
  }
}

// How a call's work is cut.  The launchers make a grid of it by the shape alone: two cards with the same row of the table
// compute the same.
struct Tile {
  int index;       // of the kernel's compiled tiles
  int64_t blocks;  // aimed at, over all positions and channels
  int64_t enough;  // blocks that do for a card: a small call is cut into so many, whatever `least` says; 0: not asked
  int64_t runs;    // most partial results of one channel, for each is written and read again; 0: as many as blocks
  int64_t least;   // steps of a block (tiles, slots or rounds): fewer are not worth its tables and partial results
};

// Where a row was measured.
struct Timing {
  const char* card;
  const char* commit;
  const char* date;
  double microseconds;
};

struct TileRow {
  Kernel kernel;
  int bits;          // of the storage dtype; 0: any
  int architecture;  // from this one on, 10 x compute capability
  int channels;      // up to so many of the result; 0: any
  Tile tile;
  const char* reason;
  const Timing* measured;  // nullptr: an ESTIMATE from counted bytes and occupancy
};

// Counted for the pointwise rows, for 128 positions and 16-bit storage, per step of 64 channels: the operand 16 KiB (once more
// for every block of columns, from the second level of cache), the weight columns x 128 B, 256 x columns x 64 operations.
// First fit, so the narrower rows of a kernel come first.  The last row of a kernel takes what is left.
constexpr TileRow kTileTable[] = {
    {Kernel::kDepthwise, 0, 80, 0, {0, 8192, 0, 2048, 1}, "several waves of any card; few moments to combine", nullptr},
    {Kernel::kDepthwiseBackward, 0, 80, 0, {0, 2112, 264, 0, 8}, "16 blocks for each of 132 SMs; of a small call two", nullptr},
    {Kernel::kNormalize, 0, 80, 0, {0, 8192, 0, 0, 2}, "a block's tables are little beside what it reads", nullptr},
    {Kernel::kNormalizeSums, 0, 80, 0, {0, 1056, 256, 0, 4}, "8 blocks for each of 132 SMs; few sums to combine", nullptr},
    {Kernel::kPointwise, 16, 80, 32, {0, 4096, 0, 2048, 1},
     "128 x 32, ring 60 KiB: multiplies little, so a third slot keeps copies further ahead", nullptr},
    {Kernel::kPointwise, 16, 80, 64, {1, 4096, 0, 2048, 1},
     "128 x 64, ring 48 KiB, two blocks an SM, 24 KiB under way in each; 3 TB/s x 600 ns want 14 KiB an SM", nullptr},
    {Kernel::kPointwise, 16, 80, 0, {2, 4096, 0, 2048, 1},
     "64 x 128, ring 48 KiB: the operand and its activation once for 128 columns, in registers of two blocks an SM", nullptr},
    {Kernel::kPointwise, 32, 80, 0, {0, 4096, 0, 2048, 1},
     "128 x 64, ring 48 KiB: half the columns for the same bytes", nullptr},
    {Kernel::kPointwiseInputGradient, 16, 80, 64, {0, 4096, 0, 2048, 1},
     "64 x 64, ring 48 KiB and sums 25 KiB: an operand of two tensors, hence 64 rows", nullptr},
    {Kernel::kPointwiseInputGradient, 16, 80, 0, {1, 4096, 0, 2048, 1},
     "64 x 128, ring 64 KiB and sums 25 KiB: two blocks an SM of 228 KiB, one or two of 164 KiB", nullptr},
    {Kernel::kPointwiseInputGradient, 32, 80, 0, {0, 4096, 0, 2048, 1}, "64 x 64, as of 16 bits up to 64 columns", nullptr},
    {Kernel::kPointwiseWeightGradient, 0, 80, 0, {0, 1056, 0, 2048, 8},
     "4 to 8 blocks for each of 132 SMs: each run writes a gradient in float32, to be read again", nullptr},
    {Kernel::kPointwiseBothGradients, 16, 80, 0, {1, 528, 0, 528, 8},
     "reads grad, y and x once: 2 P E + 2 P C elements where two kernels move 4 P E + 3 P C", nullptr},
    {Kernel::kPointwiseBothGradients, 32, 80, 0, {0, 528, 0, 528, 8}, "two kernels: written for 16 bits alone", nullptr},
    {Kernel::kGram, 0, 80, 0, {0, 528, 0, 0, 4}, "two waves of two blocks on each of 132 SMs; few tables to combine", nullptr},
    {Kernel::kExpandDepthwise, 0, 80, 0, {0, 4096, 0, 2048, 1},
     "several waves; several tiles for each weight a block reads, 8 KiB where a tile of x has 2 to 12", nullptr},
    {Kernel::kStem, 0, 80, 0, {0, 8192, 0, 2048, 1}, "several waves of any card; few moments to combine", nullptr},
    {Kernel::kStemBackward, 0, 80, 0, {0, 1056, 0, 2048, 1},
     "8 blocks for each of 132 SMs, of which each writes a gradient", nullptr},
};

constexpr bool fits(const TileRow& row, Kernel kernel, int bits, int64_t channels, int architecture) {
  return row.kernel == kernel && (row.bits == 0 || row.bits == bits) && architecture >= row.architecture &&
         (row.channels == 0 || channels <= row.channels);
}

constexpr bool valid(const TileRow& row) {
  const Tile& t = row.tile;
  for (const int bits : {16, 32}) {
    if ((row.bits == 0 || row.bits == bits) && (t.index < 0 || t.index >= compiled_tiles(row.kernel, bits))) return false;
  }
  return (row.bits == 0 || row.bits == 16 || row.bits == 32) && row.channels >= 0 && t.blocks > 0 && t.enough >= 0 &&
         t.runs >= 0 && t.least > 0;
}

constexpr bool whole_table() {
  for (const TileRow& row : kTileTable) {
    if (!valid(row)) return false;
  }
  for (int kernel = 0; kernel < kKernels; ++kernel) {
    for (const int bits : {16, 32}) {
      bool found = false;
      for (const TileRow& row : kTileTable) found = found || fits(row, Kernel(kernel), bits, INT64_MAX, 80);
      if (!found) return false;
    }
  }
  return true;
}
static_assert(whole_table(), "every kernel, dtype and number of channels has a row, of a compiled tile");

inline int storage_bits(Dtype dtype) { return dtype == Dtype::kFloat32 ? 32 : 16; }

// Rows that go before the table's, for a benchmark's search: not while another thread calls a kernel.
inline std::vector<TileRow>& tile_overrides() {
  static std::vector<TileRow> rows;
  return rows;
}

// The rule: the first row that fits, overrides first.  `channels` are the columns of the result.
inline Tile choose_tile(Kernel kernel, Dtype dtype, int64_t channels, int architecture) {
  const int bits = storage_bits(dtype);
  for (const TileRow& row : tile_overrides()) {
    if (fits(row, kernel, bits, channels, architecture)) return row.tile;
  }
  for (const TileRow& row : kTileTable) {
    if (fits(row, kernel, bits, channels, architecture)) return row.tile;
  }
  return kTileTable[0].tile;  // not reached from 8.0 on: static_assert above, check_device.h
}

}  // namespace mnet::cuda
