// How the tiles of a depthwise convolution are dealt to blocks.
#pragma once

#include "depthwise_tile.cuh"
#include "launch.h"

namespace mnet::cuda {

// Of about target_blocks blocks, with at most max_chunks of them one behind the other; a function of the shape alone.
template <typename Traits>
DepthwiseTiling deal_tiles(const DepthwiseParams& p, int64_t target_blocks, int64_t max_chunks) {
  DepthwiseTiling t{};
  t.tiles_h = static_cast<int32_t>(divide_up(p.out_h, Traits::kTileH));
  t.tiles_w = static_cast<int32_t>(divide_up(p.out_w, Traits::kTileW));
  t.tiles = p.n * t.tiles_h * t.tiles_w;
  t.channel_blocks = static_cast<int32_t>(divide_up(p.c, Traits::kChannels));
  const int64_t wanted = divide_up(target_blocks, t.channel_blocks);
  t.tiles_per_block = divide_up(t.tiles, wanted < max_chunks ? wanted : max_chunks);
  t.chunks = t.tiles == 0 ? 0 : divide_up(t.tiles, t.tiles_per_block);
  return t;
}

}  // namespace mnet::cuda
