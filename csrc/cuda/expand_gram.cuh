// Mean, covariance and shift of the channels of x, up to 64 of them.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/expand_params.h"
#include "../common/plant.h"
#include "expand_gram.h"
#include "pointwise_operand.cuh"

namespace mnet::cuda {

// Memory plan.  A block of 256 threads walks over tiles in float32, of as many positions as four 16-byte loads a
// thread bring (32 KiB of 16-bit values, 128 positions of 64 channels); the next tile's are on their way in registers while
// this one is worked on.  Per tile:
//   centre    a thread sums its channel over every parts-th position, less the first value; then subtracts the tile's mean in
//             place and sums what is left, the rounding of the mean.  The tile's own mean as the shift makes a constant channel
//             exact, and loses nothing whatever the mean and however it changes from image to image.
//   multiply  the lower triangle in blocks of 4 x 4 channels, a thread one of them; where they are fewer than the threads,
//             groups of threads share the positions.  A position costs a thread 16 multiply-adds for two 16-byte reads, which
//             are broadcasts.  float32 throughout: a tensor core's bfloat16 would round x - mean (docs/mathematics.md).
//   merge     into the thread's 16 sums, by Chan's formula with the tile's and the block's mean (the latter in double).
// Blocks are merged in double and in a fixed order.  By counted multiply-adds and bytes, the products take about
// as long as the reading up to 32 channels and three times as long at 64, the maps of 14 x 14; not measured on a card.
struct GramTraits {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kMaxChannels = kMaxGramChannels;
  static constexpr int kTileFloats = 8192;
  static constexpr int kBlock = 4;  // channels
  static constexpr int kRun = 32;   // positions that are added up before they go into a long sum
  static constexpr int kMaxTriangle = (kMaxChannels / kBlock) * (kMaxChannels / kBlock + 1) / 2;
  static constexpr int kLoads = 4;  // 16-byte loads a thread has in flight: as many as a tile has of 16-bit values

  static_assert(kLoads * kThreads * Pack<__half>::kSize <= kTileFloats, "what is loaded fits in the tile");
  static_assert(kMaxTriangle <= kThreads, "a thread for every block of the triangle");
  static_assert(kThreads * kBlock * kBlock <= kTileFloats, "the groups are added up where the tile was");
  static_assert((kTileFloats + 2 * kThreads + 4 * kMaxChannels) * 4 <= 48 * 1024, "static shared memory");
};

// How positions are dealt to blocks; a function of the shape alone.
struct GramTiling {
  int32_t packs;     // 16 bytes of channels of a position
  int32_t row_step;  // positions that all threads load at a time
  int32_t rows;      // of a tile
  int32_t pitch;     // channels, rounded up to whole blocks
  int32_t triangle;  // blocks
  int32_t groups;    // of `triangle` threads
  int64_t run;       // positions of a chunk; a multiple of rows
  int64_t chunks;
  bool vectorized;  // 16-byte loads of x are aligned and end within c
};

// Row and column of block `index` of the lower triangle.
MNET_DEVICE int2 triangle_block(int index) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

// Where gather_gram has a thread's 16 bytes of channels from: a map in memory.  `fetch` starts the loads of a position,
// `finish` makes of what has arrived, positions from `first` on, `step` apart, of which those less than `left` further exist,
// the values that `words` then holds.
template <typename T_>
struct MapSource {
  using T = T_;
  const T* x;  // the thread's first channel
  int c;
  int valid;  // channels
  bool vectorized;
  Words words[GramTraits::kLoads];

  MNET_DEVICE void fetch(int u, int64_t position, bool exists) {
    words[u] = Words{};
    if (exists) words[u] = load_words(x + position * c, valid, vectorized);
  }
  MNET_DEVICE void finish(int64_t, int, int) {}
};

// The partials of a block: means [chunks, pitch], products [chunks, pitch, pitch] of which the blocks of the lower triangle.
template <typename Source>
MNET_DEVICE void gather_gram(Source& source, int64_t positions, const GramTiling& t, double* means, float* products) {
  using T = typename Source::T;
  constexpr int kLoads = GramTraits::kLoads, kVec = Pack<T>::kSize, kBlock = GramTraits::kBlock;
  MNET_SHARED(float, tile, [GramTraits::kTileFloats]);
  MNET_SHARED(float, sums, [GramTraits::kThreads]);
  MNET_SHARED(float, rests, [GramTraits::kThreads]);
  MNET_SHARED(float, delta, [GramTraits::kMaxChannels]);  // of the tile's mean from the one so far
  MNET_SHARED(float, rest, [GramTraits::kMaxChannels]);   // the tile's mean less the value that was subtracted for it

  const int tid = threadIdx.x;
  // Loading: this thread's pack of channels, of every row_step-th position.
  const int pack = tid % t.packs, row = tid / t.packs, pack_channel = pack * kVec;
  const bool loads = row < t.row_step;
  // Centring: this thread's channel, of every parts-th position.
  const int channel = tid % t.pitch, part = tid / t.pitch, parts = GramTraits::kThreads / t.pitch;
  // Multiplying: this thread's block of channels, of every groups-th position.
  const int group = tid / t.triangle;
  const bool multiplies = group < t.groups;
  const int2 block = triangle_block(tid % t.triangle);
  const float* const left = tile + block.x * kBlock;
  const float* const right = tile + block.y * kBlock;

  const int64_t begin = blockIdx.x * t.run, end = smaller(begin + t.run, positions);
  const auto fetch = [&](int64_t first) {
    MNET_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      const int64_t position = first + row + u * t.row_step;
      source.fetch(u, position, loads && position < end);
    }
  };

