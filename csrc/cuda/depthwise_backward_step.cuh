// What a block of depthwise_backward.cuh does in a step: copy, combine, compute; and its sums at the end.
#pragma once

#include "../common/params.h"
#include "../common/plant.h"
#include "depthwise_backward_traits.cuh"
#include "device.h"
#include "pack.cuh"

namespace mnet::cuda {

// Pixels in rows of `columns`: where one lies, without a division.
struct Rows {
  int columns;
  int reciprocal;  // 2^20 / columns, rounded up: exact for fewer than 1024 pixels

  MNET_DEVICE explicit Rows(int columns) : columns(columns), reciprocal(((1 << 20) + columns - 1) / columns) {}
  MNET_DEVICE int row(int pixel) const { return pixel * reciprocal >> 20; }
};

// The 16 bytes of channels that a thread loads and stores.
struct PackPlace {
  int pack;
  int packs;
  int lane;     // of pixels
  int lanes;
  int channel;  // the first
  int valid;    // may be negative
};

// kRows rows of kMaps maps from (top, left) of an image on to shared memory, 16 bytes at a time; what lies outside is left.
// Element by element only one pixel at a time: several would need more registers than there are.
template <bool kVectorized, int kRows, typename T, int kMaps>
MNET_DEVICE void copy_rows(const T* const (&from)[kMaps], Pack<T>* const (&to)[kMaps], const PackPlace& place,
                           const Rows& map, int top, int left, int height, int width, int64_t c) {
  constexpr int kLoads = !kVectorized ? 1 : kMaps == 1 ? 4 : 3;  // pixels that a thread has in flight
  const int pixels = kRows * map.columns;
  MNET_UNROLL_BY(1)
  for (int first = place.lane; first < pixels; first += kLoads * place.lanes) {
    Pack<T> values[kMaps][kLoads];
    bool inside[kLoads];
    MNET_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      const int pixel = first + u * place.lanes, row = map.row(pixel);
      const int ih = top + row, iw = left + pixel - row * map.columns;
      inside[u] = pixel < pixels && place.valid > 0 && ih >= 0 && ih < height && iw >= 0 && iw < width;
      MNET_UNROLL
      for (int m = 0; m < kMaps; ++m) {
        values[m][u] = zero_pack<T>();
        if (inside[u]) values[m][u] = load_pack(from[m] + (int64_t{ih} * width + iw) * c, place.valid, kVectorized);
      }
    }
    MNET_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      MNET_UNROLL
      for (int m = 0; m < kMaps; ++m) {
        if (inside[u]) to[m][(first + u * place.lanes) * place.packs + place.pack] = values[m][u];
      }
    }
  }
}

template <int kRows, typename T, int kMaps>
MNET_DEVICE void copy_rows(const T* const (&from)[kMaps], Pack<T>* const (&to)[kMaps], const PackPlace& place,
                           const Rows& map, int top, int left, int height, int width, int64_t c, bool vectorized) {
  if (vectorized) {
    copy_rows<true, kRows>(from, to, place, map, top, left, height, width, c);
  } else {
    copy_rows<false, kRows>(from, to, place, map, top, left, height, width, c);
  }
}

// The words that a thread combines and computes.
struct WordPlace {
  int word;
  int words;
  int lane;  // of columns or patches
  int lanes;
};

// dy of one group, in the place of grad.  `top` and `left` as for copy_rows; `upstream` has the rows scale, shift, mean, b, c,
// `gates` gate and offset.
template <typename Traits>
MNET_DEVICE void combine_dy(const DepthwiseBackwardParams& p, const float (*upstream)[64], const float (*gates)[64],
                            const WordPlace& place, int columns, int top, int left, Word<typename Traits::T>* grad,
                            const Word<typename Traits::T>* y) {
  using T = typename Traits::T;
  constexpr int kLane = Traits::kLane;
  const bool gated = p.gate != nullptr || p.offset != nullptr;
  with_activation(p.y_act, [&](auto act) {
    MNET_UNROLL_BY(1)
    for (int column = place.lane; column < columns; column += place.lanes) {
      const bool column_inside = left + column >= 0 && left + column < p.out_w;
      MNET_UNROLL
      for (int i = 0; i < Traits::kGroup; ++i) {
        const bool inside = MNET_PLANT(1, column_inside, true) && top + i >= 0 && top + i < p.out_h;
        const int at = (i * columns + column) * place.words + place.word;
        Word<T> dy = grad[at];
        const Word<T> value = y[at];
        MNET_UNROLL
        for (int v = 0; v < kLane; ++v) {
          const int c = place.word * kLane + v;
          const float raw = to_float(value.lane[v]);
          float g = to_float(dy.lane[v]);
          if (gated) g = fmaf(gates[0][c], g, gates[1][c]);
          g *= decltype(act)::bwd(fmaf(upstream[0][c], raw, upstream[1][c]));
          g = fmaf(upstream[0][c], g, fmaf(upstream[3][c], raw - upstream[2][c], upstream[4][c]));
          dy.lane[v] = from_float<T>(inside ? g : 0.f);
        }
        grad[at] = dy;
      }
    }
  });
}

// The part of a thread in the products: its word of channels, and what it adds up from step to step.
template <typename Traits>
struct Products {
  float dw[Traits::kTaps][Traits::kLane];
  float sum[Traits::kLane];    // gx
  float sum_x[Traits::kLane];  // gx * (x - mean)
};

// Where a step's tiles lie.
template <typename T>
struct StepTiles {
  Word<T>* x;             // [kRows, patches * kColumns, words]; becomes gx
  const Word<T>* dy;      // [kGroup, columns, words], the first rows of the window
  const Word<T>* dy_far;  // the next ones
  const Word<T>* weight;  // [kTaps, kMaxWords]
  const float (*own)[64];  // scale, shift, mean of x; not read where there is no batch norm
  int words;
  int x_columns;
  int dy_columns;
};

