// The operands of the pointwise products on their way into shared memory.  Free of torch.
//
// An operand's tile is rows of positions by chunks of channels.  `issue` starts the copy of the raw values into a slot, by
// cp.async where they are aligned; `prepare`, once they have arrived, makes of them what the product reads, rounded to the
// storage dtype, in place.  A thread prepares what it copied itself, so nothing but its own wait stands between the two,
// and no register holds a value from the one to the other.  What lies beyond the positions or channels is zero.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/pointwise_params.h"
#include "pointwise_tile.cuh"

namespace mnet::cuda {

// 16 bytes of a storage dtype in four registers: as a Pack, each of its values would take one.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename T>
MNET_DEVICE uint32_t bits_of(T v) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> bits;
  memcpy(&bits, &v, sizeof(T));
  return bits;
}

template <typename T>
MNET_DEVICE T element_of(const Words& words, int v) {
  constexpr int kPerWord = 4 / sizeof(T);
  const auto bits = static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>(
      words.word[v / kPerWord] >> v % kPerWord * 8 * static_cast<int>(sizeof(T)));
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));  // half types want constructors, not their bits
  return value;
}

template <typename T>
MNET_DEVICE float value_of(const Words& words, int v) {
  return to_float(element_of<T>(words, v));
}

// Without 16-byte alignment one value at a time, zero from the `valid`-th on.
template <typename T>
MNET_DEVICE Words load_words(const T* from, int valid, bool vectorized) {
  constexpr int kPerWord = 4 / sizeof(T);
  if (vectorized) return *reinterpret_cast<const Words*>(from);
  Words words{};
  MNET_UNROLL
  for (int v = 0; v < Pack<T>::kSize; ++v) {
    if (v < valid) words.word[v / kPerWord] |= bits_of(from[v]) << v % kPerWord * 8 * static_cast<int>(sizeof(T));
  }
  return words;
}

template <typename T>
MNET_DEVICE void store_words(T* to, const Words& words, int valid, bool vectorized) {
  if (vectorized) {
    *reinterpret_cast<Words*>(to) = words;
    return;
  }
  MNET_UNROLL
  for (int v = 0; v < Pack<T>::kSize; ++v) {
    if (MNET_PLANT(21, v < valid, v + 1 < valid)) to[v] = element_of<T>(words, v);
  }
}

// Values of a float32 table, zero from the `valid`-th on.
template <int kCount>
MNET_DEVICE void load_table(const float* from, int valid, bool vectorized, float (&v)[kCount]) {
  MNET_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    const Words four = load_words(from + i, valid - i, vectorized && i < valid);
    MNET_UNROLL
    for (int k = 0; k < 4; ++k) v[i + k] = value_of<float>(four, k);
  }
}

// Rounded to the storage dtype.
template <typename T, int kVec>
MNET_DEVICE Words words_of(const float (&v)[kVec]) {
  constexpr int kPerWord = 4 / sizeof(T);
  Words words;
  MNET_UNROLL
  for (int i = 0; i < 4; ++i) {
    words.word[i] = bits_of(from_float<T>(v[i * kPerWord]));
    if (kPerWord == 2) words.word[i] |= bits_of(from_float<T>(v[i * kPerWord + kPerWord - 1])) << 16;
  }
  return words;
}

// Division of positions by those of an image, without a division: the 64-bit one is a call that spills registers.
struct Images {
  int64_t positions;  // of an image
  uint64_t inverse;   // 2^64 / positions, rounded up; 0 for one position

  explicit Images(int64_t image_positions)
      : positions(image_positions),
        inverse(image_positions == 1 ? 0 : ~uint64_t{0} / static_cast<uint64_t>(image_positions) + 1) {}
  MNET_HD int64_t of(int64_t position) const {
    if (inverse == 0) return position;
    const auto image = static_cast<int64_t>(high_product(static_cast<uint64_t>(position), inverse));
    return image * positions > position ? image - 1 : image;
  }

 private:
  static MNET_HD uint64_t high_product(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
  }
};

// The weight [e, c] as cp.async needs it: rows of `stride` elements, 16-byte chunks that exist whole or not at all.
struct Weight {
  const void* data;
  int64_t stride;
  int32_t e;
  int32_t c;
};

