// Backward of the depthwise convolution, NHWC: input and weight gradient in one pass, with the gradient at its output put
// together on load (params.h), the mask of its input's activation applied on store, and the sums of the stored gradient.
// Compute capability 8.0 or higher; free of torch.
//
// Both gradients are taken from the input's side.  At input (ih, iw) the outputs that read it are a window of dy, and
//   gz(ih, iw) = sum over taps of w(kh, kw) dy(oh, ow),   dW(kh, kw) += z(ih, iw) dy(oh, ow),   oh = (ih + pad - kh) / s,
// so that one load of dy serves both, and z needs no halo.
//
// Memory plan.  A block of 128 threads owns `words` times 4 bytes of channels (one cache line of every pixel; half or a
// quarter of one, and more pixels, where the channels would fill the last line badly) of a stripe of columns, and walks
// down the rows of the batch, four input rows a step.
//   load     the next group of rows of grad and y (with the columns around the stripe) and the step's rows of x, 16 bytes a
//            thread, as they are.
//   combine  grad and y to dy, rounded to the storage dtype, in the place of grad: one of two buffers, because a step's window
//            is the last group and the next, so that no row of dy is made twice but at the top of a run.  Outside the image
//            dy is zero: there are no borders below.
//   compute  a thread owns 4 bytes of channels: all of their dW stay in its registers from step to step.  It takes patches of
//            four rows and one column (two at stride 2: then every patch has the same taps), z of which are in registers
//            too, and each dy read from shared memory serves up to four rows' gz and dW.  A warp's threads read neighbouring
//            words: no bank conflicts.  gx takes the place of x in shared memory.
//   store    gx, 16 bytes a thread.
//   sums     and dW over a block's threads at its end, over blocks by combine.h: a fixed order, hence deterministic.
// kBlocks blocks share a multiprocessor, and while one computes others load: 128 threads with 6 loads of 16 bytes in flight
// are 12 KiB a block, so that two loading blocks cover an H100's latency (about 18 KiB a multiprocessor).
#pragma once

#include "depthwise_backward_step.cuh"

