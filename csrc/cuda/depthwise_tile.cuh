// The depthwise convolution of a tile in shared memory, and what becomes of its outputs: what the kernel that reads its input
// (depthwise.cuh) and the one that makes it (expand_depthwise.cuh) share.  Free of torch.
#pragma once

#include "../common/moments.h"
#include "../common/params.h"
#include "../common/plant.h"
#include "device.h"
#include "pack.cuh"

namespace mnet::cuda {

// A block of 128 threads makes tiles of 8 x kTileH outputs of 128 bytes of channels: 8 threads x 16 bytes a pixel.
template <typename T_, int kKernel_, int kStride_>
struct DepthwiseTile {
  using T = T_;
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
  static constexpr int kTaps = kKernel_ * kKernel_;
  static constexpr int kPad = kKernel_ / 2;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kPacks = 8;
  static constexpr int kChannels = kPacks * kVec;
  static constexpr int kTileW = 8;
  static constexpr int kStrips = 2;
  static constexpr int kRows = 4 / kStride_;
  static constexpr int kTileH = kStrips * kRows;
  static constexpr int kPixelLanes = kTileW * kStrips;
  static constexpr int kThreads = kPacks * kPixelLanes;
  static constexpr int kInH = (kTileH - 1) * kStride_ + kKernel_;
  static constexpr int kInW = (kTileW - 1) * kStride_ + kKernel_;
  static constexpr int kPixels = kInH * kInW;

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
  static_assert(kPacks * sizeof(Pack<T_>) == 128, "a pixel's channels of a block are one cache line");
  static_assert(kThreads % 32 == 0 && 32 % kPacks == 0, "a warp reads whole lines");
  static_assert(kChannels <= kThreads, "one thread per channel reduces the block's moments");
};

// How the outputs are dealt to blocks (depthwise_tiling.h).
struct DepthwiseTiling {
  int32_t tiles_h;
  int32_t tiles_w;
  int64_t tiles;  // n * tiles_h * tiles_w
  int64_t tiles_per_block;
  int64_t chunks;          // runs of tiles_per_block tiles
  int32_t channel_blocks;  // grid = chunks * channel_blocks, in one dimension: it never meets the 65535 of y and z
  bool vectorized;         // 16-byte accesses to the maps of these channels are aligned and end within c
};

// Where a tile lies.
struct TilePlace {
  int64_t image;
  int h;
  int w;

  MNET_DEVICE TilePlace(const DepthwiseTiling& tiling, int64_t tile) {
    const int64_t per_image = int64_t{tiling.tiles_h} * tiling.tiles_w;
    image = tile / per_image;
    h = static_cast<int>(tile % per_image / tiling.tiles_w);
    w = static_cast<int>(tile % per_image % tiling.tiles_w);
  }
  MNET_DEVICE void advance(const DepthwiseTiling& tiling) {
    if (++w < tiling.tiles_w) return;
    w = 0;
    if (++h < tiling.tiles_h) return;
    h = 0;
    ++image;
  }
};

// The block's weights, by tap and channel, zero beyond c; read in memory order when they are contiguous.
template <typename Traits>
MNET_DEVICE void load_taps(const DepthwiseParams& p, int block_channel, Pack<typename Traits::T>* taps) {
  using T = typename Traits::T;
  for (int k = threadIdx.x; k < Traits::kChannels * Traits::kTaps; k += Traits::kThreads) {
    const int c = k / Traits::kTaps, tap = k % Traits::kTaps;
    const int64_t at = (int64_t{block_channel} + c) * p.weight_stride_c + tap / Traits::kKernel * p.weight_stride_h +
                       tap % Traits::kKernel * p.weight_stride_w;
    const bool exists = block_channel + c < p.c;
    taps[tap * Traits::kPacks + c / Traits::kVec].lane[c % Traits::kVec] =
        exists ? static_cast<const T*>(p.weight)[at] : from_float<T>(0.f);
  }
}

// The thread's kRows outputs, one below the other, from the tile's rows at `tile` (already at the thread's strip, column and
// channels; Traits::kPitch packs a pixel): each value read serves up to kKernel outputs, and kKernel weights stay in registers.
template <typename Traits>
MNET_DEVICE void convolve(const Pack<typename Traits::T>* tile, const Pack<typename Traits::T>* weight,
                          float (&out)[Traits::kRows][Traits::kVec]) {
  constexpr int kInRows = (Traits::kRows - 1) * Traits::kStride + Traits::kKernel;
  MNET_UNROLL
  for (int o = 0; o < Traits::kRows; ++o) {
    MNET_UNROLL
    for (int v = 0; v < Traits::kVec; ++v) out[o][v] = 0.f;
  }
  MNET_UNROLL_BY(1)  // one column of the kernel at a time: its weights are what fits in registers
  for (int j = 0; j < Traits::kKernel; ++j) {
    float w[Traits::kKernel][Traits::kVec];
    MNET_UNROLL
    for (int i = 0; i < Traits::kKernel; ++i) {
      const Pack<typename Traits::T> pack = weight[(i * Traits::kKernel + j) * Traits::kPacks];
      MNET_UNROLL
      for (int v = 0; v < Traits::kVec; ++v) w[i][v] = to_float(pack.lane[v]);
    }
    MNET_UNROLL
    for (int r = 0; r < kInRows; ++r) {
      const Pack<typename Traits::T> pack = tile[(r * Traits::kInW + j) * Traits::kPitch];
      MNET_UNROLL
      for (int v = 0; v < Traits::kVec; ++v) {
        const float z = to_float(pack.lane[v]);
        MNET_UNROLL
        for (int o = 0; o < Traits::kRows; ++o) {
          const int i = r - o * Traits::kStride;
          if (i >= 0 && i < Traits::kKernel) out[o][v] = fmaf(z, w[i][v], out[o][v]);
        }
      }
    }
  }
}

// Convolves, rounds and stores the thread's outputs; gathers the moments of the stored values.  A thread keeps those in shared
// memory of its own (no registers across tiles); over threads they are merged once per block, over blocks by combine.h: a
// fixed order, hence deterministic.
template <typename Traits>
class DepthwiseOutput {
  using T = typename Traits::T;
  static constexpr int kVec = Traits::kVec;

