// Mean and variance without E[y^2] - E[y]^2.
//
// Two steps.  A short run of values is summed after subtracting one of its own values (the shift): with n values
// sum d^2 <= n * M2 holds then whatever the data, so the subtraction below loses at most a factor n of precision, and a
// constant run gives exactly zero.  Or it is taken value by value (Welford), which loses nothing.  Runs are merged by Chan's
// formula, or all at once about their common mean; equal means again add exactly nothing.
#pragma once

#include <type_traits>

#include "portability.h"

namespace mnet {

template <typename Real>
struct Moments {
  Real count;
  Real mean;
  Real m2;  // sum of squared distances from the mean
};

static_assert(std::is_trivially_copyable_v<Moments<float>>, "kept in shared memory and workspaces");
static_assert(sizeof(Moments<float>) == 3 * sizeof(float), "no padding: workspaces are indexed by element");

// count > 0 values with sum1 = sum (y - shift), sum2 = sum (y - shift)^2; shift is one of the values.
template <typename Real>
MNET_HD Moments<Real> from_shifted(Real count, Real shift, Real sum1, Real sum2) {
  const Real mean = sum1 / count;
  const Real m2 = sum2 - sum1 * mean;
  return {count, shift + mean, m2 < Real(0) ? Real(0) : m2};
}

// Welford's update with one more value; inverse = 1 / how many there are with it.
template <typename Real>
MNET_HD void welford_update(Real& mean, Real& m2, Real value, Real inverse) {
  const Real delta = value - mean;
  mean += delta * inverse;
  m2 += delta * (value - mean);
}

// Chan's update with the weight b.count / (a.count + b.count) given: it is the same for every channel of a tile.
template <typename Real>
MNET_HD void chan_update(Real& mean, Real& m2, Real count, Real other_mean, Real other_m2, Real weight) {
  const Real delta = other_mean - mean;
  mean += delta * weight;
  m2 += other_m2 + delta * delta * (count * weight);
}

template <typename Real>
MNET_HD Moments<Real> combine(Moments<Real> a, const Moments<Real>& b) {
  const Real count = a.count + b.count;
  if (b.count == Real(0)) return a;  // an empty run may hold anything
  if (a.count == Real(0)) return b;
  chan_update(a.mean, a.m2, a.count, b.mean, b.m2, b.count / count);
  a.count = count;
  return a;
}

// Merges all that for_each(f) calls f with, in two passes: one division, and rounding errors of the last operations only.
template <typename Real, typename ForEach>
MNET_HD Moments<Real> merge(ForEach&& for_each) {
  Real count = 0, first = 0, sum = 0;
  for_each([&](const Moments<Real>& part) {
    if (part.count == Real(0)) return;  // it may hold anything
    if (count == Real(0)) first = part.mean;
    count += part.count;
    sum += part.count * (part.mean - first);
  });
  Moments<Real> all{count, first, Real(0)};
  if (count == Real(0)) return all;
  all.mean += sum / count;
  for_each([&](const Moments<Real>& part) {
    if (part.count == Real(0)) return;
    const Real d = part.mean - all.mean;
    all.m2 += part.m2 + part.count * (d * d);
  });
  return all;
}

}  // namespace mnet
