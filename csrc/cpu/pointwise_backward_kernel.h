// The backward kernel of the 1x1 convolution, of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its positions in tiles of grad and y, from which dy is built once, rounded to storage
// and kept in float32 in the second-level cache.  Then panel by panel of x's channels: gz = dy W into a panel in the
// first-level cache; one loop over it and x that masks, stores gx, adds up its sums and leaves the activated z in
// another panel; and dW += dy^T z from the two while they are near.  x, grad and y are read once, gx is written once (and
// streamed where it is large, simd.h: where a vector is half a line, from the panel, in place of gz).
// Every chunk has its own part of dW, in panels [panel][e][kPanel]: a tile adds a run of 42 positions to it.
#pragma once

#include <cstdint>

#include "../common/pointwise_params.h"
#include "gemm.h"
#include "pointwise.h"
#include "pointwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// One vector of a panel's columns, over rows of one tile.
template <typename Storage>
struct PanelColumn {
  const float* product;  // gz, rows kPanel apart
  float* activated;      // z of all the tile's rows, as the right operand of dW
  int first;             // this part's first row there
  const typename Storage::Lane* x;         // rows `pitch` apart, as residual
  const typename Storage::Lane* residual;  // or nullptr
  typename Storage::Lane* gx;              // or nullptr; rows `gx_pitch` apart
  int64_t pitch, gx_pitch;
  int valid;
  bool stream;  // gx
  const float *scale, *shift, *mean;  // of x's batch norm
  const float* gate;                  // of one image, or nullptr
};

// z, the masked gradient and its two sums.
template <typename Storage, typename Act, bool kPartial, bool kStore>
void masked_column(const PanelColumn<Storage>& p, int rows, Vec* sums) {
  const Vec scale = load_vec(p.scale), shift = load_vec(p.shift), mean = load_vec(p.mean);
  Vec sum = Vec{}, sum_y = Vec{};
  for (int row = 0; row < rows; ++row) {
    const Vec x = load_map<Storage, kPartial>(p.x + row * p.pitch, p.valid);
    const Vec u = scale * x + shift;
    store_deep<Storage, false>(p.activated, p.first + row, Act::fwd(u));
    Vec g = load_vec(p.product + row * kPanel) * Act::bwd(u);
    if constexpr (kStore) g = stream_map<Storage, kPartial>(p.gx + row * p.gx_pitch, g, p.valid, p.stream);
    sum = sum + g;
    sum_y = sum_y + g * (x - mean);
  }
  sums[0] = sum;
  sums[1] = sum_y;
}

// z with its gate, the gradient at z as it is, and the three sums of one image.
template <typename Storage, typename Act, bool kPartial>
void gated_column(const PanelColumn<Storage>& p, int rows, Vec* sums) {
  const Vec scale = load_vec(p.scale), shift = load_vec(p.shift), mean = load_vec(p.mean);
  const Vec gate = load_lanes<kPartial, float, Vec>(p.gate, p.valid);
  Vec sum_z = Vec{}, sum = Vec{}, sum_y = Vec{};
  for (int row = 0; row < rows; ++row) {
    const Vec x = load_map<Storage, kPartial>(p.x + row * p.pitch, p.valid);
    const Vec u = scale * x + shift, z = Act::fwd(u);
    store_deep<Storage, false>(p.activated, p.first + row, Vec(z * gate));
    Vec dz = load_vec(p.product + row * kPanel);
    if (p.gx != nullptr) dz = stream_map<Storage, kPartial>(p.gx + row * p.gx_pitch, dz, p.valid, p.stream);
    const Vec g = dz * Act::bwd(u);
    sum_z = sum_z + dz * z;
    sum = sum + g;
    sum_y = sum_y + g * (x - mean);
  }
  sums[0] = sum_z;
  sums[1] = sum;
  sums[2] = sum_y;
}

// Without a batch norm: z = x [* gate], gx = gz [+ residual].
template <typename Storage, bool kPartial>
void plain_column(const PanelColumn<Storage>& p, int rows) {
  const Vec gate = p.gate == nullptr ? Vec{} : load_lanes<kPartial, float, Vec>(p.gate, p.valid);
  for (int row = 0; row < rows; ++row) {
    const int64_t at = row * p.pitch;
    const Vec x = load_map<Storage, kPartial>(p.x + at, p.valid);
    store_deep<Storage, true>(p.activated, p.first + row, p.gate == nullptr ? x : Storage::round(x * gate));
    if (p.gx == nullptr) continue;
    Vec g = load_vec(p.product + row * kPanel);
    if (p.residual != nullptr) g = g + load_map<Storage, kPartial>(p.residual + at, p.valid);
    stream_map<Storage, kPartial>(p.gx + row * p.gx_pitch, g, p.valid, p.stream);
  }
}

