// The products of gemm.h, which includes this, on AMX: its instruction multiplies a register ("tile") of 16 rows of 32
// bfloat16 values of A with one of 16 rows of 16 words of B (pairs along the depth, as panels are packed) into a third of
// 16 x 16 floats.
//
// Two tiles of rows meet both of a panel's tiles of columns: every tile that is loaded is used twice.  Tiles 0 to 3 hold
// results, 4 and 5 rows of A, 6 and 7 columns of B.  Rows and depths are padded to whole tiles: what stands in A and B
// beyond the depth must be finite and one of the two zero; results beyond the rows are written and mean nothing.
// Subnormal values and results are taken for zero.
//
// The instructions are written out: the compilers' intrinsics do not say that they touch memory.
#pragma once

#include <cstdint>

#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

constexpr int kTileRows = 16, kTileWords = 16;
constexpr int kRowBlock = 2 * kTileRows;
constexpr int64_t kPanelBytes = kPanel * sizeof(float);
static_assert(kPanel == 2 * kTileWords, "a panel is two tiles wide");

#if !defined(MNET_AMX_EMULATED)
// Eight tiles of 16 rows of 64 bytes, while it lives; then what was configured before (a library's code may rely on it).
class TileConfiguration {
 public:
  TileConfiguration() {
    alignas(64) uint8_t wanted[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) {
      wanted[16 + 2 * tile] = kTileWords * sizeof(float);
      wanted[48 + tile] = kTileRows;
    }
    asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before_) : "m"(wanted));
  }
  ~TileConfiguration() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  TileConfiguration(const TileConfiguration&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

template <int kTile>
MNET_HD void tile_load(const float* from, int64_t bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes), "i"(kTile) : "memory");
}
template <int kTile>
MNET_HD void tile_store(float* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes), "i"(kTile) : "memory");
}
template <int kTile>
MNET_HD void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kA, int kB>
MNET_HD void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

#else
// For tests: where there is no AMX, and where every access is to be seen.
struct TileConfiguration {
  TileConfiguration() {}
};
inline thread_local float emulated_tiles[8][kTileRows][kTileWords];

template <int kTile>
void tile_load(const float* from, int64_t bytes) {
  for (int row = 0; row < kTileRows; ++row) {
    std::memcpy(emulated_tiles[kTile][row], reinterpret_cast<const char*>(from) + row * bytes, sizeof emulated_tiles[0][0]);
  }
}
template <int kTile>
void tile_store(float* to, int64_t bytes) {
  for (int row = 0; row < kTileRows; ++row) {
    std::memcpy(reinterpret_cast<char*>(to) + row * bytes, emulated_tiles[kTile][row], sizeof emulated_tiles[0][0]);
  }
}
template <int kTile>
void tile_zero() {
  std::memset(emulated_tiles[kTile], 0, sizeof emulated_tiles[kTile]);
}
template <int kSum, int kA, int kB>
void tile_multiply() {
  for (int row = 0; row < kTileRows; ++row) {
    Vec sum = load_vec(emulated_tiles[kSum][row]);
    for (int k = 0; k < kTileWords; ++k) {
      const auto words = (__m512)load_vec(emulated_tiles[kB][k]);
      sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(emulated_tiles[kA][row][k]), (__m512bh)words);
    }
    store_vec(emulated_tiles[kSum][row], sum);
  }
}
#endif

