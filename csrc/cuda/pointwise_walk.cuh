// The products that run along positions: y = z W^T and the input gradient dy W.  Free of torch.
#pragma once

#include "pointwise_operand.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 256 threads owns kColumns columns of the product and walks down a run of positions in tiles of
// kRows; operand and weight pass through a ring of kStages slots, each with 128 bytes of the depth.
//   copy      into every slot that has been used up, by cp.async: kStages - 1 steps are always under way, while the block
//             prepares, multiplies and stores.  A slot's tiles are lines of 128 bytes, permuted so that neither 16-byte
//             accesses nor ldmatrix meet a bank twice.
//   prepare   batch norm, activation and the like, in place, by the thread that copied (pointwise_operand.cuh).
//   multiply  8 warps, each 32 rows x kWarpColumns of the tile.
//   store     a warp turns its part of the tile round in the slot just used, 16 rows at a time, in float32, so that a thread
//             has 16 bytes of one row: coalesced stores, and the same columns in every tile, so that what is summed over
//             positions stays with the thread until the run ends.
// kTensors is how many tensors the operand is made of: each has a tile in the slot, the first becomes the operand.
template <typename T_, Math kMath_, int kTensors_, int kRows_, int kColumns_, int kStages_>
struct ProductTraits {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kTensors = kTensors_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kDepth = kDepthBytes / sizeof(T_);

  static constexpr int kWarps = kThreads / 32;
  static constexpr int kWarpRows = 32;
  static constexpr int kWarpsDown = kRows / kWarpRows;
  static constexpr int kWarpColumns = kColumns * kWarpsDown / kWarps;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpColumns / 8;

  using OperandTile = TileOf<T, kRows, kDepthBytes / 16, false>;
  using WeightRows = TileOf<T, kColumns, kDepthBytes / 16, false>;  // forward: [e, c], the depth is c
  using WeightColumns = TileOf<T, kDepth, kColumns / kVec, true>;   // input gradient: [e, c], the depth is e
  static constexpr int kSlotPacks = kTensors * OperandTile::kPacks + WeightRows::kPacks;
  static constexpr int kRingBytes = kStages * kSlotPacks * 16;

  // The thread's 16 bytes of the rows of its warp's part.
  static constexpr int kRowPacks = kWarpColumns / kVec;
  static constexpr int kRowsAtOnce = 32 / kRowPacks;
  static constexpr int kPasses = 16 / kRowsAtOnce;

  static_assert(kRows % kWarpRows == 0 && kWarps % kWarpsDown == 0, "warps cover the tile");
  static_assert(kWarpColumns % 16 == 0, "right fragments come in pairs");
  static_assert(WeightColumns::kPacks == WeightRows::kPacks, "a slot serves both directions");
  static_assert(kRowPacks <= 16 && 32 % kRowPacks == 0 && 16 % kRowsAtOnce == 0, "a thread keeps its columns");
  static_assert(kWarps * 16 * kWarpColumns * 4 <= kSlotPacks * 16, "a slot holds what its warps turn round");
  static_assert(kStages >= 2, "one slot is filled while another is used");
};

constexpr int64_t kLongestRun = 1 << 30;  // rows of a run are counted in 32 bits

// How positions are dealt to blocks: spans (all positions, or an image) in runs.
struct RowTiling {
  int64_t span;           // positions
  int64_t run;            // of a block, at most kLongestRun; a multiple of the tile's rows
  int64_t runs_per_span;
  int64_t chunks;         // runs altogether; grid = chunks * column_blocks, in one dimension, columns first: blocks that
  int32_t column_blocks;  // read the same positions run together and find them in the second level of cache
};

// Where a warp keeps four values from column 4 * quad of row `row`: written in pairs by rows, read by columns.
template <typename Traits>
MNET_DEVICE int staged_at(int row, int quad) {
  constexpr int kQuads = Traits::kWarpColumns / 4;
  return (row * kQuads + (quad ^ row * 2 % (kQuads < 8 ? kQuads : 8))) * 4;
}

// No second product.
template <typename T>
struct Alone {
  MNET_DEVICE void issue(int, int64_t, int) const {}
  MNET_DEVICE void prepare(int, int64_t, int) const {}
  MNET_DEVICE void multiply(int, int, const Pack<T>*) const {}
};

