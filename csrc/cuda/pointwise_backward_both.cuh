// Both gradients of the pointwise convolution in one pass over grad, y and x, for layers of few output channels.
// Compute capability 8.0 or higher; free of torch.
#pragma once

#include "pointwise_backward_input.cuh"
#include "pointwise_backward_weight.cuh"

namespace mnet::cuda {

// Memory plan.  The input gradient's (pointwise_walk.cuh), with 64 positions by 64 channels of x a tile.  Beside it:
//   copy      x of the tile's positions, with its first step, into one of two tiles of 8 KiB, where it becomes z.
//   multiply  a step's dy, 64 positions x 64 channels of e, is in shared memory for gx = dy W: read the other way round
//             (ldmatrix transposes both operands) it gives 64 x 64 of dW = dy^T z, which stay in registers from tile to tile,
//             16 of a thread for every step.
// The epilogue reads x once more, for its mask, from the second level of cache.  So grad, y and x come from memory once and
// gx goes there once: 2 P E + 2 P C elements for P positions, where two kernels move 4 P E + 3 P C.
// Tensor cores truncate as they accumulate: a run is short enough that this stays far below the rounding of 16-bit operands.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBothBlocksPerSm = 1;  // that is what 164 KiB of shared memory hold
#else
constexpr int kBothBlocksPerSm = 2;
#endif

template <typename T_, int kSteps_>
struct BothTraits : ProductTraits<T_, Math::kTensor, 2, 64, 64, 2> {
  using Product = ProductTraits<T_, Math::kTensor, 2, 64, 64, 2>;
  static constexpr int kSteps = kSteps_;  // of 64 channels of e
  static constexpr int kLongest = 8192;   // positions of a run
  using Activated = TileOf<T_, Product::kRows, kDepthBytes / 16, true>;
  using Transposed = TileOf<T_, Product::kRows, kDepthBytes / 16, true>;  // Product::OperandTile
  static constexpr int kBytes = Product::kRingBytes + 2 * Activated::kPacks * 16;

  static constexpr int kPartsDown = 2;  // warps over 64 channels of e, four over 64 of c
  static constexpr int kPartRows = 32;
  static constexpr int kPartColumns = 16;

  static_assert(sizeof(T_) == 2 && Product::kRows * sizeof(T_) == kDepthBytes, "a tile's positions are a step of depth");
  static_assert(Product::kColumns == Activated::kChunks * Product::kVec, "the tile of x has the block's columns");
  static_assert(Transposed::kPacks == Product::OperandTile::kPacks, "the same packs");
  static_assert(Product::kStages == 2, "two tiles of x are enough");
  static_assert(kPartsDown * kPartRows == 64 && Product::kWarps / kPartsDown * kPartColumns == 64, "warps cover dW's part");
};

// The weight gradient of the block's columns.
template <typename Traits>
class BesideGradient {
  using T = typename Traits::T;
  using Tile = typename Traits::Activated;
  using Mine = Share<Tile, Traits::kThreads>;

 public:
  MNET_DEVICE BesideGradient(const ActivatedSource& source, int block_column, Pack<T>* tiles)
      : source_(source), column_(block_column), tiles_(tiles) {
    MNET_UNROLL
    for (int k = 0; k < Traits::kSteps; ++k) sums_[k].clear();
  }

  MNET_DEVICE void issue(int tile, int64_t position, int rows) const {
    Mine::issue(source_.x, position, rows, column_, source_.c, source_.vectorized, at(tile));
  }

