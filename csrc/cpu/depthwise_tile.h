// What the kernels that convolve depthwise share: outputs from rows of activated inputs, and their moments (see simd.h for
// how it is included).
#pragma once

#include <cstdint>

#include "../common/moments.h"
#include "../common/plant.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// Positions summed in float32, with one shift (moments.h), once `flushed` are in the sums.  The rounding errors of many
// runs average out, those of few do not, and the first shift is but one of the values.
constexpr int kLongestRun = 32;
MNET_HD int longest_run(int64_t flushed) { return flushed < 256 ? 8 : kLongestRun; }

// The moments of one vector of channels.
struct ChannelMoments {
  Vec run_shift, run_sum1, run_sum2;
  Vec unit_shift;  // the first run's
  double sum1[kLanes], sum2[kLanes];  // of all runs so far, about unit_shift

  void start() {
    for (int i = 0; i < kLanes; ++i) sum1[i] = sum2[i] = 0.0;
  }

  // Adds a run to the unit's sums, which are about a value of the unit as the run's are about its shift: in double the
  // factor that moments.h speaks of, here the unit's size, is harmless.  The next run is shifted by this one's mean, which
  // loses less than one of its own values would, and leaves a constant channel exact as well.
  void flush(int run, bool first) {
    if (first) unit_shift = run_shift;
    for (int i = 0; i < kLanes; ++i) {
      const double moved = static_cast<double>(run_shift[i]) - static_cast<double>(unit_shift[i]);
      const double s1 = run_sum1[i], s2 = run_sum2[i];
      sum1[i] += s1 + run * moved;
      sum2[i] += s2 + moved * (2.0 * s1 + run * moved);
    }
    const Vec mean = run_shift + run_sum1 * (1.f / static_cast<float>(run));
    run_shift = mean - mean == Vec{} ? mean : run_shift;  // not an infinity, nor a NaN
  }

  void finish(int64_t flushed, int valid, double* mean, double* m2) const {
    for (int i = 0; i < valid; ++i) {
      const Moments<double> m = from_shifted<double>(flushed, unit_shift[i], sum1[i], sum2[i]);
      mean[i] = m.mean;
      m2[i] = m.m2;
    }
  }
};

// kBlock_ neighbouring outputs from rows of inputs, in the order of the kernel's rows; neighbours are kPitch apart.
template <typename Traits, int kBlock_, int kPitch>
MNET_HD void convolve(const Vec* const* rows, int in_column, const Vec* weight, Vec* out) {
  constexpr int kInputs = (kBlock_ - 1) * Traits::kStride + Traits::kKernel;
  MNET_UNROLL
  for (int b = 0; b < kBlock_; ++b) out[b] = Vec{};
  MNET_UNROLL
  for (int i = 0; i < Traits::kKernel; ++i) {
    const Vec* in = rows[i] + int64_t{in_column} * kPitch;
    MNET_UNROLL
    for (int t = 0; t < kInputs; ++t) {
      const Vec value = in[t * kPitch];
      MNET_UNROLL
      for (int b = 0; b < kBlock_; ++b) {
        const int j = t - b * Traits::kStride;
        if (j >= 0 && j < Traits::kKernel) out[b] = out[b] + value * weight[i * Traits::kKernel + j];
      }
    }
  }
}

// Outputs [0, columns) of a row: rounds, stores `pitch` apart, and adds the stored values to the running moments.
template <typename Traits, int kPitch, bool kPartial>
void output_row(ChannelMoments& m, const Vec* weight, const Vec* const* rows, int columns, typename Traits::Lane* to,
                int64_t pitch, int valid, bool first_of_run, bool first_of_unit, bool stream) {
  Vec shift = m.run_shift, sum1 = m.run_sum1, sum2 = m.run_sum2;
  if (first_of_run) sum1 = sum2 = Vec{};
  // Neighbours are added first: a long float32 sum then has a fourth of the roundings.
  const auto emit = [&](auto block, int column) {
    Vec out[decltype(block)::value];
    convolve<Traits, decltype(block)::value, kPitch>(rows, column * Traits::kStride, weight, out);
    Vec d1{}, d2{};
    MNET_UNROLL
    for (int b = 0; b < decltype(block)::value; ++b) {
      const int64_t at = static_cast<int64_t>(column + b) * pitch;
      const Vec stored = stream_map<typename Traits::Storage, kPartial>(to + at, out[b], valid, stream);
      if (b == 0 && column == 0 && first_of_unit) shift = stored;
      const Vec d = stored - shift;
      d1 = b == 0 ? d : d1 + d;
      d2 = b == 0 ? d * d : d2 + d * d;
    }
    sum1 = sum1 + d1;
    sum2 = sum2 + d2;
  };
  const int end = MNET_PLANT(3, columns, columns - 1);
  int column = 0;
  for (; column + Traits::kBlock <= end; column += Traits::kBlock) emit(Size<Traits::kBlock>{}, column);
  for_blocks<2>(column, end, emit);
  m.run_shift = shift;
  m.run_sum1 = sum1;
  m.run_sum2 = sum2;
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
