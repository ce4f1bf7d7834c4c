// What the pointwise stages share: tiles of activated positions and of upstream gradients in float32, and their tables
// (see simd.h for how it is included).
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/activation.h"
#include "gemm.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

struct alignas(64) CacheLine {
  float value[16];
};

// Distance of a tile's rows in floats: an odd number of cache lines, so that a column's rows fall into different sets.
MNET_HD int64_t tile_stride(int channels) { return 16 * (int64_t{channels + 15} / 16 | 1); }

// Zeros where rows of words(channels) have padding, for products over whole blocks of words.
MNET_HD void clear_padding(float* tile, int rows, int64_t stride) {
  if constexpr (kWordBlock > 1) {
    for (int64_t i = 0; i < rows * stride; ++i) tile[i] = 0.f;
  }
}

// Hands out pieces of a Scratch, each on its own cache lines.
class Arena {
 public:
  explicit Arena(int64_t floats) : scratch_(floats / 16), next_(scratch_.memory->value) {}
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += (floats + 15) / 16 * 16;
    return piece;
  }
  // A table's row, padded with zeros to whole cache lines.
  const float* copy(const float* from, int channels) {
    float* to = take(channels);
    const int padded = (channels + 15) / 16 * 16;
    for (int i = 0; i < padded; ++i) to[i] = i < channels ? from[i] : 0.f;
    return to;
  }

 private:
  Scratch<CacheLine> scratch_;
  float* next_;
};

// f(image, first, count) for the parts of rows [row, row + rows) that lie in one image; first counts from `row`.
template <typename F>
void for_images(int64_t row, int rows, int64_t image_positions, F&& f) {
  for (int first = 0; first < rows;) {
    const int64_t image = (row + first) / image_positions;
    const int count = static_cast<int>(least<int64_t>(rows - first, (image + 1) * image_positions - row - first));
    f(image, first, count);
    first += count;
  }
}

// f(Flag<partial>, column, valid) for each vector of columns [0, columns).
template <typename F>
MNET_HD void for_vectors(int columns, F&& f) {
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) f(Flag<false>{}, column, kLanes);
  if (column < columns) f(Flag<true>{}, column, columns - column);
}

template <typename Storage, typename Act, bool kNormalized, bool kGated>
void activate_rows(const typename Storage::Lane* x, int rows, int channels, const float* scale, const float* shift,
                   const float* gate, float* tile, int64_t stride) {
  // Row by row, although rows could share a load of the coefficients: memory is read in its order.
  for (int row = 0; row < rows; ++row) {
    for_vectors(channels, [&](auto partial, int c, int valid) __attribute__((always_inline)) {
      constexpr bool kPartial = decltype(partial)::value;
      Vec z = load_map<Storage, kPartial>(x + int64_t{row} * channels + c, valid);
      if constexpr (kNormalized) z = Act::fwd(Vec(load_vec(scale + c) * z + load_vec(shift + c)));
      if constexpr (kGated) z = z * load_lanes<kPartial, float, Vec>(gate + c, valid);
      store_row<Storage, !(kNormalized || kGated)>(tile + row * stride, c, z);
    });
  }
}

// z = act(scale * x + shift) [* gate] of rows [row, row + rows), rounded to storage; scale nullptr: x as it is.
template <typename Storage>
void activate_tile(const typename Storage::Lane* x, int64_t row, int rows, int channels, const float* scale,
                   const float* shift, Activation act, const float* gate, int64_t image_positions, float* tile,
                   int64_t stride) {
  const auto run = [&](auto function, const float* factor, int first, int count) {
    function(x + (row + first) * channels, count, channels, scale, shift, factor, tile + first * stride, stride);
  };
  with_activation(scale == nullptr ? Activation::kIdentity : act, [&](auto a) {
    using Act = decltype(a);
    if (gate == nullptr) {
      run(scale == nullptr ? activate_rows<Storage, Identity, false, false> : activate_rows<Storage, Act, true, false>,
          nullptr, 0, rows);
      return;
    }
    for_images(row, rows, image_positions, [&](int64_t image, int first, int count) {
      run(scale == nullptr ? activate_rows<Storage, Identity, false, true> : activate_rows<Storage, Act, true, true>,
          gate + image * channels, first, count);
    });
  });
}

// The upstream's tables, each padded to whole cache lines.
struct UpstreamTables {
  const float *scale, *shift, *mean, *b, *c;
};

// dy of one vector of values and their gradients; the tables are those of channel e on (schema.py).
template <typename Act>
MNET_HD Vec upstream_vector(Vec g, Vec value, const UpstreamTables& t, int e) {
  const Vec scale = load_vec(t.scale + e), b = load_vec(t.b + e), c = load_vec(t.c + e);
  if constexpr (Act::kCode != Activation::kIdentity) g = g * Act::bwd(Vec(scale * value + load_vec(t.shift + e)));
  return scale * g + b * (value - load_vec(t.mean + e)) + c;
}

// One gradient a channel, of every row.
struct SameGradient {
  const float* values;
};

// dy of rows that `grad` (or SameGradient) and `y` point to, rounded to storage.
template <typename Storage, typename Act, typename Gradient>
void upstream_rows(Gradient grad, const typename Storage::Lane* y, int rows, int channels, const UpstreamTables& t,
                   float* tile, int64_t stride) {
  for (int row = 0; row < rows; ++row) {
    for_vectors(channels, [&](auto partial, int e, int valid) __attribute__((always_inline)) {
      const int64_t at = int64_t{row} * channels + e;
      constexpr bool kPartial = decltype(partial)::value;
      Vec g;
      if constexpr (std::is_same_v<Gradient, SameGradient>) {
        g = load_lanes<kPartial, float, Vec>(grad.values + e, valid);
      } else {
        g = load_map<Storage, kPartial>(grad + at, valid);
      }
      store_row<Storage, false>(tile + row * stride, e,
                                upstream_vector<Act>(g, load_map<Storage, kPartial>(y + at, valid), t, e));
    });
  }
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
