// F1 of algebraic mode: the expand layer and the depthwise convolution in one kernel, y = depthwise(act(bn(W (x - shift)))).
// The expanded map lives in shared memory only.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/expand_params.h"
#include "depthwise_tile.cuh"
#include "pointwise_operand.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 128 threads owns 128 bytes of expanded channels (64 of 16 bits, 32 of float32), whose part of both
// weights it keeps in shared memory, and walks over consecutive tiles of 8 x kTileH outputs.  Per tile:
//   copy      x with halo, as many channels as there are, by cp.async into rows of 128 bytes a pixel and step of the depth,
//             permuted for ldmatrix (pointwise_tile.cuh).  Issued as soon as the product before has read the last one, so that
//             it is under way while the block convolves and stores.  Where x is shifted, x - shift in place by who copied it.
//   expand    a warp multiplies 16 pixels by all channels of the block at a time, on the tensor cores, applies batch norm and
//             activation to the sums in its registers and writes them, rounded to the storage dtype, into the expanded tile.
//             Pixels beyond the image become zeros: padding is of the activated value, and x is not read there.
//             A pixel is 144 bytes: eight rows of a fragment lie in different banks (of float32, in pairs of the same one).
//   convolve  as depthwise.cuh does, from the expanded tile; outputs and moments as there (depthwise_tile.cuh).
// Blocks with the same pixels and other channels run side by side and find x in the second level of cache, so that memory
// sees x once.  Bytes of shared memory at kernel 3, stride 1 and 16 bits: x 12.5 KiB, weight 8, expanded tile 14, the rest 10:
// five blocks on an SM of 228 KiB (four by registers), three on one of 164 KiB.  Kernel 5, stride 2: 26, 8, 29 and 12 KiB.
template <typename T_, Math kMath_, int kKernel_, int kStride_>
struct ExpandTraits : DepthwiseTile<T_, kKernel_, kStride_> {
  using Tile = DepthwiseTile<T_, kKernel_, kStride_>;
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kPitch = Tile::kPacks + 1;
  static constexpr int kWarps = Tile::kThreads / 32;
  static constexpr int kBlocksPerSm = 4;

  static constexpr int kMaxChannels = 64;                   // of x
  static constexpr int kDepth = kDepthBytes / sizeof(T_);   // of a step
  static constexpr int kMaxSteps = kMaxChannels / kDepth;
  using Source = TileOf<T_, Tile::kPixels, kDepthBytes / 16, false>;
  using WeightTile = TileOf<T_, Tile::kChannels, kDepthBytes / 16, false>;
  static constexpr int kRowTiles = (Tile::kPixels + 15) / 16;
  static constexpr int kTilesN = Tile::kChannels / 8;

  static MNET_HD constexpr int steps(int channels) { return (channels + kDepth - 1) / kDepth; }
  static constexpr int dynamic_bytes(int steps) {
    return (steps * (Source::kPacks + WeightTile::kPacks) + Tile::kPixels * kPitch + Tile::kTaps * Tile::kPacks) * 16;
  }
  static constexpr int kStaticBytes =
      (2 * Tile::kChannels + kMaxChannels + DepthwiseOutput<ExpandTraits>::kSharedFloats) * 4;

  static_assert(kMaxSteps * kDepth == kMaxChannels, "whole steps");
  static_assert(kRowTiles * 16 - Tile::kPixels <= Tile::kChannels, "the last rows of a product read on in the weight");
  static_assert(dynamic_bytes(kMaxSteps) + kStaticBytes <= 99 * 1024, "what a block has on every card from 8.0 on");
};

// A thread's share of the tiles of x: 16 bytes of channels, of every step_-th pixel.
template <typename Traits>
class ExpandSource {
  using T = typename Traits::T;
  using Source = typename Traits::Source;
  static constexpr int kVec = Traits::kVec;

