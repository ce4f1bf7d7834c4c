// The backward kernel of the stem, of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its positions in tiles of grad and y, from which dy is built once, rounded to storage,
// into panels in the first-level cache (56 x 64 bytes, twice that with 16 lanes); the rows of pixels are kept as in the
// forward pass.  A tile adds its product to the unit's part of the weight's gradient (27 x 64 bytes, or twice that): grad,
// y and the image are read once, and only a dy that is asked for is written.
#pragma once

#include <cstdint>

#include "../common/stem_params.h"
#include "gemm.h"
#include "pointwise_tile.h"
#include "simd.h"
#include "stem.h"
#include "stem_tile.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// dy of `rows` positions into panels [panel][kStemTile][kPanel], and into `dy` unless that is nullptr.
template <typename Storage, typename Act>
void upstream_panels(const typename Storage::Lane* grad, const typename Storage::Lane* y, typename Storage::Lane* dy,
                     int rows, int channels, const UpstreamTables& t, float* panels) {
  for (int row = 0; row < rows; ++row) {
    for_vectors(channels, [&](auto partial, int e, int valid) __attribute__((always_inline)) {
      constexpr bool kPartial = decltype(partial)::value;
      const int64_t at = int64_t{row} * channels + e;
      const Vec v = upstream_vector<Act>(load_map<Storage, kPartial>(grad + at, valid),
                                         load_map<Storage, kPartial>(y + at, valid), t, e);
      if (dy != nullptr) store_map<Storage, kPartial>(dy + at, v, valid);
      store_vec(panels + (int64_t{e / kPanel} * kStemTile + row) * kPanel + e % kPanel, Storage::round(v));
    });
  }
}

template <typename Storage>
void run_stem_backward(const StemBackwardParams& p, const StemPlan& plan, const StemUnit& unit) {
  using Lane = typename Storage::Lane;
  Arena arena(int64_t{plan.panels} * kStemTile * kPanel + PixelRows<Storage>::size(p.image) + 5 * (int64_t{p.e} + 16) + 32);
  float* upstream = arena.take(int64_t{plan.panels} * kStemTile * kPanel);
  PixelRows<Storage> pixels(p.image, arena.take(PixelRows<Storage>::size(p.image)));
  const auto table = [&](const float* from, int row) { return arena.copy(from + int64_t{row} * p.e, p.e); };
  const UpstreamTables tables{table(p.y_bn, 0), table(p.y_bn, 1), table(p.y_bn, 2), table(p.coef, 0), table(p.coef, 1)};
  if (unit.partial != nullptr) {
    for (int64_t i = 0; i < plan.packed_size(); ++i) unit.partial[i] = 0.f;
  }

  const int depth = kStemKernel * p.image.c;
  const int64_t begin = unit.row_begin * p.image.out_w, end = unit.row_end * p.image.out_w;
  for (int64_t position = begin; position < end; position += kStemTile) {
    const int count = static_cast<int>(least<int64_t>(kStemTile, end - position));
    const int64_t at = position * p.e;
    with_activation(p.y_act, [&](auto act) {
      upstream_panels<Storage, decltype(act)>(static_cast<const Lane*>(p.grad) + at, static_cast<const Lane*>(p.y) + at,
                                              p.dy == nullptr ? nullptr : static_cast<Lane*>(p.dy) + at, count, p.e, tables,
                                              upstream);
    });
    if (unit.partial == nullptr) continue;
    Ahead ahead;
    if (const int64_t next = least<int64_t>(kStemTile, end - position - count); next > 0) {
      const int64_t from = at + int64_t{count} * p.e;
      ahead.add(static_cast<const Lane*>(p.grad) + from, next * p.e * sizeof(Lane));
      ahead.add(static_cast<const Lane*>(p.y) + from, next * p.e * sizeof(Lane));
      ahead.spread(kStemKernel * plan.panels);
    }
    for_output_rows(position, count, p.image.out_w, [&](int64_t row, int64_t column, int first, int part) {
      pixels.move_to(row);
      for (int panel = 0; panel < plan.panels; ++panel) {
        const float* b = upstream + (int64_t{panel} * kStemTile + MNET_PLANT(5, first, 0)) * kPanel;
        for (int i = 0; i < kStemKernel; ++i) {
          ahead.step();
          const float* a = pixels.taps(i, column);
          float* c = unit.partial + (int64_t{panel} * plan.depth + i * depth) * kPanel;
          p.e - panel * kPanel > kLanes ? tap_rows<kTapBlock, 2>(a, pixels.pitch(), b, part, depth, c)
                                        : tap_rows<kTapBlock, 1>(a, pixels.pitch(), b, part, depth, c);
        }
      }
    });
  }
}

void stem_backward_unit(const StemBackwardParams& params, Dtype dtype, const StemPlan& plan, const StemUnit& unit) {
  with_storage(dtype, [&](auto storage) { run_stem_backward<decltype(storage)>(params, plan, unit); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
