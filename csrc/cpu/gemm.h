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

// Memory that the next tile reads or writes, touched line by line during this tile's products: they leave the memory
// idle, and the element-wise work in between has too little arithmetic to hide it.
class Ahead {
 public:
  void add(const void* from, int64_t bytes) {
    ranges_[count_++] = {static_cast<const char*>(from), static_cast<const char*>(from) + bytes};
    lines_ += (bytes + kLine - 1) / kLine;
  }
  // The products come in so many blocks, or in none.
  void spread(int64_t blocks) { lines_each_ = blocks > 0 ? static_cast<int>((lines_ + blocks - 1) / blocks) : 0; }
  // One block's lines at once.
  MNET_HD void step() {
    for (int i = 0; i < lines_each_ && current_ < count_; ++i) {
      Range& range = ranges_[current_];
      __builtin_prefetch(range.at, 0, 2);
      range.at += kLine;
      current_ += range.at >= range.end;
    }
  }
  // One block's lines, for a loop that touches `at` and moves it by `bytes` at each of so many steps: a burst of requests
  // would keep the block's own loads waiting.
  struct Walk {
    const char* at;
    int64_t bytes;
    MNET_HD void step() {
      __builtin_prefetch(at, 0, 2);
      at += bytes;
    }
  };
  MNET_HD Walk walk(int steps, const void* elsewhere) {
    if (lines_each_ == 0 || current_ == count_) return {static_cast<const char*>(elsewhere), 0};
    Range& range = ranges_[current_];
    int lines = static_cast<int>(least<int64_t>(lines_each_, (range.end - range.at + kLine - 1) / kLine));
    for (; lines > steps; --lines) {
      __builtin_prefetch(range.at, 0, 2);
      range.at += kLine;
    }
    const Walk walk{range.at, (lines * kLine + steps - 1) / steps};
    range.at += int64_t{lines} * kLine;
    current_ += range.at >= range.end;
    return walk;
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

#if MNET_CPU_LANES == 16
// Transposes 16 x 16 words.
MNET_HD void transpose_words(Vec (&v)[16]) {
  const auto exchange = [&](auto distance, auto low, auto high) __attribute__((always_inline)) {
    constexpr int kDistance = decltype(distance)::value;
    MNET_UNROLL
    for (int i = 0; i < 16; ++i) {
      if ((i & kDistance) != 0) continue;
      const Vec a = v[i], b = v[i + kDistance];
      v[i] = low(a, b);
      v[i + kDistance] = high(a, b);
    }
  };
#define MNET_SHUFFLE(...) [](Vec a, Vec b) __attribute__((always_inline)) { return __builtin_shufflevector(a, b, __VA_ARGS__); }
  exchange(Size<1>{}, MNET_SHUFFLE(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
           MNET_SHUFFLE(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  exchange(Size<2>{}, MNET_SHUFFLE(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
           MNET_SHUFFLE(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  exchange(Size<4>{}, MNET_SHUFFLE(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
           MNET_SHUFFLE(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  exchange(Size<8>{}, MNET_SHUFFLE(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
           MNET_SHUFFLE(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
#undef MNET_SHUFFLE
}

// 16 words of a column whose values follow each other.
template <typename Storage>
MNET_HD Vec column_words(const void* from, int64_t at) {
#if defined(MNET_CPU_BF16)
  Vec words;
  std::memcpy(&words, static_cast<const uint16_t*>(from) + at, sizeof words);
  return words;
#else
  return load_map<Storage, false>(static_cast<const typename Storage::Lane*>(from) + at, kLanes);
#endif
}
#endif

// Packs columns [first, first + kPanel) of B[depth, columns], whose elements are storage values at the given strides.
template <typename Storage>
void pack_panel(const void* from, int64_t stride_k, int64_t stride_n, int depth, int first, int columns, float* to) {
  const int used = least(kPanel, columns - first);
  const auto word = [&](int k, int j) __attribute__((always_inline)) {
    const int64_t at = int64_t{k} * kPerWord * stride_k + (first + j) * stride_n;
    return packed_word<Storage>(from, at, stride_k, k * kPerWord + 1 == depth);
  };
  const int whole = (depth + kPerWord - 1) / kPerWord;
  for (int k = 0; k < words(depth); ++k) {
    for (int j = k < whole ? used : 0; j < kPanel; ++j) to[int64_t{k} * kPanel + j] = 0.f;
  }
  if (stride_n == 1) {
    for (int k = 0; k < whole; ++k) {
      for (int j = 0; j < used; ++j) to[int64_t{k} * kPanel + j] = word(k, j);
    }
    return;
  }
  // A column's words lie together, a panel's rows far apart: some of every column are turned round at a time.
  constexpr int kTurned = 16;
  for (int begin = 0; begin < whole; begin += kTurned) {
    const int count = least(kTurned, whole - begin);
    float* const rows = to + int64_t{begin} * kPanel;
    int j = 0;
#if MNET_CPU_LANES == 16
    for (; stride_k == 1 && (begin + kTurned) * kPerWord <= depth && j + 16 <= used; j += 16) {
      Vec v[16];
      MNET_UNROLL
      for (int i = 0; i < 16; ++i) v[i] = column_words<Storage>(from, begin * kPerWord + (first + j + i) * stride_n);
      transpose_words(v);
      MNET_UNROLL
      for (int i = 0; i < 16; ++i) store_vec(rows + i * kPanel + j, v[i]);
    }
#endif
    float turned[kPanel][kTurned];
    for (int column = j; column < used; ++column) {
      for (int i = 0; i < count; ++i) turned[column][i] = word(begin + i, column);
    }
    for (int i = 0; i < count; ++i) {
      for (int column = j; column < used; ++column) rows[i * kPanel + column] = turned[column][i];
    }
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
