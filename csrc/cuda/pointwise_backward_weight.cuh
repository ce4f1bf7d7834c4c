// Weight gradient of the pointwise convolution: dW = sum over positions of dy z^T, both operands made as they are read.
// Compute capability 8.0 or higher; free of torch.
#pragma once

#include "pointwise_backward_operand.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 256 threads owns 64 x 64 of the gradient and walks down a run of positions, which are the depth
// of this product, 64 at a time (32 of float32): a slot holds a line of 128 bytes (two of float32) of grad, y and x of each.
// Copies and preparation as in pointwise_walk.cuh; ldmatrix transposes both operands.
//   multiply  8 warps, 2 down by 4 across, each 32 x 16 of the gradient.
//   sums      a tensor core truncates as it accumulates, so after kRun slots what it has goes to a second set of registers.
// Runs are combined by combine_sums: a fixed order, hence deterministic.
template <typename T_, Math kMath_, int kStages_>
struct WeightGradientTraits {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kStages = kStages_;
  static constexpr int kSize = 64;  // channels of a block, on both sides
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = sizeof(T_) == 2 ? 2 : 1;  // float32 fragments are read word by word: more registers
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kDepth = kDepthBytes / sizeof(T_);
  static constexpr int kRun = 8;
  static constexpr int kWarpsDown = 2;
  static constexpr int kWarpRows = kSize / kWarpsDown;
  static constexpr int kWarpColumns = kSize * kWarpsDown * 32 / kThreads;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpColumns / 8;

  using Tile = TileOf<T, kDepth, kSize / kVec, true>;
  static constexpr int kSlotPacks = 3 * Tile::kPacks;
  static constexpr int kRingBytes = kStages * kSlotPacks * 16;
  static_assert(kRingBytes <= 99 * 1024, "shared memory of every card from 8.0 on");
};

// How the gradient is dealt to blocks: runs of positions by blocks of channels, the latter first.
struct WeightTiling {
  int64_t positions;
  int64_t run;  // positions of a block, at most 2^30
  int64_t runs;
  int32_t blocks_c;
  int32_t blocks_e;
};

// Writes a warp's part of the gradient [e, c], whose first row and column of the block are `first_e` and `first_c`.
template <int kTilesM, int kTilesN>
MNET_DEVICE void write_gradient(const Accumulators<kTilesM, kTilesN>& part, int first_e, int first_c, int e, int c, float* to) {
  const int lane = threadIdx.x % 32, row = first_e + MNET_PLANT(8, lane / 4, lane / 8), column = first_c + lane % 4 * 2;
  MNET_UNROLL
  for (int m = 0; m < kTilesM; ++m) {
    MNET_UNROLL
    for (int n = 0; n < kTilesN; ++n) {
      MNET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at_e = row + m * 16 + i / 2 * 8, at_c = column + n * 8 + i % 2;
        if (at_e < e && at_c < c) to[int64_t{at_e} * c + at_c] = part.c[m][n][i];
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    pointwise_weight_gradient(const UpstreamSource upstream, const ActivatedSource activated, const WeightTiling tiling,
                              float* __restrict__ partials) {
  using T = typename Traits::T;
  using Tile = typename Traits::Tile;
  MNET_DYNAMIC_SHARED(Pack<T>, ring);
  const Upstream<Tile, Traits::kThreads> dy{upstream};
  const Activated<Tile, Traits::kThreads> z{activated};
  const int blocks = tiling.blocks_c * tiling.blocks_e, index = static_cast<int>(blockIdx.x % blocks);
  const int first_c = index % tiling.blocks_c * Traits::kSize, first_e = index / tiling.blocks_c * Traits::kSize;
  const int64_t run = blockIdx.x / blocks, begin = run * tiling.run;
  const int length = static_cast<int>(smaller(tiling.run, tiling.positions - begin));
  const int warp = threadIdx.x / 32;
  const int warp_row = warp % Traits::kWarpsDown * Traits::kWarpRows;
  const int warp_column = warp / Traits::kWarpsDown * Traits::kWarpColumns;

  int next_row = 0;
  const auto issue = [&](int slot) {
    if (next_row < length) {
      Pack<T>* const to = ring + slot * Traits::kSlotPacks;
      dy.issue(to, begin + next_row, length - next_row, first_e);
      z.issue(to + 2 * Tile::kPacks, begin + next_row, length - next_row, first_c);
      next_row += Traits::kDepth;
    }
    cp_async_commit();
  };
  for (int slot = 0; slot < Traits::kStages; ++slot) issue(slot);

  Accumulators<Traits::kTilesM, Traits::kTilesN> total, acc;
  total.clear();
  acc.clear();
  int slot = 0, summed = 0;
  for (int row = 0; row < length; row += Traits::kDepth) {
    Pack<T>* const left = ring + slot * Traits::kSlotPacks;
    MNET_PLANT(5, cp_async_wait<Traits::kStages - 1>(), cp_async_wait<Traits::kStages>());
    dy.prepare(left, begin + row, length - row, first_e);
    z.prepare(left + 2 * Tile::kPacks, begin + row, length - row, first_c);
    MNET_PLANT(6, __syncthreads(), (void)0);  // the slot is there for all
    multiply<Traits::kMath, Tile, Tile>(left, left + 2 * Tile::kPacks, warp_row, warp_column, 4, acc);
    if (++summed == Traits::kRun) {
      total.take(acc);
      summed = 0;
    }
    MNET_PLANT(7, __syncthreads(), (void)0);  // all have multiplied: the slot may be written over
    issue(slot);
    slot = slot + 1 == Traits::kStages ? 0 : slot + 1;
  }
  total.take(acc);

  write_gradient(total, first_e + warp_row, first_c + warp_column, upstream.e, activated.c,
                 partials + run * upstream.e * activated.c);
}

}  // namespace mnet::cuda
