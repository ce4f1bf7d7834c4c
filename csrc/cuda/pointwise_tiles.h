// Which tile a pointwise product takes, and how its positions are dealt to blocks: the one place to tune.
//
// Every row is an ESTIMATE from counted bytes and occupancy; none has been measured on a card yet.  What was counted, for
// 128 rows and 16-bit storage, per step of 64 channels: the operand 16 KiB (once more for every block of columns, from the
// second level of cache), the weight kColumns x 128 B, 256 x kColumns x 64 operations.
//
//   columns up to  tile      ring, KiB  blocks an SM (228 / 164 KiB)   why
//   32             128 x 32  60         2 / 2     a third slot: the tile multiplies little, so copies must be further ahead
//   64             128 x 64  48         2 / 2     24 KiB under way in each block; 3 TB/s x 600 ns want 14 KiB an SM
//   more           64 x 128  48         2 / 2     the operand, and its batch norm and activation, once for 128 columns;
//                                                 128 x 128 would need more registers than two blocks have
//   float32        128 x 64  48         2 / 2     half the columns a tile of 16-bit values has for the same bytes
#pragma once

#include <type_traits>

#include "launch.h"
#include "pointwise_walk.cuh"

namespace mnet::cuda {

constexpr int kNarrowColumns = 32;
constexpr int kMediumColumns = 64;

template <typename T>
using NarrowTile = ProductTraits<T, Math::kTensor, 1, 128, 32, 3>;
template <typename T>
using MediumTile = ProductTraits<T, Math::kTensor, 1, 128, 64, 2>;
template <typename T>
using WideTile = ProductTraits<T, Math::kTensor, 1, 64, 128, 2>;
using FloatTile = ProductTraits<float, Math::kTensor, 1, 128, 64, 2>;
using ExactFloatTile = ProductTraits<float, Math::kFma, 1, 128, 64, 2>;

// The input gradient's columns are channels of x; its operand is made of two tensors, hence 64 rows.  By columns: 64 x 64 up
// to 64 (ring 48 KiB), 64 x 128 beyond (64 KiB); with the sums' 25 KiB an SM of 228 KiB has 2 blocks, one of 164 KiB 2 or 1.
template <typename T>
using MediumGradientTile = ProductTraits<T, Math::kTensor, 2, 64, 64, 2>;
template <typename T>
using WideGradientTile = ProductTraits<T, Math::kTensor, 2, 64, 128, 2>;
using ExactFloatGradientTile = ProductTraits<float, Math::kFma, 2, 64, 64, 2>;

// Enough blocks to fill any card several times over, and few enough partial sums to combine quickly.
constexpr int64_t kTargetBlocks = 4096;
#if !defined(MNET_POINTWISE_MAX_RUNS)  // the tests' blocks walk over several tiles of small maps
#define MNET_POINTWISE_MAX_RUNS 2048
#endif
constexpr int64_t kMaxRuns = MNET_POINTWISE_MAX_RUNS;

// The weight gradient's blocks: few, for each run writes a whole gradient in float32 to be read again, and each of at least
// a few slots, for the same reason.  4 to 8 blocks for each of 132 SMs.
constexpr int64_t kTargetWeightBlocks = 1056;
constexpr int64_t kFewestWeightSlots = 8;

// Calls f with the traits of a product of `columns` columns.
template <typename F>
auto with_product(Dtype dtype, bool tf32, int columns, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      return tf32 ? f(FloatTile{}) : f(ExactFloatTile{});
    } else {
      if (columns <= kNarrowColumns) return f(NarrowTile<T>{});
      return columns <= kMediumColumns ? f(MediumTile<T>{}) : f(WideTile<T>{});
    }
  });
}

// Calls f with the traits of an input gradient of `columns` columns.
template <typename F>
auto with_gradient(Dtype dtype, bool tf32, int columns, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      return tf32 ? f(MediumGradientTile<float>{}) : f(ExactFloatGradientTile{});
    } else {
      return columns <= kMediumColumns ? f(MediumGradientTile<T>{}) : f(WideGradientTile<T>{});
    }
  });
}

// The blocks of `spans` spans of `span` positions; a function of the shape alone.
template <typename Traits>
RowTiling deal_rows(int64_t spans, int64_t span, int columns) {
  RowTiling t{};
  t.span = span;
  t.column_blocks = static_cast<int32_t>(divide_up(columns, Traits::kColumns));
  const int64_t tiles = divide_up(span, Traits::kRows), wanted = divide_up(kTargetBlocks, t.column_blocks);
  const int64_t runs = spans == 0 ? 1 : divide_up(smaller(wanted, kMaxRuns), spans);
  const int64_t tiles_per_run = smaller(divide_up(tiles, runs), kLongestRun / Traits::kRows);
  t.run = tiles_per_run * Traits::kRows;
  t.runs_per_span = tiles == 0 ? 0 : divide_up(tiles, tiles_per_run);
  t.chunks = spans * t.runs_per_span;
  return t;
}

}  // namespace mnet::cuda
