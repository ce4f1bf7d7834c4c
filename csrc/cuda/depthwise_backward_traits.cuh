// Sizes of depthwise_backward.cuh, where the memory plan stands.
#pragma once

#include <cstdint>

#include "device.h"

namespace mnet::cuda {

// 4 bytes of a storage dtype.
template <typename T>
struct alignas(4) Word {
  static constexpr int kSize = 4 / sizeof(T);
  T lane[kSize];
};

template <typename T_, int kKernel_, int kStride_>
struct DepthwiseBackwardTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
  static constexpr int kPad = kKernel_ / 2;
  static constexpr int kTaps = kKernel_ * kKernel_;
  static constexpr int kVec = Pack<T_>::kSize;   // channels of 16 bytes
  static constexpr int kLane = Word<T_>::kSize;  // channels of a thread
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = kKernel_ == 3 ? 4 : 3;  // of a multiprocessor
  static constexpr int kMaxWords = 32;
  static constexpr int kMaxChannels = kMaxWords * kLane;
  static constexpr int kPatches = 16;  // of a full line of channels; of half a line twice as many

  static constexpr int kRows = 4;                 // input rows of a step
  static constexpr int kColumns = kStride_;       // input columns of a patch
  static constexpr int kGroup = kRows / kStride_;  // rows of dy that a step adds
  static constexpr int kBefore = kPad / kStride_;  // rows and columns of dy before those a patch is centred on
  static constexpr int kWindowRows = kBefore + (kRows - 1 + kPad) / kStride_ + 1;
  static constexpr int kWindowColumns = kBefore + (kColumns - 1 + kPad) / kStride_ + 1;

  static constexpr int kDyPacks = 2 * kGroup * (kPatches + kWindowColumns - 1) * kMaxWords / 4;
  static constexpr int kTilePacks = kRows * kColumns * kPatches * kMaxWords / 4;
  static constexpr int kSharedBytes =
      (kDyPacks + kDyPacks / 2 + kTilePacks) * 16 + kTaps * kMaxWords * 4 + (5 + 3 + 2) * 64 * 4;

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
  static_assert(kWindowRows <= 2 * kGroup, "a step's window is two groups");
  static_assert(kTaps * kLane * kThreads * 4 <= (kDyPacks + kTilePacks) * 16, "dW of all threads fits where the tiles were");
  static_assert(kSharedBytes <= 48 * 1024, "static shared memory");
  static_assert(kBlocks * (kSharedBytes + 1024) <= 164 * 1024, "kBlocks fit where an A100 has least to give");
};

// How the inputs are dealt to blocks; a function of the shape alone.
struct DepthwiseBackwardTiling {
  int32_t words;           // 8, 16 or 32
  int32_t channel_blocks;  // grid = runs * tiles_w * channel_blocks, in one dimension
  int32_t patches;         // across a stripe, but for the last one
  int32_t tiles_w;         // stripes
  int32_t steps_h;         // of an image
  int64_t steps;           // of the batch
  int64_t steps_per_run;
  int64_t chunks;   // runs * tiles_w: neighbours work at the same time, so that their halos meet in the cache
  bool vectorized;  // 16-byte accesses to all maps are aligned and end within c
};

}  // namespace mnet::cuda
