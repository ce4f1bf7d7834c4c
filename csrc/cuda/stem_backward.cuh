// The stem's backward: dW = sum over positions of dy z^T with z the neighbourhoods of the image, dy made as grad and y are
// read.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "pointwise_operand.cuh"
#include "stem_tile.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 128 threads owns 32 channels by one slice of 32 taps of the gradient and walks over consecutive
// tiles of 8 x 16 outputs; an image with up to 3 channels has one slice.
//   load      the tile's pixels as in the forward pass; of grad and y 16 bytes a thread, 2 of each on their way.  dy is built
//             from them in registers, rounded to storage, written where it is wanted, and kept as lines of 32 channels,
//             permuted so that ldmatrix meets no bank twice.
//   multiply  the depth are positions: a warp has 2 rows of 16 of them and the whole 32 x 32 of the gradient.  ldmatrix
//             transposes dy, right fragments come word by word from the pixels.
//   sums      a tensor core truncates as it accumulates, so after kRun tiles what it has goes to a second set of registers;
//             warps are added up once per block, in their order, blocks by combine_sums: deterministic.
template <typename T_, Math kMath_>
struct StemBackwardTraits {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr int kThreads = StemTile::kThreads;
  static constexpr int kBlocksPerSm = 3;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kColumns = 32;
  static constexpr int kPacks = kColumns / kVec;
  static constexpr int kTilesM = kColumns / 16;
  static constexpr int kTilesN = StemTile::kTaps / 8;
  static constexpr int kPerWord = 4 / sizeof(T_);
  static constexpr int kSteps = StemTile::kW / (8 * kPerWord);  // of a row, 32 bytes of depth each
  static constexpr int kRun = 8;

  using Tile = TileOf<T, StemTile::kPositions, kPacks, true>;
  static constexpr int kRowStep = kThreads / kPacks;
  static constexpr int kBatch = 2;  // packs of each tensor on their way
  static constexpr int kBatches = Tile::kPacks / (kThreads * kBatch);
  static constexpr int kTables = 5;  // scale, shift, mean, b, c
  static constexpr int kSharedBytes =
      Tile::kPacks * 16 + kColumns * StemTile::kTaps * 4 + kTables * kColumns * 4 + StemTile::kTaps * 4;

  static_assert(kThreads % kPacks == 0 && Tile::kPacks % (kThreads * kBatch) == 0, "every thread has as many packs");
  static_assert(kSharedBytes + StemTile::values(kStemMaxChannels, 2) * sizeof(T_) <= 48 * 1024, "no more than any card gives");
};

// dy of the tile whose first output is (row, column), zero where no output or channel is.
template <typename Traits>
MNET_DEVICE void make_upstream(const StemBackwardParams& p, const float (&tables)[Traits::kTables][Traits::kColumns],
                               int64_t image, int row, int column, int block_column, bool writes, bool vectorized,
                               Pack<typename Traits::T>* tile) {
  using T = typename Traits::T;
  const int pack = threadIdx.x % Traits::kPacks, channel = block_column + pack * Traits::kVec, valid = p.e - channel;
  MNET_UNROLL_BY(1)
  for (int batch = 0; batch < Traits::kBatches; ++batch) {
    const int first = threadIdx.x / Traits::kPacks + batch * Traits::kBatch * Traits::kRowStep;
    Words dy[Traits::kBatch], y[Traits::kBatch];
    int64_t from[Traits::kBatch];  // negative: there is no such output
    MNET_UNROLL
    for (int u = 0; u < Traits::kBatch; ++u) {
      const int position = first + u * Traits::kRowStep;
      const int y_row = row + position / StemTile::kW, y_column = column + position % StemTile::kW;
      const bool exists = valid > 0 && y_row < p.image.out_h && y_column < p.image.out_w;
      from[u] = exists ? ((image * p.image.out_h + y_row) * p.image.out_w + y_column) * p.e + channel : -1;
      dy[u] = exists ? load_words(static_cast<const T*>(p.grad) + from[u], valid, vectorized) : Words{};
      y[u] = exists ? load_words(static_cast<const T*>(p.y) + from[u], valid, vectorized) : Words{};
    }
    with_activation(p.y_act, [&](auto act) {
      MNET_UNROLL
      for (int quad = 0; quad < Traits::kVec / 4; ++quad) {
        Pack<float> table[Traits::kTables];
        MNET_UNROLL
        for (int i = 0; i < Traits::kTables; ++i) {
          table[i] = *reinterpret_cast<const Pack<float>*>(&tables[i][pack * Traits::kVec + quad * 4]);
        }
        MNET_UNROLL
        for (int u = 0; u < Traits::kBatch; ++u) {
          MNET_UNROLL
          for (int k = 0; k < 4; ++k) {
            constexpr int kPerWord = Traits::kPerWord, kBits = 32 / kPerWord;
            const int at = quad * 4 + k;
            const float scale = table[0].lane[k], value = value_of<T>(y[u], at);
            const float g = value_of<T>(dy[u], at) * decltype(act)::bwd(fmaf(scale, value, table[1].lane[k]));
            const float d = fmaf(scale, g, fmaf(table[3].lane[k], value - table[2].lane[k], table[4].lane[k]));
            const uint32_t bits = bits_of(from_float<T>(from[u] >= 0 ? d : 0.f));
            uint32_t& word = dy[u].word[at / kPerWord];
            const uint32_t others = kPerWord == 1 ? 0u : word & ~(0xffffu << at % kPerWord * kBits);
            word = others | bits << at % kPerWord * kBits;
          }
        }
      }
    });
    MNET_UNROLL
    for (int u = 0; u < Traits::kBatch; ++u) {
      if (writes && from[u] >= 0) store_words(static_cast<T*>(p.dy) + from[u], dy[u], valid, vectorized);
      const int position = first + u * Traits::kRowStep;
      *reinterpret_cast<Words*>(tile + chunk_at<Traits::kPacks>(position, pack)) = dy[u];
    }
  }
}