  // As Activated's, without a gate and with four channels at a time: beside dW there are few registers left.
  MNET_DEVICE void prepare(int tile, int64_t, int rows) const {
    const int channel = column_ + Mine::channel(), valid = source_.c - channel;
    if (source_.bn == nullptr || valid <= 0) return;
    with_activation(source_.act, [&](auto act) {
      MNET_UNROLL_BY(1)
      for (int quad = 0; quad < Tile::kVec / 4; ++quad) {
        const int left = valid - quad * 4;
        float scale[4], shift[4];
        load_table(source_.bn + channel + MNET_PLANT(15, quad * 4, 0), left, source_.vectorized, scale);
        load_table(source_.bn + source_.c + channel + quad * 4, left, source_.vectorized, shift);
        MNET_UNROLL_BY(1)
        for (int u = 0; u < Mine::kLoads && Mine::row(u) < rows; ++u) {
          Pack<T>& z = reinterpret_cast<Pack<T>&>(Mine::words(at(tile), u));
          MNET_UNROLL
          for (int k = 0; k < 4; ++k) {
            const float value = decltype(act)::fwd(fmaf(scale[k], to_float(z.lane[quad * 4 + k]), shift[k]));
            z.lane[quad * 4 + k] = from_float<T>(value);  // beyond c of no matter: no such column of dW is written
          }
        }
      }
    });
  }

  MNET_DEVICE void multiply(int tile, int step, const Pack<T>* dy) {
    MNET_UNROLL
    for (int k = 0; k < Traits::kSteps; ++k) {  // registers have no index
      if (k == MNET_PLANT(13, step, 0)) {
        mnet::cuda::multiply<Math::kTensor, typename Traits::Transposed, Tile>(dy, at(tile), part_row(), part_column(), 4,
                                                                               sums_[k]);
      }
    }
  }

  // This run's gradient [e, c], of the block's columns.
  MNET_DEVICE void finish(int e, int c, float* to) const {
    MNET_UNROLL
    for (int k = 0; k < Traits::kSteps; ++k) {
      write_gradient(sums_[k], k * 64 + part_row(), column_ + part_column(), e, c, to);
    }
  }

 private:
  MNET_DEVICE Pack<T>* at(int tile) const { return tiles_ + MNET_PLANT(14, tile % 2, 0) * Tile::kPacks; }
  static MNET_DEVICE int part_row() { return threadIdx.x / 32 % Traits::kPartsDown * Traits::kPartRows; }
  static MNET_DEVICE int part_column() { return threadIdx.x / 32 / Traits::kPartsDown * Traits::kPartColumns; }

  const ActivatedSource& source_;
  const int column_;
  Pack<T>* const tiles_;
  Accumulators<Traits::kPartRows / 16, Traits::kPartColumns / 8> sums_[Traits::kSteps];
};

// Partials: sums [chunks, 2, c] and gradients [chunks, e, c].
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, kBothBlocksPerSm)
    pointwise_both_gradients(const PointwiseBackwardParams p, const UpstreamSource upstream, const ActivatedSource activated,
                             const Weight weight, const RowTiling tiling, bool vectorized, float* __restrict__ sums,
                             float* __restrict__ gradients) {
  using T = typename Traits::T;
  using Epilogue = StoreGradient<Traits, false>;
  MNET_DYNAMIC_SHARED(Pack<T>, ring);
  MNET_SHARED(float, slots, [Epilogue::kSharedFloats]);
  MNET_SHARED(float, table, [Epilogue::kTableFloats]);  // read after the first tile's barriers
  const int block_column = static_cast<int>(blockIdx.x % tiling.column_blocks) * Traits::kColumns;
  const int64_t chunk = blockIdx.x / tiling.column_blocks;
  const Upstream<typename Traits::OperandTile, Traits::kThreads> operand{upstream};
  Epilogue epilogue(p, block_column, vectorized, slots, table);
  BesideGradient<Traits> beside(activated, block_column, ring + Traits::kStages * Traits::kSlotPacks);
  walk<Traits, typename Traits::WeightColumns>(tiling, weight, operand, epilogue, beside, ring);
  epilogue.finish(block_column, chunk, sums);
  beside.finish(p.e, p.c, gradients + chunk * p.e * p.c);
}

}  // namespace mnet::cuda
