// The end of a product: a panel of results (gemm.h) is rounded, stored and added to the moments of its channels, or
// normalised, activated and stored, while it is in the first-level cache (see simd.h for how it is included).
#pragma once

#include <cstdint>

#include "../common/moments.h"
#include "gemm.h"
#include "pointwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// Sums of a run of values of kLanes channels about `shift`: for a unit's first run the mean of some of its values, then
// the mean so far (moments.h: the closer to the mean, the less is lost; a constant channel has it exactly).  It is rounded
// to storage: with more digits than the values have, every difference and sum would be rounded the same way.
struct RunMoments {
  Vec shift, sum1, sum2;

  void merge(int64_t flushed, int run, double* mean, double* m2) const {
    const double weight = static_cast<double>(run) / static_cast<double>(flushed + run);
    float a[kLanes], b[kLanes], c[kLanes];
    store_vec(a, shift);
    store_vec(b, sum1);
    store_vec(c, sum2);
    for (int i = 0; i < kLanes; ++i) {
      const Moments<double> m = from_shifted<double>(run, a[i], b[i], c[i]);
      chan_update<double>(mean[i], m2[i], static_cast<double>(flushed), m.mean, m.m2, weight);
    }
  }
};

template <typename Storage>
Vec shift_of_first_run(const float* result, int rows) {
  const int count = least(rows, 8);
  const Vec first = Storage::round(load_vec(result));
  Vec sum = Vec{};
  for (int row = 1; row < count; ++row) sum = sum + (Storage::round(load_vec(result + row * kPanel)) - first);
  return Storage::round(first + sum * (1.f / static_cast<float>(count)));
}

template <typename Storage>
Vec shift_of_later_run(const double* mean) {
  Vec shift{};
  for (int i = 0; i < kLanes; ++i) shift[i] = static_cast<float>(mean[i]);
  return Storage::round(shift);
}

// Rounds and stores one vector of a panel's columns; with kMoments, adds the stored values up about run->shift.
template <typename Storage, bool kPartial, bool kMoments>
void store_column(const float* result, int rows, typename Storage::Lane* y, int64_t pitch, int valid, RunMoments* run) {
  // Two sums of each kind: one would wait for its own last addition.
  const Vec shift = kMoments ? run->shift : Vec{};
  Vec sum1[2] = {}, sum2[2] = {};
  const auto emit = [&](int row, int which) __attribute__((always_inline)) {
    const Vec stored = store_map<Storage, kPartial>(y + row * pitch, load_vec(result + row * kPanel), valid);
    if constexpr (kMoments) {
      const Vec d = stored - shift;
      sum1[which] = sum1[which] + d;
      sum2[which] = sum2[which] + d * d;
    }
  };
  int row = 0;
  for (; row + 2 <= rows; row += 2) {
    emit(row, 0);
    emit(row + 1, 1);
  }
  if (row < rows) emit(row, 0);
  if constexpr (kMoments) *run = {shift, sum1[0] + sum1[1], sum2[0] + sum2[1]};
}

// Columns [0, used) of a panel.  `to`: rows `pitch` apart.  `mean`: of the unit's `flushed` positions before these, its M2
// `padded` further on; nullptr: no moments are wanted.
template <typename Storage>
void store_panel(const float* result, int rows, int used, typename Storage::Lane* to, int64_t pitch, double* mean,
                 int64_t padded, int64_t flushed) {
  for_vectors(used, [&](auto partial, int c, int valid) {
    constexpr bool kPartial = decltype(partial)::value;
    RunMoments run{};
    if (mean == nullptr) {
      store_column<Storage, kPartial, false>(result + c, rows, to + c, pitch, valid, &run);
      return;
    }
    double* at = mean + c;
    run.shift = flushed == 0 ? shift_of_first_run<Storage>(result + c, rows) : shift_of_later_run<Storage>(at);
    store_column<Storage, kPartial, true>(result + c, rows, to + c, pitch, valid, &run);
    run.merge(flushed, rows, at, at + padded);
  });
}

// The same columns of a folded layer: act(scale * result + shift) [+ residual].
template <typename Storage>
void store_activated_panel(const float* result, int rows, int used, typename Storage::Lane* to, int64_t pitch,
                           const float* scale, const float* shift, Activation activation,
                           const typename Storage::Lane* residual) {
  with_activation(activation, [&](auto act) {
    for_vectors(used, [&](auto partial, int c, int valid) {
      constexpr bool kPartial = decltype(partial)::value;
      const Vec a = load_vec(scale + c), b = load_vec(shift + c);
      for (int row = 0; row < rows; ++row) {
        const int64_t at = row * pitch + c;
        Vec z = decltype(act)::fwd(Vec(a * load_vec(result + row * kPanel + c) + b));
        if (residual != nullptr) z = z + load_map<Storage, kPartial>(residual + at, valid);
        store_map<Storage, kPartial>(to + at, z, valid);
      }
    });
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
