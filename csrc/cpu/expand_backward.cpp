#include "expand_backward.h"

#include <algorithm>
#include <vector>

#include "expand.h"

namespace mnet::cpu {

namespace {

constexpr int64_t kMaxChunks = 64;
constexpr int64_t kTableDoubles = 4 << 20;  // all chunks' tables together, where 2 chunks allow
constexpr int64_t kBlockBytes = 512 << 10;  // what a block of channels keeps in the second-level cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Kernels {
  decltype(&baseline::expand_backward_pack_panel) pack_panel;
  decltype(&baseline::expand_backward_unit) unit;
};

Kernels kernels(Capability capability) {
#if defined(__x86_64__)
  if (capability >= Capability::kAvx512) return {avx512::expand_backward_pack_panel, avx512::expand_backward_unit};
  if (capability == Capability::kAvx2) return {avx2::expand_backward_pack_panel, avx2::expand_backward_unit};
#endif
  (void)capability;
  return {baseline::expand_backward_pack_panel, baseline::expand_backward_unit};
}

}  // namespace

ExpandBackwardPlan plan_expand_backward(const ExpandBackwardParams& p, Capability capability) {
  const DepthwiseBackwardParams& d = p.depthwise;
  ExpandBackwardPlan plan{};
  plan.rows = d.n * d.h;
  plan.panel = capability >= Capability::kAvx512 ? 32 : 16;
  plan.panels = static_cast<int>(divide_up(d.c, plan.panel));
  plan.dx_panels = static_cast<int>(divide_up(p.expand.c, plan.panel));
  plan.taps = d.kernel * d.kernel;
  plan.c = p.expand.c;
  plan.strip_rows = static_cast<int>(divide_up(d.h, divide_up(d.h, std::max(1, kStripPositions / d.w))));
  const int64_t ring = ((int64_t{plan.strip_rows} + d.kernel) / d.stride + 2) * (d.out_w + d.kernel + 2);
  // ring and packed weights in float32, G in float32 and double
  const int64_t panel_bytes = plan.panel * (4 * (ring + 2 * p.expand.c + p.project.c) + 12 * p.expand.c);
  const int64_t blocks = divide_up(plan.panels, std::max<int64_t>(1, kBlockBytes / panel_bytes));
  plan.panels_per_block = static_cast<int>(divide_up(plan.panels, blocks));
  plan.blocks = static_cast<int>(divide_up(plan.panels, plan.panels_per_block));
  if (plan.rows == 0) return plan;
  const int64_t most = std::clamp<int64_t>(kTableDoubles / plan.table_size(), 2, kMaxChunks);
  plan.rows_per_chunk = rows_per_chunk(d.n, d.h, plan.strip_rows, most);
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  return plan;
}

void expand_backward_pack(const ExpandBackwardParams& p, Dtype dtype, const ExpandBackwardPlan& plan, int64_t begin,
                          int64_t end, const ExpandBackwardPacked& packed, Capability capability) {
  for (int64_t i = begin; i < end; ++i) kernels(capability).pack_panel(p, dtype, plan, i, packed);
}

void expand_backward_units(const ExpandBackwardParams& p, Dtype dtype, const ExpandBackwardPlan& plan, int64_t begin,
                           int64_t end, const ExpandBackwardPacked& packed, double* workspace, Capability capability) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * plan.rows_per_chunk;
    const ExpandBackwardUnit unit{first, std::min(plan.rows, first + plan.rows_per_chunk), workspace + i * plan.table_size()};
    kernels(capability).unit(p, dtype, plan, unit, packed);
  }
}

void expand_backward_combine(const ExpandBackwardParams& p, const ExpandBackwardPlan& plan, int64_t begin, int64_t end,
                             const double* workspace) {
  const int64_t padded = plan.padded(), c = plan.c;
  std::vector<double> total(static_cast<size_t>(plan.panel));
  // The channels' sums of one row of the tables, added up over the chunks in their order.
  const auto add_up = [&](int64_t at) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const double* from = workspace + chunk * plan.table_size() + at;
      for (int i = 0; i < plan.panel; ++i) total[i] += from[i];
    }
  };
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t e = panel * plan.panel;
    const int used = static_cast<int>(std::min<int64_t>(plan.panel, p.depthwise.c - e));
    const auto write = [&](float* to, int64_t pitch) {
      for (int i = 0; i < used; ++i) to[i * pitch] = static_cast<float>(total[i]);
    };
    for (int64_t j = 0; j < c; ++j) {
      add_up((panel * c + j) * plan.panel);
      write(p.gramgrad + e * (c + 1) + j, c + 1);
    }
    add_up(padded * c + e);
    write(p.gramgrad + e * (c + 1) + c, c + 1);
    for (int tap = 0; p.depthwise.dw != nullptr && tap < plan.taps; ++tap) {
      add_up(padded * (c + 1 + tap) + e);
      write(p.depthwise.dw + e * plan.taps + tap, plan.taps);
    }
  }
}

}  // namespace mnet::cpu
