// Tiles of the matrix products in shared memory, and their multiplication by one block.  Free of torch.
#pragma once

#include "../common/plant.h"
#include "mma.cuh"

namespace mnet::cuda {

// How two tiles are multiplied: on the tensor cores (float32 rounded to tf32), or by float32 multiply-adds.
enum class Math { kTensor, kFma };

// Depth is what a product sums over.  A step of a product has 128 bytes of it: one line of cache of a channels_last map.
constexpr int kDepthBytes = 128;

MNET_DEVICE uint32_t float_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of kChunks.  The chunks of a row are permuted such that
// eight rows of one column, which ldmatrix reads, and eight columns of one row lie in different banks.
template <int kChunks>
MNET_DEVICE int chunk_at(int row, int chunk) {
  static_assert(kChunks >= 2 && (kChunks & (kChunks - 1)) == 0, "a power of two");
  constexpr int kSpread = kChunks < 8 ? kChunks : 8, kRowsPerLine = 8 / kSpread;
  return row * kChunks + (chunk ^ row / kRowsPerLine % kSpread);
}

// chunk_at(row, chunk + more) from chunk_at(row, chunk), where the two have no bit in common.
MNET_DEVICE int chunk_after(int at, int more) { return at ^ more; }

// A tile of an operand: rows of kChunks x 16 bytes as they lie in global memory.  kDepthRows: its rows are the depth and its
// columns the product's rows (columns); otherwise the other way round.
template <typename T_, int kRows_, int kChunks_, bool kDepthRows_>
struct TileOf {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kChunks = kChunks_;
  static constexpr bool kDepthRows = kDepthRows_;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kPacks = kRows_ * kChunks_;
};

// One 32-bit value at `index` of the product's rows or columns and `depth`; float32 tiles.
template <typename Tile>
MNET_DEVICE float value_at(const Pack<float>* tile, int index, int depth) {
  const int row = Tile::kDepthRows ? depth : index, column = Tile::kDepthRows ? index : depth;
  return tile[chunk_at<Tile::kChunks>(row, column / 4)].lane[column % 4];
}

// The left fragment of 16 rows from `row`, 32 bytes of depth from 32 * step.
template <typename Tile>
MNET_DEVICE void load_left(const Pack<typename Tile::T>* tile, int row, int step, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (!Tile::kDepthRows) {
    ldmatrix_x4<false>(a, tile + chunk_after(chunk_at<Tile::kChunks>(row + lane % 16, lane / 16), step * 2));
  } else if constexpr (sizeof(typename Tile::T) == 2) {
    const int depth = step * 16 + lane % 8 + lane / 16 * 8;
    ldmatrix_x4<true>(a, tile + chunk_at<Tile::kChunks>(depth, row / 8 + lane / 8 % 2));
  } else {
    MNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      a[i] = float_bits(value_at<Tile>(tile, row + lane / 4 + i % 2 * 8, step * 8 + lane % 4 + i / 2 * 4));
    }
  }
  if constexpr (sizeof(typename Tile::T) == 4) {
    MNET_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(a[i]);
  }
}

