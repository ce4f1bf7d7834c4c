#include "expand_depthwise.h"

#include "combine.h"
#include "depthwise_tiling.h"
#include "expand_depthwise.cuh"
#include "pointwise_weight.cuh"

namespace mnet::cuda {

// Calls f with the traits of a shape and dtype.
template <typename F>
static auto with_expand(const DepthwiseParams& p, Dtype dtype, bool tf32, F&& f) {
  const auto with_window = [&](auto zero, auto math) {
    using T = decltype(zero);
    constexpr Math kMath = decltype(math)::value;
    if (p.kernel == 3) return p.stride == 1 ? f(ExpandTraits<T, kMath, 3, 1>{}) : f(ExpandTraits<T, kMath, 3, 2>{});
    return p.stride == 1 ? f(ExpandTraits<T, kMath, 5, 1>{}) : f(ExpandTraits<T, kMath, 5, 2>{});
  };
  return with_storage(dtype, [&](auto zero) {
    if constexpr (sizeof(zero) == 4) {
      if (!tf32) return with_window(zero, std::integral_constant<Math, Math::kFma>{});
    }
    return with_window(zero, std::integral_constant<Math, Math::kTensor>{});
  });
}

static int64_t expand_weight_bytes(const ExpandDepthwiseParams& p, Dtype dtype) {
  return packed_weight_bytes(p.expand.weight, p.expand.weight_stride_e, p.expand.weight_stride_c, p.depthwise.c, p.expand.c,
                             dtype);
}

template <typename Traits>
static DepthwiseTiling deal_expanded(const DepthwiseParams& p, const Tile& tile) {
  DepthwiseTiling tiling = deal_tiles<Traits>(p, tile);
  tiling.vectorized = p.c % Traits::kVec == 0 && aligned(p.y);
  return tiling;
}

int64_t expand_depthwise_workspace(const ExpandDepthwiseParams& p, Dtype dtype, const Tile& tile) {
  const int64_t weight = expand_weight_bytes(p, dtype);
  if (p.depthwise.moments == nullptr) return weight;
  return with_expand(p.depthwise, dtype, true, [&](auto traits) {  // float32's two kernels deal tiles alike
    return weight + deal_expanded<decltype(traits)>(p.depthwise, tile).chunks * 3 * p.depthwise.c * int64_t{sizeof(float)};
  });
}

template <typename Traits>
static cudaError_t launch_expand(const ExpandDepthwiseParams& p, Dtype dtype, const Tile& tile, void* workspace,
                                 cudaStream_t stream) {
  using T = typename Traits::T;
  static_assert(Traits::kMaxChannels == kMaxExpandSource, "what the launcher promises");
  const DepthwiseTiling tiling = deal_expanded<Traits>(p.depthwise, tile);
  const int64_t packed = expand_weight_bytes(p, dtype);
  auto* const partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed);
  if (tiling.chunks > 0) {
    Weight weight{};
    cudaError_t error = prepare_weight<T>(p.expand.weight, p.expand.weight_stride_e, p.expand.weight_stride_c, p.depthwise.c,
                                          p.expand.c, packed, workspace, stream, weight);
    if (error != cudaSuccess) return error;
    const bool vectorized = p.expand.c % Traits::kVec == 0 && aligned(p.expand.x);
    const auto kernel = expand_depthwise_kernel<Traits>;
    const int bytes = Traits::dynamic_bytes(Traits::steps(p.expand.c));
    error = allow_shared(kernel, bytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.channel_blocks);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, bytes, stream, p, weight, tiling, vectorized, partials);
    if (error = launch_status(); error != cudaSuccess) return error;
  }
  if (p.depthwise.moments == nullptr) return cudaSuccess;
  return combine_moments(partials, tiling.chunks, p.depthwise.c, p.depthwise.moments, stream);
}

cudaError_t expand_depthwise(const ExpandDepthwiseParams& p, Dtype dtype, const Tile& tile, bool tf32, void* workspace,
                             cudaStream_t stream) {
  if (p.expand.c > kMaxExpandSource) return cudaErrorInvalidValue;
  return with_expand(p.depthwise, dtype, tf32,
                     [&](auto traits) { return launch_expand<decltype(traits)>(p, dtype, tile, workspace, stream); });
}

}  // namespace mnet::cuda
