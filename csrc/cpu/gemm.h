// Small matrix products on packed panels, for the fused stages of one capability (see simd.h for how it is included).
//
// The products of a 1x1 convolution are narrow (16 to 1280 channels) and sit between element-wise work, so that a
// library's call per tile costs more than it gives.  One operand is packed in panels of kPanel columns, [ceil(N/kPanel)]
// [K][kPanel], zero padded; a panel's kDepth rows fit in half the first-level cache.  The result is one panel, [M]
// [kPanel]: the epilogue reads it from the first-level cache.  A block of kRowBlock x kPanel results lives in registers.
//
// Operands are made of words of the size of a float: a float or, where the processor multiplies them in pairs, two
// bfloat16 values that follow each other along the depth (the first in the lower half; an odd depth ends with a zero;
// the instruction takes subnormal values for zero).
// Depths, and the distances of rows, count words.  Results are floats.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

constexpr int kPanel = 2 * kLanes;
constexpr int kDepth = 4096 / kPanel;
constexpr int kShortDepth = 64;  // values, whatever a word holds
#if MNET_CPU_LANES == 16
constexpr int kRowBlock = 14;  // 28 of 32 registers
#elif defined(MNET_CPU_F16C) || defined(__aarch64__)
constexpr int kRowBlock = 6;  // 12 of 16 registers (24 of 32 half as wide)
#else
constexpr int kRowBlock = 2;  // 8 of 16 registers half as wide
#endif
static_assert(kDepth * kPanel * sizeof(float) <= 16 * 1024, "half of a first-level cache of 32 KiB");

#if defined(MNET_CPU_BF16)
constexpr int kPerWord = 2;
MNET_HD Vec multiply_add(Vec sum, float word, Vec row) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)_mm512_set1_ps(word));
}
#else
constexpr int kPerWord = 1;
MNET_HD Vec multiply_add(Vec sum, float word, Vec row) { return sum + word * row; }
#endif
constexpr int words(int depth) { return (depth + kPerWord - 1) / kPerWord; }

MNET_HD Vec load_vec(const float* from) { return load_lanes<false, float, Vec>(from, kLanes); }
MNET_HD void store_vec(float* to, Vec v) { copy_lanes<false, float>(to, &v, kLanes); }

// Memory that the next tile reads or writes, touched line by line between the blocks of this tile's products: they leave
// the memory idle, and the element-wise work in between has too little arithmetic to hide it.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) {
    ranges_[count_++] = {static_cast<const char*>(from), static_cast<const char*>(from) + bytes};
    lines_ += bytes / kLine;
  }
  void spread(int64_t blocks) { lines_each_ = static_cast<int>((lines_ + blocks - 1) / blocks); }
  MNET_HD void step() {
    for (int i = 0; i < lines_each_ && current_ < count_; ++i) {
      Range& range = ranges_[current_];
      __builtin_prefetch(range.at, 0, 2);
      range.at += kLine;
      current_ += range.at >= range.end;
    }
  }

 private:
  static constexpr int kLine = 64;
  struct Range {
    const char *at, *end;
  };
  Range ranges_[4];
  int count_ = 0, current_ = 0, lines_each_ = 0;
  int64_t lines_ = 0;
};

// C[kRows, kPanel] (+)= A[kRows, depth] B[depth, kPanel], the first kVecs vectors of the panel.  kTransposed: A is
// stored [depth, kRows]; `lda` is the distance of A's stored rows.  depth is at least 1.
template <int kRows, int kVecs, bool kTransposed>
MNET_HD void multiply_block(const float* a, int64_t lda, const float* b, int depth, float* c, bool accumulate) {
  Vec sum[kRows][kVecs];
  MNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec{};
  }
  const float* const end = b + int64_t{depth} * kPanel;
  do {  // not `for`: a loop that may not run at all makes the compiler keep a second copy of the sums in memory
    Vec row[kVecs];
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) row[v] = load_vec(b + v * kLanes);
    MNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float factor = kTransposed ? a[r] : a[r * lda];
      MNET_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add(sum[r][v], factor, row[v]);
    }
    a += kTransposed ? lda : 1;
    b += kPanel;
  } while (b != end);
  if (accumulate) {  // only now: the sum of a short run loses less than one sum over everything
    MNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MNET_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[r][v] = sum[r][v] + load_vec(c + r * kPanel + v * kLanes);
    }
  }
  MNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) store_vec(c + r * kPanel + v * kLanes, sum[r][v]);
  }
}

// The same for any number of rows: as many blocks of kRows as fit, the rest in smaller ones.
template <int kRows, int kVecs, bool kTransposed>
void multiply_rows(const float* a, int64_t lda, const float* b, int depth, int rows, float* c, bool accumulate,
                   Ahead& ahead) {
  const int64_t step = kRows * (kTransposed ? 1 : lda);
  for (; rows >= kRows; rows -= kRows) {
    ahead.step();
    multiply_block<kRows, kVecs, kTransposed>(a, lda, b, depth, c, accumulate);
    a += step;
    c += kRows * kPanel;
  }
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    if (rows > 0) multiply_rows<kFewer, kVecs, kTransposed>(a, lda, b, depth, rows, c, accumulate, ahead);
  }
}

