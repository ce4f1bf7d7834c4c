#include "normalize_gram.h"

#include "expand_gram_tiling.h"
#include "normalize_gram.cuh"

namespace mnet::cuda {

static GramParams of_output(const NormalizeParams& p) { return {p.output, p.table, p.n * p.area, p.c}; }

int64_t normalize_gram_workspace(const NormalizeParams& p, Dtype dtype, const Tile& tile) {
  return gram_workspace(of_output(p), dtype, tile);
}

cudaError_t normalize_gram(const NormalizeParams& p, Dtype dtype, const Tile& tile, void* workspace, cudaStream_t stream) {
  if (p.c > kMaxGramChannels) return cudaErrorInvalidValue;
  return with_storage(dtype, [&](auto zero) {
    using T = decltype(zero);
    GramTiling t = deal_positions<T>(of_output(p), tile);
    t.vectorized = t.vectorized && aligned(p.y) && aligned(p.operand);
    const GramPartials to(workspace, t);
    if (t.chunks > 0) {
      const auto kernel = p.operand == nullptr ? normalize_gram_kernel<T, false> : normalize_gram_kernel<T, true>;
      const auto blocks = static_cast<unsigned>(t.chunks);
      MNET_LAUNCH(kernel, blocks, GramTraits::kThreads, stream, p, t, to.means, to.products);
      if (const cudaError_t error = launch_status(); error != cudaSuccess) return error;
    }
    return combine_gram(of_output(p), dtype, t, to, stream);
  });
}

}  // namespace mnet::cuda
