#include "pointwise.h"

#include "combine.h"
#include "pointwise.cuh"
#include "pointwise_tiles.h"
#include "pointwise_weight.cuh"

namespace mnet::cuda {

static int64_t weight_bytes(const PointwiseParams& p, Dtype dtype) {
  return packed_weight_bytes(p.weight, p.weight_stride_e, p.weight_stride_c, p.e, p.c, dtype);
}

template <typename Traits>
static RowTiling make_tiling(const PointwiseParams& p, const Tile& tile) {
  return deal_rows<Traits>(1, p.positions(), p.e, tile);
}

int64_t pointwise_workspace(const PointwiseParams& p, Dtype dtype, const Tile& tile) {
  // float32's two tiles deal positions alike.
  const int64_t chunks =
      with_product(dtype, true, tile, [&](auto traits) { return make_tiling<decltype(traits)>(p, tile).chunks; });
  return weight_bytes(p, dtype) + (p.moments == nullptr ? 0 : chunks * 3 * p.e * static_cast<int64_t>(sizeof(float)));
}

template <typename Traits>
static cudaError_t launch(const PointwiseParams& p, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream) {
  using T = typename Traits::T;
  const RowTiling tiling = make_tiling<Traits>(p, tile);
  const int64_t packed = weight_bytes(p, dtype);
  auto* const partials = reinterpret_cast<float*>(static_cast<char*>(workspace) + packed);
  if (tiling.chunks > 0) {
    Weight weight{};
    cudaError_t error = prepare_weight<T>(p.weight, p.weight_stride_e, p.weight_stride_c, p.e, p.c, packed, workspace, stream,
                                          weight);
    if (error != cudaSuccess) return error;
    const bool tables = (p.bn == nullptr || aligned(p.bn)) && (p.gate == nullptr || aligned(p.gate));
    const ActivatedSource source{p.x, p.bn, p.gate, Images(p.image_positions), p.c, p.act,
                                 p.c % Traits::kVec == 0 && aligned(p.x) && tables};
    const bool vectorized = p.e % Traits::kVec == 0 && aligned(p.y);
    const auto kernel = pointwise_kernel<Traits>;
    error = allow_shared(kernel, Traits::kRingBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kRingBytes, stream, p, source, weight, tiling, vectorized,
                        partials);
    if (error = launch_status(); error != cudaSuccess) return error;
  }
  if (p.moments == nullptr) return cudaSuccess;
  return combine_moments(partials, tiling.chunks, p.e, p.moments, stream);
}

cudaError_t pointwise(const PointwiseParams& p, Dtype dtype, const Tile& tile, bool tf32, void* workspace,
                      cudaStream_t stream) {
  return with_product(dtype, tf32, tile,
                      [&](auto traits) { return launch<decltype(traits)>(p, dtype, tile, workspace, stream); });
}

}  // namespace mnet::cuda
