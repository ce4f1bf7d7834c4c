// The stem, the dense 3x3 convolution of an image: y = W z with z the neighbourhoods, and the moments of y gathered on store.
// Compute capability 8.0 or higher; free of torch.
#pragma once

#include "pointwise.cuh"
#include "stem_tile.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 128 threads owns 32 channels of y and walks over consecutive tiles of 8 x 16 outputs.
//   load      the tile's pixels with halo (17 x 33 of each image channel at stride 2), zero padding included, into dynamic
//             shared memory, 8 loads a thread on their way; the image is read by its strides, whatever the layout.
//   multiply  a warp has 2 rows of 16 outputs by all 32 channels.  Left fragments come straight from the pixels, word by word
//             (about two ways of bank conflicts), right ones by ldmatrix from the weight, which stays in shared memory: 27
//             taps padded with zeros to 32, up to 3 such slices of an image with 8 channels.
//   store     a warp turns its outputs round in shared memory of its own, 16 at a time, as the pointwise product does
//             (pointwise_walk.cuh), so that a thread has 16 bytes of one output; moments as there (StoreOutput).
// Of a bfloat16 image with 3 channels a block has 27 KiB: 8 of them on an SM of 228 KiB have 27 KiB of pixels on their way.
template <typename T_, Math kMath_>
struct StemTraits {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kThreads = StemTile::kThreads;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kColumns = 32;

  static constexpr int kWarpsDown = StemTile::kWarps;
  static constexpr int kWarpColumns = kColumns;
  static constexpr int kTilesM = StemTile::kWarpRows;
  static constexpr int kTilesN = kColumns / 8;
  static constexpr int kPerWord = 4 / sizeof(T_);
  static constexpr int kSteps = StemTile::kTaps / (8 * kPerWord);  // of a slice, 32 bytes each

  static constexpr int kRowPacks = kWarpColumns / kVec;
  static constexpr int kRowsAtOnce = 32 / kRowPacks;
  static constexpr int kPasses = 16 / kRowsAtOnce;

  using WeightTile = TileOf<T, kColumns, StemTile::kTaps / kVec, false>;  // one slice
  static constexpr int kStagedFloats = StemTile::kWarps * 16 * kWarpColumns;
  static constexpr int kSharedBytes = StemTile::kMaxSlices * (WeightTile::kPacks * 16 + StemTile::kTaps * 4) +
                                      (kStagedFloats + (2 * kVec + 1) * kThreads) * 4;

  static_assert(kTilesN % 2 == 0, "right fragments come in pairs");
  static_assert(StemTile::kW == 16, "a fragment's rows are a row of the tile");
  static_assert(32 % kRowPacks == 0 && 16 % kRowsAtOnce == 0, "a thread keeps its columns");
  static_assert(kColumns <= kThreads, "one thread per column reduces the block's moments");
  static_assert(kSharedBytes + StemTile::values(kStemMaxChannels, 2) * sizeof(T_) <= 48 * 1024, "no more than any card gives");
};

// The weight's rows of a block, slice by slice, zero where there is no tap or channel.
template <typename Traits>
MNET_DEVICE void load_weight(const StemParams& p, int block_column, int slices, Pack<typename Traits::T>* weight) {
  using T = typename Traits::T;
  using Tile = typename Traits::WeightTile;
  constexpr int kTaps = StemTile::kMaxSlices * StemTile::kTaps;
  for (int k = threadIdx.x; k < Traits::kColumns * kTaps; k += Traits::kThreads) {
    const int column = k / kTaps, tap = k % kTaps, slice = tap / StemTile::kTaps, at = tap % StemTile::kTaps;
    const int c = tap / StemTile::kNeighbours, place = tap % StemTile::kNeighbours;
    if (slice >= slices) continue;
    const bool exists = c < p.image.c && block_column + column < p.e;
    const int64_t from = (int64_t{block_column} + column) * p.weight_stride_e + c * p.weight_stride_c +
                         place / kStemKernel * p.weight_stride_h + place % kStemKernel * p.weight_stride_w;
    weight[slice * Tile::kPacks + chunk_at<Tile::kChunks>(column, at / Traits::kVec)].lane[at % Traits::kVec] =
        exists ? static_cast<const T*>(p.weight)[from] : from_float<T>(0.f);
  }
}

