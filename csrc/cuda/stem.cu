#include "stem.h"

#include "combine.h"
#include "launch.h"
#include "stem.cuh"
#include "stem_backward.cuh"

namespace mnet::cuda {

// A function of the shape and the tile alone.
static StemTiling make_tiling(const StemImage& image, int32_t channels, int columns, const Tile& tile, bool by_slice) {
  StemTiling t{};
  t.tiles_h = static_cast<int32_t>(divide_up(image.out_h, StemTile::kH));
  t.tiles_w = static_cast<int32_t>(divide_up(image.out_w, StemTile::kW));
  t.tiles = image.n * t.tiles_h * t.tiles_w;
  t.column_blocks = static_cast<int32_t>(divide_up(channels, columns));
  t.slices = static_cast<int32_t>(divide_up(StemTile::kNeighbours * image.c, StemTile::kTaps));
  const int64_t wanted = divide_up(tile.blocks, int64_t{t.column_blocks} * (by_slice ? t.slices : 1));
  t.tiles_per_block = larger(divide_up(t.tiles, smaller(wanted, tile.runs)), tile.least);
  t.chunks = t.tiles == 0 ? 0 : divide_up(t.tiles, t.tiles_per_block);
  return t;
}

// Calls f with the traits of a dtype.
template <template <typename, Math> class Traits, typename F>
static cudaError_t with_traits(Dtype dtype, bool tf32, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 4) {
      return tf32 ? f(Traits<T, Math::kTensor>{}) : f(Traits<T, Math::kFma>{});
    } else {
      return f(Traits<T, Math::kTensor>{});
    }
  });
}

static StemTiling forward_tiling(const StemParams& p, const Tile& tile) {
  return make_tiling(p.image, p.e, StemTraits<float, Math::kFma>::kColumns, tile, false);
}

static StemTiling backward_tiling(const StemBackwardParams& p, const Tile& tile) {
  return make_tiling(p.image, p.e, StemBackwardTraits<float, Math::kFma>::kColumns, tile, true);
}

template <typename T>
static int pixel_bytes(const StemImage& image) {
  return StemTile::values(image.c, image.stride) * static_cast<int>(sizeof(T));
}

int64_t stem_workspace(const StemParams& p, const Tile& tile) {
  return p.moments == nullptr ? 0 : forward_tiling(p, tile).chunks * 3 * p.e;
}

int64_t stem_backward_workspace(const StemBackwardParams& p, const Tile& tile) {
  const int64_t chunks = backward_tiling(p, tile).chunks;
  return p.dw == nullptr || chunks == 1 ? 0 : chunks * p.e * StemTile::kNeighbours * p.image.c;
}

template <typename Traits>
static cudaError_t launch(const StemParams& p, const Tile& tile, float* workspace, cudaStream_t stream) {
  const StemTiling tiling = forward_tiling(p, tile);
  if (tiling.chunks > 0) {
    PointwiseParams output{};
    output.y = p.y;
    output.moments = p.moments;
    output.e = p.e;
    const bool vectorized = p.e % Traits::kVec == 0 && aligned(p.y);
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks);
    MNET_LAUNCH_DYNAMIC(stem_kernel<Traits>, blocks, Traits::kThreads, pixel_bytes<typename Traits::T>(p.image), stream, p,
                        output, tiling, vectorized, workspace);
    if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
  }
  if (p.moments == nullptr) return cudaSuccess;
  return combine_moments(workspace, tiling.chunks, p.e, p.moments, stream);
}

template <typename Traits>
static cudaError_t launch(const StemBackwardParams& p, const Tile& tile, float* workspace, cudaStream_t stream) {
  const StemTiling tiling = backward_tiling(p, tile);
  if (tiling.chunks > 0) {
    const bool vectorized = p.e % Traits::kVec == 0 && aligned(p.grad) && aligned(p.y) && (p.dy == nullptr || aligned(p.dy));
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks * tiling.slices);
    MNET_LAUNCH_DYNAMIC(stem_backward_kernel<Traits>, blocks, Traits::kThreads, pixel_bytes<typename Traits::T>(p.image),
                        stream, p, tiling, vectorized, tiling.chunks == 1 ? p.dw : workspace);
    if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
  }
  if (p.dw == nullptr || tiling.chunks == 1) return cudaSuccess;
  const int32_t depth = StemTile::kNeighbours * p.image.c;
  return combine_sums({workspace, 1, tiling.chunks, int64_t{p.e} * depth, p.e, depth, p.dw, 0, depth, 1}, stream);
}

cudaError_t stem(const StemParams& p, Dtype dtype, const Tile& tile, bool tf32, float* workspace, cudaStream_t stream) {
  return with_traits<StemTraits>(dtype, tf32,
                                 [&](auto traits) { return launch<decltype(traits)>(p, tile, workspace, stream); });
}

cudaError_t stem_backward(const StemBackwardParams& p, Dtype dtype, const Tile& tile, bool tf32, float* workspace,
                          cudaStream_t stream) {
  if (p.dw == nullptr && p.dy == nullptr) return cudaSuccess;
  return with_traits<StemBackwardTraits>(dtype, tf32,
                                         [&](auto traits) { return launch<decltype(traits)>(p, tile, workspace, stream); });
}

}  // namespace mnet::cuda
