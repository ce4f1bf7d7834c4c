#include "depthwise.h"

#include "combine.h"
#include "depthwise.cuh"
#include "depthwise_tiling.h"

namespace mnet::cuda {

template <typename Traits>
static DepthwiseTiling make_tiling(const DepthwiseParams& p, const Tile& tile) {
  DepthwiseTiling tiling = deal_tiles<Traits>(p, tile);
  tiling.vectorized = p.c % Traits::kVec == 0 && aligned(p.x) && aligned(p.y);
  return tiling;
}

// Calls f with the traits of a shape and dtype.
template <typename F>
static auto with_traits(const DepthwiseParams& p, Dtype dtype, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.kernel == 3) return p.stride == 1 ? f(DepthwiseTraits<T, 3, 1>{}) : f(DepthwiseTraits<T, 3, 2>{});
    return p.stride == 1 ? f(DepthwiseTraits<T, 5, 1>{}) : f(DepthwiseTraits<T, 5, 2>{});
  });
}

int64_t depthwise_workspace(const DepthwiseParams& p, Dtype dtype, const Tile& tile) {
  if (p.moments == nullptr) return 0;
  return with_traits(p, dtype, [&](auto traits) { return make_tiling<decltype(traits)>(p, tile).chunks * 3 * p.c; });
}

template <typename Traits>
static cudaError_t launch(const DepthwiseParams& p, const Tile& tile, float* workspace, cudaStream_t stream) {
  const DepthwiseTiling tiling = make_tiling<Traits>(p, tile);
  if (tiling.chunks > 0) {
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.channel_blocks);
    MNET_LAUNCH(depthwise_kernel<Traits>, blocks, Traits::kThreads, stream, p, tiling, workspace);
    if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
  }
  if (p.moments == nullptr) return cudaSuccess;
  return combine_moments(workspace, tiling.chunks, p.c, p.moments, stream);
}

cudaError_t depthwise(const DepthwiseParams& p, Dtype dtype, const Tile& tile, float* workspace, cudaStream_t stream) {
  return with_traits(p, dtype, [&](auto traits) { return launch<decltype(traits)>(p, tile, workspace, stream); });
}

}  // namespace mnet::cuda