// The element-wise work on one vector of a panel.  `sums`: rows `padded` apart, of the unit's first slot.
template <typename Storage, typename Act, bool kPartial>
void column_rows(const PointwiseBackwardParams& p, PanelColumn<Storage> column, int64_t row, int rows, int64_t first_image,
                 int64_t padded, double* sums) {
  Vec part[3] = {};
  const auto add = [&](double* to, int count) {
    if (sums == nullptr) return;
    for (int i = 0; i < count; ++i) add_lanes(to + i * padded, part[i], kLanes);
  };
  if (p.gate == nullptr) {
    if (p.bn == nullptr) {
      plain_column<Storage, kPartial>(column, rows);
    } else {
      p.gx == nullptr ? masked_column<Storage, Act, kPartial, false>(column, rows, part)
                      : masked_column<Storage, Act, kPartial, true>(column, rows, part);
      add(sums, 2);
    }
    return;
  }
  for_images(row, rows, p.image_positions, [&](int64_t image, int first, int count) {
    PanelColumn<Storage> piece = column;
    piece.product += first * kPanel;
    piece.first = first;
    piece.x += first * column.pitch;
    if (column.gx != nullptr) piece.gx += first * column.gx_pitch;
    piece.gate += image * p.c;
    if (p.bn == nullptr) {
      plain_column<Storage, kPartial>(piece, count);
    } else {
      gated_column<Storage, Act, kPartial>(piece, count, part);
      add(sums + (image - first_image) * 3 * padded, 3);
    }
  });
}

