// What the kernels of algebraic mode share: rows of x - shift as the left operand of a product, and the packed weight of
// the expand layer (see simd.h for how it is included).
#pragma once

#include <cstdint>

#include "../common/expand_params.h"
#include "../common/plant.h"
#include "gemm.h"
#include "pointwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

constexpr int kVecs = kPanel / kLanes;

// Positions of x - shift in float32, rounded to storage.  Where that is x itself it is read in place, else a tile holds it.
template <typename Storage>
class ShiftedRows {
  using Lane = typename Storage::Lane;

 public:
  static int64_t floats(int64_t rows, int c) { return (rows + 1) * tile_stride(c); }  // of the arena

  ShiftedRows(Arena& arena, const void* x, const float* shift, int c, int64_t rows)
      : x_(static_cast<const Lane*>(x)), channels_(c), stride_(tile_stride(c)), tile_(arena.take(rows * stride_)) {
    for (int i = 0; i < c; ++i) shifted_ = shifted_ || shift[i] != 0.f;
    shift_ = arena.copy(shift, c);
    if constexpr (kInPlace) {
      if (!shifted_) stride_ = c;
    }
  }

  int64_t stride() const { return stride_; }

  // Positions [first, first + count).
  const float* rows(int64_t first, int count) {
    const Lane* from = x_ + first * channels_;
    if constexpr (kInPlace) {
      if (!shifted_) return from;
    }
    for (int row = 0; row < count; ++row) {
      for_vectors(channels_, [&](auto partial, int c, int valid) __attribute__((always_inline)) {
        Vec value = load_map<Storage, decltype(partial)::value>(from + int64_t{row} * channels_ + c, valid);
        if (MNET_PLANT(13, shifted_, false)) value = Storage::round(value - load_vec(shift_ + c));
        store_vec(tile_ + row * stride_ + c, value);
      });
    }
    return tile_;
  }

  const Lane* at(int64_t position) const { return x_ + position * channels_; }

 private:
  static constexpr bool kInPlace = sizeof(Lane) == sizeof(float);

  const Lane* x_;
  int channels_;
  int64_t stride_;
  float* tile_;
  const float* shift_;
  bool shifted_ = false;
};

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
