// Mean and covariance of the channels of x, in one capability (see simd.h for how it is included).
//
// Memory plan.  A tile of 128 positions is read once, kept in float32 panels [panel][row][kPanel] (80 KiB at 160
// channels) and centred on its own mean; its products are summed by the matrix product in float32 runs of kShortDepth,
// a block of the lower triangle (panel x panel) at a time, and merged into the chunk's doubles by Chan's formula.  The
// tile's own mean as the shift makes a constant channel exact, and loses nothing whatever the mean and however it
// changes from image to image.
#pragma once

#include <cstdint>

#include "../common/expand_params.h"
#include "../common/plant.h"
#include "expand.h"
#include "gemm.h"
#include "pointwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

typedef double Wide __attribute__((vector_size(kLanes * 8)));

MNET_HD Wide widened(Vec v) { return __builtin_convertvector(v, Wide); }
MNET_HD Wide load_wide(const double* from) {
  Wide v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
MNET_HD void store_wide(double* to, Wide v) { std::memcpy(to, &v, sizeof v); }

// f(row panel, column panel, index of the block) for the blocks of the lower triangle.
template <typename F>
MNET_HD void for_triangle(int panels, F&& f) {
  for (int a = 0, block = 0; a < panels; ++a) {
    for (int b = 0; b <= a; ++b) f(a, b, block++);
  }
}

// A tile's values less their mean, by panel, and that mean: `shift` + residual / rows.
template <typename Storage, bool kPartial>
void centre_column(const typename Storage::Lane* x, int rows, int64_t pitch, int valid, float* tile, Vec* shift,
                   Vec* residual) {
  const Vec first = load_map<Storage, kPartial>(x, valid);
  Vec sum[2] = {};
  for (int row = 0; row < rows; ++row) {
    const Vec value = load_map<Storage, kPartial>(x + row * pitch, valid);
    store_vec(tile + row * kPanel, value);
    sum[row & 1] = sum[row & 1] + (value - first);
  }
  const Vec mean = first + (sum[0] + sum[1]) * (1.f / static_cast<float>(rows));
  sum[0] = sum[1] = Vec{};
  for (int row = 0; row < rows; ++row) {
    const Vec d = load_vec(tile + row * kPanel) - mean;
    store_vec(tile + row * kPanel, d);
    sum[row & 1] = sum[row & 1] + d;
  }
  *shift = mean;
  *residual = MNET_PLANT(11, sum[0] + sum[1], Vec{} + 1.f);
}

// Merges a set of values (`count` of them: means, sums of products about them by block) into the totals of `before`.
// add(row panel, column panel, block, row, lane offset) gives the set's sums of products.
template <typename F>
void merge_products(const GramPlan& plan, int c, double before, double count, const double* delta, double* blocks, F&& add) {
  const double factor = before * count / (before + count);
  for_triangle(plan.panels, [&](int a, int b, int block) {
    const int rows = least(kPanel, c - a * kPanel), columns = least(kPanel, c - b * kPanel);
    for (int i = 0; i < rows; ++i) {
      const double scaled = delta[a * kPanel + i] * MNET_PLANT(12, factor, 0.0);
      for (int v = 0; v < columns; v += kLanes) {
        double* to = blocks + (int64_t{block} * kPanel + i) * kPanel + v;
        store_wide(to, load_wide(to) + add(a, b, block, i, v) + scaled * load_wide(delta + b * kPanel + v));
      }
    }
  });
}

template <typename Storage>
void run_gram(const GramParams& p, const GramPlan& plan, int64_t chunk, double* table) {
  using Lane = typename Storage::Lane;
  const int64_t padded = plan.padded(), row_end = least(p.positions, (chunk + 1) * plan.rows_per_chunk);
  constexpr int kTile = GramPlan::kTileRows;
  Arena arena(padded * kTile + kPanel * kPanel);
  float *tile = arena.take(padded * kTile), *product = arena.take(kPanel * kPanel);
  const Scratch<double> doubles(2 * padded);
  double *delta = doubles.memory, *residual = doubles.memory + padded;  // of the tile's mean: from the one so far; rounding
  double *mean = table, *blocks = table + padded;
  for (int64_t i = 0; i < plan.table_size(); ++i) table[i] = 0.0;
  for (int64_t i = 0; i < padded * kTile; ++i) tile[i] = 0.f;
  for (int64_t i = 0; i < padded; ++i) delta[i] = residual[i] = 0.0;

  double before = 0.0;
  for (int64_t row = chunk * plan.rows_per_chunk; row < row_end; row += kTile) {
    const int rows = static_cast<int>(least<int64_t>(kTile, row_end - row));
    const double count = rows, weight = count / (before + count);
    const Lane* x = static_cast<const Lane*>(p.x) + row * p.c;
    for_vectors(p.c, [&](auto partial, int c, int valid) {
      Vec shift, sum;
      centre_column<Storage, decltype(partial)::value>(x + c, rows, p.c, valid,
                                                       tile + int64_t{c} / kPanel * kTile * kPanel + c % kPanel, &shift, &sum);
      const Wide r = widened(sum) * (1.0 / count), d = widened(shift) + r - load_wide(mean + c);
      store_wide(residual + c, r);
      store_wide(delta + c, d);
      store_wide(mean + c, load_wide(mean + c) + d * weight);
    });
    Ahead ahead;
    if (const int64_t next = row + rows; next < row_end) {
      ahead.add(x + int64_t{rows} * p.c, least<int64_t>(kTile, row_end - next) * p.c * sizeof(Lane));
      ahead.spread(plan.blocks() * along_blocks(kPanel, rows));
    }
    const auto panel = [&](int i) { return tile + int64_t{i} * kTile * kPanel; };
    int current = -1;
    merge_products(plan, p.c, before, count, delta, blocks, [&](int a, int b, int block, int i, int v) {
      if (block != current) {
        current = block;
        multiply_panel<true>(panel(a), kPanel, panel(b), rows, least(kPanel, p.c - a * kPanel), least(kPanel, p.c - b * kPanel),
                             product, false, ahead);
      }
      const Wide correction = (count * residual[a * kPanel + i]) * load_wide(residual + b * kPanel + v);
      return Wide(widened(load_vec(product + i * kPanel + v)) - correction);
    });
    before += count;
  }
}

void gram_unit(const GramParams& p, Dtype dtype, const GramPlan& plan, int64_t chunk, double* table) {
  with_storage(dtype, [&](auto storage) { run_gram<decltype(storage)>(p, plan, chunk, table); });
}

void gram_table(const GramParams& p, Dtype dtype, const GramPlan& plan, double* tables) {
  constexpr float kGateRatio = 4.f;  // stages/reference.py
  const int64_t padded = plan.padded(), c = p.c;
  double *mean = tables, *blocks = tables + padded;
  const Scratch<double> delta(padded);
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    const double* other = tables + chunk * plan.table_size();
    const double before = static_cast<double>(chunk * plan.rows_per_chunk);
    const double count = static_cast<double>(least(plan.rows_per_chunk, p.positions - chunk * plan.rows_per_chunk));
    for (int64_t i = 0; i < padded; ++i) {
      delta.memory[i] = other[i] - mean[i];
      mean[i] += delta.memory[i] * (count / (before + count));
    }
    merge_products(plan, p.c, before, count, delta.memory, blocks, [&](int, int, int block, int i, int v) {
      return load_wide(other + padded + (int64_t{block} * kPanel + i) * kPanel + v);
    });
  }
  const double scale = 1.0 / static_cast<double>(p.positions);
  for_triangle(plan.panels, [&](int a, int b, int block) {
    const int rows = least<int>(kPanel, c - a * kPanel), columns = least<int>(kPanel, c - b * kPanel);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const int64_t row = a * kPanel + i, column = b * kPanel + j;
        const auto value = static_cast<float>(blocks[(int64_t{block} * kPanel + i) * kPanel + j] * scale);
        p.gram[row * c + column] = p.gram[column * c + row] = value;
      }
    }
  });
  with_storage(dtype, [&](auto storage) {
    for (int64_t i = 0; i < c; ++i) {
      const auto m = static_cast<float>(mean[i]);
      const float deviation = __builtin_sqrtf(p.gram[i * c + i]), magnitude = m < 0.f ? -m : m;
      p.gram[c * c + i] = m;
      // a value of the storage dtype, or x - k would not be exact
      p.gram[(c + 1) * c + i] = magnitude > kGateRatio * deviation ? decltype(storage)::round(Vec{} + m)[0] : 0.f;
    }
  });
}

// ---- small tables --------------------------------------------------------------------------------------------------

void multiply_double(const double* a, int64_t row_stride, int64_t depth_stride, const double* b, int rows, int depth,
                     int64_t columns, double* c) {
  for_blocks<4>(0, rows, [&](auto block, int row) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Wide sum[decltype(block)::value] = {};
      for (int k = 0; k < depth; ++k) {
        const Wide value = load_wide(b + k * columns + column);
        MNET_UNROLL
        for (int i = 0; i < decltype(block)::value; ++i) {
          sum[i] = sum[i] + a[(row + i) * row_stride + k * depth_stride] * value;
        }
      }
      MNET_UNROLL
      for (int i = 0; i < decltype(block)::value; ++i) store_wide(c + (row + i) * columns + column, sum[i]);
    }
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
