// normalize (+ residual) that gathers mean and covariance of what it writes: gram without its read of the map.  Compute
// capability 8.0 or higher; free of torch.
#pragma once

#include "../common/params.h"
#include "../common/plant.h"
#include "expand_gram.cuh"

namespace mnet::cuda {

// Memory plan.  As gram's (expand_gram.cuh), of which this is another source: what a thread has loaded is y and, with a
// residual, as many bytes of that; it becomes the output in registers, is stored 16 bytes a thread and goes on to the tile as it
// was stored.  Loads of the next tile are under way while this one is multiplied: 16 or 32 KiB a block, two blocks a
// multiprocessor.  normalize and gram move 3 or 4 maps, this 2 or 3; the products, as long as reading a map up to 32
// channels and three times as long at 64, hide behind more bytes here; counted, not measured on a card.
template <typename T_, bool kResidual>
struct NormalizedSource {
  using T = T_;
  static constexpr int kVec = Pack<T_>::kSize;

  const T* y;  // these three at the thread's first channel
  const T* residual;
  T* out;
  int c;
  int valid;  // channels
  Activation act;
  bool vectorized;
  const float* scale;  // in shared memory, the shifts kMaxChannels on; zero for channels that do not exist: so is their output
  Words words[GramTraits::kLoads];
  Words others[kResidual ? GramTraits::kLoads : 1];

  MNET_DEVICE void fetch(int u, int64_t position, bool exists) {
    words[u] = Words{};
    if (exists) words[u] = load_words(y + position * c, valid, vectorized);
    if constexpr (kResidual) {
      others[u] = Words{};
      if (exists) others[u] = load_words(residual + position * c, valid, vectorized);
    }
  }

  MNET_DEVICE void finish(int64_t first, int step, int left) {
    with_activation(act, [&](auto a) {
      MNET_UNROLL
      for (int u = 0; u < GramTraits::kLoads; ++u) {
        float z[kVec];
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          z[v] = decltype(a)::fwd(fmaf(scale[v], value_of<T>(words[u], v), scale[GramTraits::kMaxChannels + v]));
          if constexpr (kResidual) z[v] += value_of<T>(others[MNET_PLANT(7, u, 0)], v);
        }
        const Words stored = words_of<T>(z);
        if (u * step < MNET_PLANT(8, left, left - 1)) {
          store_words(out + (first + u * step) * c, stored, MNET_PLANT(9, valid, valid - 1), vectorized);
        }
        words[u] = MNET_PLANT(10, stored, words[u]);
      }
    });
  }
};

template <typename T, bool kResidual>
__global__ void __launch_bounds__(GramTraits::kThreads, GramTraits::kBlocksPerSm)
    normalize_gram_kernel(const NormalizeParams p, const GramTiling t, double* __restrict__ means,
                          float* __restrict__ products) {
  using Source = NormalizedSource<T, kResidual>;
  const int channel = static_cast<int>(threadIdx.x) % t.packs * Source::kVec;
  MNET_SHARED(float, tables, [2][GramTraits::kMaxChannels]);
  for (int k = threadIdx.x; k < 2 * GramTraits::kMaxChannels; k += GramTraits::kThreads) {
    const int row = k / GramTraits::kMaxChannels, i = k % GramTraits::kMaxChannels;
    tables[row][i] = i < p.c ? p.bn[MNET_PLANT(11, row, 0) * p.c + i] : 0.f;
  }
  MNET_PLANT(12, __syncthreads(), (void)0);  // they are there for all
  Source source{};
  source.y = static_cast<const T*>(p.y) + channel;
  source.residual = kResidual ? static_cast<const T*>(p.operand) + channel : nullptr;
  source.out = static_cast<T*>(p.output) + channel;
  source.c = p.c;
  source.valid = p.c - channel;
  source.act = p.act;
  source.vectorized = t.vectorized;
  source.scale = tables[0] + channel;
  gather_gram(source, p.n * p.area, t, means, products);
}

}  // namespace mnet::cuda
