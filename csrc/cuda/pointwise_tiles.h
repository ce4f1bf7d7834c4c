// The compiled tiles of the pointwise products, by index (tiles.h says which is taken), and how positions are dealt to blocks.
#pragma once

#include <type_traits>

#include "launch.h"
#include "pointwise_walk.cuh"
#include "tiles.h"

namespace mnet::cuda {

template <typename T>
using NarrowTile = ProductTraits<T, Math::kTensor, 1, 128, 32, 3>;
template <typename T>
using MediumTile = ProductTraits<T, Math::kTensor, 1, 128, 64, 2>;
template <typename T>
using WideTile = ProductTraits<T, Math::kTensor, 1, 64, 128, 2>;
using FloatTile = ProductTraits<float, Math::kTensor, 1, 128, 64, 2>;
using ExactFloatTile = ProductTraits<float, Math::kFma, 1, 128, 64, 2>;

// The input gradient's columns are channels of x.
template <typename T>
using MediumGradientTile = ProductTraits<T, Math::kTensor, 2, 64, 64, 2>;
template <typename T>
using WideGradientTile = ProductTraits<T, Math::kTensor, 2, 64, 128, 2>;
using ExactFloatGradientTile = ProductTraits<float, Math::kFma, 2, 64, 64, 2>;

// Calls f with the traits of a product's tile.
template <typename F>
auto with_product(Dtype dtype, bool tf32, const Tile& tile, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      return tf32 ? f(FloatTile{}) : f(ExactFloatTile{});
    } else {
      static_assert(compiled_tiles(Kernel::kPointwise, 16) == 3, "the cases below");
      if (tile.index == 0) return f(NarrowTile<T>{});
      return tile.index == 1 ? f(MediumTile<T>{}) : f(WideTile<T>{});
    }
  });
}

// Calls f with the traits of an input gradient's tile.
template <typename F>
auto with_gradient(Dtype dtype, bool tf32, const Tile& tile, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      return tf32 ? f(MediumGradientTile<float>{}) : f(ExactFloatGradientTile{});
    } else {
      static_assert(compiled_tiles(Kernel::kPointwiseInputGradient, 16) == 2, "the cases below");
      return tile.index == 0 ? f(MediumGradientTile<T>{}) : f(WideGradientTile<T>{});
    }
  });
}

// The blocks of `spans` spans of `span` positions; a function of the shape and the tile alone.
template <typename Traits>
RowTiling deal_rows(int64_t spans, int64_t span, int columns, const Tile& tile, int64_t longest = kLongestRun) {
  RowTiling t{};
  t.span = span;
  t.column_blocks = static_cast<int32_t>(divide_up(columns, Traits::kColumns));
  const int64_t tiles = divide_up(span, Traits::kRows), wanted = divide_up(tile.blocks, t.column_blocks);
  const int64_t runs = spans == 0 ? 1 : divide_up(smaller(wanted, tile.runs), spans);
  const int64_t tiles_per_run = smaller(larger(divide_up(tiles, runs), tile.least), longest / Traits::kRows);
  t.run = tiles_per_run * Traits::kRows;
  t.runs_per_span = tiles == 0 ? 0 : divide_up(tiles, tiles_per_run);
  t.chunks = spans * t.runs_per_span;
  return t;
}

}  // namespace mnet::cuda
