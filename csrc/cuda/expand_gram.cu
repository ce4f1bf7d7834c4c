#include "expand_gram.h"

#include "expand_gram.cuh"
#include "launch.h"

namespace mnet::cuda {

template <typename T>
static GramTiling deal_positions(const GramParams& p, const Tile& tile) {
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

int64_t gram_workspace(const GramParams& p, Dtype dtype, const Tile& tile) {
  return with_storage(dtype, [&](auto zero) {
    const GramTiling t = deal_positions<decltype(zero)>(p, tile);
    return t.chunks * t.pitch * (int64_t{sizeof(double)} + t.pitch * int64_t{sizeof(float)});
  });
}

cudaError_t gram(const GramParams& p, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream) {
  if (p.c > kMaxGramChannels) return cudaErrorInvalidValue;
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GramTiling t = deal_positions<T>(p, tile);
    auto* const means = static_cast<double*>(workspace);
    auto* const products = reinterpret_cast<float*>(means + t.chunks * t.pitch);
    if (t.chunks > 0) {
      MNET_LAUNCH(gram_kernel<T>, static_cast<unsigned>(t.chunks), GramTraits::kThreads, stream, p, t, means, products);
      if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
    }
    const auto blocks = static_cast<unsigned>(divide_up(int64_t{p.c} * p.c, GramTableTraits::kLanes));
    MNET_LAUNCH(gram_table_kernel<T>, blocks, GramTableTraits::kThreads, stream, p, t, means, products);
    return launch_status();
  });
}

}  // namespace mnet::cuda