// acc += dy z^T over one row of 16 outputs, of which `count` exist: row `row` of the tile of dy, whose first output's first
// pixel is at `first`.  `taps`: of the thread's columns, one of eight for a tensor core, two of eight otherwise.
template <typename Traits>
MNET_DEVICE void multiply_row(const Pack<typename Traits::T>* dy, int row, const typename Traits::T* first, int stride,
                              int count, const int (&taps)[Traits::kTilesN][2],
                              Accumulators<Traits::kTilesM, Traits::kTilesN>& acc) {
  using T = typename Traits::T;
  using Tile = typename Traits::Tile;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if constexpr (Traits::kMath == Math::kTensor) {
    MNET_UNROLL
    for (int step = 0; step < Traits::kSteps; ++step) {
      uint32_t a[Traits::kTilesM][4];
      MNET_UNROLL
      for (int m = 0; m < Traits::kTilesM; ++m) load_left<Tile>(dy, m * 16, row * Traits::kSteps + step, a[m]);
      MNET_UNROLL
      for (int n = 0; n < Traits::kTilesN; ++n) {
        uint32_t b[2];
        MNET_UNROLL
        for (int i = 0; i < 2; ++i) {
          T values[Traits::kPerWord];
          MNET_UNROLL
          for (int v = 0; v < Traits::kPerWord; ++v) {
            // Beyond the map there may be pixels, and what is not finite stays so times zero.
            const int output = (step * 8 + MNET_PLANT(50, t + i * 4, t * 2 + i)) * Traits::kPerWord + v;
            values[v] = output < count ? first[output * stride + taps[n][0]] : from_float<T>(0.f);
          }
          b[i] = fragment_word<T>(values);
        }
        MNET_UNROLL
        for (int m = 0; m < Traits::kTilesM; ++m) mma<T>(acc.c[m][n], a[m], b);
      }
    }
  } else {
    static_assert(sizeof(T) == 4, "float32");
    MNET_UNROLL_BY(1)
    for (int output = 0; output < count; ++output) {
      const float* const pixels = first + output * stride;
      float d[Traits::kTilesM][2];
      MNET_UNROLL
      for (int m = 0; m < Traits::kTilesM; ++m) {
        MNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          d[m][half] = value_at<Tile>(dy, m * 16 + g + half * 8, row * StemTile::kW + output);
        }
      }
      MNET_UNROLL
      for (int n = 0; n < Traits::kTilesN; ++n) {
        MNET_UNROLL
        for (int i = 0; i < 4; ++i) {
          MNET_UNROLL
          for (int m = 0; m < Traits::kTilesM; ++m) {
            acc.c[m][n][i] = fmaf(d[m][i / 2], pixels[taps[n][i % 2]], acc.c[m][n][i]);
          }
        }
      }
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    stem_backward_kernel(const StemBackwardParams p, const StemTiling tiling, bool vectorized, float* __restrict__ partials) {
  using T = typename Traits::T;
  MNET_DYNAMIC_SHARED(T, pixels);
  MNET_SHARED(Pack<T>, dy, [Traits::Tile::kPacks]);
  MNET_SHARED(float, sums, [Traits::kColumns][StemTile::kTaps]);
  MNET_SHARED(float, tables, [Traits::kTables][Traits::kColumns]);
  MNET_SHARED(int, places, [StemTile::kTaps]);

  const int blocks = tiling.column_blocks * tiling.slices, index = static_cast<int>(blockIdx.x % blocks);
  const int slice = index % tiling.slices, block_column = index / tiling.slices * Traits::kColumns;
  const int64_t chunk = blockIdx.x / blocks;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, stride = p.image.stride;
  const int pitch = StemTile::in_w(stride) * stride;
  place_taps(p.image, MNET_PLANT(51, slice, 0), 1, places);
  for (int k = threadIdx.x; k < Traits::kTables * Traits::kColumns; k += Traits::kThreads) {
    const int table = k / Traits::kColumns, column = k % Traits::kColumns;
    const float* const from = table < 3 ? p.y_bn + int64_t{table} * p.e : p.coef + int64_t{table - 3} * p.e;
    tables[table][column] = block_column + column < p.e ? from[block_column + column] : 0.f;
  }
  MNET_PLANT(52, __syncthreads(), (void)0);  // both are read before the first tile is there
  int taps[Traits::kTilesN][2];
  MNET_UNROLL
  for (int n = 0; n < Traits::kTilesN; ++n) {
    MNET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int place = places[n * 8 + (Traits::kMath == Math::kTensor ? g : 2 * t + i)];
      taps[n][i] = place < 0 ? 0 : place;  // no such column is written
    }
  }

  Accumulators<Traits::kTilesM, Traits::kTilesN> total, acc;
  total.clear();
  acc.clear();
  int summed = 0;
  for_tiles(tiling, chunk, [&](int64_t image, int row, int column) {
    MNET_PLANT(53, __syncthreads(), (void)0);  // the previous tile is used up
    if (p.dw != nullptr) load_tile<T>(p.image, image, row, column, pixels);
    make_upstream<Traits>(p, tables, image, row, column, block_column, p.dy != nullptr && slice == 0, vectorized, dy);
    MNET_PLANT(54, __syncthreads(), (void)0);  // the tile is there for all
    if (p.dw == nullptr) return;
    const int count = p.image.out_w - column < StemTile::kW ? p.image.out_w - column : StemTile::kW;
    MNET_UNROLL
    for (int r = 0; r < StemTile::kWarpRows; ++r) {
      const int own = warp * StemTile::kWarpRows + r;
      if (row + own < p.image.out_h) multiply_row<Traits>(dy, own, pixels + own * pitch, stride, count, taps, acc);
    }
    if (++summed == Traits::kRun) {
      total.take(acc);
      summed = MNET_PLANT(55, 0, (acc = total, 0));
    }
  });
  if (p.dw == nullptr) return;
  total.take(acc);

  for (int turn = 0; turn < StemTile::kWarps; ++turn) {
    if (turn == warp) {
      MNET_UNROLL
      for (int m = 0; m < Traits::kTilesM; ++m) {
        MNET_UNROLL
        for (int n = 0; n < Traits::kTilesN; ++n) {
          MNET_UNROLL
          for (int i = 0; i < 4; ++i) {
            float& sum = sums[m * 16 + g + i / 2 * 8][n * 8 + 2 * t + i % 2];
            sum = turn == 0 ? total.c[m][n][i] : sum + total.c[m][n][i];
          }
        }
      }
    }
    MNET_PLANT(56, __syncthreads(), (void)0);
  }
  const int depth = StemTile::kNeighbours * p.image.c;
  for (int k = threadIdx.x; k < Traits::kColumns * StemTile::kTaps; k += Traits::kThreads) {
    const int column = k / StemTile::kTaps, tap = slice * StemTile::kTaps + k % StemTile::kTaps;
    if (block_column + column < p.e && tap < depth) {
      partials[(chunk * p.e + block_column + column) * depth + tap] = sums[column][k % StemTile::kTaps];
    }
  }
}

}  // namespace mnet::cuda
