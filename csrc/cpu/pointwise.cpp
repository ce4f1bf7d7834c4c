#include "pointwise.h"

#include <algorithm>
#include <vector>

#include "../common/moments.h"

namespace mnet::cpu {

namespace {

// A multiple of every capability's block of rows (6, and kRowBlock of most).  Longer tiles would save passes over the packed weight and the
// weight gradient, but lose more: panels of results and the depth's part of the tile leave the first-level cache.
constexpr int kTileRows = 42;
constexpr int kRowBlock = 14;
constexpr int kAmxTileRows = 96;
constexpr int kAmxRowBlock = 32;
constexpr int kAmxRows = 16;      // of a register, to which the depth is padded

constexpr int64_t kMaxChunks = 64;
constexpr int64_t kChunkRows = 168;          // at least
constexpr int64_t kBackwardChunkRows = 336;  // each leaves a weight gradient behind
constexpr int64_t kUnitsPerThread = 4;           // where the chunks are uneven; below, the columns are split as well
constexpr int kMinBlockColumns = 64;             // a block repeats the element-wise work on the tile's input
constexpr int64_t kPartialFloats = 2 << 20;      // all parts of a weight gradient together, where 4 chunks allow

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool on_amx(Capability capability, Dtype dtype) {
  return capability >= Capability::kAmx && dtype == Dtype::kBFloat16;
}

PointwisePlan make_plan(int64_t positions, int depth, int columns, int64_t chunk_rows, int64_t max_chunks, Dtype dtype,
                        Capability capability, int threads) {
  const bool amx = on_amx(capability, dtype);
  PointwisePlan plan{};
  plan.positions = positions;
  plan.tile_rows = amx ? kAmxTileRows : kTileRows;
  plan.depth = depth;
  plan.packed_depth = amx ? static_cast<int>(divide_up(depth, kAmxRows)) * kAmxRows : depth;
  plan.columns = columns;
  plan.panel = capability >= Capability::kAvx512 ? 32 : 16;
  plan.panels = static_cast<int>(divide_up(columns, plan.panel));
  // Chunks of the same length, and a multiple of four of them: two or four threads then have the same to do.
  const int64_t most = std::min(max_chunks, std::max<int64_t>(1, positions / chunk_rows));
  const int64_t wanted = most > 4 ? most / 4 * 4 : most;
  const int64_t block = amx ? kAmxRowBlock : kRowBlock;
  plan.rows_per_chunk = std::max<int64_t>(1, divide_up(divide_up(positions, wanted), block)) * block;
  plan.chunks = divide_up(positions, plan.rows_per_chunk);
  const bool even = plan.chunks % threads == 0;  // every thread has as many
  const int64_t wished = even ? 1 : divide_up(kUnitsPerThread * threads, std::max<int64_t>(1, plan.chunks));
  const int64_t fewest = kMinBlockColumns / plan.panel;
  plan.panels_per_block = static_cast<int>(std::max(fewest, divide_up(plan.panels, wished)));
  plan.blocks = static_cast<int>(divide_up(plan.panels, plan.panels_per_block));
  plan.slots = plan.chunks;
  return plan;
}

PointwiseUnit unit_of(const PointwisePlan& plan, int64_t index) {
  PointwiseUnit unit{};
  unit.chunk = index / plan.blocks;
  unit.row_begin = unit.chunk * plan.rows_per_chunk;
  unit.row_end = std::min(plan.positions, unit.row_begin + plan.rows_per_chunk);
  unit.panel_begin = static_cast<int>(index % plan.blocks) * plan.panels_per_block;
  unit.panel_end = std::min(plan.panels, unit.panel_begin + plan.panels_per_block);
  return unit;
}

struct Kernels {
  decltype(&baseline::pointwise_pack_panel) pack_panel;
  decltype(&baseline::pointwise_unit) unit;
  decltype(&baseline::pointwise_backward_unit) backward_unit;
};

Kernels kernels(Capability capability, Dtype dtype) {
#if defined(MNET_BUILD_AMX)
  if (on_amx(capability, dtype)) {
    return {amx::pointwise_pack_panel, amx::pointwise_unit, amx::pointwise_backward_unit};
  }
#endif
#if defined(__x86_64__)
  if (capability >= Capability::kAvx512Bf16 && dtype == Dtype::kBFloat16) {
    return {avx512bf16::pointwise_pack_panel, avx512bf16::pointwise_unit, avx512bf16::pointwise_backward_unit};
  }
  if (capability >= Capability::kAvx512) {
    return {avx512::pointwise_pack_panel, avx512::pointwise_unit, avx512::pointwise_backward_unit};
  }
  if (capability == Capability::kAvx2) {
    return {avx2::pointwise_pack_panel, avx2::pointwise_unit, avx2::pointwise_backward_unit};
  }
#endif
  (void)capability, (void)dtype;
  return {baseline::pointwise_pack_panel, baseline::pointwise_unit, baseline::pointwise_backward_unit};
}

}  // namespace

PointwisePlan plan_pointwise(const PointwiseParams& p, Dtype dtype, Capability capability, int threads) {
  return make_plan(p.positions(), p.c, p.e, kChunkRows, kMaxChunks, dtype, capability, threads);
}

PointwisePlan plan_pointwise_backward(const PointwiseBackwardParams& p, Dtype dtype, Capability capability, int threads) {
  const int64_t size = int64_t{p.c} * p.e;
  const int64_t max_chunks = p.dw == nullptr ? kMaxChunks : std::clamp<int64_t>(kPartialFloats / size, 4, kMaxChunks);
  PointwisePlan plan = make_plan(p.positions(), p.e, p.c, kBackwardChunkRows, max_chunks, dtype, capability, threads);
  // A chunk ends within an image, which then has a slot in both.
  if (p.gate != nullptr) plan.slots = plan.chunks + p.images;
  return plan;
}

void pointwise_pack(const PointwiseParams& p, Dtype dtype, const PointwisePlan& plan, int64_t begin, int64_t end,
                    float* packed, Capability capability) {
  const auto pack = kernels(capability, dtype).pack_panel;
  for (int64_t i = begin; i < end; ++i) {
    pack(p.weight, dtype, p.weight_stride_c, p.weight_stride_e, plan.depth, static_cast<int>(i) * plan.panel,
         plan.columns, packed + i * plan.panel * plan.packed_depth);
  }
}

void pointwise_backward_pack(const PointwiseBackwardParams& p, Dtype dtype, const PointwisePlan& plan, int64_t begin,
                             int64_t end, float* packed, Capability capability) {
  const auto pack = kernels(capability, dtype).pack_panel;
  for (int64_t i = begin; i < end; ++i) {
    pack(p.weight, dtype, p.weight_stride_e, p.weight_stride_c, plan.depth, static_cast<int>(i) * plan.panel,
         plan.columns, packed + i * plan.panel * plan.packed_depth);
  }
}

void pointwise_units(const PointwiseParams& p, Dtype dtype, const PointwisePlan& plan, int64_t begin, int64_t end,
                     const PointwiseWorkspace& workspace, const PointwiseEpilogue* epilogue, Capability capability) {
  const auto run = kernels(capability, dtype).unit;
  for (int64_t i = begin; i < end; ++i) run(p, dtype, plan, unit_of(plan, i), workspace, epilogue);
}

void pointwise_backward_units(const PointwiseBackwardParams& p, Dtype dtype, const PointwisePlan& plan, int64_t begin,
                              int64_t end, const PointwiseWorkspace& workspace, Capability capability) {
  const auto run = kernels(capability, dtype).backward_unit;
  for (int64_t i = begin; i < end; ++i) run(p, dtype, plan, unit_of(plan, i), workspace);
}

void pointwise_finish(const PointwiseParams& p, const PointwisePlan& plan, const double* sums) {
  const int columns = plan.columns, padded = plan.padded_columns();
  std::vector<double> mean(columns, 0.0), m2(columns, 0.0);
  double count = 0.0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const double added = static_cast<double>(std::min(plan.rows_per_chunk, plan.positions - chunk * plan.rows_per_chunk));
    const double weight = added / (count + added);
    const double* from = sums + chunk * 3 * padded;
    for (int j = 0; j < columns; ++j) chan_update(mean[j], m2[j], count, from[j], from[padded + j], weight);
    count += added;
  }
  for (int j = 0; j < columns; ++j) {
    p.moments[j] = static_cast<float>(mean[j]);
    p.moments[columns + j] = count > 0.0 ? static_cast<float>(m2[j] / count) : 0.f;
  }
}

