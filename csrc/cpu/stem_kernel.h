// The stem's kernel of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its positions in tiles.  Three rows of pixels (3 x 226 x 3 x 4 bytes = 8 KiB of an image
// of 224 columns) and the packed weight (27 x 64 bytes, twice that with 16 lanes) are in the first-level cache, and so is
// the tile's panel of results (56 x 64 bytes, or twice that), which is rounded, stored and added to the moments there: the
// image is read once, y is written once and not read.
#pragma once

#include <cstdint>

#include "../common/stem_params.h"
#include "gemm.h"
#include "panel_output.h"
#include "pointwise_tile.h"
#include "simd.h"
#include "stem.h"
#include "stem_tile.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// The weight in panels, [panel][tap][kPanel], zero padded; taps in the order of pixels: kernel row, kernel column, image
// channel.
template <typename Storage>
void pack_taps(const StemParams& p, const StemPlan& plan, float* to) {
  for (int panel = 0; panel < plan.panels; ++panel) {
    for (int tap = 0; tap < plan.depth; ++tap) {
      const int c = tap % p.image.c, j = tap / p.image.c % kStemKernel, i = tap / p.image.c / kStemKernel;
      const int64_t at = c * p.weight_stride_c + i * p.weight_stride_h + j * p.weight_stride_w;
      for (int lane = 0; lane < kPanel; ++lane, ++to) {
        const int64_t e = int64_t{panel} * kPanel + lane;
        *to = e < p.e ? Storage::scalar(p.weight, at + e * p.weight_stride_e) : 0.f;
      }
    }
  }
}

template <typename Storage>
void run_stem(const StemParams& p, const StemPlan& plan, const StemUnit& unit) {
  using Lane = typename Storage::Lane;
  Arena arena(plan.packed_size() + PixelRows<Storage>::size(p.image) + int64_t{plan.panels} * kStemTile * kPanel + 32);
  float* weight = arena.take(plan.packed_size());
  float* result = arena.take(int64_t{plan.panels} * kStemTile * kPanel);
  PixelRows<Storage> pixels(p.image, arena.take(PixelRows<Storage>::size(p.image)));
  pack_taps<Storage>(p, plan, weight);
  if (unit.mean != nullptr) {
    for (int i = 0; i < 2 * plan.padded_columns(); ++i) unit.mean[i] = 0.0;
  }

  const int depth = kStemKernel * p.image.c;
  const int64_t begin = unit.row_begin * p.image.out_w, end = unit.row_end * p.image.out_w;
  for (int64_t position = begin; position < end; position += kStemTile) {
    const int count = static_cast<int>(least<int64_t>(kStemTile, end - position));
    Lane* const y = static_cast<Lane*>(p.y) + position * p.e;
    Ahead ahead;
    if (const int64_t next = least<int64_t>(kStemTile, end - position - count); next > 0) {
      ahead.add(y + int64_t{count} * p.e, next * p.e * sizeof(Lane));
      ahead.spread(int64_t{plan.panels} * (count / kRowBlock + 1));
    }
    for_output_rows(position, count, p.image.out_w, [&](int64_t row, int64_t column, int first, int part) {
      pixels.move_to(row);
      for (int panel = 0; panel < plan.panels; ++panel) {
        const float* b = weight + int64_t{panel} * plan.depth * kPanel;
        float* c = result + (int64_t{panel} * kStemTile + MNET_PLANT(4, first, 0)) * kPanel;
        p.e - panel * kPanel > kLanes ? stem_rows<kRowBlock, 2>(pixels, column, b, depth, part, c, ahead)
                                      : stem_rows<2 * kRowBlock, 1>(pixels, column, b, depth, part, c, ahead);
      }
    });
    for (int panel = 0; panel < plan.panels; ++panel) {
      const int e = panel * kPanel;
      store_panel<Storage>(result + int64_t{panel} * kStemTile * kPanel, count, least(kPanel, p.e - e), y + e, p.e,
                           unit.mean == nullptr ? nullptr : unit.mean + e, plan.padded_columns(), position - begin);
    }
  }
}

void stem_unit(const StemParams& params, Dtype dtype, const StemPlan& plan, const StemUnit& unit) {
  with_storage(dtype, [&](auto storage) { run_stem<decltype(storage)>(params, plan, unit); });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