// The weight's tile from row e and column c on, by all threads.
template <typename Tile, int kThreads>
MNET_DEVICE void issue_weight(const Weight& weight, int e, int c, Pack<typename Tile::T>* tile) {
  using T = typename Tile::T;
  constexpr int kRounds = (Tile::kPacks + kThreads - 1) / kThreads;
  MNET_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const int k = threadIdx.x + round * kThreads;
    if (Tile::kPacks % kThreads != 0 && k >= Tile::kPacks) break;
    const int row = k / Tile::kChunks, chunk = k % Tile::kChunks;
    const bool exists = e + row < weight.e && c + chunk * Tile::kVec < weight.c;
    const T* from = static_cast<const T*>(weight.data);
    if (exists) from += (int64_t{e} + row) * weight.stride + c + chunk * Tile::kVec;
    cp_async16(tile + chunk_at<Tile::kChunks>(row, chunk), from, exists);
  }
}

// Which packs of a tile are this thread's: one column of chunks, rows kRowStep apart.
template <typename Tile_, int kThreads>
struct Share {
  using Tile = Tile_;
  using T = typename Tile_::T;
  static constexpr int kVec = Tile::kVec;
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static constexpr int kLoads = Tile::kRows / kRowStep;  // 16-byte copies a thread has under way, of each tensor
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowStep == 0, "every thread has as many packs");

  static MNET_DEVICE int row(int u) { return threadIdx.x / Tile::kChunks + u * kRowStep; }
  static MNET_DEVICE int channel() { return threadIdx.x % Tile::kChunks * kVec; }
  static MNET_DEVICE Words& words(Pack<T>* tile, int u) {
    return *reinterpret_cast<Words*>(tile + chunk_at<Tile::kChunks>(row(u), threadIdx.x % Tile::kChunks));
  }

  // Rows of the map [positions, channels] from `position` on.
  static MNET_DEVICE void issue(const void* map, int64_t position, int rows, int first_channel, int channels, bool vectorized,
                                Pack<T>* tile) {
    const int at = first_channel + channel(), valid = channels - at;
    const T* const base = static_cast<const T*>(map);
    const T* from = base + (valid > 0 ? (position + row(0)) * channels + at : 0);
    if (vectorized) {
      MNET_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        const bool exists = row(u) < rows && valid > 0;
        cp_async16(&words(tile, u), exists ? from + int64_t{u} * kRowStep * channels : base, exists);
      }
      return;
    }
    MNET_UNROLL_BY(1)
    for (int u = 0; u < kLoads; ++u) {
      Words copy{};
      if (row(u) < rows && valid > 0) copy = load_words(from + int64_t{u} * kRowStep * channels, valid, false);
      words(tile, u) = copy;
    }
  }
};

// z = act(scale * x + shift) [* gate], the operand of the forward product and of the weight gradient.
struct ActivatedSource {
  const void* x;
  const float* bn;
  const float* gate;
  Images images;
  int32_t c;
  Activation act;
  bool vectorized;  // 16-byte accesses to x and its tables are aligned and end within c
};

template <typename Tile_, int kThreads>
struct Activated {
  using Tile = Tile_;
  using T = typename Tile_::T;
  using Mine = Share<Tile_, kThreads>;
  static constexpr int kTiles = 1;

  const ActivatedSource& s;

  MNET_DEVICE int channels() const { return s.c; }

  MNET_DEVICE void issue(Pack<T>* tile, int64_t position, int rows, int first_channel) const {
    Mine::issue(s.x, position, rows, first_channel, s.c, s.vectorized, tile);
  }

  MNET_DEVICE void prepare(Pack<T>* tile, int64_t position, int rows, int first_channel) const {
    constexpr int kVec = Tile::kVec;
    const int channel = first_channel + Mine::channel(), valid = s.c - channel;
    if ((s.bn == nullptr && s.gate == nullptr) || valid <= 0) return;
    float scale[kVec], shift[kVec];
    if (s.bn != nullptr) {
      load_table(s.bn + channel, valid, s.vectorized, scale);
      load_table(s.bn + s.c + channel, valid, s.vectorized, shift);
    }
    with_activation(s.act, [&](auto act) {
      MNET_UNROLL_BY(1)  // as much code as one pack takes
      for (int u = 0; u < Mine::kLoads && Mine::row(u) < rows; ++u) {
        Words& words = Mine::words(tile, u);
        const Words raw = words;
        float z[kVec];
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          z[v] = value_of<T>(raw, v);
          if (s.bn != nullptr) z[v] = decltype(act)::fwd(fmaf(scale[v], z[v], shift[v]));
        }
        if (s.gate != nullptr) {
          float gate[kVec];
          const int64_t image = s.images.of(MNET_PLANT(22, position + Mine::row(u), position));
          load_table(s.gate + image * s.c + channel, valid, s.vectorized, gate);
          MNET_UNROLL
          for (int v = 0; v < kVec; ++v) z[v] *= gate[v];
        }
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) z[v] = v < valid ? z[v] : 0.f;
        words = words_of<T>(z);
      }
    });
  }
};

}  // namespace mnet::cuda
