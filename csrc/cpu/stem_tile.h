// What the stem's kernels share: rows of pixels in float32, and the products that read their 3x3 neighbourhoods where they
// are (see simd.h for how it is included).
//
// A padded row is [1 + w + 1][c] values.  An output's neighbourhood is 3 c values in a row in each of three rows, those of
// the next output begin `stride` pixels further on: both products take a row of pixels for a matrix whose rows overlap, so
// that no columns are ever built, and an input row is read and converted once for all the output rows that need it.
#pragma once

#include <cstdint>

#include "../common/plant.h"
#include "../common/stem_params.h"
#include "gemm.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// Positions of a tile: blocks of 14 and 28 fit, and a run of the weight gradient is short (gemm.h).  Maps of 112 and 56
// columns have no rest.
constexpr int kStemTile = 56;
static_assert(kStemTile % kRowBlock == 0 || kLanes < 16, "whole blocks");
static_assert(kStemTile <= kShortDepth, "one float32 run");

// The rows of pixels that an output row reads, in a ring.
template <typename Storage>
class PixelRows {
 public:
  using Lane = typename Storage::Lane;
  static int64_t row_size(const StemImage& image) { return (int64_t{image.w} + 2) * image.c; }
  static int64_t size(const StemImage& image) { return kStemKernel * row_size(image); }

  PixelRows(const StemImage& image, float* memory) : image_(image), memory_(memory) {}

  // Makes the rows of output row `row` (counted over the batch, in ascending order) those of taps().
  void move_to(int64_t row) {
    if (row == row_) return;
    const int64_t top = row % image_.out_h * image_.stride - 1;
    const bool next = row == row_ + 1 && top != -1 && row_ >= 0;
    const int64_t loaded = MNET_PLANT(2, next, row_ >= 0) ? top + kStemKernel - image_.stride : top;
    for (int64_t h = loaded; h < top + kStemKernel; ++h) load(row / image_.out_h, h, slot(h));
    for (int i = 0; i < kStemKernel; ++i) rows_[i] = slot(top + i);
    row_ = row;
  }

  // The first value of kernel row i of output column `column`.
  const float* taps(int i, int64_t column) const { return rows_[i] + column * pitch(); }
  int64_t pitch() const { return int64_t{image_.stride} * image_.c; }  // from one output's to the next one's

 private:
  float* slot(int64_t h) const { return memory_ + (h + kStemKernel) % kStemKernel * row_size(image_); }

  void load(int64_t n, int64_t h, float* to) const {
    const int c = image_.c;
    const int64_t size = row_size(image_);
    if (h < 0 || h >= image_.h) {
      for (int64_t i = 0; i < size; ++i) to[i] = 0.f;
      return;
    }
    for (int i = 0; i < c; ++i) to[i] = to[size - c + i] = 0.f;
    const Lane* from = static_cast<const Lane*>(image_.x) + n * image_.stride_n + h * image_.stride_h;
    to += MNET_PLANT(3, c, 0);
    if (image_.stride_c == 1 && image_.stride_w == c) {
      load_values(from, int64_t{image_.w} * c, [&](int64_t i, Vec v, auto partial, int valid) {
        copy_lanes<decltype(partial)::value, float>(to + i, &v, valid);
      });
      return;
    }
    for (int i = 0; i < c; ++i) {
      const Lane* plane = from + i * image_.stride_c;
      if (image_.stride_w == 1) {
        load_values(plane, image_.w, [&](int64_t w, Vec v, auto, int valid) {
          float values[kLanes];
          store_vec(values, v);
          for (int lane = 0; lane < valid; ++lane) to[(w + lane) * c + i] = values[lane];
        });
      } else {
        for (int64_t w = 0; w < image_.w; ++w) to[w * c + i] = Storage::scalar(plane, w * image_.stride_w);
      }
    }
  }

