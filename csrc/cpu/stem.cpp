#include "stem.h"

#include <algorithm>
#include <vector>

#include "../common/moments.h"
#include "../common/plant.h"

namespace mnet::cpu {

namespace {

constexpr int64_t kMaxChunks = 64;
constexpr int64_t kMinPositions = 128;  // of a chunk

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

StemUnit unit_of(const StemPlan& plan, int64_t chunk) {
  StemUnit unit{};
  unit.row_begin = chunk * plan.rows_per_chunk;
  unit.row_end = std::min(plan.rows, unit.row_begin + plan.rows_per_chunk);
  return unit;
}

}  // namespace

StemPlan plan_stem(const StemImage& image, int channels, Capability capability) {
  StemPlan plan{};
  plan.rows = image.rows();
  plan.rows_per_chunk = std::max(divide_up(kMinPositions, image.out_w), divide_up(plan.rows, kMaxChunks));
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  plan.depth = kStemKernel * kStemKernel * image.c;
  plan.panel = capability >= Capability::kAvx512 ? 32 : 16;
  plan.panels = static_cast<int>(divide_up(channels, plan.panel));
  return plan;
}

void stem_units(const StemParams& p, Dtype dtype, const StemPlan& plan, int64_t begin, int64_t end, double* sums,
                Capability capability) {
  auto run = baseline::stem_unit;
#if defined(__x86_64__)
  if (capability >= Capability::kAvx2) run = capability >= Capability::kAvx512 ? avx512::stem_unit : avx2::stem_unit;
#endif
  (void)capability;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    StemUnit unit = unit_of(plan, chunk);
    if (sums != nullptr) unit.mean = sums + chunk * 2 * plan.padded_columns();
    run(p, dtype, plan, unit);
  }
}

void stem_backward_units(const StemBackwardParams& p, Dtype dtype, const StemPlan& plan, int64_t begin, int64_t end,
                         float* partials, Capability capability) {
  auto run = baseline::stem_backward_unit;
#if defined(__x86_64__)
  if (capability >= Capability::kAvx2) {
    run = capability >= Capability::kAvx512 ? avx512::stem_backward_unit : avx2::stem_backward_unit;
  }
#endif
  (void)capability;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    StemUnit unit = unit_of(plan, chunk);
    if (partials != nullptr) unit.partial = partials + chunk * plan.packed_size();
    run(p, dtype, plan, unit);
  }
}

void stem_finish(const StemParams& p, const StemPlan& plan, const double* sums) {
  std::vector<double> mean(p.e, 0.0), m2(p.e, 0.0);
  double count = 0.0;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t left = plan.rows - chunk * plan.rows_per_chunk;
    const int64_t rows = MNET_PLANT(1, std::min(plan.rows_per_chunk, left), plan.rows_per_chunk);
    const double added = static_cast<double>(rows) * p.image.out_w;
    const double weight = added / (count + added);
    const double* from = sums + chunk * 2 * plan.padded_columns();
    for (int i = 0; i < p.e; ++i) chan_update(mean[i], m2[i], count, from[i], from[plan.padded_columns() + i], weight);
    count += added;
  }
  for (int i = 0; i < p.e; ++i) {
    p.moments[i] = static_cast<float>(mean[i]);
    p.moments[p.e + i] = count > 0.0 ? static_cast<float>(m2[i] / count) : 0.f;
  }
}

void stem_backward_finish(const StemBackwardParams& p, const StemPlan& plan, const float* partials) {
  for (int e = 0; e < p.e; ++e) {
    for (int tap = 0; tap < plan.depth; ++tap) {
      const float* from = partials + (int64_t{e / plan.panel} * plan.depth + tap) * plan.panel + e % plan.panel;
      double total = 0.0;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) total += static_cast<double>(from[chunk * plan.packed_size()]);
      const int c = tap % p.image.c, place = tap / p.image.c;
      p.dw[(int64_t{e} * p.image.c + c) * kStemKernel * kStemKernel + place] = static_cast<float>(total);
    }
  }
}

}  // namespace mnet::cpu
