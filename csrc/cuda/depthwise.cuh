// Depthwise convolution, NHWC, with the batch norm and activation of its input applied on load and the moments of its
// output gathered on store.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/moments.h"
#include "../common/params.h"
#include "../common/plant.h"
#include "device.h"
#include "pack.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 128 threads owns 128 bytes of channels (one cache line of every pixel: 8 threads x 16 bytes)
// and walks over consecutive tiles of 8 x kTileH outputs.
//   load     the tile's inputs with halo, 16 bytes a thread, a warp reading four whole lines; activated once; rounded to
//            the storage dtype into shared memory.  Zero padding is written there, so the convolution has no borders.
//   convolve a thread makes kRows outputs of one column, one below the other, for its 16 bytes of channels: each value read
//            from shared memory serves up to kKernel outputs, and kKernel weights stay in registers.  A quarter warp
//            reads the 128 bytes of one pixel: no bank conflicts.
//   moments  of the thread's outputs, merged into thread-private slots in shared memory (no registers across tiles),
//            over threads once per block, over blocks by combine.h: a fixed order, hence deterministic.
template <typename T_, int kKernel_, int kStride_>
struct DepthwiseTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
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
  static constexpr int kLoads = 4;  // 16-byte loads a thread has in flight
  static constexpr int kSharedBytes = kPixels * kPacks * 16 + kKernel_ * kKernel_ * kPacks * 16 +
                                      2 * kVec * kThreads * 4 + 2 * kChannels * 4 + kPixelLanes * 4;

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
  static_assert(kPacks * sizeof(Pack<T_>) == 128, "a pixel's channels of a block are one cache line");
  static_assert(kThreads % 32 == 0 && 32 % kPacks == 0, "a warp reads whole lines");
  static_assert(kChannels <= kThreads, "one thread per channel reduces the block's moments");
  static_assert(kSharedBytes <= 48 * 1024, "static shared memory");
};

// How the outputs are dealt to blocks; a function of the shape alone.
struct DepthwiseTiling {
  int32_t tiles_h;
  int32_t tiles_w;
  int64_t tiles;  // n * tiles_h * tiles_w
  int64_t tiles_per_block;
  int64_t chunks;          // runs of tiles_per_block tiles
  int32_t channel_blocks;  // grid = chunks * channel_blocks, in one dimension: it never meets the 65535 of y and z
  bool vectorized;         // 16-byte accesses to x and y are aligned and end within c
};

// Fills the tile: pixels from (top, left) of one image, whose first channel of this thread is at `image`.
template <typename Traits>
MNET_DEVICE void load_tile(const DepthwiseParams& p, const typename Traits::T* image, int top, int left, int valid,
                           bool vectorized, const float* scale, const float* shift, Pack<typename Traits::T>* tile) {
  using T = typename Traits::T;
  constexpr int kStep = Traits::kPixelLanes;
  const int pack = threadIdx.x % Traits::kPacks;
  float a[Traits::kVec], b[Traits::kVec];
  if (p.bn != nullptr) {
    MNET_UNROLL
    for (int v = 0; v < Traits::kVec; ++v) {
      a[v] = scale[pack * Traits::kVec + v];
      b[v] = shift[pack * Traits::kVec + v];
    }
  }
  for (int first = threadIdx.x / Traits::kPacks; first < Traits::kPixels; first += Traits::kLoads * kStep) {
    Pack<T> z[Traits::kLoads];
    bool inside[Traits::kLoads];
    MNET_UNROLL
    for (int u = 0; u < Traits::kLoads; ++u) {
      const int pixel = first + u * kStep;
      const int ih = top + pixel / Traits::kInW, iw = left + pixel % Traits::kInW;
      inside[u] = pixel < Traits::kPixels && valid > 0 && ih >= 0 && ih < p.h && iw >= 0 && iw < p.w;
      z[u] = inside[u] ? load_pack(image + (int64_t{ih} * p.w + iw) * p.c, valid, vectorized) : zero_pack<T>();
    }
    if (p.bn != nullptr) {
      with_activation(p.act, [&](auto act) {
        MNET_UNROLL
        for (int u = 0; u < Traits::kLoads; ++u) {
          if (MNET_PLANT(2, inside[u], true)) {
            MNET_UNROLL
            for (int v = 0; v < Traits::kVec; ++v) {
              const float value = fmaf(a[v], to_float(z[u].lane[v]), b[v]);
              z[u].lane[v] = from_float<T>(decltype(act)::fwd(value));
            }
          }
        }
      });
    }
    MNET_UNROLL
    for (int u = 0; u < Traits::kLoads; ++u) {
      const int pixel = first + u * kStep;
      if (pixel < Traits::kPixels) tile[pixel * Traits::kPacks + pack] = z[u];
    }
  }
}

