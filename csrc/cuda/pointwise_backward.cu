#include "pointwise_backward.h"

#include "combine.h"
#include "pointwise_backward_input.cuh"
#include "pointwise_backward_weight.cuh"
#include "pointwise_tiles.h"
#include "pointwise_weight.cuh"

namespace mnet::cuda {

// Two kernels, one for each product.  Counted in elements of P positions: grad, y and x are read for gx (x only where it is
// masked) and again for dW, and gx is written, 4 P E + 3 P C.  One kernel for both could do with 2 P E + 2 P C, 36 to 48 %
// less for V2's layers of E C up to 6144, whose gradient fits in the registers of a block; it is not written yet.
// Beyond, blocks of columns read their operand again anyway, from the second level of cache.

// Calls f with the traits of a weight gradient.
template <typename F>
static auto with_weight_gradient(Dtype dtype, bool tf32, F&& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(WeightGradientTraits<__nv_bfloat16, Math::kTensor, 2>{});
    case Dtype::kFloat16:
      return f(WeightGradientTraits<__half, Math::kTensor, 2>{});
    default:
      return tf32 ? f(WeightGradientTraits<float, Math::kTensor, 2>{}) : f(WeightGradientTraits<float, Math::kFma, 2>{});
  }
}

static bool wants_input(const PointwiseBackwardParams& p) { return p.gx != nullptr || p.sums != nullptr; }
static int sums_rows(const PointwiseBackwardParams& p) { return p.gate == nullptr ? 2 : 3; }

// The image table's partials are of one image each.
template <typename Traits>
static RowTiling input_tiling(const PointwiseBackwardParams& p, const Tile& tile) {
  const bool by_image = p.gate != nullptr && p.sums != nullptr;
  return by_image ? deal_rows<Traits>(p.images, p.image_positions, p.c, tile)
                  : deal_rows<Traits>(1, p.positions(), p.c, tile);
}

template <typename Traits>
static WeightTiling weight_tiling(const PointwiseBackwardParams& p, const Tile& tile) {
  WeightTiling t{};
  t.positions = p.positions();
  t.blocks_c = static_cast<int32_t>(divide_up(p.c, Traits::kSize));
  t.blocks_e = static_cast<int32_t>(divide_up(p.e, Traits::kSize));
  const int64_t slots = divide_up(t.positions, Traits::kDepth), blocks = int64_t{t.blocks_c} * t.blocks_e;
  const int64_t runs = smaller(tile.runs, divide_up(tile.blocks, blocks));
  const int64_t longest = kLongestRun / Traits::kDepth, shortest = smaller(slots, tile.least);
  const int64_t wanted = larger(divide_up(slots, runs), shortest);
  const int64_t slots_per_run = smaller(wanted, longest);
  t.run = slots_per_run * Traits::kDepth;
  t.runs = slots == 0 ? 0 : divide_up(slots, slots_per_run);
  return t;
}

// What lies where in the workspace, in bytes.
struct Layout {
  int64_t weight, sums, dw;  // sizes
};

static Layout layout(const PointwiseBackwardParams& p, Dtype dtype, const PointwiseBackwardTiles& tiles) {
  Layout l{};
  if (wants_input(p)) l.weight = packed_weight_bytes(p.weight, p.weight_stride_e, p.weight_stride_c, p.e, p.c, dtype);
  if (p.sums != nullptr) {
    // float32's two tiles deal positions alike.
    const int64_t chunks =
        with_gradient(dtype, true, tiles.input, [&](auto t) { return input_tiling<decltype(t)>(p, tiles.input).chunks; });
    l.sums = divide_up(chunks * sums_rows(p) * p.c, 4) * 16;
  }
  if (p.dw != nullptr) {
    const int64_t runs =
        with_weight_gradient(dtype, true, [&](auto t) { return weight_tiling<decltype(t)>(p, tiles.weight).runs; });
    l.dw = runs == 1 ? 0 : runs * p.e * p.c * static_cast<int64_t>(sizeof(float));
  }
  return l;
}

int64_t pointwise_backward_workspace(const PointwiseBackwardParams& p, Dtype dtype, const PointwiseBackwardTiles& tiles) {
  const Layout l = layout(p, dtype, tiles);
  return l.weight + l.sums + l.dw;
}

