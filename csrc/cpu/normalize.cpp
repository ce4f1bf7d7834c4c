#include "normalize.h"

#include <algorithm>
#include <vector>

namespace mnet::cpu {

constexpr int64_t kChunkElements = int64_t{1} << 16;
constexpr int64_t kManyImages = 16;
constexpr int kSqueezeBlock = 256;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

NormalizePlan plan_normalize(const NormalizeParams& p) {
  NormalizePlan plan{};
  plan.positions = p.n * p.area;
  plan.channels = p.n >= kManyImages ? p.c : std::min(p.c, kSqueezeBlock);
  plan.channel_blocks = divide_up(p.c, plan.channels);
  if (plan.positions == 0) return plan;
  plan.positions_per_chunk = std::min(plan.positions, std::max<int64_t>(8, kChunkElements / p.c));
  plan.chunks = divide_up(plan.positions, plan.positions_per_chunk);
  return plan;
}

int64_t normalize_backward_workspace(const NormalizeParams& p, const NormalizePlan& plan) {
  return 2 * plan.chunks * p.c;
}

#if defined(__x86_64__)
#define MNET_CHOOSE(function)                                    \
  (capability >= Capability::kAvx512 ? avx512::function          \
   : capability == Capability::kAvx2 ? avx2::function : baseline::function)
#else
#define MNET_CHOOSE(function) ((void)capability, baseline::function)
#endif

void normalize_chunks(const NormalizeParams& p, Dtype dtype, const NormalizePlan& plan, int64_t begin, int64_t end,
                      Capability capability) {
  const auto run = MNET_CHOOSE(normalize_positions);
  const int64_t size = plan.positions_per_chunk;
  run(p, dtype, begin * size, std::min(plan.positions, end * size));
}

void normalize_backward_chunks(const NormalizeParams& p, Dtype dtype, const NormalizePlan& plan, int64_t begin,
                               int64_t end, double* workspace, Capability capability) {
  const auto run = MNET_CHOOSE(normalize_backward_positions);
  const int64_t size = plan.positions_per_chunk;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    run(p, dtype, chunk * size, std::min(plan.positions, (chunk + 1) * size), workspace + 2 * chunk * p.c);
  }
}

void normalize_backward_finish(const NormalizeParams& p, const NormalizePlan& plan, const double* workspace) {
  std::vector<double> sums(2 * static_cast<size_t>(p.c), 0.0);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double* from = workspace + 2 * chunk * p.c;
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += from[i];
  }
  for (size_t i = 0; i < sums.size(); ++i) p.table[i] = static_cast<float>(sums[i]);
}

void squeeze_units(const NormalizeParams& p, Dtype dtype, const NormalizePlan& plan, int64_t begin, int64_t end,
                   Capability capability) {
  const auto run = MNET_CHOOSE(squeeze_image);
  for (int64_t index = begin; index < end; ++index) {
    const int first = static_cast<int>(index % plan.channel_blocks) * plan.channels;
    run(p, dtype, index / plan.channel_blocks, first, std::min(p.c, first + plan.channels));
  }
}

}  // namespace mnet::cpu
