// Input gradient of the pointwise convolution: gx = (dy W) act'(scale * x + shift) [+ residual], and the sums that the batch
// norm of x needs of it.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "pointwise_backward_operand.cuh"
#include "pointwise_walk.cuh"

namespace mnet::cuda {

// Masks, rounds and stores gx; gathers sum gx, sum gx (x - mean), or with a gate (where gx is dz, neither gated nor masked)
// the rows of the image table.  Sums are of the stored values where they are stored.  Memory plan as for the forward's moments.
// `kByImage`: whether there may be an image table.
template <typename Traits, bool kByImage>
class StoreGradient {
  using T = typename Traits::T;
  static constexpr int kVec = Traits::kVec;

 public:
  static constexpr int kSums = kByImage ? 3 : 2;
  static constexpr int kSharedFloats = kSums * kVec * Traits::kThreads;
  static constexpr int kTableFloats = 3 * Traits::kColumns;

  MNET_DEVICE StoreGradient(const PointwiseBackwardParams& p, int block_column, bool vectorized, float* slots, float* table)
      : p_(p), column_(block_column + thread_column<Traits>()), vectorized_(vectorized), slots_(slots), table_(table) {
    MNET_UNROLL
    for (int i = 0; i < kSums * kVec; ++i) slot(i) = 0.f;
    if (p.bn == nullptr) return;
    for (int i = threadIdx.x; i < kTableFloats; i += Traits::kThreads) {
      const int column = block_column + i % Traits::kColumns;
      table[i] = column < p.c ? p.bn[int64_t{i / Traits::kColumns} * p.c + column] : 0.f;
    }
  }

  MNET_DEVICE void begin() {
    MNET_UNROLL
    for (int i = 0; i < 2; ++i) {
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) sum_[i][v] = 0.f;
    }
  }

  MNET_DEVICE void fetch(int pass, int64_t position, bool exists) {
    const int valid = p_.c - column_;
    const bool wants_x = p_.bn != nullptr && (p_.gate == nullptr || p_.sums != nullptr);
    const void* const from = wants_x ? p_.x : p_.residual;
    other_[pass] = Words{};
    if (from == nullptr || !exists || valid <= 0) return;
    other_[pass] = load_words(static_cast<const T*>(from) + position * p_.c + column_, valid, vectorized_);
  }

  MNET_DEVICE void take(int pass, int, int64_t position, bool exists, float (&g)[kVec]) {
    const int valid = p_.c - column_;
    if (!exists || valid <= 0) return;
    if (p_.bn == nullptr) {
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) g[v] += value_of<T>(other_[pass], v);
    } else if (p_.gate == nullptr) {
      with_activation(p_.act, [&](auto act) {
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) g[v] *= decltype(act)::bwd(normalized(pass, v));
      });
    }
    if (p_.gx != nullptr) {
      const Words stored = words_of<T>(g);
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) g[v] = value_of<T>(stored, v);
      store_words(static_cast<T*>(p_.gx) + position * p_.c + column_, stored, valid, vectorized_);
    }
    if (p_.sums == nullptr) return;
    if (!kByImage || p_.gate == nullptr) {
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) {
        sum_[0][v] += g[v];
        sum_[1][v] = fmaf(g[v], value_of<T>(other_[pass], v) - table(2, v), sum_[1][v]);
      }
      return;
    }
    if constexpr (kByImage) {
      with_activation(p_.act, [&](auto act) {
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          const float u = normalized(pass, v), masked = g[v] * decltype(act)::bwd(u);
          sum_[0][v] = fmaf(g[v], decltype(act)::fwd(u), sum_[0][v]);
          sum_[1][v] += masked;
          // A third row of registers would spill.
          slot(2 * kVec + v) = fmaf(masked, value_of<T>(other_[pass], v) - table(2, v), slot(2 * kVec + v));
        }
      });
    }
  }

  MNET_DEVICE void end() {
    if (p_.sums == nullptr) return;
    MNET_UNROLL
    for (int i = 0; i < 2; ++i) {
      MNET_UNROLL
      for (int v = 0; v < kVec; ++v) slot(i * kVec + v) += MNET_PLANT(10, sum_[i][v], sum_[i][0]);
    }
  }

  // Once per block, by all threads, after the barrier that the walk ends with: its partial of [chunks, 2 or 3, c].
  MNET_DEVICE void finish(int block_column, int64_t chunk, float* workspace) {
    if (p_.sums == nullptr) return;
    const int column = threadIdx.x;
    if (column >= Traits::kColumns || block_column + column >= p_.c) return;
    const int rows = !kByImage || p_.gate == nullptr ? 2 : 3;
    for (int i = 0; i < rows; ++i) {
      float sum = 0.f;
      for_threads_of_column<Traits>(
          column, [&](int thread) {
            sum += slots_[(i * kVec + MNET_PLANT(9, column % kVec, 0)) * Traits::kThreads + thread];
          });
      workspace[(chunk * rows + i) * p_.c + block_column + column] = sum;
    }
  }

 private:
  MNET_DEVICE float& slot(int i) { return slots_[i * Traits::kThreads + threadIdx.x]; }
  MNET_DEVICE float table(int row, int v) const { return table_[row * Traits::kColumns + thread_column<Traits>() + v]; }
  MNET_DEVICE float normalized(int pass, int v) const {
    return fmaf(table(0, v), value_of<T>(other_[pass], v), table(1, v));
  }

  const PointwiseBackwardParams& p_;
  const int column_;
  const bool vectorized_;
  float* const slots_;
  const float* const table_;  // scale, shift, mean of the block's columns
  Words other_[Traits::kPasses];  // x, or the residual where there is no batch norm
  float sum_[2][kVec];            // of this tile
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    pointwise_input_gradient(const PointwiseBackwardParams p, const UpstreamSource source, const Weight weight,
                             const RowTiling tiling, bool vectorized, float* __restrict__ workspace) {
  using T = typename Traits::T;
  using Epilogue = StoreGradient<Traits, true>;
  static_assert(Traits::kTensors == 2, "grad and y");
  static_assert(Traits::kColumns <= Traits::kThreads, "one thread per column adds up the block's sums");
  MNET_DYNAMIC_SHARED(Pack<T>, ring);
  MNET_SHARED(float, slots, [Epilogue::kSharedFloats]);
  MNET_SHARED(float, table, [Epilogue::kTableFloats]);  // read after the first tile's barriers
  const int block_column = static_cast<int>(blockIdx.x % tiling.column_blocks) * Traits::kColumns;
  const Upstream<typename Traits::OperandTile, Traits::kThreads> operand{source};
  Epilogue epilogue(p, block_column, vectorized, slots, table);
  const Alone<T> alone;
  walk<Traits, typename Traits::WeightColumns>(tiling, weight, operand, epilogue, alone, ring);
  epilogue.finish(block_column, blockIdx.x / tiling.column_blocks, workspace);
}

}  // namespace mnet::cuda