 public:
  static constexpr int kSharedFloats = 2 * kVec * Traits::kThreads + Traits::kPixelLanes;

  MNET_DEVICE DepthwiseOutput(const DepthwiseParams& p, int block_channel, bool vectorized, float* slots)
      : p_(p),
        block_channel_(block_channel),
        channel_(block_channel + static_cast<int>(threadIdx.x) % Traits::kPacks * kVec),
        valid_(p.c - channel_ < kVec ? p.c - channel_ : kVec),
        vectorized_(vectorized),
        slots_(slots),
        count_(0.f) {
    MNET_UNROLL
    for (int v = 0; v < 2 * kVec; ++v) slots_[v * Traits::kThreads + threadIdx.x] = 0.f;
  }

  MNET_DEVICE int channel() const { return channel_; }  // the thread's first
  MNET_DEVICE int valid() const { return valid_; }      // and how many it has; may be negative

  // The outputs of the tile at `place`, whose inputs are there.
  MNET_DEVICE void make(const TilePlace& place, const Pack<T>* tile, const Pack<T>* taps) {
    const int pack = threadIdx.x % Traits::kPacks, lane = threadIdx.x / Traits::kPacks;
    const int column = lane % Traits::kTileW, strip = lane / Traits::kTileW;
    float out[Traits::kRows][kVec];
    const int in_row = strip * Traits::kRows * Traits::kStride, in_column = column * Traits::kStride;
    convolve<Traits>(tile + (in_row * Traits::kInW + in_column) * Traits::kPitch + pack, taps + pack, out);

    const int row = place.h * Traits::kTileH + strip * Traits::kRows, rows_left = p_.out_h - row;
    const int ow = place.w * Traits::kTileW + column;
    const int rows = ow < p_.out_w && valid_ > 0 ? (rows_left < Traits::kRows ? rows_left : Traits::kRows) : 0;
    T* to = static_cast<T*>(p_.y) + ((place.image * p_.out_h + row) * p_.out_w + ow) * p_.c + channel_;
    MNET_UNROLL
    for (int o = 0; o < Traits::kRows; ++o) {
      if (o < rows) {
        Pack<T> stored;
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          stored.lane[v] = from_float<T>(out[o][v]);
          out[o][v] = to_float(stored.lane[v]);
        }
        store_pack(to + int64_t{o} * p_.out_w * p_.c, stored, MNET_PLANT(1, valid_, valid_ - 1), vectorized_);
      }
    }
    if (p_.moments == nullptr || rows <= 0) return;
    const float added = static_cast<float>(rows), merged = added / (count_ + added);
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) {
      float mean = out[0][v], m2 = 0.f;
      MNET_UNROLL
      for (int o = 1; o < Traits::kRows; ++o) {
        if (MNET_PLANT(7, o < rows, true)) welford_update(mean, m2, out[o][v], 1.f / static_cast<float>(o + 1));
      }
      float* const slot = slots_ + v * Traits::kThreads + threadIdx.x;
      chan_update(slot[0], slot[kVec * Traits::kThreads], count_, mean, m2, merged);
    }
    count_ += added;
  }

  // Once per block, by all threads: its partial of [chunks, 3, c].
  MNET_DEVICE void finish(int64_t chunk, float* workspace) {
    if (p_.moments == nullptr) return;
    float* const counts = slots_ + 2 * kVec * Traits::kThreads;
    const int tid = threadIdx.x;
    if (tid % Traits::kPacks == 0) counts[tid / Traits::kPacks] = count_;  // the first pack of a block always has channels
    MNET_PLANT(8, __syncthreads(), (void)0);
    if (tid >= Traits::kChannels || block_channel_ + tid >= p_.c) return;
    const float* const slots = slots_ + tid % kVec * Traits::kThreads + MNET_PLANT(9, tid / kVec, tid % kVec);
    const Moments<float> sum = merge<float>([&](auto&& add) {
      for (int l = 0; l < Traits::kPixelLanes; ++l) {
        const float* const slot = slots + l * Traits::kPacks;
        add({counts[l], slot[0], slot[kVec * Traits::kThreads]});
      }
    });
    float* partial = workspace + chunk * 3 * p_.c + block_channel_ + tid;
    partial[0] = sum.count;
    partial[p_.c] = sum.mean;
    partial[2 * int64_t{p_.c}] = sum.m2;
  }

 private:
  const DepthwiseParams& p_;
  const int block_channel_;
  const int channel_;
  const int valid_;
  const bool vectorized_;
  float* const slots_;
  float count_;
};

}  // namespace mnet::cuda