  // f(index, values, Flag<partial>, valid) for each vector of `count` values side by side.
  template <typename F>
  static MNET_HD void load_values(const Lane* from, int64_t count, F&& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, load_map<Storage, false>(from + i, kLanes), Flag<false>{}, kLanes);
    const int rest = static_cast<int>(count - i);
    if (rest > 0) f(i, load_map<Storage, true>(from + i, rest), Flag<true>{}, rest);
  }

  const StemImage image_;
  float* const memory_;
  int64_t row_ = -2;
  const float* rows_[kStemKernel] = {};
};

// f(row, column, first, count) for the parts of positions [position, position + count) that lie in one output row; `first`
// counts from `position`.
template <typename F>
void for_output_rows(int64_t position, int count, int64_t out_w, F&& f) {
  for (int first = 0; first < count;) {
    const int64_t row = (position + first) / out_w, column = position + first - row * out_w;
    const int part = static_cast<int>(least<int64_t>(count - first, out_w - column));
    f(row, column, first, part);
    first += part;
  }
}

// C[kRows, kPanel] = A B for the first kVecs vectors of the panel.  A's rows are `pitch` apart, each of three pieces of
// `depth` values that begin at a[0], a[1] and a[2]; B is a panel of three times `depth` rows.
template <int kRows, int kVecs>
MNET_HD void stem_block(const float* const* a, int64_t pitch, const float* b, int depth, float* c) {
  Vec sum[kRows][kVecs];
  MNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec{};
  }
  int piece = 0;
  do {  // `do`: see gemm.h
    const float* taps = a[piece];
    const float* const end = b + int64_t{depth} * kPanel;
    do {
      Vec row[kVecs];
      MNET_UNROLL
      for (int v = 0; v < kVecs; ++v) row[v] = load_vec(b + v * kLanes);
      MNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = taps[r * pitch];
        MNET_UNROLL
        for (int v = 0; v < kVecs; ++v) sum[r][v] = sum[r][v] + factor * row[v];
      }
      ++taps;
      b += kPanel;
    } while (b != end);
  } while (++piece < kStemKernel);
  MNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) store_vec(c + r * kPanel + v * kLanes, sum[r][v]);
  }
}

// The same for `rows` outputs from a column on: as many blocks of kRows as fit, the rest in smaller ones.
template <int kRows, int kVecs, typename Pixels>
void stem_rows(const Pixels& pixels, int64_t column, const float* b, int depth, int rows, float* c, Ahead& ahead) {
  for (; rows >= kRows; rows -= kRows) {
    ahead.step();
    const float* const a[] = {pixels.taps(0, column), pixels.taps(1, column), pixels.taps(2, column)};
    stem_block<kRows, kVecs>(a, pixels.pitch(), b, depth, c);
    column += kRows;
    c += kRows * kPanel;
  }
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    if (rows > 0) stem_rows<kFewer, kVecs>(pixels, column, b, depth, rows, c, ahead);
  }
}

// C[rows, kPanel] += A^T B for one kernel row: A's rows are positions, `pitch` apart, and `rows` of the values that follow
// each other there count, 3 of every image channel; B is a panel of `positions` rows.
template <int kRows, int kVecs>
void tap_rows(const float* a, int64_t pitch, const float* b, int positions, int rows, float* c) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_block<kRows, kVecs, true>(a, pitch, b, positions, c, true, Ahead::Walk{reinterpret_cast<const char*>(a), 0});
    a += kRows;
    c += kRows * kPanel;
  }
  if constexpr (kRows > kStemKernel) {
    if (rows > 0) tap_rows<kRows - kStemKernel, kVecs>(a, pitch, b, positions, rows, c);
  }
}

// 9 of an image with 3 channels, where as many registers are there.
#if MNET_CPU_LANES == 16
constexpr int kTapBlock = 9;
#else
constexpr int kTapBlock = kRowBlock >= 6 ? 6 : 3;
#endif

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