// One patch: gz and dW, then mask (or residual), rounding and sums.  `rows` and `columns` of it exist; `at` is the thread's
// first channel, `valid` of which exist, of its first pixel in x.
template <typename Traits>
MNET_DEVICE void compute_patch(const DepthwiseBackwardParams& p, const StepTiles<typename Traits::T>& tiles, int word,
                               int patch, int rows, int columns, int64_t at, int valid,
                               Products<Traits>& sums) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns, kLane = Traits::kLane, kKernel = Traits::kKernel;
  Word<T>* x = tiles.x + patch * kColumns * tiles.words + word;
  float z[kRows][kColumns][kLane], gz[kRows][kColumns][kLane];
  const auto prologue = [&](auto&& f) {
    MNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MNET_UNROLL
      for (int q = 0; q < kColumns; ++q) {
        const Word<T> raw = x[(r * tiles.x_columns + q) * tiles.words];
        MNET_UNROLL
        for (int v = 0; v < kLane; ++v) {
          const bool inside = MNET_PLANT(2, r < rows && q < columns, true);
          z[r][q][v] = inside ? f(to_float(raw.lane[v]), word * kLane + v) : 0.f;
          gz[r][q][v] = 0.f;
        }
      }
    }
  };
  if (p.bn == nullptr) {
    prologue([](float value, int) { return value; });
  } else {
    with_activation(p.act, [&](auto act) {
      prologue([&](float value, int c) {
        return to_float(from_float<T>(decltype(act)::fwd(fmaf(tiles.own[0][c], value, tiles.own[1][c]))));
      });
    });
  }

  MNET_UNROLL
  for (int d = 0; d < Traits::kWindowColumns; ++d) {
    MNET_UNROLL
    for (int i = 0; i < Traits::kWindowRows; ++i) {
      const Word<T>* group = i < Traits::kGroup ? tiles.dy : tiles.dy_far;
      const Word<T> packed = group[(i % Traits::kGroup * tiles.dy_columns + patch + d) * tiles.words + word];
      MNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        MNET_UNROLL
        for (int q = 0; q < kColumns; ++q) {
          const int kh = r + Traits::kPad - (i - Traits::kBefore) * Traits::kStride;
          const int kw = q + Traits::kPad - (d - Traits::kBefore) * Traits::kStride;
          if (kh >= 0 && kh < kKernel && kw >= 0 && kw < kKernel) {
            const int tap = kh * kKernel + kw;
            const Word<T> w = tiles.weight[MNET_PLANT(3, tap, Traits::kTaps - 1 - tap) * Traits::kMaxWords + word];
            MNET_UNROLL
            for (int v = 0; v < kLane; ++v) {
              const float dy = to_float(packed.lane[v]);
              gz[r][q][v] = fmaf(to_float(w.lane[v]), dy, gz[r][q][v]);
              sums.dw[tap][v] = fmaf(z[r][q][v], dy, sums.dw[tap][v]);
            }
          }
        }
      }
    }
  }

  if (p.gx == nullptr) return;
  const auto finish = [&](auto&& f) {
    MNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      MNET_UNROLL
      for (int q = 0; q < kColumns; ++q) {
        if (r < rows && q < columns) {
          Word<T>& slot = x[(r * tiles.x_columns + q) * tiles.words];
          Word<T> stored = slot;
          MNET_UNROLL
          for (int v = 0; v < kLane; ++v) {
            stored.lane[v] = from_float<T>(f(gz[r][q][v], to_float(stored.lane[v]), v, (int64_t{r} * p.w + q) * p.c));
          }
          slot = stored;
        }
      }
    }
  };
  if (p.bn == nullptr) {
    const T* residual = static_cast<const T*>(p.residual);
    finish([&](float value, float, int v, int64_t offset) {
      return residual != nullptr && v < valid ? value + to_float(residual[at + offset + v]) : value;
    });
    return;
  }
  with_activation(p.act, [&](auto act) {
    finish([&](float value, float raw, int v, int64_t) {
      const int c = word * kLane + v;
      const float masked = value * decltype(act)::bwd(fmaf(tiles.own[0][c], raw, tiles.own[1][c]));
      const float stored = to_float(from_float<T>(masked));
      sums.sum[v] += stored;
      sums.sum_x[v] = fmaf(stored, raw - tiles.own[2][c], sums.sum_x[v]);
      return MNET_PLANT(4, masked, value);
    });
  });
}

// Adds up kRows values of every thread over the threads with the same word, in shared memory: row i of channel c goes to
// to[i / kLane * pitch + c].  Every thread of the block calls it.
template <typename Traits, int kRows>
MNET_DEVICE void store_partials(const float (&values)[kRows], int words, int channels, float* scratch, float* to,
                                int64_t pitch) {
  constexpr int kLane = Traits::kLane;
  MNET_PLANT(5, __syncthreads(), (void)0);  // what lay there is used up
  MNET_UNROLL
  for (int row = 0; row < kRows; ++row) scratch[row * Traits::kThreads + threadIdx.x] = values[row];
  MNET_PLANT(6, __syncthreads(), (void)0);
  for (int item = threadIdx.x; item < kRows * words; item += Traits::kThreads) {
    const int row = item / words, word = item % words, channel = word * kLane + row % kLane;
    float sum = 0.f;
    for (int at = word; at < Traits::kThreads; at += words) sum += scratch[row * Traits::kThreads + at];
    if (channel < channels) to[row / kLane * pitch + channel] = sum;
  }
}

}  // namespace mnet::cuda
