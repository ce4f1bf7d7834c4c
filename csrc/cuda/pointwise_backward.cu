#include "pointwise_backward.h"

#include "combine.h"
#include "pointwise_backward_both.cuh"
#include "pointwise_tiles.h"
#include "pointwise_weight.cuh"

namespace mnet::cuda {

// One kernel for both products where both are wanted, of a layer whose gradient fits in the registers of a block (three steps
// of e; of more columns, blocks read their operand again, from the second level of cache).  Otherwise two, one for each:
// with a gate an image has sums of its own, and each of its few runs would write a gradient.
constexpr int kMostSteps = 3;

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

// Calls f with the traits of both gradients; 16 bits.
template <typename F>
static auto with_both_gradients(Dtype dtype, int e, F&& f) {
  const auto with_steps = [&](auto zero) {
    using T = decltype(zero);
    if (e <= 64) return f(BothTraits<T, 1>{});
    return e <= 128 ? f(BothTraits<T, 2>{}) : f(BothTraits<T, kMostSteps>{});
  };
  return dtype == Dtype::kBFloat16 ? with_steps(__nv_bfloat16{}) : with_steps(__half{});
}

static bool wants_input(const PointwiseBackwardParams& p) { return p.gx != nullptr || p.sums != nullptr; }
static int sums_rows(const PointwiseBackwardParams& p) { return p.gate == nullptr ? 2 : 3; }

static bool in_one_pass(const PointwiseBackwardParams& p, const Tile& tile) {
  return tile.index == 1 && wants_input(p) && p.dw != nullptr && p.gate == nullptr && p.e <= kMostSteps * 64;
}

// The image table's partials are of one image each.
template <typename Traits>
static RowTiling input_tiling(const PointwiseBackwardParams& p, const Tile& tile) {
  const bool by_image = p.gate != nullptr && p.sums != nullptr;
  return by_image ? deal_rows<Traits>(p.images, p.image_positions, p.c, tile)
                  : deal_rows<Traits>(1, p.positions(), p.c, tile);
}

template <typename Traits>
static RowTiling both_tiling(const PointwiseBackwardParams& p, const Tile& tile) {
  return deal_rows<Traits>(1, p.positions(), p.c, tile, Traits::kLongest);
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
  const auto sums_bytes = [&](int64_t chunks) { return divide_up(chunks * sums_rows(p) * p.c, 4) * 16; };
  const auto gradient_bytes = [&](int64_t runs) { return runs == 1 ? 0 : runs * p.e * p.c * int64_t{sizeof(float)}; };
  if (in_one_pass(p, tiles.both)) {
    const int64_t chunks =
        with_both_gradients(dtype, p.e, [&](auto t) { return both_tiling<decltype(t)>(p, tiles.both).chunks; });
    l.sums = p.sums == nullptr ? 0 : sums_bytes(chunks);
    l.dw = gradient_bytes(chunks);
    return l;
  }
  if (p.sums != nullptr) {
    // float32's two tiles deal positions alike.
    const int64_t chunks =
        with_gradient(dtype, true, tiles.input, [&](auto t) { return input_tiling<decltype(t)>(p, tiles.input).chunks; });
    l.sums = sums_bytes(chunks);
  }
  if (p.dw != nullptr) {
    const int64_t runs =
        with_weight_gradient(dtype, true, [&](auto t) { return weight_tiling<decltype(t)>(p, tiles.weight).runs; });
    l.dw = gradient_bytes(runs);
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

static cudaError_t combine_input_sums(const PointwiseBackwardParams& p, const RowTiling& tiling, const float* partials,
                                      cudaStream_t stream) {
  if (p.sums == nullptr) return cudaSuccess;
  const int64_t spans = p.gate == nullptr ? 1 : p.images;
  const int rows = sums_rows(p);
  return combine_sums({partials, spans, tiling.runs_per_span, int64_t{rows} * p.c, rows, p.c, p.sums, p.c, spans * p.c, 1},
                      stream);
}

static cudaError_t combine_gradients(const PointwiseBackwardParams& p, int64_t runs, const float* partials,
                                     cudaStream_t stream) {
  if (runs == 1) return cudaSuccess;  // it is there
  return combine_sums({partials, 1, runs, int64_t{p.e} * p.c, p.e, p.c, p.dw, 0, p.c, 1}, stream);
}

static ActivatedSource activated_source(const PointwiseBackwardParams& p, int vec) {
  const bool vectorized = p.c % vec == 0 && aligned(p.x) && tables_aligned(p);
  return {p.x, p.bn, p.gate, Images(p.image_positions), p.c, p.act, vectorized};
}

template <typename Traits>
static bool stores_vectors(const PointwiseBackwardParams& p) {
  return p.c % Traits::kVec == 0 && (p.gx == nullptr || aligned(p.gx)) && aligned(p.x) &&
         (p.residual == nullptr || aligned(p.residual));
}

template <typename Traits>
static cudaError_t launch_both(const PointwiseBackwardParams& p, const Tile& tile, const Weight& weight, float* sums,
                               float* gradients, cudaStream_t stream) {
  const RowTiling tiling = both_tiling<Traits>(p, tile);
  if (tiling.chunks > 0) {
    const auto kernel = pointwise_both_gradients<Traits>;
    const cudaError_t error = allow_shared(kernel, Traits::kBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kBytes, stream, p, upstream<typename Traits::T>(p),
                        activated_source(p, Traits::kVec), weight, tiling, stores_vectors<Traits>(p), sums,
                        tiling.chunks == 1 ? p.dw : gradients);
    if (const cudaError_t status = launch_status(); status != cudaSuccess) return status;
  }
  if (const cudaError_t error = combine_input_sums(p, tiling, sums, stream); error != cudaSuccess) return error;
  return combine_gradients(p, tiling.chunks, gradients, stream);
}

template <typename Traits>
static cudaError_t launch_input(const PointwiseBackwardParams& p, const Tile& tile, const Weight& weight, float* partials,
                                cudaStream_t stream) {
  const RowTiling tiling = input_tiling<Traits>(p, tile);
  if (tiling.chunks > 0) {
    const auto kernel = pointwise_input_gradient<Traits>;
    const cudaError_t error = allow_shared(kernel, Traits::kRingBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.column_blocks);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kRingBytes, stream, p, upstream<typename Traits::T>(p),
                        weight, tiling, stores_vectors<Traits>(p), partials);
    if (const cudaError_t status = launch_status(); status != cudaSuccess) return status;
  }
  return combine_input_sums(p, tiling, partials, stream);
}

template <typename Traits>
static cudaError_t launch_weight(const PointwiseBackwardParams& p, const Tile& tile, float* partials, cudaStream_t stream) {
  using T = typename Traits::T;
  const WeightTiling tiling = weight_tiling<Traits>(p, tile);
  float* const to = tiling.runs == 1 ? p.dw : partials;
  if (tiling.runs > 0) {
    const auto kernel = pointwise_weight_gradient<Traits>;
    const cudaError_t error = allow_shared(kernel, Traits::kRingBytes);
    if (error != cudaSuccess) return error;
    const auto blocks = static_cast<unsigned>(tiling.runs * tiling.blocks_c * tiling.blocks_e);
    MNET_LAUNCH_DYNAMIC(kernel, blocks, Traits::kThreads, Traits::kRingBytes, stream, upstream<T>(p),
                        activated_source(p, Traits::kVec), tiling, to);
    if (const cudaError_t status = launch_status(); status != cudaSuccess) return status;
  }
  return combine_gradients(p, tiling.runs, partials, stream);
}

cudaError_t pointwise_backward(const PointwiseBackwardParams& p, Dtype dtype, const PointwiseBackwardTiles& tiles, bool tf32,
                               void* workspace, cudaStream_t stream) {
  const Layout l = layout(p, dtype, tiles);
  auto* const sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + l.weight);
  auto* const gradients = reinterpret_cast<float*>(static_cast<char*>(workspace) + l.weight + l.sums);
  const auto prepare = [&](auto zero, Weight& weight) {
    return prepare_weight<decltype(zero)>(p.weight, p.weight_stride_e, p.weight_stride_c, p.e, p.c, l.weight, workspace, stream,
                                          weight);
  };
  if (in_one_pass(p, tiles.both)) {
    return with_both_gradients(dtype, p.e, [&](auto traits) {
      Weight weight{};
      const cudaError_t status = prepare(typename decltype(traits)::T{}, weight);
      return status != cudaSuccess ? status : launch_both<decltype(traits)>(p, tiles.both, weight, sums, gradients, stream);
    });
  }
  if (wants_input(p)) {
    const cudaError_t error = with_gradient(dtype, tf32, tiles.input, [&](auto traits) {
      Weight weight{};
      const cudaError_t status = prepare(typename decltype(traits)::T{}, weight);
      return status != cudaSuccess ? status : launch_input<decltype(traits)>(p, tiles.input, weight, sums, stream);
    });
    if (error != cudaSuccess) return error;
  }
  if (p.dw == nullptr) return cudaSuccess;
  return with_weight_gradient(dtype, tf32, [&](auto traits) {
    return launch_weight<decltype(traits)>(p, tiles.weight, gradients, stream);
  });
}

}  // namespace mnet::cuda
