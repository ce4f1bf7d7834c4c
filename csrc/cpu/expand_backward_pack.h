// The weights of B2 in panels, in one capability (see simd.h for how it is included).
#pragma once

#include <cstdint>

#include "../common/plant.h"
#include "expand_backward.h"
#include "gemm.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

void expand_backward_pack_panel(const ExpandBackwardParams& p, Dtype dtype, const ExpandBackwardPlan& plan, int64_t panel,
                                const ExpandBackwardPacked& packed) {
  const ExpandLayer& expand = p.expand;
  const ProjectUpstream& project = p.project;
  const int e = p.depthwise.c;
  with_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (panel < plan.panels) {
      const int first = static_cast<int>(panel) * kPanel;
      pack_panel<Storage>(expand.weight, expand.weight_stride_c, expand.weight_stride_e, expand.c, first, e,
                          packed.expand + int64_t{first} * expand.c);
      pack_panel<Storage>(project.weight, project.weight_stride_c, project.weight_stride_e, project.c, first, e,
                          packed.project + int64_t{first} * project.c);
      return;
    }
    const int first = static_cast<int>(panel - plan.panels) * kPanel;
    float* scaled = packed.scaled + int64_t{first} * e;
    pack_panel<Storage>(expand.weight, expand.weight_stride_e, expand.weight_stride_c, e, first, expand.c, scaled);
    for (int64_t i = 0; i < e; ++i) {
      for (int j = 0; j < kPanel; j += kLanes) {
        float* at = scaled + i * kPanel + j;
        store_vec(at, Storage::round(MNET_PLANT(26, p.depthwise.bn[i], 1.f) * load_vec(at)));
      }
    }
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
