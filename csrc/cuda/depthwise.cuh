// Depthwise convolution, NHWC, with the batch norm and activation of its input applied on load and the moments of its
// output gathered on store.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "depthwise_tile.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 128 threads owns 128 bytes of channels (one cache line of every pixel: 8 threads x 16 bytes)
// and walks over consecutive tiles of 8 x kTileH outputs.
//   load     the tile's inputs with halo, 16 bytes a thread, a warp reading four whole lines; activated once; rounded to
//            the storage dtype into shared memory.  Zero padding is written there, so the convolution has no borders.
//   convolve a thread makes kRows outputs of one column for its 16 bytes of channels.  A quarter warp reads the 128 bytes of
//            one pixel: no bank conflicts.
//   moments  depthwise_tile.cuh
template <typename T_, int kKernel_, int kStride_>
struct DepthwiseTraits : DepthwiseTile<T_, kKernel_, kStride_> {
  using Tile = DepthwiseTile<T_, kKernel_, kStride_>;
  static constexpr int kPitch = Tile::kPacks;
  static constexpr int kLoads = 4;  // 16-byte loads a thread has in flight
  // At least; 0: left to ptxas, which for the sake of a sixth block would spill a few registers of kernel 3, stride 2.
  static constexpr int kBlocksPerSm = kKernel_ == 3 && kStride_ == 2 ? 5 : 0;
  static constexpr int kSharedBytes = (Tile::kPixels + Tile::kTaps) * Tile::kPacks * 16 + 2 * Tile::kVec * Tile::kThreads * 4 +
                                      2 * Tile::kChannels * 4 + Tile::kPixelLanes * 4;

  static_assert(kSharedBytes <= 48 * 1024, "static shared memory");
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

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    depthwise_kernel(const DepthwiseParams p, const DepthwiseTiling tiling, float* __restrict__ workspace) {
  using T = typename Traits::T;
  MNET_SHARED(Pack<T>, tile, [Traits::kPixels * Traits::kPacks]);
  MNET_SHARED(Pack<T>, taps, [Traits::kTaps * Traits::kPacks]);
  MNET_SHARED(float, scale, [Traits::kChannels]);
  MNET_SHARED(float, shift, [Traits::kChannels]);
  MNET_SHARED(float, slots, [DepthwiseOutput<Traits>::kSharedFloats]);

  const int tid = threadIdx.x;
  const int64_t chunk = blockIdx.x / tiling.channel_blocks;
  const int block_channel = static_cast<int>(blockIdx.x % tiling.channel_blocks) * Traits::kChannels;

  load_taps<Traits>(p, block_channel, taps);
  if (tid < Traits::kChannels) {
    const bool exists = p.bn != nullptr && block_channel + tid < p.c;
    scale[tid] = exists ? p.bn[block_channel + tid] : 1.f;
    shift[tid] = exists ? p.bn[p.c + block_channel + tid] : 0.f;
  }
  DepthwiseOutput<Traits> output(p, block_channel, tiling.vectorized, slots);

  const int64_t first = chunk * tiling.tiles_per_block;
  const int64_t last = first + tiling.tiles_per_block < tiling.tiles ? first + tiling.tiles_per_block : tiling.tiles;
  TilePlace place(tiling, first);
  for (int64_t t = first; t < last; ++t, place.advance(tiling)) {
    const T* in = static_cast<const T*>(p.x) + place.image * p.h * p.w * p.c + output.channel();
    // The previous tile is used up; before the first one, weight, scale and shift are there.
    MNET_PLANT(3, __syncthreads(), (void)0);
    const int top = place.h * Traits::kTileH * Traits::kStride - MNET_PLANT(4, Traits::kPad, Traits::kPad - 1);
    const int left = place.w * Traits::kTileW * Traits::kStride - Traits::kPad;
    if (MNET_PLANT(5, true, t == first)) {
      load_tile<Traits>(p, in, top, left, output.valid(), tiling.vectorized, scale, shift, tile);
    }
    MNET_PLANT(6, __syncthreads(), (void)0);
    output.make(place, tile, taps);
  }
  output.finish(chunk, workspace);
}

}  // namespace mnet::cuda
