#include "depthwise_backward.h"

#include <algorithm>
#include <vector>

namespace mnet::cpu {

// Inputs of one unit: long enough that rebuilding the rows of dy around it costs little, short enough for balance.
constexpr int64_t kUnitInputs = int64_t{1} << 17;
constexpr int64_t kChannelMultiple = 16;  // whole vectors of every capability
// All channels together where that leaves enough units; else narrow blocks, for balance.
constexpr int64_t kManyUnits = 16;
constexpr int64_t kNarrowBlock = 64;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

DepthwiseBackwardPlan plan_depthwise_backward(const DepthwiseBackwardParams& p) {
  DepthwiseBackwardPlan plan{};
  plan.rows = p.n * p.h;
  const bool many = plan.rows * p.w * p.c >= kManyUnits * kUnitInputs;
  // Equal blocks: 144 channels are three of 48, not two of 64 and one of 16.
  const int64_t blocks = divide_up(p.c, many ? DepthwiseBackwardPlan::kChannelBlock : kNarrowBlock);
  plan.channels = static_cast<int>(divide_up(divide_up(p.c, blocks), kChannelMultiple) * kChannelMultiple);
  plan.channel_blocks = divide_up(p.c, plan.channels);
  if (plan.rows == 0) return plan;
  const int64_t per_row = int64_t{p.w} * std::min(p.c, plan.channels);
  int64_t rows = std::max<int64_t>(1, kUnitInputs / per_row);
  if (rows >= p.h) {
    rows = divide_up(p.n, divide_up(p.n, rows / p.h)) * p.h;  // whole images, so that no row is rebuilt; equally many
  } else {
    rows = divide_up(p.h, divide_up(p.h, rows));  // equal parts of an image
  }
  plan.rows_per_chunk = std::min(rows, plan.rows);
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  return plan;
}

static int64_t table_rows(const DepthwiseBackwardParams& p) { return int64_t{p.kernel} * p.kernel + 2; }

int64_t depthwise_backward_workspace(const DepthwiseBackwardParams& p, const DepthwiseBackwardPlan& plan) {
  return plan.chunks * table_rows(p) * p.c;
}

void depthwise_backward_units(const DepthwiseBackwardParams& p, Dtype dtype, const DepthwiseBackwardPlan& plan,
                              int64_t begin, int64_t end, double* workspace, Capability capability) {
#if defined(__x86_64__)
  const auto run = capability >= Capability::kAvx512 ? avx512::depthwise_backward_unit
                   : capability == Capability::kAvx2 ? avx2::depthwise_backward_unit
                                                     : baseline::depthwise_backward_unit;
#else
  (void)capability;
  const auto run = baseline::depthwise_backward_unit;
#endif
  for (int64_t index = begin; index < end; ++index) {
    const int64_t chunk = index / plan.channel_blocks, block = index % plan.channel_blocks;
    DepthwiseBackwardUnit unit{};
    unit.row_begin = chunk * plan.rows_per_chunk;
    unit.row_end = std::min(plan.rows, unit.row_begin + plan.rows_per_chunk);
    unit.channel_begin = static_cast<int>(block * plan.channels);
    unit.channel_end = std::min(p.c, unit.channel_begin + plan.channels);
    unit.totals = workspace + chunk * table_rows(p) * p.c;
    run(p, dtype, unit);
  }
}

void depthwise_backward_finish(const DepthwiseBackwardParams& p, const DepthwiseBackwardPlan& plan,
                               const double* workspace) {
  const int64_t taps = int64_t{p.kernel} * p.kernel, size = table_rows(p) * p.c;
  std::vector<double> totals(static_cast<size_t>(size), 0.0);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double* from = workspace + chunk * size;
    for (int64_t i = 0; i < size; ++i) totals[i] += from[i];
  }
  for (int64_t c = 0; p.dw != nullptr && c < p.c; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) p.dw[c * taps + tap] = static_cast<float>(totals[tap * p.c + c]);
  }
  for (int64_t i = 0; p.sums != nullptr && i < 2 * p.c; ++i) p.sums[i] = static_cast<float>(totals[taps * p.c + i]);
}

}  // namespace mnet::cpu
