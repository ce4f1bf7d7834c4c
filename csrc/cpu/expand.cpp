#include "expand.h"

#include <algorithm>

#include "../common/moments.h"

namespace mnet::cpu {

namespace {

constexpr int64_t kMaxChunks = 64;
constexpr int64_t kWishedChunks = 16;  // below, images are split as well
constexpr int64_t kGramChunkRows = 4 * GramPlan::kTileRows;
constexpr int64_t kGramDoubles = 4 << 20;  // all chunks' tables together, where 2 chunks allow
constexpr int64_t kBlockBytes = 384 << 10;  // ring and weight of a block of channels: the second-level cache has room for more

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int panel_columns(Capability capability) { return capability >= Capability::kAvx512 ? 32 : 16; }

struct Kernels {
  decltype(&baseline::gram_unit) gram_unit;
  decltype(&baseline::gram_table) gram_table;
  decltype(&baseline::expand_mix_pack) mix_pack;
  decltype(&baseline::expand_mix_chunk) mix_chunk;
  decltype(&baseline::multiply_double) multiply;
  decltype(&baseline::expand_pack_panel) pack_panel;
  decltype(&baseline::expand_depthwise_unit) depthwise_unit;
};

#define MNET_EXPAND_TABLE(name)                                                                                    \
  Kernels {                                                                                                        \
    name::gram_unit, name::gram_table, name::expand_mix_pack, name::expand_mix_chunk, name::multiply_double,       \
        name::expand_pack_panel, name::expand_depthwise_unit                                                       \
  }

Kernels kernels(Capability capability) {
#if defined(__x86_64__)
  if (capability >= Capability::kAvx512) return MNET_EXPAND_TABLE(avx512);
  if (capability == Capability::kAvx2) return MNET_EXPAND_TABLE(avx2);
#endif
  (void)capability;
  return MNET_EXPAND_TABLE(baseline);
}

}  // namespace

// ---- gram ----------------------------------------------------------------------------------------------------------

GramPlan plan_gram(const GramParams& p, Capability capability) {
  GramPlan plan{};
  plan.panel = panel_columns(capability);
  plan.panels = static_cast<int>(divide_up(p.c, plan.panel));
  const int64_t most = std::clamp<int64_t>(kGramDoubles / plan.table_size(), 2, kMaxChunks);
  const int64_t rows = std::max(kGramChunkRows, divide_up(p.positions, most));
  plan.rows_per_chunk = divide_up(rows, GramPlan::kTileRows) * GramPlan::kTileRows;
  plan.chunks = divide_up(p.positions, plan.rows_per_chunk);
  return plan;
}

void gram_units(const GramParams& p, Dtype dtype, const GramPlan& plan, int64_t begin, int64_t end, double* workspace,
                Capability capability) {
  for (int64_t i = begin; i < end; ++i) {
    kernels(capability).gram_unit(p, dtype, plan, i, workspace + i * plan.table_size());
  }
}

void gram_finish(const GramParams& p, Dtype dtype, const GramPlan& plan, double* workspace, Capability capability) {
  if (plan.chunks == 0) {
    std::fill_n(p.gram, (int64_t{p.c} + 2) * p.c, 0.f);
  } else {
    kernels(capability).gram_table(p, dtype, plan, workspace);
  }
}

// ---- mix -----------------------------------------------------------------------------------------------------------

ExpandMixPlan plan_expand_mix(const ExpandMixParams& p, Capability capability) {
  const int panel = panel_columns(capability);
  return {divide_up(p.positions, ExpandMixPlan::kChunkRows), panel, static_cast<int>(divide_up(p.c, panel))};
}

void expand_mix_pack(const ExpandMixParams& p, const ExpandMixPlan&, float* packed, Capability capability) {
  kernels(capability).mix_pack(p, packed);
}

void expand_mix_units(const ExpandMixParams& p, Dtype dtype, const ExpandMixPlan&, int64_t begin, int64_t end,
                      const float* packed, Capability capability) {
  for (int64_t i = begin; i < end; ++i) kernels(capability).mix_chunk(p, dtype, i, packed);
}

void multiply_double(const double* a, int64_t row_stride, int64_t depth_stride, const double* b, int rows, int depth,
                     int64_t columns, double* c, Capability capability) {
  kernels(capability).multiply(a, row_stride, depth_stride, b, rows, depth, columns, c);
}

// ---- F1 ------------------------------------------------------------------------------------------------------------

int64_t rows_per_chunk(int64_t images, int64_t height, int64_t strip_rows, int64_t max_chunks) {
  if (images >= kWishedChunks || max_chunks <= images) return divide_up(images, max_chunks) * height;  // whole images
  // The rows around a part of an image are expanded twice: parts of several strips.
  constexpr int64_t kMinRows = 12;
  const int64_t wished = std::min(divide_up(kWishedChunks, images), max_chunks / images);
  const int64_t parts = std::max<int64_t>(1, std::min(wished, height / std::max(kMinRows, strip_rows)));
  return divide_up(height, parts);
}

ExpandPlan plan_expand_depthwise(const ExpandDepthwiseParams& params, Capability capability) {
  const DepthwiseParams& p = params.depthwise;
  ExpandPlan plan{};
  plan.rows = p.n * p.out_h;
  plan.panel = panel_columns(capability);
  plan.panels = expand_panels(p.c, capability);
  // Equal strips of an image: 14 rows are two of 7, not one of 9 and one of 5.
  const int64_t rows = std::max(1, kStripPositions / (p.w * p.stride));
  plan.strip_rows = static_cast<int>(divide_up(p.out_h, divide_up(p.out_h, rows)));
  const int64_t ring = (int64_t{plan.strip_rows} * p.stride + p.kernel) * (p.w + p.kernel);
  const int64_t panel_bytes = plan.panel * 4 * (ring + params.expand.c);
  const int64_t fitting = std::max<int64_t>(1, kBlockBytes / panel_bytes);
  plan.blocks = static_cast<int>(divide_up(plan.panels, fitting));
  plan.panels_per_block = static_cast<int>(divide_up(plan.panels, plan.blocks));
  plan.blocks = static_cast<int>(divide_up(plan.panels, plan.panels_per_block));
  if (plan.rows == 0) return plan;
  plan.rows_per_chunk = rows_per_chunk(p.n, p.out_h, plan.strip_rows, kMaxChunks);
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  return plan;
}

int expand_panels(int e, Capability capability) { return static_cast<int>(divide_up(e, panel_columns(capability))); }

int64_t expand_packed_size(const ExpandLayer& expand, int e, Capability capability) {
  return int64_t{expand_panels(e, capability)} * panel_columns(capability) * expand.c;
}

void expand_pack(const ExpandLayer& expand, int e, Dtype dtype, int64_t begin, int64_t end, float* packed,
                 Capability capability) {
  for (int64_t i = begin; i < end; ++i) kernels(capability).pack_panel(expand, e, dtype, i, packed);
}

void expand_depthwise_units(const ExpandDepthwiseParams& p, Dtype dtype, const ExpandPlan& plan, int64_t begin,
                            int64_t end, const float* packed, double* moments, Capability capability) {
  for (int64_t i = begin; i < end; ++i) {
    ExpandUnit unit{};
    const int64_t chunk = i / plan.blocks;
    unit.row_begin = chunk * plan.rows_per_chunk;
    unit.row_end = std::min(plan.rows, unit.row_begin + plan.rows_per_chunk);
    unit.panel_begin = static_cast<int>(i % plan.blocks) * plan.panels_per_block;
    unit.panel_end = std::min(plan.panels, unit.panel_begin + plan.panels_per_block);
    unit.mean = moments == nullptr ? nullptr : moments + chunk * 2 * plan.padded();
    unit.m2 = moments == nullptr ? nullptr : unit.mean + plan.padded();
    kernels(capability).depthwise_unit(p, dtype, plan, unit, packed);
  }
}

void expand_depthwise_finish(const ExpandDepthwiseParams& params, const ExpandPlan& plan, const double* moments) {
  const DepthwiseParams& p = params.depthwise;
  for (int c = 0; c < p.c; ++c) {
    Moments<double> total{0.0, 0.0, 0.0};
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const double* from = moments + chunk * 2 * plan.padded() + c;
      const int64_t rows = std::min(plan.rows_per_chunk, plan.rows - chunk * plan.rows_per_chunk);
      total = combine(total, {static_cast<double>(rows * p.out_w), from[0], from[plan.padded()]});
    }
    p.moments[c] = static_cast<float>(total.mean);
    p.moments[p.c + c] = total.count > 0.0 ? static_cast<float>(total.m2 / total.count) : 0.f;
  }
}

}  // namespace mnet::cpu