 public:
  // `shift` is in shared memory, zero beyond the channels.
  MNET_DEVICE ExpandSource(const ExpandDepthwiseParams& p, bool vectorized, const float* shift, Pack<T>* tile)
      : p_(p), vectorized_(vectorized), tile_(tile) {
    const int chunks = (p.expand.c * static_cast<int>(sizeof(T)) + 31) / 32 * 2;  // whole 32 bytes, as the product reads
    const int chunk = threadIdx.x % chunks;
    step_ = Traits::kThreads / chunks;
    first_ = static_cast<int>(threadIdx.x) / chunks;
    if (first_ >= step_) first_ = Traits::kPixels;  // more threads than whole pixels: none
    channel_ = chunk * kVec;
    tile_ += chunk / Source::kChunks * Source::kPacks;
    chunk_ = chunk % Source::kChunks;
    shift_ = shift + channel_;
    shifted_ = false;
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) shifted_ = shifted_ || shift_[v] != 0.f;
  }

  MNET_DEVICE void issue(int64_t image, int top, int left) const {
    const int valid = p_.expand.c - channel_;
    const T* const base = static_cast<const T*>(p_.expand.x);
    const T* const from = base + image * p_.depthwise.h * p_.depthwise.w * p_.expand.c + (valid > 0 ? channel_ : 0);
    for_pixels(top, left, [&](int64_t position, Words& words) {
      const T* at = from + position * p_.expand.c;
      if (vectorized_) {
        cp_async16(&words, at, valid > 0);
      } else {
        words = load_words(at, MNET_PLANT(45, valid, valid - 1), false);
      }
    });
  }

  // Once this thread's copies have arrived.
  MNET_DEVICE void prepare(int top, int left) const {
    if (!MNET_PLANT(48, shifted_, false)) return;
    for_pixels(top, left, [&](int64_t, Words& words) {
      const Words raw = words;
      float value[kVec];
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) value[v] = value_of<T>(raw, v) - shift_[v];
      words = words_of<T>(value);
    });
  }

 private:
  // f(position in the image, its place in the tile) of this thread's pixels within the image; the others are never used.
  template <typename F>
  MNET_DEVICE void for_pixels(int top, int left, F&& f) const {
    MNET_UNROLL_BY(2)
    for (int pixel = first_; pixel < Traits::kPixels; pixel += step_) {
      const int ih = top + pixel / Traits::kInW, iw = left + pixel % Traits::kInW;
      if (ih < 0 || ih >= p_.depthwise.h || iw < 0 || iw >= p_.depthwise.w) continue;
      f(int64_t{ih} * p_.depthwise.w + iw,
        *reinterpret_cast<Words*>(tile_ + chunk_at<Source::kChunks>(pixel, chunk_)));
    }
  }

  const ExpandDepthwiseParams& p_;
  const bool vectorized_;  // 16-byte accesses to x are aligned and end within c
  Pack<T>* tile_;
  const float* shift_;
  int first_, step_, channel_, chunk_;
  bool shifted_;
};

// Two neighbouring channels, rounded to the storage dtype.
template <typename T>
MNET_DEVICE void store_pair(T* to, float first, float second) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t low = bits_of(from_float<T>(first)), high = bits_of(from_float<T>(second));
    *reinterpret_cast<uint32_t*>(to) = low | high << 16;
  } else {
    to[0] = first;
    to[1] = second;
  }
}

