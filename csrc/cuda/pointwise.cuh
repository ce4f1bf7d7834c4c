// Pointwise (1x1) convolution, NHWC: y = z W^T with the batch norm, activation and gate of its input applied on load and the
// moments of its output gathered on store.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/moments.h"
#include "pointwise_walk.cuh"

namespace mnet::cuda {

// Rounds and stores y; gathers the moments of the stored values.  A thread keeps those of its columns in shared memory of its
// own; over threads they are merged once per block, over blocks by combine.h: a fixed order, hence deterministic.
template <typename Traits>
class StoreOutput {
  using T = typename Traits::T;
  static constexpr int kVec = Traits::kVec;

 public:
  static constexpr int kSharedFloats = (2 * kVec + 1) * Traits::kThreads;

  MNET_DEVICE StoreOutput(const PointwiseParams& p, int block_column, bool vectorized, float* slots)
      : p_(p), column_(block_column + thread_column<Traits>()), vectorized_(vectorized), slots_(slots), count_(0.f) {
    MNET_UNROLL
    for (int v = 0; v < 2 * kVec; ++v) slot(v) = 0.f;
  }

  MNET_DEVICE void begin() {
    rows_ = 0;
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) mean_[v] = m2_[v] = 0.f;
  }
  MNET_DEVICE void fetch(int, int64_t, bool) {}

  MNET_DEVICE void take(int, int row, int64_t position, bool exists, float (&y)[kVec]) {
    const int valid = p_.e - column_;
    if (!exists || valid <= 0) return;
    const Words stored = words_of<T>(y);
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) y[v] = value_of<T>(stored, v);
    store_words(static_cast<T*>(p_.y) + position * p_.e + column_, stored, valid, vectorized_);
    if (p_.moments == nullptr) return;
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) welford_update(mean_[v], m2_[v], y[v], 1.f / static_cast<float>(row + 1));
    rows_ = row + 1;
  }

  MNET_DEVICE void end() {
    if (rows_ == 0) return;
    const float added = static_cast<float>(rows_), merged = added / (count_ + added);
    MNET_UNROLL
    for (int v = 0; v < kVec; ++v) {
      float mean = slot(v), m2 = slot(kVec + v);
      chan_update(mean, m2, count_, mean_[v], m2_[v], merged);
      slot(v) = mean;
      slot(kVec + v) = m2;
    }
    count_ += added;
  }

  // Once per block, by all threads: its partial of [chunks, 3, e].
  MNET_DEVICE void finish(int block_column, int64_t chunk, float* workspace) {
    if (p_.moments == nullptr) return;
    slot(2 * kVec) = count_;
    MNET_PLANT(27, __syncthreads(), (void)0);
    const int column = threadIdx.x;
    if (column >= Traits::kColumns || block_column + column >= p_.e) return;
    const int v = column % kVec;
    const Moments<float> sum = merge<float>([&](auto&& add) {
      for_threads_of_column<Traits>(column, [&](int thread) {
        const float* from = slots_ + thread;
        add({from[2 * kVec * Traits::kThreads], from[v * Traits::kThreads], from[(kVec + v) * Traits::kThreads]});
      });
    });
    float* partial = workspace + chunk * 3 * p_.e + block_column + column;
    partial[0] = sum.count;
    partial[p_.e] = sum.mean;
    partial[2 * int64_t{p_.e}] = sum.m2;
  }

 private:
  MNET_DEVICE float& slot(int i) { return slots_[i * Traits::kThreads + threadIdx.x]; }

  const PointwiseParams& p_;
  const int column_;
  const bool vectorized_;
  float* const slots_;
  float count_;
  int rows_;  // of this tile, so far
  float mean_[kVec], m2_[kVec];  // of them
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    pointwise_kernel(const PointwiseParams p, const ActivatedSource source, const Weight weight, const RowTiling tiling,
                     bool vectorized, float* __restrict__ workspace) {
  using T = typename Traits::T;
  static_assert(Traits::kColumns <= Traits::kThreads, "one thread per column reduces the block's moments");
  MNET_DYNAMIC_SHARED(Pack<T>, ring);
  MNET_SHARED(float, slots, [StoreOutput<Traits>::kSharedFloats]);
  const int block_column = static_cast<int>(blockIdx.x % tiling.column_blocks) * Traits::kColumns;
  const Activated<typename Traits::OperandTile, Traits::kThreads> operand{source};
  StoreOutput<Traits> epilogue(p, block_column, vectorized, slots);
  const Alone<T> alone;
  walk<Traits, typename Traits::WeightRows>(tiling, weight, operand, epilogue, alone, ring);
  epilogue.finish(block_column, blockIdx.x / tiling.column_blocks, workspace);
}

}  // namespace mnet::cuda
