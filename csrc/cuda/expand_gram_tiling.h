// How the positions that gram is gathered over are dealt to blocks, and the second level of its reduction.
#pragma once

#include "expand_gram.cuh"
#include "launch.h"

namespace mnet::cuda {

// A function of the shape and the tile alone.
template <typename T>
GramTiling deal_positions(const GramParams& p, const Tile& tile) {
  GramTiling t{};
  t.packs = static_cast<int32_t>(divide_up(p.c, Pack<T>::kSize));
  t.row_step = GramTraits::kThreads / t.packs;
  t.rows = t.row_step * GramTraits::kLoads;
  const auto blocks = static_cast<int32_t>(divide_up(p.c, GramTraits::kBlock));
  t.pitch = blocks * GramTraits::kBlock;
  t.triangle = blocks * (blocks + 1) / 2;
  t.groups = GramTraits::kThreads / t.triangle;
  const int64_t tiles = divide_up(p.positions, t.rows);
  const int64_t per_chunk = divide_up(tiles, tile.blocks);
  t.run = larger(per_chunk, tile.least) * t.rows;
  t.chunks = divide_up(p.positions, t.run);
  t.vectorized = p.c % Pack<T>::kSize == 0 && aligned(p.x);
  return t;
}

// The blocks' partial results, in gram_workspace's bytes.
struct GramPartials {
  double* means;
  float* products;

  GramPartials(void* workspace, const GramTiling& t)
      : means(static_cast<double*>(workspace)), products(reinterpret_cast<float*>(means + t.chunks * t.pitch)) {}
};

// p.gram from the partials (expand_gram.cu).
cudaError_t combine_gram(const GramParams& p, Dtype dtype, const GramTiling& t, const GramPartials& partials,
                         cudaStream_t stream);

}  // namespace mnet::cuda
