#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "../common/moments.h"
#include "../common/plant.h"

namespace mnet::cpu {

// Outputs of one unit: long enough that reading the k - 1 rows above it again costs little, short enough for balance.
constexpr int64_t kUnitOutputs = int64_t{1} << 16;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

DepthwisePlan plan_depthwise(const DepthwiseParams& p) {
  DepthwisePlan plan{};
  plan.rows = p.n * p.out_h;
  plan.channel_blocks = divide_up(p.c, DepthwisePlan::kChannelBlock);
  if (plan.rows == 0) return plan;
  const int64_t per_row = int64_t{p.out_w} * std::min<int64_t>(p.c, DepthwisePlan::kChannelBlock);
  int64_t rows = std::max<int64_t>(1, kUnitOutputs / per_row);
  if (rows >= p.out_h) {
    rows = divide_up(p.n, divide_up(p.n, rows / p.out_h)) * p.out_h;  // whole images: no row is read twice; equally many
  } else {
    rows = divide_up(p.out_h, divide_up(p.out_h, rows));  // equal parts of an image
  }
  plan.rows_per_chunk = std::min(rows, plan.rows);
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  return plan;
}

int64_t depthwise_workspace(const DepthwiseParams& p, const DepthwisePlan& plan) { return 2 * plan.chunks * p.c; }

void depthwise_units(const DepthwiseParams& p, Dtype dtype, const DepthwisePlan& plan, int64_t begin, int64_t end,
                     double* workspace, Capability capability) {
#if defined(__x86_64__)
  const auto run = capability >= Capability::kAvx512 ? avx512::depthwise_unit
                   : capability == Capability::kAvx2 ? avx2::depthwise_unit
                                                     : baseline::depthwise_unit;
#else
  (void)capability;
  const auto run = baseline::depthwise_unit;
#endif
  for (int64_t index = begin; index < end; ++index) {
    const int64_t chunk = index / plan.channel_blocks, block = index % plan.channel_blocks;
    DepthwiseUnit unit{};
    unit.row_begin = chunk * plan.rows_per_chunk;
    unit.row_end = std::min(plan.rows, unit.row_begin + plan.rows_per_chunk);
    unit.channel_begin = static_cast<int>(block * DepthwisePlan::kChannelBlock);
    unit.channel_end = std::min(p.c, unit.channel_begin + DepthwisePlan::kChannelBlock);
    if (workspace != nullptr) {
      unit.mean = workspace + 2 * chunk * p.c;
      unit.m2 = unit.mean + p.c;
    }
    run(p, dtype, unit);
  }
}

void depthwise_finish(const DepthwiseParams& p, const DepthwisePlan& plan, const double* workspace) {
  std::vector<double> mean(p.c, 0.0), m2(p.c, 0.0);
  double count = 0.0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t left = plan.rows - chunk * plan.rows_per_chunk;
    const int64_t rows = MNET_PLANT(7, std::min(plan.rows_per_chunk, left), plan.rows_per_chunk);
    const double added = static_cast<double>(rows) * p.out_w;
    const double weight = added / (count + added);
    const double* chunk_mean = workspace + 2 * chunk * p.c;
    const double* chunk_m2 = chunk_mean + p.c;
    for (int c = 0; c < p.c; ++c) chan_update(mean[c], m2[c], count, chunk_mean[c], chunk_m2[c], weight);
    count += added;
  }
  for (int c = 0; c < p.c; ++c) {
    p.moments[c] = static_cast<float>(mean[c]);
    p.moments[p.c + c] = count > 0.0 ? static_cast<float>(m2[c] / count) : 0.f;
  }
}

}  // namespace mnet::cpu
