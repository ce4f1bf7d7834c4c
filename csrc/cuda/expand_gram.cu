#include "expand_gram.h"

#include "expand_gram_tiling.h"

namespace mnet::cuda {

int64_t gram_workspace(const GramParams& p, Dtype dtype, const Tile& tile) {
  return with_storage(dtype, [&](auto zero) {
    const GramTiling t = deal_positions<decltype(zero)>(p, tile);
    return t.chunks * t.pitch * (int64_t{sizeof(double)} + t.pitch * int64_t{sizeof(float)});
  });
}

cudaError_t combine_gram(const GramParams& p, Dtype dtype, const GramTiling& t, const GramPartials& partials,
                         cudaStream_t stream) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto blocks = static_cast<unsigned>(divide_up(int64_t{p.c} * p.c, GramTableTraits::kLanes));
    MNET_LAUNCH(gram_table_kernel<T>, blocks, GramTableTraits::kThreads, stream, p, t, partials.means, partials.products);
    return launch_status();
  });
}

cudaError_t gram(const GramParams& p, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream) {
  if (p.c > kMaxGramChannels) return cudaErrorInvalidValue;
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    const GramTiling t = deal_positions<T>(p, tile);
    const GramPartials to(workspace, t);
    if (t.chunks > 0) {
      const auto blocks = static_cast<unsigned>(t.chunks);
      MNET_LAUNCH(gram_kernel<T>, blocks, GramTraits::kThreads, stream, p, t, to.means, to.products);
      if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
    }
    return combine_gram(p, dtype, t, to, stream);
  });
}

}  // namespace mnet::cuda