template <typename Storage>
void run_pointwise_backward(const PointwiseBackwardParams& p, const PointwisePlan& plan, const PointwiseUnit& unit,
                            const PointwiseWorkspace& workspace) {
  using Lane = typename Storage::Lane;
  const int64_t stride = tile_stride(words(p.e)), padded = plan.padded_columns();
  Arena arena(plan.tile_rows * (stride + 2 * kPanel) + turned_floats(plan.tile_rows, stride, p.e) + 5 * tile_stride(p.e) +
              3 * (padded + 16));
  float* tile = arena.take(plan.tile_rows * stride);
  clear_padding(tile, plan.tile_rows, stride);
  float* turned = arena.take(turned_floats(plan.tile_rows, stride, p.e));
  float* product = arena.take(plan.tile_rows * kPanel);
  float* activated = arena.take(plan.tile_rows * kPanel);
  const auto upstream_table = [&](const float* table, int row) { return arena.copy(table + int64_t{row} * p.e, p.e); };
  const UpstreamTables upstream{upstream_table(p.y_bn, 0), upstream_table(p.y_bn, 1), upstream_table(p.y_bn, 2),
                                upstream_table(p.coef, 0), upstream_table(p.coef, 1)};
  const auto table = [&](int row) { return p.bn == nullptr ? nullptr : arena.copy(p.bn + int64_t{row} * p.c, p.c); };
  const float *scale = table(0), *shift = table(1), *mean = table(2);

  const bool stream = p.gx != nullptr && streams<Storage>(p.gx, p.positions(), p.c);
  const bool gather = kGathers && stream;  // gx in place of the product
  const bool needs_product = p.gx != nullptr || p.sums != nullptr;
  const int64_t first_image = p.gate == nullptr ? 0 : unit.row_begin / p.image_positions;
  double* sums = nullptr;
  if (p.sums != nullptr) {
    const int64_t slots = p.gate == nullptr ? 1 : (unit.row_end - 1) / p.image_positions - first_image + 1;
    sums = workspace.sums + (unit.chunk + first_image) * 3 * padded;
    for (int64_t i = 0; i < 3 * slots; ++i) {
      for (int c = unit.panel_begin * kPanel; c < unit.panel_end * kPanel; ++c) sums[i * padded + c] = 0.0;
    }
  }
  float* partial_dw = p.dw == nullptr ? nullptr : workspace.partials + unit.chunk * plan.packed_size();
  if (!needs_product) {
    for (int i = 0; i < plan.tile_rows * kPanel; ++i) product[i] = 0.f;
  }

  const TileConfiguration tiles;
  for (int64_t row = unit.row_begin; row < unit.row_end; row += plan.tile_rows) {
    const int rows = static_cast<int>(least<int64_t>(plan.tile_rows, unit.row_end - row));
    with_activation(p.y_act, [&](auto act) {
      const Lane* y = static_cast<const Lane*>(p.y) + row * p.e;
      if (p.offset == nullptr) {
        upstream_rows<Storage, decltype(act)>(static_cast<const Lane*>(p.grad) + row * p.e, y, rows, p.e, upstream, tile,
                                              stride);
        return;
      }
      for_images(row, rows, p.image_positions, [&](int64_t image, int first, int count) {
        upstream_rows<Storage, decltype(act)>(SameGradient{p.offset + image * p.e}, y + int64_t{first} * p.e, count, p.e,
                                              upstream, tile + first * stride, stride);
      });
    });
    Ahead ahead;
    if (const int64_t next = row + rows; next < unit.row_end) {
      const int64_t count = least<int64_t>(plan.tile_rows, unit.row_end - next);
      if (p.grad != nullptr) ahead.add(static_cast<const Lane*>(p.grad) + next * p.e, count * p.e * sizeof(Lane));
      ahead.add(static_cast<const Lane*>(p.y) + next * p.e, count * p.e * sizeof(Lane));
      if (plan.blocks == 1) {
        ahead.add(static_cast<const Lane*>(p.x) + next * p.c, count * p.c * sizeof(Lane));
        if (p.gx != nullptr && !stream) ahead.add(static_cast<const Lane*>(p.gx) + next * p.c, count * p.c * sizeof(Lane));
      }
      const int64_t blocks = (needs_product ? deep_blocks(rows, words(p.e)) : 0) +
                             (partial_dw != nullptr ? along_blocks(p.e, rows) : 0);
      ahead.spread((unit.panel_end - unit.panel_begin) * blocks);
    }
    const float* deep = partial_dw == nullptr ? nullptr : rows_as_depth(tile, stride, plan.tile_rows, rows, p.e, turned);
    clear_deep(activated, rows);
    for (int panel = unit.panel_begin; panel < unit.panel_end; ++panel) {
      const int column = panel * kPanel, used = least(kPanel, p.c - column);
      if (needs_product) {
        multiply_deep(tile, stride, workspace.packed + int64_t{column} * plan.packed_depth, words(p.e), rows, used, product,
                      ahead);
      }
      with_activation(p.act, [&](auto act) {
        for_vectors(used, [&](auto partial, int c, int valid) {
          const int64_t at = row * p.c + column + c;
          PanelColumn<Storage> piece{};
          piece.product = product + c;
          piece.activated = activated + c;
          piece.x = static_cast<const Lane*>(p.x) + at;
          piece.residual = p.residual == nullptr ? nullptr : static_cast<const Lane*>(p.residual) + at;
          piece.gx = p.gx == nullptr ? nullptr : static_cast<Lane*>(p.gx) + at;
          piece.pitch = piece.gx_pitch = p.c;
          piece.valid = valid;
          piece.stream = stream && !gather;
          if (gather) {
            piece.gx = reinterpret_cast<Lane*>(product + c);
            piece.gx_pitch = kPanel;
          }
          if (p.bn != nullptr) {
            piece.scale = scale + column + c;
            piece.shift = shift + column + c;
            piece.mean = mean + column + c;
          }
          piece.gate = p.gate == nullptr ? nullptr : p.gate + column + c;
          column_rows<Storage, decltype(act), decltype(partial)::value>(
              p, piece, row, rows, first_image, padded, sums == nullptr ? nullptr : sums + column + c);
        });
      });
      if (gather) stream_rows(static_cast<Lane*>(p.gx) + row * p.c + column, p.c, product, kPanel, rows, used);
      if (partial_dw != nullptr) {
        multiply_along_rows(deep, stride, plan.tile_rows, activated, rows, p.e, used,
                            partial_dw + int64_t{column} * plan.packed_depth, row > unit.row_begin, ahead);
      }
    }
  }
  end_stream(stream);
}

void pointwise_backward_unit(const PointwiseBackwardParams& params, Dtype dtype, const PointwisePlan& plan,
                             const PointwiseUnit& unit, const PointwiseWorkspace& workspace) {
  with_storage(dtype, [&](auto storage) { run_pointwise_backward<decltype(storage)>(params, plan, unit, workspace); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
