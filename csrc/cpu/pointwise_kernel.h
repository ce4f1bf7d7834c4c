// The pointwise kernel of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its positions in tiles.  A tile's input is read once, activated, and kept in float32
// in the second-level cache (84 x 512 x 4 bytes = 168 KiB at most); the packed weight passes by it panel by panel, from
// the first-level cache.  A panel of results (84 x 64 bytes, twice that with 16 lanes) is rounded, stored and added to
// the moments while it is in the first-level cache: y is written once and not read.
#pragma once

#include <cstdint>

#include "../common/moments.h"
#include "../common/pointwise_params.h"
#include "gemm.h"
#include "pointwise.h"
#include "pointwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

void pointwise_pack_panel(const void* weight, Dtype dtype, int64_t stride_k, int64_t stride_n, int depth, int first,
                          int columns, float* packed) {
  with_storage(dtype, [&](auto storage) {
    pack_panel<decltype(storage)>(weight, stride_k, stride_n, depth, first, columns, packed);
  });
}

// Sums of a run of values of kLanes channels about `shift`: for a unit's first run the mean of some of its values, then
// the mean so far (moments.h: the closer to the mean, the less is lost; a constant channel has it exactly).  It is rounded
// to storage: with more digits than the values have, every difference and sum would be rounded the same way.
struct RunMoments {
  Vec shift, sum1, sum2;

  void merge(int64_t flushed, int run, double* mean, double* m2) const {
    const double weight = static_cast<double>(run) / static_cast<double>(flushed + run);
    float a[kLanes], b[kLanes], c[kLanes];
    store_vec(a, shift);
    store_vec(b, sum1);
    store_vec(c, sum2);
    for (int i = 0; i < kLanes; ++i) {
      const Moments<double> m = from_shifted<double>(run, a[i], b[i], c[i]);
      chan_update<double>(mean[i], m2[i], static_cast<double>(flushed), m.mean, m.m2, weight);
    }
  }
};

template <typename Storage>
Vec shift_of_first_run(const float* result, int rows) {
  const int count = least(rows, 8);
  const Vec first = Storage::round(load_vec(result));
  Vec sum = Vec{};
  for (int row = 1; row < count; ++row) sum = sum + (Storage::round(load_vec(result + row * kPanel)) - first);
  return Storage::round(first + sum * (1.f / static_cast<float>(count)));
}

template <typename Storage>
Vec shift_of_later_run(const double* mean) {
  Vec shift{};
  for (int i = 0; i < kLanes; ++i) shift[i] = static_cast<float>(mean[i]);
  return Storage::round(shift);
}

// Rounds and stores one vector of a panel's columns; with kMoments, adds the stored values up about run->shift.
template <typename Storage, bool kPartial, bool kMoments>
void store_column(const float* result, int rows, typename Storage::Lane* y, int64_t pitch, int valid, RunMoments* run) {
  // Two sums of each kind: one would wait for its own last addition.
  const Vec shift = kMoments ? run->shift : Vec{};
  Vec sum1[2] = {}, sum2[2] = {};
  const auto emit = [&](int row, int which) __attribute__((always_inline)) {
    const Vec stored = store_map<Storage, kPartial>(y + row * pitch, load_vec(result + row * kPanel), valid);
    if constexpr (kMoments) {
      const Vec d = stored - shift;
      sum1[which] = sum1[which] + d;
      sum2[which] = sum2[which] + d * d;
    }
  };
  int row = 0;
  for (; row + 2 <= rows; row += 2) {
    emit(row, 0);
    emit(row + 1, 1);
  }
  if (row < rows) emit(row, 0);
  if constexpr (kMoments) *run = {shift, sum1[0] + sum1[1], sum2[0] + sum2[1]};
}

template <typename Storage>
void run_pointwise(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseUnit& unit,
                   const PointwiseWorkspace& workspace) {
  using Lane = typename Storage::Lane;
  static_assert(alignof(CacheLine) == 64, "pieces of the arena start on cache lines");
  const int64_t stride = tile_stride(words(p.c));
  Arena arena(plan.tile_rows * (stride + kPanel) + 2 * tile_stride(p.c));
  float* tile = arena.take(plan.tile_rows * stride);
  float* result = arena.take(plan.tile_rows * kPanel);
  const float* scale = p.bn == nullptr ? nullptr : arena.copy(p.bn, p.c);
  const float* shift = p.bn == nullptr ? nullptr : arena.copy(p.bn + p.c, p.c);
  double* mean = workspace.sums == nullptr ? nullptr : workspace.sums + unit.chunk * 3 * plan.padded_columns();
  if (mean != nullptr) {
    for (int i = unit.panel_begin * kPanel; i < unit.panel_end * kPanel; ++i) mean[i] = mean[plan.padded_columns() + i] = 0.0;
  }

  for (int64_t row = unit.row_begin; row < unit.row_end; row += plan.tile_rows) {
    const int rows = static_cast<int>(least<int64_t>(plan.tile_rows, unit.row_end - row));
    activate_tile<Storage>(static_cast<const Lane*>(p.x), row, rows, p.c, scale, shift, p.act, p.gate,
                           p.image_positions, tile, stride);
    Ahead ahead;
    if (const int64_t next = row + rows; next < unit.row_end) {
      const int64_t count = least<int64_t>(plan.tile_rows, unit.row_end - next);
      ahead.add(static_cast<const Lane*>(p.x) + next * p.c, count * p.c * sizeof(Lane));
      if (plan.blocks == 1) ahead.add(static_cast<const Lane*>(p.y) + next * p.e, count * p.e * sizeof(Lane));
      ahead.spread(int64_t{unit.panel_end - unit.panel_begin} * (rows / kRowBlock + 1));
    }
    for (int panel = unit.panel_begin; panel < unit.panel_end; ++panel) {
      const int column = panel * kPanel, used = least(kPanel, p.e - column);
      multiply_deep(tile, stride, workspace.packed + int64_t{column} * p.c, words(p.c), rows, used, result,
                    ahead);
      Lane* to = static_cast<Lane*>(p.y) + row * p.e + column;
      for_vectors(used, [&](auto partial, int c, int valid) {
        constexpr bool kPartial = decltype(partial)::value;
        RunMoments run{};
        if (mean == nullptr) {
          store_column<Storage, kPartial, false>(result + c, rows, to + c, p.e, valid, &run);
          return;
        }
        double* at = mean + column + c;
        run.shift = row == unit.row_begin ? shift_of_first_run<Storage>(result + c, rows) : shift_of_later_run<Storage>(at);
        store_column<Storage, kPartial, true>(result + c, rows, to + c, p.e, valid, &run);
        run.merge(row - unit.row_begin, rows, at, at + plan.padded_columns());
      });
    }
  }
}

void pointwise_unit(const PointwiseParams& params, Dtype dtype, const PointwisePlan& plan, const PointwiseUnit& unit,
                    const PointwiseWorkspace& workspace) {
  with_storage(dtype, [&](auto storage) { run_pointwise<decltype(storage)>(params, plan, unit, workspace); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
