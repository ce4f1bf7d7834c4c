#include "depthwise_backward.h"

#include "combine.h"
#include "depthwise_backward.cuh"
#include "launch.h"

namespace mnet::cuda {

constexpr int64_t kMostSteps = 64;  // of a run: its sums are in float32

static int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// The widest split of the channels that fills its last block nearly as well as the best one.
static int32_t choose_words(int64_t words) {
  int64_t best = divide_up(words, 8) * 8;
  for (const int32_t width : {32, 16}) {
    if (divide_up(words, width) * width * 8 <= best * 9) return width;
  }
  return 8;
}

template <typename Traits>
static DepthwiseBackwardTiling make_backward_tiling(const DepthwiseBackwardParams& p, const Tile& tile) {
  DepthwiseBackwardTiling t{};
  const int64_t words = divide_up(p.c, Traits::kLane);
  t.words = choose_words(words);
  t.channel_blocks = static_cast<int32_t>(divide_up(words, t.words));
  // Equal stripes: 56 columns are four of 14, not three of 16 and one of 8.
  const int64_t patches = divide_up(p.w, Traits::kColumns), most = Traits::kPatches * (Traits::kMaxWords / t.words);
  t.tiles_w = static_cast<int32_t>(divide_up(patches, most));
  t.patches = static_cast<int32_t>(divide_up(patches, t.tiles_w));
  t.tiles_w = static_cast<int32_t>(divide_up(patches, t.patches));
  t.steps_h = static_cast<int32_t>(divide_up(p.h, Traits::kRows));
  t.steps = p.n * t.steps_h;
  const int64_t columns = int64_t{t.tiles_w} * t.channel_blocks;
  const int64_t least = tile.enough == 0 ? tile.least : clamp(t.steps * columns / tile.enough, 1, tile.least);
  t.steps_per_run = clamp(divide_up(t.steps * columns, tile.blocks), least, kMostSteps);
  t.chunks = divide_up(t.steps, t.steps_per_run) * t.tiles_w;
  t.vectorized = p.c % Traits::kVec == 0 && aligned(p.grad) && aligned(p.y) && aligned(p.x) && aligned(p.gx);
  return t;
}

// Calls f with the traits of a shape and dtype.
template <typename F>
static auto with_backward_traits(const DepthwiseBackwardParams& p, Dtype dtype, F&& f) {
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.kernel == 3) {
      return p.stride == 1 ? f(DepthwiseBackwardTraits<T, 3, 1>{}) : f(DepthwiseBackwardTraits<T, 3, 2>{});
    }
    return p.stride == 1 ? f(DepthwiseBackwardTraits<T, 5, 1>{}) : f(DepthwiseBackwardTraits<T, 5, 2>{});
  });
}

int64_t depthwise_backward_workspace(const DepthwiseBackwardParams& p, Dtype dtype, const Tile& tile) {
  return with_backward_traits(p, dtype, [&](auto traits) {
    using Traits = decltype(traits);
    return make_backward_tiling<Traits>(p, tile).chunks * (Traits::kTaps + 2) * p.c;
  });
}

template <typename Traits>
static cudaError_t launch_backward(const DepthwiseBackwardParams& p, const Tile& tile, float* workspace, cudaStream_t stream) {
  const DepthwiseBackwardTiling tiling = make_backward_tiling<Traits>(p, tile);
  if (tiling.chunks > 0 && (p.gx != nullptr || p.dw != nullptr)) {
    const auto blocks = static_cast<unsigned>(tiling.chunks * tiling.channel_blocks);
    MNET_LAUNCH(depthwise_backward_kernel<Traits>, blocks, Traits::kThreads, stream, p, tiling, workspace);
    if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
  }
  constexpr int kTaps = Traits::kTaps;
  const int64_t c = p.c, pitch = (kTaps + 2) * c;
  if (p.dw != nullptr) {
    const PartialSums dw{workspace, 1, tiling.chunks, pitch, kTaps, p.c, p.dw, 0, 1, kTaps};
    if (const cudaError_t error = combine_sums(dw, stream); error != cudaSuccess) return error;
  }
  if (p.sums == nullptr) return cudaSuccess;
  return combine_sums({workspace + kTaps * c, 1, tiling.chunks, pitch, 2, p.c, p.sums, 0, c, 1}, stream);
}

cudaError_t depthwise_backward(const DepthwiseBackwardParams& p, Dtype dtype, const Tile& tile, float* workspace,
                               cudaStream_t stream) {
  return with_backward_traits(p, dtype,
                              [&](auto traits) { return launch_backward<decltype(traits)>(p, tile, workspace, stream); });
}

}  // namespace mnet::cuda
