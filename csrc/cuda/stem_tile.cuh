// What the stem's kernels share: tiles of outputs, the pixels they read, and where a tap lies among these.  Compute
// capability 8.0 or higher; free of torch.
//
// The depth of the stem's products is the taps of a neighbourhood, image channel first: 27 of an image with 3 channels,
// taken in slices of 32.  No neighbourhood is ever built: a thread puts the words of its fragments together from the pixels,
// each tap a fixed distance from an output's first pixel.
#pragma once

#include "../common/plant.h"
#include "../common/stem_params.h"
#include "pointwise_operand.cuh"

namespace mnet::cuda {

// A tile: 8 rows of 16 outputs, 2 rows a warp.  The 16 positions of a fragment are a row of the tile.
struct StemTile {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kW = 16;
  static constexpr int kH = 8;
  static constexpr int kWarpRows = kH / kWarps;
  static constexpr int kPositions = kW * kH;
  static constexpr int kNeighbours = kStemKernel * kStemKernel;
  static constexpr int kTaps = 32;  // of a slice
  static constexpr int kMaxSlices = (kNeighbours * kStemMaxChannels + kTaps - 1) / kTaps;
  static constexpr int kLoads = 8;  // pixels a thread has on their way

  static MNET_HD constexpr int in_w(int stride) { return (kW - 1) * stride + kStemKernel; }
  static MNET_HD constexpr int in_h(int stride) { return (kH - 1) * stride + kStemKernel; }
  // Values of the pixels of a tile, [channel][row][column].
  static MNET_HD constexpr int values(int channels, int stride) { return channels * in_h(stride) * in_w(stride); }
};
static_assert(StemTile::kH % StemTile::kWarps == 0, "every warp has as many rows");

// How the outputs are dealt to blocks; a function of the shape alone.
struct StemTiling {
  int32_t tiles_h;
  int32_t tiles_w;
  int64_t tiles;  // n * tiles_h * tiles_w
  int64_t tiles_per_block;
  int64_t chunks;         // runs of tiles_per_block tiles; grid = chunks * blocks of channels [* slices], in one dimension
  int32_t column_blocks;  // of the output's channels
  int32_t slices;
};

// f(image, row, column) for the first output of every tile of a block's chunk.
template <typename F>
MNET_DEVICE void for_tiles(const StemTiling& tiling, int64_t chunk, F&& f) {
  const int64_t first = chunk * tiling.tiles_per_block, last = smaller(first + tiling.tiles_per_block, tiling.tiles);
  const int64_t tiles_per_image = int64_t{tiling.tiles_h} * tiling.tiles_w;
  int64_t image = first / tiles_per_image;
  int tile_h = static_cast<int>(first % tiles_per_image / tiling.tiles_w);
  int tile_w = static_cast<int>(first % tiles_per_image % tiling.tiles_w);
  for (int64_t tile = first; tile < last; ++tile) {
    f(image, tile_h * StemTile::kH, tile_w * StemTile::kW);
    if (++tile_w == tiling.tiles_w) {
      tile_w = 0;
      if (++tile_h == tiling.tiles_h) {
        tile_h = 0;
        ++image;
      }
    }
  }
}

// The pixels of one image from (top, left) on, zero beyond its edges.
template <int kStride, typename T>
MNET_DEVICE void load_pixels(const StemImage& image, const T* from, int top, int left, T* pixels) {
  constexpr int kW = StemTile::in_w(kStride), kH = StemTile::in_h(kStride), kStep = StemTile::kThreads;
  const int count = StemTile::values(image.c, kStride);
  for (int first = threadIdx.x; first < count; first += StemTile::kLoads * kStep) {
    T value[StemTile::kLoads];
    MNET_UNROLL
    for (int u = 0; u < StemTile::kLoads; ++u) {
      const int at = first + u * kStep, c = at / (kH * kW), h = top + at / kW % kH, w = left + at % kW;
      const bool inside = at < count && h >= 0 && h < image.h && w >= 0 && w < image.w;
      value[u] = inside ? from[c * image.stride_c + h * image.stride_h + w * image.stride_w] : from_float<T>(0.f);
    }
    MNET_UNROLL
    for (int u = 0; u < StemTile::kLoads; ++u) {
      if (first + u * kStep < count) pixels[first + u * kStep] = value[u];
    }
  }
}

// Those of the tile whose first output is (row, column).
template <typename T>
MNET_DEVICE void load_tile(const StemImage& image, int64_t n, int row, int column, T* pixels) {
  const T* const from = static_cast<const T*>(image.x) + n * image.stride_n;
  const int top = row * image.stride - MNET_PLANT(40, 1, 0), left = column * image.stride - 1;
  if (image.stride == 2) {
    load_pixels<2>(image, from, top, left, pixels);
  } else {
    load_pixels<1>(image, from, top, left, pixels);
  }
}

// Where the taps of slices [first, first + count) lie, counted from an output's first pixel; -1: there is no such tap.
MNET_DEVICE void place_taps(const StemImage& image, int first, int count, int* taps) {
  const int width = StemTile::in_w(image.stride), height = StemTile::in_h(image.stride);
  for (int k = threadIdx.x; k < count * StemTile::kTaps; k += StemTile::kThreads) {
    const int tap = first * StemTile::kTaps + k, c = tap / StemTile::kNeighbours, place = tap % StemTile::kNeighbours;
    taps[k] = c < image.c ? (c * height + place / kStemKernel) * width + place % kStemKernel : -1;
  }
}

// The word of a fragment: two values of 16 bits, or float32 as tf32.
template <typename T>
MNET_DEVICE uint32_t fragment_word(const T (&values)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return to_tf32(float_bits(values[0]));
  } else {
    return bits_of(values[0]) | bits_of(values[1]) << 16;
  }
}

}  // namespace mnet::cuda
