// What the tests of the elementwise and backward kernels share: random tables and maps, and a check that prints once.
#pragma once

#include <algorithm>
#include <string>

#include "depthwise_reference.h"

namespace mnet::test {

inline int failures = 0;

inline float act_value(int act, float u) {
  float z = u;
  with_activation(static_cast<Activation>(act), [&](auto f) { z = decltype(f)::fwd(u); });
  return z;
}
inline float act_slope(int act, float u) {
  float d = 1.f;
  with_activation(static_cast<Activation>(act), [&](auto f) { d = decltype(f)::bwd(u); });
  return d;
}

// Bounds are relative to the sum of magnitudes: in units of the storage dtype for what is stored in it, of float32 for
// sums.  An operand may have been rounded to its other neighbour where the processor has no fused multiply-add: dW allows
// that for a few terms, gx for every one.
class Check {
 public:
  explicit Check(std::string label) : label_(std::move(label)) {}
  void operator()(const char* what, int64_t at, double got, double want, double bound) {
    if (std::fabs(got - want) <= bound) return;
    if (!reported_) {
      std::printf("%s: %s[%ld] is %.9g, expected %.9g within %.3g\n", label_.c_str(), what, static_cast<long>(at), got, want,
                  bound);
    }
    reported_ = true;
  }
  ~Check() { failures += reported_; }

 private:
  std::string label_;
  bool reported_ = false;
};

struct Data {
  std::mt19937_64 random;
  std::normal_distribution<double> normal;
  explicit Data(uint64_t seed) : random(seed) {}
  void fill(Buffer& buffer, int64_t size) {
    for (int64_t i = 0; i < size; ++i) buffer.set(i, normal(random));
  }
  std::vector<float> table(int64_t size) {
    std::vector<float> v(size);
    for (float& f : v) f = static_cast<float>(normal(random));
    return v;
  }
};

}  // namespace mnet::test
