// The kernels of normalize.h for one capability (see simd.h for how it is included).
//
// Memory plan.  A map is walked in its own order, position by position: loading the coefficients anew at each (from the
// first-level cache) costs less than reading several positions side by side.  Sums stay in float32 for runs of
// kNormalizeRun positions, in the first-level cache, and are then added to doubles.
#pragma once

#include <cstdint>
#include <new>

#include "../common/params.h"
#include "normalize.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

constexpr int kNormalizeRun = 32;  // positions summed in float32

// f(channel, valid lanes, flag of a partial vector) for every vector of channels in [begin, end).
template <typename F>
MNET_HD void for_vectors(int begin, int end, F&& f) {
  int channel = begin;
  for (; channel + kLanes <= end; channel += kLanes) f(channel, kLanes, Flag<false>{});
  if (channel < end) f(channel, end - channel, Flag<true>{});
}

template <typename Storage, typename Act, bool kResidual>
void normalize_rows(const NormalizeParams& p, int64_t begin, int64_t end) {
  using Lane = typename Storage::Lane;
  const auto* y = static_cast<const Lane*>(p.y);
  const auto* residual = static_cast<const Lane*>(p.operand);
  auto* out = static_cast<Lane*>(p.output);
  for (int64_t position = begin; position < end; ++position) {
    for_vectors(0, p.c, [&](int channel, int valid, auto partial) {
      constexpr bool kPartial = decltype(partial)::value;
      const Vec scale = load_lanes<kPartial, float, Vec>(p.bn + channel, valid);
      const Vec shift = load_lanes<kPartial, float, Vec>(p.bn + p.c + channel, valid);
      const int64_t at = position * p.c + channel;
      Vec z = Act::fwd(Vec(scale * load_map<Storage, kPartial>(y + at, valid) + shift));
      if constexpr (kResidual) z = z + load_map<Storage, kPartial>(residual + at, valid);
      store_map<Storage, kPartial>(out + at, z, valid);
    });
  }
}

// Adds kTables sums over the positions [begin, end) of channels [first, last) to `totals`, table t at t * pitch:
// term(channel, valid, position, partial, values) gives one value a table.
template <int kTables, typename Term>
MNET_HD void sum_rows(int64_t begin, int64_t end, int first, int last, double* totals, int64_t pitch, const Term& term) {
  const int vectors = (last - first + kLanes - 1) / kLanes;
  const Scratch<Vec> scratch(kTables * vectors);
  for (int64_t run = begin; run < end; run += kNormalizeRun) {
    fill_zero(scratch.memory, scratch.memory + kTables * vectors);
    const int64_t run_end = least<int64_t>(end, run + kNormalizeRun);
    for (int64_t position = run; position < run_end; ++position) {
      Vec* sums = scratch.memory;
      for_vectors(first, last, [&](int channel, int valid, auto partial) {
        Vec sum[kTables];
        term(channel, valid, position, partial, sum);
        MNET_UNROLL
        for (int t = 0; t < kTables; ++t) sums[t] = sums[t] + sum[t];
        sums += kTables;
      });
    }
    for (int v = 0; v < vectors; ++v) {
      const int valid = least(kLanes, last - first - v * kLanes);
      for (int t = 0; t < kTables; ++t) {
        add_lanes(totals + t * pitch + v * kLanes, scratch.memory[v * kTables + t], valid);
      }
    }
  }
}

template <typename Storage, typename Act>
void normalize_backward_rows(const NormalizeParams& p, int64_t begin, int64_t end, double* sums) {
  using Lane = typename Storage::Lane;
  const auto* y = static_cast<const Lane*>(p.y);
  const auto* grad = static_cast<const Lane*>(p.operand);
  for (int i = 0; i < 2 * p.c; ++i) sums[i] = 0.0;
  sum_rows<2>(begin, end, 0, p.c, sums, p.c, [&](int channel, int valid, int64_t position, auto partial, Vec* sum) {
    constexpr bool kPartial = decltype(partial)::value;
    const Vec scale = load_lanes<kPartial, float, Vec>(p.bn + channel, valid);
    const Vec shift = load_lanes<kPartial, float, Vec>(p.bn + p.c + channel, valid);
    const Vec mean = load_lanes<kPartial, float, Vec>(p.bn + 2 * int64_t{p.c} + channel, valid);
    const int64_t at = position * p.c + channel;
    const Vec v = load_map<Storage, kPartial>(y + at, valid);
    sum[0] = load_map<Storage, kPartial>(grad + at, valid) * Act::bwd(Vec(scale * v + shift));
    sum[1] = sum[0] * (v - mean);
  });
}

template <typename Storage, typename Act>
void squeeze_rows(const NormalizeParams& p, int64_t image, int first, int last) {
  const auto* y = static_cast<const typename Storage::Lane*>(p.y);
  const int channels = last - first;
  const Scratch<double> totals(3 * channels);
  for (int i = 0; i < 3 * channels; ++i) totals.memory[i] = 0.0;
  sum_rows<3>(image * p.area, (image + 1) * p.area, first, last, totals.memory, channels,
              [&](int channel, int valid, int64_t position, auto partial, Vec* sum) {
    constexpr bool kPartial = decltype(partial)::value;
    const Vec scale = load_lanes<kPartial, float, Vec>(p.bn + channel, valid);
    const Vec shift = load_lanes<kPartial, float, Vec>(p.bn + p.c + channel, valid);
    const Vec mean = load_lanes<kPartial, float, Vec>(p.bn + 2 * int64_t{p.c} + channel, valid);
    const Vec v = load_map<Storage, kPartial>(y + position * p.c + channel, valid);
    const Vec u = scale * v + shift;
    sum[0] = Act::fwd(u);
    sum[1] = Act::bwd(u);
    sum[2] = sum[1] * (v - mean);
  });
  for (int c = 0; c < channels; ++c) {
    float* to = p.table + image * p.c + first + c;
    const int64_t table = p.n * p.c;
    to[0] = static_cast<float>(totals.memory[c] / static_cast<double>(p.area));
    to[table] = static_cast<float>(totals.memory[channels + c]);
    to[2 * table] = static_cast<float>(totals.memory[2 * channels + c]);
  }
}

void normalize_positions(const NormalizeParams& p, Dtype dtype, int64_t begin, int64_t end) {
  with_storage(dtype, [&](auto storage) {
    with_activation(p.act, [&](auto act) {
      const auto run = p.operand ? normalize_rows<decltype(storage), decltype(act), true>
                                 : normalize_rows<decltype(storage), decltype(act), false>;
      run(p, begin, end);
    });
  });
}

void normalize_backward_positions(const NormalizeParams& p, Dtype dtype, int64_t begin, int64_t end, double* sums) {
  with_storage(dtype, [&](auto storage) {
    with_activation(p.act, [&](auto act) {
      normalize_backward_rows<decltype(storage), decltype(act)>(p, begin, end, sums);
    });
  });
}

void squeeze_image(const NormalizeParams& p, Dtype dtype, int64_t image, int channel_begin, int channel_end) {
  with_storage(dtype, [&](auto storage) {
    with_activation(p.act, [&](auto act) {
      squeeze_rows<decltype(storage), decltype(act)>(p, image, channel_begin, channel_end);
    });
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