// Runs a block.  `operand` is that of kRows positions by the depth; WeightTile says which side of the weight the depth is.
// `epilogue` gets, for every tile, begin(), for every 16 rows fetch(pass, position, exists) and then take(pass, row, position,
// exists, v) of the 16 bytes at `position` and the thread's column, the thread's row-th of the tile, and end().  `beside` may
// make a second product of every prepared step: its issue and prepare are called with a tile's first step.
template <typename Traits, typename WeightTile, typename Operand, typename Epilogue, typename Beside>
MNET_DEVICE void walk(const RowTiling& tiling, const Weight& weight, const Operand& operand, Epilogue& epilogue, Beside& beside,
                      Pack<typename Traits::T>* ring) {
  using T = typename Traits::T;
  const int64_t chunk = blockIdx.x / tiling.column_blocks, span = chunk / tiling.runs_per_span;
  const int64_t begin = span * tiling.span + chunk % tiling.runs_per_span * tiling.run;
  const int length = static_cast<int>(smaller(tiling.run, (span + 1) * tiling.span - begin));
  const int column = static_cast<int>(blockIdx.x % tiling.column_blocks) * Traits::kColumns;
  const int steps = (operand.channels() + Traits::kDepth - 1) / Traits::kDepth;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp % Traits::kWarpsDown * Traits::kWarpRows;
  const int warp_column = warp / Traits::kWarpsDown * Traits::kWarpColumns;

  int next_row = 0;  // of the step to copy next
  int next_step = 0;
  const auto issue = [&](int slot) {
    if (next_row < length) {
      Pack<T>* const to = ring + slot * Traits::kSlotPacks;
      const int depth = next_step * Traits::kDepth;
      operand.issue(to, begin + next_row, length - next_row, depth);
      if (next_step == 0) beside.issue(next_row / Traits::kRows, begin + next_row, length - next_row);
      issue_weight<WeightTile, Traits::kThreads>(weight, WeightTile::kDepthRows ? depth : column,
                                                 WeightTile::kDepthRows ? column : depth,
                                                 to + Traits::kTensors * Traits::OperandTile::kPacks);
      if (++next_step == steps) {
        next_step = 0;
        next_row += Traits::kRows;
      }
    }
    cp_async_commit();  // a group even if it is empty: they are counted
  };
  for (int slot = 0; slot < Traits::kStages; ++slot) issue(slot);

  int slot = 0;
  for (int row = 0; row < length; row += Traits::kRows) {
    Accumulators<Traits::kTilesM, Traits::kTilesN> acc;
    acc.clear();
    for (int step = 0;; ++step) {
      Pack<T>* const left = ring + slot * Traits::kSlotPacks;
      MNET_PLANT(29, cp_async_wait<Traits::kStages - 1>(), cp_async_wait<Traits::kStages>());
      operand.prepare(left, begin + row, length - row, step * Traits::kDepth);
      if (step == 0) beside.prepare(row / Traits::kRows, begin + row, length - row);
      MNET_PLANT(23, __syncthreads(), (void)0);  // the slot is there for all
      const int bytes = (operand.channels() - step * Traits::kDepth) * static_cast<int>(sizeof(T));
      multiply<Traits::kMath, typename Traits::OperandTile, WeightTile>(
          left, left + Traits::kTensors * Traits::OperandTile::kPacks, warp_row, warp_column, (bytes + 31) / 32, acc);
      beside.multiply(row / Traits::kRows, step, left);
      MNET_PLANT(24, __syncthreads(), (void)0);  // all have multiplied: the slot may be written over
      if (step + 1 == steps) break;
      issue(slot);
      slot = slot + 1 == Traits::kStages ? 0 : slot + 1;
    }

    auto* staged = reinterpret_cast<float*>(ring + slot * Traits::kSlotPacks) + warp * 16 * Traits::kWarpColumns;
    epilogue.begin();
    MNET_UNROLL
    for (int m = 0; m < Traits::kTilesM; ++m) {
      const int first = row + warp_row + m * 16 + lane / Traits::kRowPacks;
      MNET_UNROLL
      for (int pass = 0; pass < Traits::kPasses; ++pass) {
        const int at = first + pass * Traits::kRowsAtOnce;
        epilogue.fetch(pass, begin + at, at < length);
      }
      MNET_UNROLL
      for (int n = 0; n < Traits::kTilesN; ++n) {
        MNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          float* to = staged + staged_at<Traits>(lane / 4 + half * 8, n * 2 + lane % 4 / 2) + lane % 2 * 2;
          to[0] = acc.c[m][n][half * 2];
          to[1] = acc.c[m][n][half * 2 + 1];
        }
      }
      MNET_PLANT(25, __syncwarp(), (void)0);
      MNET_UNROLL
      for (int pass = 0; pass < Traits::kPasses; ++pass) {
        const int staged_row = pass * Traits::kRowsAtOnce + lane / Traits::kRowPacks;
        float v[Traits::kVec];
        MNET_UNROLL
        for (int quad = 0; quad < Traits::kVec / 4; ++quad) {
          const float* from = staged + staged_at<Traits>(staged_row, lane % Traits::kRowPacks * (Traits::kVec / 4) + quad);
          const Pack<float> four = *reinterpret_cast<const Pack<float>*>(from);
          MNET_UNROLL
          for (int k = 0; k < 4; ++k) v[quad * 4 + k] = four.lane[k];
        }
        const int at = first + pass * Traits::kRowsAtOnce;
        epilogue.take(pass, m * Traits::kPasses + pass, begin + at, MNET_PLANT(26, at, at + 1) < length, v);
      }
      __syncwarp();
    }
    epilogue.end();
    MNET_PLANT(30, __syncthreads(), (void)0);  // all have stored
    issue(slot);
    slot = slot + 1 == Traits::kStages ? 0 : slot + 1;
  }
}

// The thread's column in its block's columns.
template <typename Traits>
MNET_DEVICE int thread_column() {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return warp / Traits::kWarpsDown * Traits::kWarpColumns + lane % Traits::kRowPacks * Traits::kVec;
}

// Calls f with every thread that had `column` of the block, in a fixed order.
template <typename Traits, typename F>
MNET_DEVICE void for_threads_of_column(int column, F&& f) {
  const int across = column / Traits::kWarpColumns, pack = column % Traits::kWarpColumns / Traits::kVec;
  for (int down = 0; down < Traits::kWarpsDown; ++down) {
    for (int row = 0; row < Traits::kRowsAtOnce; ++row) {
      f((across * Traits::kWarpsDown + down) * 32 + row * Traits::kRowPacks + pack);
    }
  }
}

}  // namespace mnet::cuda
