// The pointwise kernel of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its positions in tiles.  A tile's input is read once, activated, and kept in float32
// in the second-level cache (42 x 960 x 4 bytes = 158 KiB at the deepest V2 layer); the packed weight passes by it panel by
// panel, from the first-level cache.  A panel of results (42 x 64 bytes, twice that with 16 lanes) is rounded, stored and
// added to the moments while it is in the first-level cache: y is written once and not read.  The next tile's lines of x
// and y are asked for one by one within the products (Ahead).
#pragma once

#include <cstdint>

#include "../common/pointwise_params.h"
#include "gemm.h"
#include "panel_output.h"
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

template <typename Storage>
void run_pointwise(const PointwiseParams& p, const PointwisePlan& plan, const PointwiseUnit& unit,
                   const PointwiseWorkspace& workspace, const PointwiseEpilogue* epilogue) {
  using Lane = typename Storage::Lane;
  static_assert(alignof(CacheLine) == 64, "pieces of the arena start on cache lines");
  const int64_t stride = tile_stride(words(p.c));
  Arena arena(plan.tile_rows * (stride + kPanel) + 2 * tile_stride(p.c) + (epilogue == nullptr ? 0 : 2 * tile_stride(p.e)));
  float* tile = arena.take(plan.tile_rows * stride);
  clear_padding(tile, plan.tile_rows, stride);
  float* result = arena.take(plan.tile_rows * kPanel);
  const float* scale = p.bn == nullptr ? nullptr : arena.copy(p.bn, p.c);
  const float* shift = p.bn == nullptr ? nullptr : arena.copy(p.bn + p.c, p.c);
  const float* out_scale = epilogue == nullptr ? nullptr : arena.copy(epilogue->table, p.e);
  const float* out_shift = epilogue == nullptr ? nullptr : arena.copy(epilogue->table + p.e, p.e);
  double* mean = workspace.sums == nullptr ? nullptr : workspace.sums + unit.chunk * 3 * plan.padded_columns();
  if (mean != nullptr) {
    for (int i = unit.panel_begin * kPanel; i < unit.panel_end * kPanel; ++i) mean[i] = mean[plan.padded_columns() + i] = 0.0;
  }

  const TileConfiguration tiles;
  for (int64_t row = unit.row_begin; row < unit.row_end; row += plan.tile_rows) {
    const int rows = static_cast<int>(least<int64_t>(plan.tile_rows, unit.row_end - row));
    activate_tile<Storage>(static_cast<const Lane*>(p.x), row, rows, p.c, scale, shift, p.act, p.gate,
                           p.image_positions, tile, stride);
    Ahead ahead;
    if (const int64_t next = row + rows; next < unit.row_end) {
      const int64_t count = least<int64_t>(plan.tile_rows, unit.row_end - next);
      ahead.add(static_cast<const Lane*>(p.x) + next * p.c, count * p.c * sizeof(Lane));
      if (plan.blocks == 1) ahead.add(static_cast<const Lane*>(p.y) + next * p.e, count * p.e * sizeof(Lane));
      ahead.spread(int64_t{unit.panel_end - unit.panel_begin} * deep_blocks(rows, words(p.c)));
    }
    for (int panel = unit.panel_begin; panel < unit.panel_end; ++panel) {
      const int column = panel * kPanel, used = least(kPanel, p.e - column);
      multiply_deep(tile, stride, workspace.packed + int64_t{column} * plan.packed_depth, words(p.c), rows, used, result,
                    ahead);
      const int64_t at = row * p.e + column;
      if (epilogue != nullptr) {
        const Lane* residual = epilogue->residual == nullptr ? nullptr : static_cast<const Lane*>(epilogue->residual) + at;
        store_activated_panel<Storage>(result, rows, used, static_cast<Lane*>(p.y) + at, p.e, out_scale + column,
                                       out_shift + column, epilogue->act, residual);
        continue;
      }
      store_panel<Storage>(result, rows, used, static_cast<Lane*>(p.y) + at, p.e, mean == nullptr ? nullptr : mean + column,
                           plan.padded_columns(), row - unit.row_begin);
    }
  }
}

void pointwise_unit(const PointwiseParams& params, Dtype dtype, const PointwisePlan& plan, const PointwiseUnit& unit,
                    const PointwiseWorkspace& workspace, const PointwiseEpilogue* epilogue) {
  with_storage(dtype, [&](auto storage) { run_pointwise<decltype(storage)>(params, plan, unit, workspace, epilogue); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