  double mean = 0.0;  // of this thread's channel, so far
  float m2[kBlock][kBlock] = {};
  fetch(begin);
  for (int64_t first = begin; first < end; first += t.rows) {
    const int count = static_cast<int>(smaller(t.rows, end - first));
    if (loads) {
      source.finish(first + row, t.row_step, count - row);
      MNET_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        float* const to = tile + (row + u * t.row_step) * t.pitch + pack_channel;
        MNET_UNROLL
        for (int v = 0; v < kVec; v += 4) {
          if (pack_channel + v < t.pitch) {
            Pack<float> four;
            MNET_UNROLL
            for (int k = 0; k < 4; ++k) four.lane[k] = value_of<T>(source.words[u], v + k);
            *reinterpret_cast<Pack<float>*>(to + v) = four;
          }
        }
      }
    }
    if (first + t.rows < end) fetch(first + MNET_PLANT(51, t.rows, 0));
    MNET_PLANT(52, __syncthreads(), (void)0);  // the tile is there

    const float shift = tile[channel];
    float sum = 0.f;
    if (part < parts) {
      for (int r = part; r < count; r += parts) sum += tile[r * t.pitch + channel] - shift;
    }
    sums[tid] = sum;
    MNET_PLANT(53, __syncthreads(), (void)0);  // the sums are there
    const float scale = 1.f / static_cast<float>(count);
    sum = 0.f;
    for (int i = 0; i < parts; ++i) sum += sums[i * t.pitch + channel];
    const float centre = shift + sum * scale;
    sum = 0.f;
    if (part < parts) {
      for (int r = part; r < count; r += parts) {
        const float d = tile[r * t.pitch + channel] - centre;
        tile[r * t.pitch + channel] = d;
        sum += d;
      }
    }
    rests[tid] = sum;
    MNET_PLANT(54, __syncthreads(), (void)0);  // the tile is centred

    const auto before = static_cast<double>(first - begin);
    if (tid < t.pitch) {
      sum = 0.f;
      for (int i = 0; i < parts; ++i) sum += rests[i * t.pitch + channel];
      rest[channel] = sum * scale;
      const double d = static_cast<double>(centre) + static_cast<double>(sum * scale) - mean;
      delta[channel] = static_cast<float>(d);
      mean += d * (count / (before + count));
    }
    for (int r = group; multiplies && r < count;) {
      float product[kBlock][kBlock] = {};
      const int stop = count - r < GramTraits::kRun * t.groups ? count : r + GramTraits::kRun * t.groups;
      MNET_UNROLL_BY(4)
      for (; r < stop; r += t.groups) {
        const Pack<float> a = *reinterpret_cast<const Pack<float>*>(left + r * t.pitch);
        const Pack<float> b = *reinterpret_cast<const Pack<float>*>(right + r * t.pitch);
        MNET_UNROLL
        for (int i = 0; i < kBlock; ++i) {
          MNET_UNROLL
          for (int j = 0; j < kBlock; ++j) product[i][j] = fmaf(a.lane[i], b.lane[j], product[i][j]);
        }
      }
      MNET_UNROLL
      for (int i = 0; i < kBlock; ++i) {
        MNET_UNROLL
        for (int j = 0; j < kBlock; ++j) m2[i][j] += product[i][j];
      }
    }
    MNET_PLANT(55, __syncthreads(), (void)0);  // delta and rest are there; the tile has been used up
    const bool merges = group == 0;  // the others' sums are about the same means
    const auto size = static_cast<float>(merges ? count : 0);
    const auto factor = static_cast<float>(merges ? MNET_PLANT(56, before * count / (before + count), 0.0) : 0.0);
    MNET_UNROLL
    for (int i = 0; i < kBlock; ++i) {
      const float d = factor * delta[block.x * kBlock + i], rounding = size * rest[block.x * kBlock + i];
      MNET_UNROLL
      for (int j = 0; j < kBlock; ++j) {
        m2[i][j] += d * delta[block.y * kBlock + j] - rounding * rest[block.y * kBlock + j];
      }
    }
  }

  if (multiplies) {
    MNET_UNROLL
    for (int i = 0; i < kBlock; ++i) {
      MNET_UNROLL
      for (int j = 0; j < kBlock; ++j) tile[tid * kBlock * kBlock + i * kBlock + j] = m2[i][j];
    }
  }
  MNET_PLANT(57, __syncthreads(), (void)0);
  for (int item = tid; item < t.triangle * kBlock * kBlock; item += GramTraits::kThreads) {
    float sum = 0.f;
    for (int g = 0; g < t.groups; ++g) sum += tile[g * t.triangle * kBlock * kBlock + item];
    const int2 at = triangle_block(item / (kBlock * kBlock));
    const int i = at.x * kBlock + item / kBlock % kBlock, j = at.y * kBlock + item % kBlock;
    products[(int64_t{blockIdx.x} * t.pitch + i) * t.pitch + j] = sum;
  }
  if (tid < t.pitch) means[int64_t{blockIdx.x} * t.pitch + tid] = mean;
}