// C (+)= A B of kDown x 16 rows and kAcross x 16 columns; `depth` is a multiple of kTileWords.
template <int kDown, int kAcross>
MNET_HD void multiply_tiles(const float* a, int64_t lda, const float* b, int depth, float* c, bool accumulate) {
  const int64_t a_bytes = lda * sizeof(float);
  float* const lower = c + kTileRows * kPanel;
  if (accumulate) {
    tile_load<0>(c, kPanelBytes);
    if constexpr (kAcross == 2) tile_load<1>(c + kTileWords, kPanelBytes);
    if constexpr (kDown == 2) tile_load<2>(lower, kPanelBytes);
    if constexpr (kDown == 2 && kAcross == 2) tile_load<3>(lower + kTileWords, kPanelBytes);
  } else {
    tile_zero<0>();
    if constexpr (kAcross == 2) tile_zero<1>();
    if constexpr (kDown == 2) tile_zero<2>();
    if constexpr (kDown == 2 && kAcross == 2) tile_zero<3>();
  }
  for (int k = 0; k < depth; k += kTileWords) {
    tile_load<6>(b, kPanelBytes);
    tile_load<4>(a, a_bytes);
    tile_multiply<0, 4, 6>();
    if constexpr (kAcross == 2) {
      tile_load<7>(b + kTileWords, kPanelBytes);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (kDown == 2) {
      tile_load<5>(a + kTileRows * lda, a_bytes);
      tile_multiply<2, 5, 6>();
      if constexpr (kAcross == 2) tile_multiply<3, 5, 7>();
    }
    a += kTileWords;
    b += kTileWords * kPanel;
  }
  tile_store<0>(c, kPanelBytes);
  if constexpr (kAcross == 2) tile_store<1>(c + kTileWords, kPanelBytes);
  if constexpr (kDown == 2) tile_store<2>(lower, kPanelBytes);
  if constexpr (kDown == 2 && kAcross == 2) tile_store<3>(lower + kTileWords, kPanelBytes);
}

// For any number of rows.
template <int kAcross>
void multiply_tile_rows(const float* a, int64_t lda, const float* b, int depth, int rows, float* c, bool accumulate,
                        Ahead& ahead) {
  for (; rows > kTileRows; rows -= 2 * kTileRows) {
    ahead.step();
    multiply_tiles<2, kAcross>(a, lda, b, depth, c, accumulate);
    a += 2 * kTileRows * lda;
    c += 2 * kTileRows * kPanel;
  }
  if (rows > 0) multiply_tiles<1, kAcross>(a, lda, b, depth, c, accumulate);
}

// How many blocks (Ahead) these take.
inline int64_t row_blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }
inline int64_t deep_blocks(int rows, int) { return row_blocks(rows); }
inline int64_t along_blocks(int channels, int) { return row_blocks(channels); }

inline void multiply_deep(const float* a, int64_t lda, const float* b, int depth, int rows, int columns, float* c,
                          Ahead& ahead) {
  const auto multiply = columns > kTileWords ? multiply_tile_rows<2> : multiply_tile_rows<1>;
  multiply(a, lda, b, depth, rows, c, false, ahead);
}

inline void multiply_along_rows(const float* deep, int64_t, int tile_rows, const float* b, int rows, int channels,
                                int columns, float* c, bool accumulate, Ahead& ahead) {
  const auto multiply = columns > kTileWords ? multiply_tile_rows<2> : multiply_tile_rows<1>;
  multiply(deep, words(tile_rows), b, words(rows), channels, c, accumulate, ahead);
}

constexpr int whole_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

inline int64_t turned_floats(int tile_rows, int64_t, int channels) {
  return int64_t{whole_tiles(channels)} * words(tile_rows);
}

// The left operand of a product along the rows: [channels][words(tile_rows)], words of rows 2i and 2i + 1 of a tile; zeros
// beyond the rows.
inline const float* rows_as_depth(const float* tile, int64_t stride, int tile_rows, int rows, int channels, float* to) {
  for (int row = 0; row < rows; row += 2 * kTileWords) {
    for (int c = 0; c < channels; c += kLanes) {
      Vec v[kTileRows];
      const auto load = [&](int i) __attribute__((always_inline)) {
        Packed packed{};
        const auto* from = reinterpret_cast<const Packed*>(tile + (row + i) * stride) + c / kLanes;
        if (row + i < rows) std::memcpy(&packed, from, sizeof packed);
        return widen(packed);
      };
      MNET_UNROLL
      for (int i = 0; i < kTileRows; ++i) v[i] = float_of(load(2 * i) | load(2 * i + 1) << 16);
      transpose_words(v);
      MNET_UNROLL
      for (int i = 0; i < kTileRows; ++i) store_vec(to + int64_t{c + i} * words(tile_rows) + row / 2, v[i]);
    }
  }
  return to;
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