static bool tables_aligned(const PointwiseBackwardParams& p) {
  return aligned(p.y_bn) && aligned(p.coef) && (p.bn == nullptr || aligned(p.bn)) &&
         (p.gate == nullptr || aligned(p.gate)) && (p.offset == nullptr || aligned(p.offset));
}

template <typename T>
static UpstreamSource upstream(const PointwiseBackwardParams& p) {
  const bool vectorized =
      p.e % Pack<T>::kSize == 0 && (p.grad == nullptr || aligned(p.grad)) && aligned(p.y) && tables_aligned(p);
  return {p.grad, p.offset, Images(p.image_positions), p.y, p.y_bn, p.coef, p.e, p.y_act, vectorized};
}

template <typename Traits>
static cudaError_t launch_input(const PointwiseBackwardParams& p, const Tile& tile, const Weight& weight, float* partials,
                                cudaStream_t stream) {
  const RowTiling tiling = input_tiling<Traits>(p, tile);
  if (tiling.chunks > 0) {
    const bool vectorized = p.c % Traits::kVec == 0 && (p.gx == nullptr || aligned(p.gx)) && aligned(p.x) &&
                            (p.residual == nullptr || aligned(p.residual));
    const auto kernel = pointwise_input_gradient<Traits>;
    const cudaError_t error = allow_shared(kernel, Traits::kRingBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kRingBytes, stream, p, upstream<typename Traits::T>(p),
                        weight, tiling, vectorized, partials);
    if (const cudaError_t status = launch_status(); status != cudaSuccess) return status;
  }
  if (p.sums == nullptr) return cudaSuccess;
  const int64_t spans = p.gate == nullptr ? 1 : p.images;
  const int rows = sums_rows(p);
  return combine_sums({partials, spans, tiling.runs_per_span, int64_t{rows} * p.c, rows, p.c, p.sums, p.c, spans * p.c, 1},
                      stream);
}

template <typename Traits>
static cudaError_t launch_weight(const PointwiseBackwardParams& p, const Tile& tile, float* partials, cudaStream_t stream) {
  using T = typename Traits::T;
  const WeightTiling tiling = weight_tiling<Traits>(p, tile);
  float* const to = tiling.runs == 1 ? p.dw : partials;
  if (tiling.runs > 0) {
    const ActivatedSource activated{p.x, p.bn, p.gate, Images(p.image_positions), p.c, p.act,
                                    p.c % Traits::kVec == 0 && aligned(p.x) && tables_aligned(p)};
    const auto kernel = pointwise_weight_gradient<Traits>;
    const cudaError_t error = allow_shared(kernel, Traits::kRingBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.runs * tiling.blocks_c * tiling.blocks_e);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kRingBytes, stream, upstream<T>(p), activated, tiling, to);
    if (const cudaError_t status = launch_status(); status != cudaSuccess) return status;
  }
  if (tiling.runs == 1) return cudaSuccess;
  return combine_sums({partials, 1, tiling.runs, int64_t{p.e} * p.c, p.e, p.c, p.dw, 0, p.c, 1}, stream);
}

cudaError_t pointwise_backward(const PointwiseBackwardParams& p, Dtype dtype, const PointwiseBackwardTiles& tiles, bool tf32,
                               void* workspace, cudaStream_t stream) {
  const Layout l = layout(p, dtype, tiles);
  char* const sums = static_cast<char*>(workspace) + l.weight;
  if (wants_input(p)) {
    const cudaError_t error = with_gradient(dtype, tf32, tiles.input, [&](auto traits) {
      using Traits = decltype(traits);
      Weight weight{};
      const cudaError_t status = prepare_weight<typename Traits::T>(p.weight, p.weight_stride_e, p.weight_stride_c, p.e, p.c,
                                                                    l.weight, workspace, stream, weight);
      if (status != cudaSuccess) return status;
      return launch_input<Traits>(p, tiles.input, weight, reinterpret_cast<float*>(sums), stream);
    });
    if (error != cudaSuccess) return error;
  }
  if (p.dw == nullptr) return cudaSuccess;
  return with_weight_gradient(dtype, tf32, [&](auto traits) {
    return launch_weight<decltype(traits)>(p, tiles.weight, reinterpret_cast<float*>(sums + l.sums), stream);
  });
}

}  // namespace mnet::cuda