namespace mnet::cuda {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    depthwise_backward_kernel(const DepthwiseBackwardParams p, const DepthwiseBackwardTiling tiling,
                              float* __restrict__ workspace) {
  using T = typename Traits::T;
  constexpr int kLane = Traits::kLane, kTaps = Traits::kTaps, kThreads = Traits::kThreads;
  MNET_SHARED(Pack<T>, memory, [Traits::kDyPacks + Traits::kTilePacks]);
  MNET_SHARED(Pack<T>, y_packs, [Traits::kDyPacks / 2]);
  MNET_SHARED(Word<T>, weight, [kTaps * Traits::kMaxWords]);
  MNET_SHARED(float, upstream, [5][64]);
  MNET_SHARED(float, own, [3][64]);
  MNET_SHARED(float, gates, [2][64]);

  const int tid = threadIdx.x;
  const int64_t chunk = blockIdx.x / tiling.channel_blocks;
  const int block_channel = static_cast<int>(blockIdx.x % tiling.channel_blocks) * tiling.words * kLane;
  const int channels = p.c - block_channel < tiling.words * kLane ? p.c - block_channel : tiling.words * kLane;

  // Once per block: the weights and the coefficients of its channels.
  for (int k = tid; k < Traits::kMaxChannels * kTaps; k += kThreads) {
    const int c = k / kTaps, tap = k % kTaps;
    const int64_t at = (int64_t{block_channel} + c) * p.weight_stride_c + tap / Traits::kKernel * p.weight_stride_h +
                       tap % Traits::kKernel * p.weight_stride_w;
    weight[tap * Traits::kMaxWords + c / kLane].lane[c % kLane] =
        c < channels ? static_cast<const T*>(p.weight)[at] : from_float<T>(0.f);
  }
  for (int k = tid; k < 8 * Traits::kMaxChannels; k += kThreads) {
    const int row = k / Traits::kMaxChannels, c = k % Traits::kMaxChannels;
    const float* table = row < 3 ? p.y_bn + int64_t{row} * p.c
                         : row < 5 ? p.coef + int64_t{row - 3} * p.c
                         : p.bn != nullptr ? p.bn + int64_t{row - 5} * p.c : nullptr;
    const float value = c < channels && table != nullptr ? table[block_channel + c] : 0.f;
    (row < 5 ? upstream[row] : own[row - 5])[c] = value;
  }

  // The stripe.
  const int left = static_cast<int>(chunk % tiling.tiles_w) * tiling.patches * Traits::kColumns;
  const int patches_left = (p.w - left + Traits::kColumns - 1) / Traits::kColumns;
  const int patches = patches_left < tiling.patches ? patches_left : tiling.patches;
  PackPlace place;
  place.packs = tiling.words / 4;
  place.pack = tid % place.packs;
  place.lane = tid / place.packs;
  place.lanes = kThreads / place.packs;
  place.channel = block_channel + place.pack * Traits::kVec;
  place.valid = p.c - place.channel < Traits::kVec ? p.c - place.channel : Traits::kVec;
  const Rows dy_map(patches + Traits::kWindowColumns - 1), x_map(patches * Traits::kColumns);
  Pack<T>* x_packs = memory + Traits::kDyPacks;
  const int group_packs = Traits::kGroup * dy_map.columns * place.packs;
  const int dy_left = left / Traits::kStride - Traits::kBefore;

  const WordPlace words{tid % tiling.words, tiling.words, tid / tiling.words, kThreads / tiling.words};
  StepTiles<T> tiles{};
  tiles.x = reinterpret_cast<Word<T>*>(x_packs);
  tiles.weight = weight;
  tiles.own = own;
  tiles.words = tiling.words;
  tiles.x_columns = x_map.columns;
  tiles.dy_columns = dy_map.columns;
  Products<Traits> sums{};

  const int64_t first = chunk / tiling.tiles_w * tiling.steps_per_run;
  const int64_t steps_left = tiling.steps - first;
  const int steps = static_cast<int>(steps_left < tiling.steps_per_run ? steps_left : tiling.steps_per_run);
  int64_t image = first / tiling.steps_h;
  int step = static_cast<int>(first % tiling.steps_h);
  int parity = 0;  // of the buffer that holds the first rows of a step's window
  for (int s = 0; s < steps; ++s) {
    const bool top_of_run = MNET_PLANT(7, s == 0 || step == 0, s == 0);
    for (int k = tid; top_of_run && k < 2 * Traits::kMaxChannels; k += kThreads) {
      const int row = k / Traits::kMaxChannels, c = k % Traits::kMaxChannels;
      const float* table = row == 0 ? p.gate : p.offset;
      const bool exists = table != nullptr && c < channels;
      gates[row][c] = exists ? table[image * p.c + block_channel + c] : (row == 0 ? 1.f : 0.f);
    }
    const int top = step * Traits::kRows;
    const int64_t base = image * p.h * p.w * p.c + place.channel;
    copy_rows<Traits::kRows, T, 1>({static_cast<const T*>(p.x) + base}, {x_packs}, place, x_map, top, left, p.h, p.w, p.c,
                                   tiling.vectorized);
    MNET_UNROLL_BY(1)
    for (int group = top_of_run ? 0 : 1; group < 2; ++group) {
      const int dy_top = (step + group) * Traits::kGroup - MNET_PLANT(8, Traits::kBefore, Traits::kBefore + 1);
      const int64_t dy_base = image * p.out_h * p.out_w * p.c + place.channel;
      Pack<T>* grad = memory + (parity ^ group) * group_packs;
      copy_rows<Traits::kGroup, T, 2>({static_cast<const T*>(p.grad) + dy_base, static_cast<const T*>(p.y) + dy_base},
                                      {grad, y_packs}, place, dy_map, dy_top, dy_left, p.out_h, p.out_w, p.c,
                                      tiling.vectorized);
      MNET_PLANT(9, __syncthreads(), (void)0);
      combine_dy<Traits>(p, upstream, gates, words, dy_map.columns, dy_top, dy_left, reinterpret_cast<Word<T>*>(grad),
                         reinterpret_cast<const Word<T>*>(y_packs));
      MNET_PLANT(10, __syncthreads(), (void)0);
    }

    tiles.dy = reinterpret_cast<const Word<T>*>(memory + parity * group_packs);
    tiles.dy_far = reinterpret_cast<const Word<T>*>(memory + (1 - parity) * group_packs);
    MNET_UNROLL_BY(1)
    for (int patch = words.lane; patch < patches; patch += words.lanes) {
      const int column = left + patch * Traits::kColumns, channel = block_channel + words.word * kLane;
      const int64_t at = ((image * p.h + top) * p.w + column) * p.c + channel;
      compute_patch<Traits>(p, tiles, words.word, patch, p.h - top, p.w - column, at, p.c - channel, sums);
    }
    MNET_PLANT(11, __syncthreads(), (void)0);

    const int pixels = p.gx != nullptr ? Traits::kRows * x_map.columns : 0;
    MNET_UNROLL_BY(1)
    for (int pixel = place.lane; pixel < pixels; pixel += place.lanes) {
      const int row = x_map.row(pixel), ih = top + row, iw = left + pixel - row * x_map.columns;
      if (place.valid > 0 && ih < p.h && iw < p.w) {
        T* to = static_cast<T*>(p.gx) + base + (int64_t{ih} * p.w + iw) * p.c;
        store_pack(to, x_packs[pixel * place.packs + place.pack], MNET_PLANT(12, place.valid, place.valid - 1),
                   tiling.vectorized);
      }
    }
    parity = 1 - parity;
    if (++step == tiling.steps_h) {
      step = 0;
      ++image;
    }
  }

  float* scratch = reinterpret_cast<float*>(memory);
  float* partial = workspace + chunk * (kTaps + 2) * p.c + block_channel;
  if (p.dw != nullptr) {
    store_partials<Traits>(reinterpret_cast<const float(&)[kTaps * kLane]>(sums.dw), tiling.words, channels, scratch,
                           partial, p.c);
  }
  if (p.sums != nullptr) {
    float both[2 * kLane];
    MNET_UNROLL
    for (int v = 0; v < kLane; ++v) {
      both[v] = sums.sum[v];
      both[kLane + v] = sums.sum_x[v];
    }
    store_partials<Traits>(both, tiling.words, channels, scratch, partial + int64_t{kTaps} * p.c, p.c);
  }
}

}  // namespace mnet::cuda