// The thread's kRows outputs, from the tile's rows at `tile` (already at the thread's strip, column and channels).
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
      const Pack<typename Traits::T> pack = tile[(r * Traits::kInW + j) * Traits::kPacks];
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

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    depthwise_kernel(const DepthwiseParams p, const DepthwiseTiling tiling, float* __restrict__ workspace) {
  using T = typename Traits::T;
  constexpr int kVec = Traits::kVec;
  MNET_SHARED(Pack<T>, tile, [Traits::kPixels * Traits::kPacks]);
  MNET_SHARED(Pack<T>, weight, [Traits::kKernel * Traits::kKernel * Traits::kPacks]);
  MNET_SHARED(float, scale, [Traits::kChannels]);
  MNET_SHARED(float, shift, [Traits::kChannels]);
  MNET_SHARED(float, means, [kVec][Traits::kThreads]);
  MNET_SHARED(float, m2s, [kVec][Traits::kThreads]);
  MNET_SHARED(float, counts, [Traits::kPixelLanes]);

  const int tid = threadIdx.x;
  const int pack = tid % Traits::kPacks, lane = tid / Traits::kPacks;
  const int column = lane % Traits::kTileW, strip = lane / Traits::kTileW;
  const int64_t chunk = blockIdx.x / tiling.channel_blocks;
  const int block_channel = static_cast<int>(blockIdx.x % tiling.channel_blocks) * Traits::kChannels;
  const int channel = block_channel + pack * kVec;
  const int valid = p.c - channel < kVec ? p.c - channel : kVec;  // channels of this thread; may be negative

  // Once per block: weights (read in memory order when they are contiguous), coefficients, empty moments.
  for (int k = tid; k < Traits::kChannels * Traits::kKernel * Traits::kKernel; k += Traits::kThreads) {
    const int c = k / (Traits::kKernel * Traits::kKernel), tap = k % (Traits::kKernel * Traits::kKernel);
    const int64_t at = (int64_t{block_channel} + c) * p.weight_stride_c + tap / Traits::kKernel * p.weight_stride_h +
                       tap % Traits::kKernel * p.weight_stride_w;
    const bool exists = block_channel + c < p.c;
    weight[tap * Traits::kPacks + c / kVec].lane[c % kVec] =
        exists ? static_cast<const T*>(p.weight)[at] : from_float<T>(0.f);
  }
  if (tid < Traits::kChannels) {
    const bool exists = p.bn != nullptr && block_channel + tid < p.c;
    scale[tid] = exists ? p.bn[block_channel + tid] : 1.f;
    shift[tid] = exists ? p.bn[p.c + block_channel + tid] : 0.f;
  }
  float count = 0.f;
  MNET_UNROLL
  for (int v = 0; v < kVec; ++v) means[v][tid] = m2s[v][tid] = 0.f;

  const int64_t first = chunk * tiling.tiles_per_block;
  const int64_t last = first + tiling.tiles_per_block < tiling.tiles ? first + tiling.tiles_per_block : tiling.tiles;
  const int64_t tiles_per_image = int64_t{tiling.tiles_h} * tiling.tiles_w;
  int64_t image = first / tiles_per_image;
  int tile_h = static_cast<int>(first % tiles_per_image / tiling.tiles_w);
  int tile_w = static_cast<int>(first % tiles_per_image % tiling.tiles_w);

  for (int64_t t = first; t < last; ++t) {
    const int oh = tile_h * Traits::kTileH, ow = tile_w * Traits::kTileW;  // of the tile
    const T* in = static_cast<const T*>(p.x) + image * p.h * p.w * p.c + channel;
    // The previous tile is used up; before the first one, weight, scale and shift are there.
    MNET_PLANT(3, __syncthreads(), (void)0);
    const int top = oh * Traits::kStride - MNET_PLANT(4, Traits::kPad, Traits::kPad - 1);
    const int left = ow * Traits::kStride - Traits::kPad;
    if (MNET_PLANT(5, true, t == first)) {
      load_tile<Traits>(p, in, top, left, valid, tiling.vectorized, scale, shift, tile);
    }
    MNET_PLANT(6, __syncthreads(), (void)0);

    float out[Traits::kRows][kVec];
    const int in_row = strip * Traits::kRows * Traits::kStride, in_column = column * Traits::kStride;
    convolve<Traits>(tile + (in_row * Traits::kInW + in_column) * Traits::kPacks + pack, weight + pack, out);

    const int row = oh + strip * Traits::kRows, rows_left = p.out_h - row;
    const int rows = ow + column < p.out_w && valid > 0 ? (rows_left < Traits::kRows ? rows_left : Traits::kRows) : 0;
    T* to = static_cast<T*>(p.y) + ((image * p.out_h + row) * p.out_w + ow + column) * p.c + channel;
    MNET_UNROLL
    for (int o = 0; o < Traits::kRows; ++o) {
      if (o < rows) {
        Pack<T> stored;
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          stored.lane[v] = from_float<T>(out[o][v]);
          out[o][v] = to_float(stored.lane[v]);
        }
        store_pack(to + int64_t{o} * p.out_w * p.c, stored, MNET_PLANT(1, valid, valid - 1), tiling.vectorized);
      }
    }
    if (p.moments != nullptr && rows > 0) {
      const float added = static_cast<float>(rows), merged = added / (count + added);
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) {
        float mean = out[0][v], m2 = 0.f;
        MNET_UNROLL
        for (int o = 1; o < Traits::kRows; ++o) {
          if (MNET_PLANT(7, o < rows, true)) welford_update(mean, m2, out[o][v], 1.f / static_cast<float>(o + 1));
        }
        chan_update(means[v][tid], m2s[v][tid], count, mean, m2, merged);
      }
      count += added;
    }

    if (++tile_w == tiling.tiles_w) {
      tile_w = 0;
      if (++tile_h == tiling.tiles_h) {
        tile_h = 0;
        ++image;
      }
    }
  }

  if (p.moments == nullptr) return;
  if (pack == 0) counts[lane] = count;  // the first pack of a block always has channels
  MNET_PLANT(8, __syncthreads(), (void)0);
  if (tid >= Traits::kChannels || block_channel + tid >= p.c) return;
  const Moments<float> sum = merge<float>([&](auto&& add) {
    for (int l = 0; l < Traits::kPixelLanes; ++l) {
      const int slot = l * Traits::kPacks + MNET_PLANT(9, tid / kVec, tid % kVec);
      add({counts[l], means[tid % kVec][slot], m2s[tid % kVec][slot]});
    }
  });
  float* partial = workspace + chunk * 3 * p.c + block_channel + tid;
  partial[0] = sum.count;
  partial[p.c] = sum.mean;
  partial[2 * int64_t{p.c}] = sum.m2;
}

}  // namespace mnet::cuda