// The expanded tile from x's.  `affine` is scale, scale, shift, shift of every two channels.
template <typename Traits>
MNET_DEVICE void expand_tile(const ExpandDepthwiseParams& p, int top, int left, const Pack<typename Traits::T>* x,
                             const Pack<typename Traits::T>* weight, const Pack<float>* affine,
                             Pack<typename Traits::T>* expanded) {
  using T = typename Traits::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  MNET_UNROLL_BY(1)
  for (int tile = warp; tile < Traits::kRowTiles; tile += Traits::kWarps) {
    Accumulators<1, Traits::kTilesN> acc;
    acc.clear();
    MNET_UNROLL_BY(1)
    for (int step = 0; step < MNET_PLANT(49, Traits::steps(p.expand.c), 1); ++step) {
      const int bytes = (p.expand.c - step * Traits::kDepth) * static_cast<int>(sizeof(T));
      multiply<Traits::kMath, typename Traits::Source, typename Traits::WeightTile>(
          x + step * Traits::Source::kPacks, weight + step * Traits::WeightTile::kPacks, tile * 16, 0, (bytes + 31) / 32, acc);
    }
    with_activation(p.depthwise.act, [&](auto act) {
      MNET_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int pixel = tile * 16 + lane / 4 + half * 8;
        if (pixel < Traits::kPixels) {
          const int ih = top + pixel / Traits::kInW, iw = left + pixel % Traits::kInW;
          const bool inside = MNET_PLANT(44, ih >= 0 && ih < p.depthwise.h && iw >= 0 && iw < p.depthwise.w, true);
          T* const to = reinterpret_cast<T*>(expanded + pixel * Traits::kPitch) + MNET_PLANT(43, lane % 4, lane % 4 / 2) * 2;
          MNET_UNROLL
          for (int n = 0; n < Traits::kTilesN; ++n) {
            const Pack<float> k = affine[n * 4 + lane % 4];
            const float first = decltype(act)::fwd(fmaf(k.lane[0], acc.c[0][n][half * 2], k.lane[2]));
            const float second = decltype(act)::fwd(fmaf(k.lane[1], acc.c[0][n][half * 2 + 1], k.lane[3]));
            store_pair(to + n * 8, inside ? first : 0.f, inside ? second : 0.f);
          }
        }
      }
    });
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    expand_depthwise_kernel(const ExpandDepthwiseParams p, const Weight expand_weight, const DepthwiseTiling tiling,
                            bool vectorized, float* __restrict__ workspace) {
  using T = typename Traits::T;
  MNET_DYNAMIC_SHARED(Pack<T>, memory);
  MNET_SHARED(Pack<float>, affine, [Traits::kChannels / 2]);
  MNET_SHARED(float, shift, [Traits::kMaxChannels]);
  MNET_SHARED(float, slots, [DepthwiseOutput<Traits>::kSharedFloats]);
  const int steps = Traits::steps(p.expand.c);
  Pack<T>* const x = memory;
  Pack<T>* const weight = x + steps * Traits::Source::kPacks;
  Pack<T>* const expanded = weight + steps * Traits::WeightTile::kPacks;
  Pack<T>* const taps = expanded + Traits::kPixels * Traits::kPitch;

  const int tid = threadIdx.x;
  const int64_t chunk = blockIdx.x / tiling.channel_blocks;
  const int block_channel = static_cast<int>(blockIdx.x % tiling.channel_blocks) * Traits::kChannels;
  for (int step = 0; step < steps; ++step) {
    issue_weight<typename Traits::WeightTile, Traits::kThreads>(expand_weight, block_channel, step * Traits::kDepth,
                                                                weight + step * Traits::WeightTile::kPacks);
  }
  load_taps<Traits>(p.depthwise, block_channel, taps);
  if (tid < Traits::kChannels) {
    const int channel = block_channel + tid;
    const bool exists = channel < p.depthwise.c;
    affine[tid / 2].lane[tid % 2] = exists ? p.depthwise.bn[channel] : 0.f;
    affine[tid / 2].lane[2 + tid % 2] = exists ? p.depthwise.bn[p.depthwise.c + channel] : 0.f;
  }
  if (tid < Traits::kMaxChannels) shift[tid] = tid < p.expand.c ? p.expand.shift[tid] : 0.f;
  DepthwiseOutput<Traits> output(p.depthwise, block_channel, tiling.vectorized, slots);
  __syncthreads();  // the shift is there

  const int64_t first = chunk * tiling.tiles_per_block;
  const int64_t last = first + tiling.tiles_per_block < tiling.tiles ? first + tiling.tiles_per_block : tiling.tiles;
  const auto top = [&](const TilePlace& at) {
    return at.h * Traits::kTileH * Traits::kStride - MNET_PLANT(42, Traits::kPad, Traits::kPad - 1);
  };
  const auto left = [&](const TilePlace& at) { return at.w * Traits::kTileW * Traits::kStride - Traits::kPad; };
  const ExpandSource<Traits> source(p, vectorized, shift, x);
  TilePlace place(tiling, first);
  source.issue(place.image, top(place), left(place));
  cp_async_commit();
  for (int64_t t = first; t < last; ++t) {
    MNET_PLANT(47, cp_async_wait<0>(), cp_async_wait<1>());
    source.prepare(top(place), left(place));
    // x and, before the first tile, the weights are there for all; the expanded tile has been used up.
    MNET_PLANT(40, __syncthreads(), (void)0);
    expand_tile<Traits>(p, top(place), left(place), x, weight, affine, expanded);
    MNET_PLANT(41, __syncthreads(), (void)0);  // the expanded tile is there; x has been used up
    TilePlace next = place;
    next.advance(tiling);
    if (t + 1 < MNET_PLANT(46, last, first)) source.issue(next.image, top(next), left(next));
    cp_async_commit();
    output.make(place, expanded, taps);
    place = next;
  }
  output.finish(chunk, workspace);
}

}  // namespace mnet::cuda