void pointwise_backward_finish(const PointwiseBackwardParams& p, const PointwisePlan& plan, const double* sums) {
  const int columns = plan.columns, padded = plan.padded_columns();
  std::vector<double> total(columns);
  // Rows `row` of slots first, first + 1, ... last added up.
  const auto add_up = [&](int row, int64_t first, int64_t last, float* to) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t slot = first; slot <= last; ++slot) {
      const double* from = sums + (slot * 3 + row) * padded;
      for (int j = 0; j < columns; ++j) total[j] += from[j];
    }
    for (int j = 0; j < columns; ++j) to[j] = static_cast<float>(total[j]);
  };
  if (p.gate == nullptr) {
    for (int row = 0; row < 2; ++row) add_up(row, 0, plan.slots - 1, p.sums + row * columns);
    return;
  }
  for (int64_t image = 0; image < p.images; ++image) {
    const int64_t first = image * p.image_positions / plan.rows_per_chunk;
    const int64_t last = ((image + 1) * p.image_positions - 1) / plan.rows_per_chunk;
    for (int row = 0; row < 3; ++row) {
      add_up(row, image + first, image + last, p.sums + (row * p.images + image) * columns);
    }
  }
}

void pointwise_backward_combine(const PointwiseBackwardParams& p, const PointwisePlan& plan, int64_t begin, int64_t end,
                                const float* partials) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * plan.panel;
    const int used = static_cast<int>(std::min<int64_t>(plan.panel, plan.columns - column));
    for (int e = 0; e < plan.depth; ++e) {
      const float* from = partials + (panel * plan.packed_depth + e) * plan.panel;
      float* to = p.dw + int64_t{e} * plan.columns + column;
      float total[32] = {};
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        for (int j = 0; j < used; ++j) total[j] += from[chunk * plan.packed_size() + j];
      }
      std::copy(total, total + used, to);
    }
  }
}

}  // namespace mnet::cpu