template <typename T>
__global__ void __launch_bounds__(GramTraits::kThreads, GramTraits::kBlocksPerSm)
    gram_kernel(const GramParams p, const GramTiling t, double* __restrict__ means, float* __restrict__ products) {
  const int channel = static_cast<int>(threadIdx.x) % t.packs * Pack<T>::kSize;
  const int valid = MNET_PLANT(50, p.c - channel, p.c - channel - 1);
  MapSource<T> source{static_cast<const T*>(p.x) + channel, p.c, valid, t.vectorized, {}};
  gather_gram(source, p.positions, t, means, products);
}

// The second level: as combine.cuh's, of all elements of the covariance.  The diagonal's threads know mean and variance of
// their channel, and write the mean and the shift.
struct GramTableTraits {
  static constexpr int kLanes = 32;  // elements of a block
  static constexpr int kRuns = 16;   // of chunks, interleaved
  static constexpr int kThreads = kLanes * kRuns;
  static constexpr float kGateRatio = 4.f;  // stages/reference.py

  static_assert(3 * kThreads * sizeof(double) <= 48 * 1024, "static shared memory");
};

template <typename T>
__global__ void __launch_bounds__(GramTableTraits::kThreads)
    gram_table_kernel(const GramParams p, const GramTiling t, const double* __restrict__ means,
                      const float* __restrict__ products) {
  MNET_SHARED(double, sums, [3][GramTableTraits::kRuns][GramTableTraits::kLanes]);
  const int lane = threadIdx.x % GramTableTraits::kLanes, run = threadIdx.x / GramTableTraits::kLanes;
  const int element = blockIdx.x * GramTableTraits::kLanes + lane;
  const int i = element / p.c, j = element % p.c;
  const bool exists = i < p.c && t.chunks > 0;
  const double shift_i = exists ? means[i] : 0.0, shift_j = exists ? means[j] : 0.0;
  double sum_i = 0.0, sum_j = 0.0, sum = 0.0;
  if (exists) {
    const int at = (i < j ? j : i) * t.pitch + (i < j ? i : j);
    MNET_UNROLL_BY(4)
    for (int64_t chunk = run; chunk < MNET_PLANT(58, t.chunks, t.chunks - 1); chunk += GramTableTraits::kRuns) {
      const auto n = static_cast<double>(smaller(t.run, p.positions - chunk * t.run));
      const double d_i = means[chunk * t.pitch + i] - shift_i, d_j = means[chunk * t.pitch + j] - shift_j;
      sum_i += n * d_i;
      sum_j += n * d_j;
      sum += products[chunk * t.pitch * t.pitch + at] + n * d_i * d_j;
    }
  }
  sums[0][run][lane] = sum_i;
  sums[1][run][lane] = sum_j;
  sums[2][run][lane] = sum;
  MNET_PLANT(59, __syncthreads(), (void)0);
  if (run != 0 || i >= p.c) return;
  for (int r = 1; r < GramTableTraits::kRuns; ++r) {
    sum_i += sums[0][r][lane];
    sum_j += sums[1][r][lane];
    sum += sums[2][r][lane];
  }
  const double inverse = p.positions > 0 ? 1.0 / static_cast<double>(p.positions) : 0.0;
  double value = (sum - sum_i * (sum_j * inverse)) * inverse;
  if (i == j && value < 0.0) value = 0.0;
  const auto covariance = static_cast<float>(value);
  p.gram[int64_t{i} * p.c + j] = covariance;
  if (i != j) return;
  const auto mean = static_cast<float>(shift_i + sum_i * inverse);
  p.gram[int64_t{p.c} * p.c + i] = mean;
  // a value of the storage dtype, or x - k would not be exact
  const bool distant = fabsf(mean) > MNET_PLANT(60, GramTableTraits::kGateRatio, 20.f) * sqrtf(covariance);
  p.gram[(int64_t{p.c} + 1) * p.c + i] = distant ? to_float(from_float<T>(mean)) : 0.f;
}

}  // namespace mnet::cuda