// The right fragments of 16 columns from `column`: b[0..1] of the first eight, b[2..3] of the others.
template <typename Tile>
MNET_DEVICE void load_right(const Pack<typename Tile::T>* tile, int column, int step, uint32_t (&b)[4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (!Tile::kDepthRows) {
    const int at = chunk_at<Tile::kChunks>(column + lane % 8 + lane / 16 * 8, MNET_PLANT(20, lane / 8 % 2, lane / 16));
    ldmatrix_x4<false>(b, tile + chunk_after(at, step * 2));
  } else if constexpr (sizeof(typename Tile::T) == 2) {
    ldmatrix_x4<true>(b, tile + chunk_at<Tile::kChunks>(step * 16 + lane % 16, column / 8 + lane / 16));
  } else {
    MNET_UNROLL
    for (int i = 0; i < 4; ++i) {
      b[i] = float_bits(value_at<Tile>(tile, column + lane / 4 + i / 2 * 8, step * 8 + lane % 4 + i % 2 * 4));
    }
  }
  if constexpr (sizeof(typename Tile::T) == 4) {
    MNET_UNROLL
    for (int i = 0; i < 4; ++i) b[i] = to_tf32(b[i]);
  }
}

// Four values along the depth, from 4 * chunk on.
template <typename Tile>
MNET_DEVICE void load_line(const Pack<float>* tile, int index, int chunk, float (&v)[4]) {
  if constexpr (Tile::kDepthRows) {
    MNET_UNROLL
    for (int k = 0; k < 4; ++k) v[k] = value_at<Tile>(tile, index, chunk * 4 + k);
  } else {
    const Pack<float> line = tile[chunk_at<Tile::kChunks>(index, chunk)];
    MNET_UNROLL
    for (int k = 0; k < 4; ++k) v[k] = line.lane[k];
  }
}

// A warp's part of a product: rows of 16 by columns of 8, in the layout of c of mma.cuh.
template <int kTilesM, int kTilesN>
struct Accumulators {
  float c[kTilesM][kTilesN][4];
  MNET_DEVICE void clear() {
    MNET_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      MNET_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        MNET_UNROLL
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0.f;
      }
    }
  }
  // Adds another's sums to these and clears it: a tensor core truncates as it accumulates, so that its runs are kept short.
  MNET_DEVICE void take(Accumulators& run) {
    MNET_UNROLL
    for (int m = 0; m < kTilesM; ++m) {
      MNET_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        MNET_UNROLL
        for (int i = 0; i < 4; ++i) c[m][n][i] += run.c[m][n][i];
      }
    }
    run.clear();
  }
};

// acc += left right, of the warp whose part begins at `row` and `column`; of the 128 bytes of depth the first `steps` 32,
// or all.
template <Math kMath, typename Left, typename Right, int kTilesM, int kTilesN>
MNET_DEVICE void multiply(const Pack<typename Left::T>* left, const Pack<typename Right::T>* right, int row, int column,
                          int steps, Accumulators<kTilesM, kTilesN>& acc) {
  using T = typename Left::T;
  static_assert(kTilesN % 2 == 0, "right fragments come in pairs");
  if constexpr (kMath == Math::kTensor) {
    MNET_UNROLL
    for (int step = 0; step < kDepthBytes / 32; ++step) {
      if (step >= steps) break;
      uint32_t a[kTilesM][4];
      MNET_UNROLL
      for (int m = 0; m < kTilesM; ++m) load_left<Left>(left, row + m * 16, step, a[m]);
      MNET_UNROLL
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t b[4];
        load_right<Right>(right, column + n * 8, step, b);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        MNET_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
          mma<T>(acc.c[m][n], a[m], first);
          mma<T>(acc.c[m][n + 1], a[m], second);
        }
      }
    }
  } else {
    static_assert(sizeof(T) == 4, "float32");
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    MNET_UNROLL_BY(1)
    for (int chunk = 0; chunk < (steps < 4 ? steps * 2 : 8); ++chunk) {
      float a[kTilesM][2][4];
      MNET_UNROLL
      for (int m = 0; m < kTilesM; ++m) {
        load_line<Left>(left, row + m * 16 + g, chunk, a[m][0]);
        load_line<Left>(left, row + m * 16 + g + 8, chunk, a[m][1]);
      }
      MNET_UNROLL
      for (int n = 0; n < kTilesN; ++n) {
        float b[2][4];
        load_line<Right>(right, column + n * 8 + 2 * t, chunk, b[0]);
        load_line<Right>(right, column + n * 8 + 2 * t + 1, chunk, b[1]);
        MNET_UNROLL
        for (int m = 0; m < kTilesM; ++m) {
          MNET_UNROLL
          for (int i = 0; i < 4; ++i) {
            MNET_UNROLL
            for (int k = 0; k < 4; ++k) acc.c[m][n][i] = fmaf(a[m][i / 2][k], b[i % 2][k], acc.c[m][n][i]);
          }
        }
      }
    }
  }
}

}  // namespace mnet::cuda
