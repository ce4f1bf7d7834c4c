#include "normalize.h"

#include "combine.h"
#include "launch.h"
#include "normalize.cuh"

namespace mnet::cuda {

template <typename T>
static NormalizeTiling deal_channels(const NormalizeParams& p) {
  using Traits = NormalizeTraits<T>;
  NormalizeTiling t{};
  const int64_t packs = divide_up(p.c, Traits::kVec), blocks = divide_up(packs, Traits::kMaxPacks);
  // Several blocks are equal, and whole cache lines.
  t.packs = static_cast<int32_t>(blocks == 1 ? packs : divide_up(divide_up(packs, blocks), 8) * 8);
  t.lanes = Traits::kThreads / t.packs;
  t.channel_blocks = static_cast<int32_t>(divide_up(packs, t.packs));
  t.vectorized = p.c % Traits::kVec == 0 && aligned(p.y) && aligned(p.operand) && aligned(p.output);
  return t;
}

static void deal_positions(NormalizeTiling& t, int64_t segments, int64_t segment, int64_t wanted, int64_t least) {
  t.segments = segments;
  t.segment = segment;
  t.part = divide_up(segment, wanted) > least ? divide_up(segment, wanted) : least;
  t.parts = divide_up(segment, t.part);
}

template <typename T>
static NormalizeTiling tile_normalize(const NormalizeParams& p, const Tile& tile) {
  NormalizeTiling t = deal_channels<T>(p);
  const int64_t least = tile.least * NormalizeTraits<T>::kInFlight * t.lanes;
  deal_positions(t, 1, p.n * p.area, divide_up(tile.blocks, t.channel_blocks), least);
  return t;
}

template <typename T>
static NormalizeTiling tile_sums(const NormalizeParams& p, const Tile& tile, bool by_image) {
  NormalizeTiling t = deal_channels<T>(p);
  const int64_t least = tile.least * NormalizeTraits<T>::kInFlight * t.lanes, segments = by_image ? p.n : 1;
  const int64_t blocks = segments * t.channel_blocks;
  const int64_t enough = tile.enough == 0 ? tile.blocks : tile.enough;  // below, an image is split
  const int64_t wanted = blocks >= enough || blocks == 0 ? 1 : divide_up(tile.blocks, blocks);
  deal_positions(t, segments, by_image ? p.area : p.n * p.area, wanted, least);
  return t;
}

static int64_t partial_floats(const NormalizeTiling& t, const NormalizeParams& p, int tables) {
  return t.segments * t.parts * tables * p.c;
}

int64_t normalize_backward_workspace(const NormalizeParams& p, Dtype dtype, const Tile& tile) {
  return with_storage(dtype, [&](auto zero) {
    return partial_floats(tile_sums<decltype(zero)>(p, tile, false), p, BackwardTerms::kTables);
  });
}

int64_t squeeze_workspace(const NormalizeParams& p, Dtype dtype, const Tile& tile) {
  return with_storage(dtype, [&](auto zero) {
    const NormalizeTiling t = tile_sums<decltype(zero)>(p, tile, true);
    return t.parts > 1 ? partial_floats(t, p, SqueezeTerms::kTables) : 0;
  });
}

static unsigned grid(const NormalizeTiling& t) { return static_cast<unsigned>(t.segments * t.parts * t.channel_blocks); }

cudaError_t normalize(const NormalizeParams& p, Dtype dtype, const Tile& tile, cudaStream_t stream) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    const NormalizeTiling tiling = tile_normalize<T>(p, tile);
    if (grid(tiling) == 0) return cudaSuccess;
    const auto kernel = p.operand == nullptr ? normalize_kernel<T, false> : normalize_kernel<T, true>;
    MNET_LAUNCH(kernel, grid(tiling), NormalizeTraits<T>::kThreads, stream, p, tiling);
    return launch_status();
  });
}

// Sums into `table` [rows, segments, c], by way of the workspace where a segment has several parts, or none.
template <typename T, typename Terms>
static cudaError_t sum(const NormalizeParams& p, const Tile& tile, bool by_image, float* workspace, cudaStream_t stream) {
  const NormalizeTiling tiling = tile_sums<T>(p, tile, by_image);
  const int64_t c = p.c, table = Terms::kTables * c, whole = tiling.segments * c;
  const bool direct = tiling.parts == 1;
  NormalizeSums to{workspace, tiling.parts * table, table, c, by_image ? static_cast<float>(p.area) : 1.f};
  if (direct) to = {p.table, c, 0, whole, to.divisor};
  if (grid(tiling) > 0) {
    const auto kernel = normalize_sums_kernel<T, Terms>;
    MNET_LAUNCH(kernel, grid(tiling), NormalizeTraits<T>::kThreads, stream, p, tiling, to);
    if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
  }
  if (direct) return cudaSuccess;
  return combine_sums({workspace, tiling.segments, tiling.parts, table, Terms::kTables, p.c, p.table, c, whole, 1}, stream);
}

cudaError_t normalize_backward(const NormalizeParams& p, Dtype dtype, const Tile& tile, float* workspace,
                               cudaStream_t stream) {
  return with_storage(dtype, [&](auto zero) { return sum<decltype(zero), BackwardTerms>(p, tile, false, workspace, stream); });
}

cudaError_t squeeze(const NormalizeParams& p, Dtype dtype, const Tile& tile, float* workspace,
                               cudaStream_t stream) {
  return with_storage(dtype, [&](auto zero) { return sum<decltype(zero), SqueezeTerms>(p, tile, true, workspace, stream); });
}

}  // namespace mnet::cuda
