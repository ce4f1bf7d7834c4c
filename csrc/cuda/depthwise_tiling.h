// How the tiles of a depthwise convolution are dealt to blocks.
#pragma once

#include "depthwise_tile.cuh"
#include "launch.h"
#include "tiles.h"

namespace mnet::cuda {

// A function of the shape and the tile alone.
template <typename Traits>
DepthwiseTiling deal_tiles(const DepthwiseParams& p, const Tile& tile) {
  DepthwiseTiling t{};
  t.tiles_h = static_cast<int32_t>(divide_up(p.out_h, Traits::kTileH));
  t.tiles_w = static_cast<int32_t>(divide_up(p.out_w, Traits::kTileW));
  t.tiles = p.n * t.tiles_h * t.tiles_w;
  t.channel_blocks = static_cast<int32_t>(divide_up(p.c, Traits::kChannels));
  const int64_t wanted = smaller(divide_up(tile.blocks, t.channel_blocks), tile.runs);
  t.tiles_per_block = larger(divide_up(t.tiles, wanted), tile.least);
  t.chunks = t.tiles == 0 ? 0 : divide_up(t.tiles, t.tiles_per_block);
  return t;
}

}  // namespace mnet::cuda
