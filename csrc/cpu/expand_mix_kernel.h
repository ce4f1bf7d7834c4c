// The last pass of algebraic mode's backward, in one capability (see simd.h for how it is included).
//
// Memory plan.  A tile of 84 positions of x - shift (84 x 160 x 4 bytes = 53 KiB at 160 channels) passes by M, packed in
// panels that stay in the first-level cache; a panel of results is finished, rounded and stored while it is there.
#pragma once

#include <cstdint>

#include "expand.h"
#include "expand_tile.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

void expand_mix_pack(const ExpandMixParams& p, float* packed) {
  for (int column = 0; column < p.c; column += kPanel) {
    pack_panel<Float32>(p.mix, 1, p.c, p.c, column, p.c, packed + int64_t{column} * p.c);
  }
}

template <typename Storage>
void run_mix(const ExpandMixParams& p, int64_t chunk, const float* packed) {
  using Lane = typename Storage::Lane;
  constexpr int kTile = ExpandMixPlan::kTileRows;
  Arena arena(ShiftedRows<Storage>::floats(kTile, p.c) + kTile * kPanel + tile_stride(p.c));
  ShiftedRows<Storage> source(arena, p.x, p.shift, p.c, kTile);
  float* result = arena.take(kTile * kPanel);
  const float* constant = arena.copy(p.mix + int64_t{p.c} * p.c, p.c);
  const auto *partial_dx = static_cast<const Lane*>(p.partial), *residual = static_cast<const Lane*>(p.residual);
  auto* dx = static_cast<Lane*>(p.dx);
  const int64_t end = least(p.positions, (chunk + 1) * ExpandMixPlan::kChunkRows);
  for (int64_t row = chunk * ExpandMixPlan::kChunkRows; row < end; row += kTile) {
    const int rows = static_cast<int>(least<int64_t>(kTile, end - row));
    const float* tile = source.rows(row, rows);
    Ahead ahead;
    if (const int64_t next = row + rows; next < end) {
      const int64_t bytes = least<int64_t>(kTile, end - next) * p.c * sizeof(Lane);
      ahead.add(source.at(next), bytes);
      ahead.add(partial_dx + next * p.c, bytes);
      if (residual != nullptr) ahead.add(residual + next * p.c, bytes);
      ahead.add(dx + next * p.c, bytes);
      ahead.spread((p.c + kPanel - 1) / kPanel * deep_blocks(rows, p.c));
    }
    for (int column = 0; column < p.c; column += kPanel) {
      const int used = least(kPanel, p.c - column);
      multiply_deep(tile, source.stride(), packed + int64_t{column} * p.c, p.c, rows, used, result, ahead);
      for_vectors(used, [&](auto part, int c, int valid) {
        constexpr bool kPartial = decltype(part)::value;
        const Vec v = load_vec(constant + column + c);
        for (int i = 0; i < rows; ++i) {
          const int64_t at = (row + i) * p.c + column + c;
          const Vec product = load_vec(result + i * kPanel + c) + MNET_PLANT(14, v, Vec{});
          Vec value = load_map<Storage, kPartial>(partial_dx + at, valid) + product;
          if (residual != nullptr) value = value + load_map<Storage, kPartial>(residual + at, valid);
          store_map<Storage, kPartial>(dx + at, value, valid);
        }
      });
    }
  }
}

void expand_mix_chunk(const ExpandMixParams& p, Dtype dtype, int64_t chunk, const float* packed) {
  with_storage(dtype, [&](auto storage) { run_mix<decltype(storage)>(p, chunk, packed); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