// C[rows, kPanel] (+)= A B for one panel with `columns` columns in use.  A half-used panel takes twice the rows at once.
template <bool kTransposed>
void multiply_panel(const float* a, int64_t lda, const float* b, int depth, int rows, int columns, float* c,
                    bool accumulate, Ahead& ahead) {
  const auto multiply = columns > kLanes ? multiply_rows<kRowBlock, 2, kTransposed>
                                         : multiply_rows<2 * kRowBlock, 1, kTransposed>;
  // One float32 sum over many positions would lose more than a library's, which sums by blocks.
  const int step = kTransposed ? kShortDepth / kPerWord : depth;
  for (int k = 0; k < depth; k += step) {
    const int64_t skipped = k;
    multiply(a + skipped * (kTransposed ? lda : 1), lda, b + skipped * kPanel, least(step, depth - k), rows, c,
             accumulate || k > 0, ahead);
  }
}

// A product over a long depth, in steps that keep B's part of the panel in the first-level cache.
inline void multiply_deep(const float* a, int64_t lda, const float* b, int depth, int rows, int columns, float* c,
                          Ahead& ahead) {
  for (int k = 0; k < depth; k += kDepth) {
    multiply_panel<false>(a + k, lda, b + int64_t{k} * kPanel, least(kDepth, depth - k), rows, columns, c, k > 0,
                          ahead);
  }
}

// The word of a column of B that holds rows k, k + 1, ... of `depth`; `at` is the element of row k.
template <typename Storage>
MNET_HD float packed_word(const void* from, int64_t at, int64_t stride_k, bool last) {
#if defined(MNET_CPU_BF16)
  const auto* elements = static_cast<const uint16_t*>(from);
  const uint32_t bits = elements[at] | (last ? 0u : uint32_t{elements[at + stride_k]} << 16);
  float word;
  std::memcpy(&word, &bits, sizeof word);
  return word;
#else
  (void)stride_k;
  (void)last;
  return Storage::scalar(from, at);
#endif
}

// Packs columns [first, first + kPanel) of B[depth, columns], whose elements are storage values at the given strides.
template <typename Storage>
void pack_panel(const void* from, int64_t stride_k, int64_t stride_n, int depth, int first, int columns, float* to) {
  const int used = least(kPanel, columns - first);
  const auto put = [&](int k, int j) __attribute__((always_inline)) {
    const int64_t at = int64_t{k} * kPerWord * stride_k + (first + j) * stride_n;
    to[int64_t{k} * kPanel + j] = packed_word<Storage>(from, at, stride_k, k * kPerWord + 1 == depth);
  };
  for (int k = 0; k < words(depth); ++k) {
    for (int j = used; j < kPanel; ++j) to[int64_t{k} * kPanel + j] = 0.f;
  }
  if (stride_n == 1) {
    for (int k = 0; k < words(depth); ++k) {
      for (int j = 0; j < used; ++j) put(k, j);
    }
    return;
  }
  for (int j = 0; j < used; ++j) {
    for (int k = 0; k < words(depth); ++k) put(k, j);
  }
}

// Values [c, c + kLanes) of a row of a left operand, or of one row of a panel that is multiplied along its rows.
// kExact: they are values of the storage already.
template <typename Storage, bool kExact>
MNET_HD void store_row(float* row, int64_t c, Vec v) {
#if defined(MNET_CPU_BF16)
  const Packed packed = Storage::pack(v);
  std::memcpy(reinterpret_cast<Packed*>(row) + c / kLanes, &packed, sizeof packed);
#else
  store_vec(row + c, kExact ? v : Storage::round(v));
#endif
}

// One vector of row `row` of a right operand that is as deep as it has rows: rows are stored in ascending order.
template <typename Storage, bool kExact>
MNET_HD void store_deep(float* panel, int row, Vec v) {
#if defined(MNET_CPU_BF16)
  float* to = panel + row / 2 * kPanel;
  const Bits value = widen(Storage::pack(v));
  store_vec(to, float_of(row % 2 == 0 ? value : bits_of(load_vec(to)) | value << 16));
#else
  store_vec(panel + row * kPanel, kExact ? v : Storage::round(v));
#endif
}

// The left operand of a product along the rows: words of rows 2i and 2i + 1 of a tile, [words(rows)][stride * kPerWord].
// Where a word is one value that is the tile itself, and `to` is not used.
inline const float* rows_as_depth(const float* tile, int64_t stride, int rows, int channels, float* to) {
#if defined(MNET_CPU_BF16)
  for (int row = 0; row < rows; row += 2) {
    const auto* upper = reinterpret_cast<const Packed*>(tile + row * stride);
    const auto* lower = reinterpret_cast<const Packed*>(tile + (row + 1) * stride);
    for (int c = 0; c < channels; c += kLanes) {
      Packed a, b{};
      std::memcpy(&a, upper + c / kLanes, sizeof a);
      if (row + 1 < rows) std::memcpy(&b, lower + c / kLanes, sizeof b);
      store_vec(to + row * stride + c, float_of(widen(a) | widen(b) << 16));
    }
  }
  return to;
#else
  (void)stride, (void)rows, (void)channels, (void)to;
  return tile;
#endif
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
