// The products of gemm.h, which includes this, in vector registers: a block of kRowBlock x kPanel results lives in them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

#if MNET_CPU_LANES == 16
constexpr int kRowBlock = 14;  // 28 of 32 registers
#elif defined(MNET_CPU_F16C) || defined(__aarch64__)
constexpr int kRowBlock = 6;  // 12 of 16 registers (24 of 32 half as wide)
#else
constexpr int kRowBlock = 2;  // 8 of 16 registers half as wide
#endif

MNET_HD Vec multiply_add(Vec sum, float word, Vec row) {
#if defined(MNET_CPU_BF16)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)_mm512_set1_ps(word));
#else
  return sum + word * row;
#endif
}

struct TileConfiguration {
  TileConfiguration() {}  // nothing to configure (gemm_amx.h)
};

// C[kRows, kPanel] (+)= A[kRows, depth] B[depth, kPanel], the first kVecs vectors of the panel.  kTransposed: A is
// stored [depth, kRows]; `lda` is the distance of A's stored rows.  depth is at least 1.
template <int kRows, int kVecs, bool kTransposed>
MNET_HD void multiply_block(const float* a, int64_t lda, const float* b, int depth, float* c, bool accumulate,
                            Ahead::Walk ahead) {
  Vec sum[kRows][kVecs];
  MNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[r][v] = Vec{};
  }
  const float* const end = b + int64_t{depth} * kPanel;
  do {  // not `for`: a loop that may not run at all makes the compiler keep a second copy of the sums in memory
    ahead.step();
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
    multiply_block<kRows, kVecs, kTransposed>(a, lda, b, depth, c, accumulate, ahead.walk(depth, a));
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
  // 16 or 24 rows (channels) are blocks of 8, not one of 14 and others too small to keep the multipliers busy.
  constexpr int kNarrow = least(8, kRowBlock);
  const auto multiply = columns <= kLanes                                  ? multiply_rows<2 * kRowBlock, 1, kTransposed>
                        : kTransposed && rows <= 24 && rows % kNarrow == 0 ? multiply_rows<kNarrow, 2, kTransposed>
                                                                           : multiply_rows<kRowBlock, 2, kTransposed>;
  // One float32 sum over many positions would lose more than a library's, which sums by blocks.
  const int step = kTransposed ? kShortDepth / kPerWord : depth;
  for (int k = 0; k < depth; k += step) {
    const int64_t skipped = k;
    multiply(a + skipped * (kTransposed ? lda : 1), lda, b + skipped * kPanel, least(step, depth - k), rows, c,
             accumulate || k > 0, ahead);
  }
}

// How many blocks (Ahead) multiply_panel takes for so many rows; multiply_deep, multiply_along_rows.
inline int64_t row_blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }
inline int64_t deep_blocks(int rows, int depth) { return row_blocks(rows) * ((depth + kDepth - 1) / kDepth); }
inline int64_t along_blocks(int channels, int rows) { return row_blocks(channels) * ((rows + kShortDepth - 1) / kShortDepth); }

// A product over a long depth, in steps that keep B's part of the panel in the first-level cache.
inline void multiply_deep(const float* a, int64_t lda, const float* b, int depth, int rows, int columns, float* c,
                          Ahead& ahead) {
  for (int k = 0; k < depth; k += kDepth) {
    multiply_panel<false>(a + k, lda, b + int64_t{k} * kPanel, least(kDepth, depth - k), rows, columns, c, k > 0,
                          ahead);
  }
}

// C[channels, kPanel] (+)= A^T B along the rows of a tile: `deep` is what rows_as_depth returned, B what store_deep wrote.
inline void multiply_along_rows(const float* deep, int64_t stride, int, const float* b, int rows, int channels, int columns,
                                float* c, bool accumulate, Ahead& ahead) {
  multiply_panel<true>(deep, stride * kPerWord, b, words(rows), channels, columns, c, accumulate, ahead);
}

// Floats that rows_as_depth needs for tiles of so many rows.
inline int64_t turned_floats(int tile_rows, int64_t stride, int) { return kPerWord == 1 ? 0 : tile_rows * stride; }

// The left operand of a product along the rows: words of rows 2i and 2i + 1 of a tile, [words(rows)][stride * kPerWord].
// Where a word is one value that is the tile itself, and `to` is not used.
inline const float* rows_as_depth(const float* tile, int64_t stride, int, int rows, int channels, float* to) {
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