// acc = the warp's outputs: rows of 16, the first pixel of whose first output is at `first`, kWarpRows of them `pitch` apart.
template <typename Traits>
MNET_DEVICE void multiply_taps(const typename Traits::T* first, int pitch, int stride, const int* taps, int slices,
                               const Pack<typename Traits::T>* weight,
                               Accumulators<Traits::kTilesM, Traits::kTilesN>& acc) {
  using T = typename Traits::T;
  using Tile = typename Traits::WeightTile;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  acc.clear();
  MNET_UNROLL_BY(1)
  for (int slice = 0; slice < slices; ++slice, taps += StemTile::kTaps, weight += Tile::kPacks) {
    if constexpr (Traits::kMath == Math::kTensor) {
      MNET_UNROLL
      for (int step = 0; step < Traits::kSteps; ++step) {
        uint32_t a[Traits::kTilesM][4];
        MNET_UNROLL
        for (int m = 0; m < Traits::kTilesM; ++m) {
          MNET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const T* const pixels = first + m * pitch + (g + MNET_PLANT(43, i % 2, i / 2) * 8) * stride;
            T values[Traits::kPerWord];
            MNET_UNROLL
            for (int v = 0; v < Traits::kPerWord; ++v) {
              const int tap = taps[(step * 8 + t + i / 2 * 4) * Traits::kPerWord + v];
              values[v] = tap < 0 ? from_float<T>(0.f) : pixels[tap];
            }
            a[m][i] = fragment_word<T>(values);
          }
        }
        MNET_UNROLL
        for (int n = 0; n < Traits::kTilesN; n += 2) {
          uint32_t b[4];
          load_right<Tile>(weight, n * 8, step, b);
          const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
          MNET_UNROLL
          for (int m = 0; m < Traits::kTilesM; ++m) {
            mma<T>(acc.c[m][n], a[m], even);
            mma<T>(acc.c[m][n + 1], a[m], odd);
          }
        }
      }
    } else {
      static_assert(sizeof(T) == 4, "float32");
      MNET_UNROLL_BY(1)
      for (int k = 0; k < StemTile::kTaps && taps[k] >= 0; ++k) {
        MNET_UNROLL
        for (int n = 0; n < Traits::kTilesN; ++n) {
          MNET_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float w = value_at<Tile>(weight, n * 8 + 2 * t + i % 2, k);
            MNET_UNROLL
            for (int m = 0; m < Traits::kTilesM; ++m) {
              const float pixel = first[m * pitch + (g + i / 2 * 8) * stride + taps[k]];
              acc.c[m][n][i] = fmaf(pixel, w, acc.c[m][n][i]);
            }
          }
        }
      }
    }
  }
}

// `output`: y, its channels and moments, of which StoreOutput is told in the words of the pointwise product.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    stem_kernel(const StemParams p, const PointwiseParams output, const StemTiling tiling, bool vectorized,
                float* __restrict__ workspace) {
  using T = typename Traits::T;
  MNET_DYNAMIC_SHARED(T, pixels);
  MNET_SHARED(Pack<T>, weight, [StemTile::kMaxSlices * Traits::WeightTile::kPacks]);
  MNET_SHARED(int, taps, [StemTile::kMaxSlices * StemTile::kTaps]);
  MNET_SHARED(float, staged, [Traits::kStagedFloats]);
  MNET_SHARED(float, slots, [StoreOutput<Traits>::kSharedFloats]);

  const int64_t chunk = blockIdx.x / tiling.column_blocks;
  const int block_column = static_cast<int>(blockIdx.x % tiling.column_blocks) * Traits::kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = p.image.stride;
  const int pitch = StemTile::in_w(stride) * stride;  // from one row of outputs to the next
  float* const mine = staged + warp * 16 * Traits::kWarpColumns;
  place_taps(p.image, 0, tiling.slices, taps);
  load_weight<Traits>(p, block_column, tiling.slices, weight);
  StoreOutput<Traits> epilogue(output, block_column, vectorized, slots);

  for_tiles(tiling, chunk, [&](int64_t image, int row, int column) {
    MNET_PLANT(41, __syncthreads(), (void)0);  // the previous tile is used up
    load_tile<T>(p.image, image, row, column, pixels);
    MNET_PLANT(42, __syncthreads(), (void)0);  // the tile is there for all; before the first one, so are taps and weight
    Accumulators<Traits::kTilesM, Traits::kTilesN> acc;
    multiply_taps<Traits>(pixels + warp * StemTile::kWarpRows * pitch, pitch, stride, taps, tiling.slices, weight, acc);

    epilogue.begin();
    int taken = 0;
    MNET_UNROLL
    for (int m = 0; m < Traits::kTilesM; ++m) {
      MNET_UNROLL
      for (int n = 0; n < Traits::kTilesN; ++n) {
        MNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          float* const to = mine + staged_at<Traits>(lane / 4 + half * 8, n * 2 + lane % 4 / 2) + lane % 2 * 2;
          to[0] = acc.c[m][n][half * 2];
          to[1] = acc.c[m][n][half * 2 + 1];
        }
      }
      MNET_PLANT(44, __syncwarp(), (void)0);
      const int y_row = row + warp * StemTile::kWarpRows + m;
      MNET_UNROLL
      for (int pass = 0; pass < Traits::kPasses; ++pass) {
        const int at = pass * Traits::kRowsAtOnce + lane / Traits::kRowPacks;
        float v[Traits::kVec];
        MNET_UNROLL
        for (int quad = 0; quad < Traits::kVec / 4; ++quad) {
          const float* const from = mine + staged_at<Traits>(at, lane % Traits::kRowPacks * (Traits::kVec / 4) + quad);
          const Pack<float> four = *reinterpret_cast<const Pack<float>*>(from);
          MNET_UNROLL
          for (int k = 0; k < 4; ++k) v[quad * 4 + k] = four.lane[k];
        }
        const bool exists = y_row < p.image.out_h && MNET_PLANT(45, column + at, column + at + 1) < p.image.out_w;
        epilogue.take(pass, taken, (image * p.image.out_h + y_row) * p.image.out_w + column + at, exists, v);
        taken += MNET_PLANT(46, exists, true);
      }
      __syncwarp();
    }
    epilogue.end();
  });
  epilogue.finish(block_column, chunk, workspace);
}

}  // namespace mnet::cuda
