// Small matrix products on packed panels, for the fused stages of one capability (see simd.h for how it is included).
//
// The products of a 1x1 convolution are narrow (16 to 1280 channels) and sit between element-wise work, so that a
// library's call per tile costs more than it gives.  One operand is packed in panels of kPanel columns, [ceil(N/kPanel)]
// [K][kPanel], zero padded; a panel's kDepth rows fit in half the first-level cache.  The result is one panel, [M]
// [kPanel]: the epilogue reads it from the first-level cache.  Whose registers multiply is in gemm_vector.h and gemm_amx.h.
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
static_assert(kDepth * kPanel * sizeof(float) <= 16 * 1024, "half of a first-level cache of 32 KiB");

#if defined(MNET_CPU_BF16)
constexpr int kPerWord = 2;
#else
constexpr int kPerWord = 1;
#endif
#if defined(MNET_CPU_AMX)
constexpr int kWordBlock = 16;  // depths are padded with zeros to whole tiles
#else
constexpr int kWordBlock = 1;
#endif
constexpr int words(int depth) {
  constexpr int kBlock = kPerWord * kWordBlock;
  return (depth + kBlock - 1) / kBlock * kWordBlock;
}

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
  const int whole = (depth + kPerWord - 1) / kPerWord;
  for (int k = 0; k < words(depth); ++k) {
    for (int j = k < whole ? used : 0; j < kPanel; ++j) to[int64_t{k} * kPanel + j] = 0.f;
  }
  if (stride_n == 1) {
    for (int k = 0; k < whole; ++k) {
      for (int j = 0; j < used; ++j) put(k, j);
    }
    return;
  }
  for (int j = 0; j < used; ++j) {
    for (int k = 0; k < whole; ++k) put(k, j);
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

// Zeros in the words of a right operand beyond its rows (store_deep has written all of a last, incomplete word).
MNET_HD void clear_deep(float* panel, int rows) {
  for (int word = (rows + kPerWord - 1) / kPerWord; word < words(rows); ++word) {
    for (int i = 0; i < kPanel; ++i) panel[word * kPanel + i] = 0.f;
  }
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE

#if defined(MNET_CPU_AMX)
#include "gemm_amx.h"
#else
#include "gemm_vector.h"
#endif
