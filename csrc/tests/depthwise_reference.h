// Depthwise convolution in double, element by element, and the inputs and bounds the tests share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../common/params.h"

namespace mnet::test {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

inline const char* name(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? "float32" : dtype == Dtype::kBFloat16 ? "bfloat16" : "float16";
}
inline int bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline int significant_bits(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 24 : dtype == Dtype::kBFloat16 ? 8 : 11;
}

// The storage dtype's neighbour of v, to nearest even: by scaling, unlike the kernels, which work on the bits.
inline double round_to(Dtype dtype, double v) {
  if (v == 0.0 || !std::isfinite(v)) return v;
  const int lowest = dtype == Dtype::kFloat16 ? -14 : -126;  // exponent of the smallest normal number
  const int exponent = std::max(std::ilogb(v), lowest);
  const double quantum = std::ldexp(1.0, exponent + 1 - significant_bits(dtype));
  const double rounded = std::nearbyint(v / quantum) * quantum;
  const double most = dtype == Dtype::kFloat16   ? 65504.0
                      : dtype == Dtype::kFloat32 ? std::numeric_limits<float>::max()
                                                 : std::ldexp(255.0, 120);
  return std::fabs(rounded) > most ? std::copysign(std::numeric_limits<double>::infinity(), v) : rounded;
}

// A value the dtype holds exactly, as its bits.
inline uint32_t encode(Dtype dtype, double v) {
  const float f = static_cast<float>(v);
  uint32_t b;
  std::memcpy(&b, &f, 4);
  if (dtype == Dtype::kFloat32) return b;
  if (dtype == Dtype::kBFloat16) return b >> 16;
  const uint32_t sign = std::signbit(v) ? 0x8000u : 0u;
  if (std::isnan(v)) return sign | 0x7e00u;
  if (std::isinf(v)) return sign | 0x7c00u;
  if (std::fabs(v) < std::ldexp(1.0, -14)) return sign | static_cast<uint32_t>(std::ldexp(std::fabs(v), 24));
  const int exponent = std::ilogb(v);
  const auto mantissa = static_cast<uint32_t>(std::ldexp(std::fabs(v), 10 - exponent)) & 0x3ffu;
  return sign | static_cast<uint32_t>(exponent + 15) << 10 | mantissa;
}

inline double decode(Dtype dtype, uint32_t b) {
  if (dtype == Dtype::kFloat16) {
    const double sign = b & 0x8000u ? -1.0 : 1.0;
    const int exponent = static_cast<int>(b >> 10 & 31u), mantissa = static_cast<int>(b & 0x3ffu);
    if (exponent == 31) return mantissa ? std::nan("") : sign * std::numeric_limits<double>::infinity();
    return exponent == 0 ? sign * std::ldexp(mantissa, -24) : sign * std::ldexp(1024 + mantissa, exponent - 25);
  }
  const uint32_t bits = dtype == Dtype::kBFloat16 ? b << 16 : b;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A tensor of a storage dtype in a buffer of exactly its size (so that AddressSanitizer sees every overrun); `skew`
// elements at its start make it unaligned.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t size, int skew = 0) : dtype_(dtype), skew_(skew), memory_((size + skew) * bytes(dtype), 0xff) {}
  void* data() { return memory_.data() + skew_ * bytes(dtype_); }
  double get(int64_t i) {
    uint32_t b = 0;
    std::memcpy(&b, at(i), bytes(dtype_));
    return decode(dtype_, b);
  }
  void set(int64_t i, double v) {
    const uint32_t b = encode(dtype_, round_to(dtype_, v));
    std::memcpy(at(i), &b, bytes(dtype_));
  }

 private:
  char* at(int64_t i) { return static_cast<char*>(data()) + i * bytes(dtype_); }
  Dtype dtype_;
  int64_t skew_;
  std::vector<char> memory_;
};

struct Case {
  int n, c, h, w, kernel, stride;
  int act;              // an Activation, or -1: no batch norm before
  double mean = 0.0;    // of x
  int constant = -1;    // this channel's x, and so its y, is constant (in the interior: needs stride > h, w or no halo)
  int skew = 0;         // elements by which x and y miss alignment
  bool moments = true;
  bool weight_transposed = false;  // weight strides other than contiguous
};

inline std::string describe(const Case& k, Dtype dtype) {
  char text[160];
  std::snprintf(text, sizeof text, "%s n%d c%d %dx%d k%d s%d act %d mean %g skew %d", name(dtype), k.n, k.c, k.h, k.w,
                k.kernel, k.stride, k.act, k.mean, k.skew);
  return text;
}

struct Problem {
  Case shape;
  Dtype dtype;
  Buffer x, weight, y;
  std::vector<float> bn, moments;
  DepthwiseParams params{};

  Problem(const Case& k, Dtype dtype, uint64_t seed)
      : shape(k),
        dtype(dtype),
        x(dtype, int64_t{k.n} * k.h * k.w * k.c, k.skew),
        weight(dtype, int64_t{k.c} * k.kernel * k.kernel),
        y(dtype, int64_t{k.n} * out(k.h) * out(k.w) * k.c, k.skew),
        bn(5 * k.c),
        moments(2 * k.c, -1.f) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < int64_t{k.n} * k.h * k.w * k.c; ++i) {
      x.set(i, i % k.c == k.constant ? 3.1 : k.mean + normal(random));
    }
    for (int c = 0; c < k.c; ++c) {
      for (int tap = 0; tap < k.kernel * k.kernel; ++tap) {
        // The constant channel only looks at the centre, so that padding does not show.
        const bool off_centre = tap != k.kernel * k.kernel / 2;
        weight.set(at(c, tap), c == k.constant ? (off_centre ? 0.0 : 1.7) : normal(random));
      }
      bn[c] = static_cast<float>(0.5 + std::fabs(normal(random)));
      bn[k.c + c] = static_cast<float>(normal(random) - k.mean * bn[c]);
    }
    params.x = x.data();
    params.weight = weight.data();
    params.bn = k.act < 0 ? nullptr : bn.data();
    params.y = y.data();
    params.moments = k.moments ? moments.data() : nullptr;
    params.weight_stride_c = k.weight_transposed ? 1 : k.kernel * k.kernel;
    params.weight_stride_h = k.weight_transposed ? int64_t{k.kernel} * k.c : k.kernel;
    params.weight_stride_w = k.weight_transposed ? k.c : 1;
    params.n = k.n;
    params.c = k.c;
    params.h = k.h;
    params.w = k.w;
    params.out_h = out(k.h);
    params.out_w = out(k.w);
    params.kernel = k.kernel;
    params.stride = k.stride;
    params.act = static_cast<Activation>(k.act < 0 ? 0 : k.act);
  }

  int out(int size) const { return (size - 1) / shape.stride + 1; }
  int64_t at(int c, int tap) const {
    return shape.weight_transposed ? int64_t{tap} * shape.c + c : int64_t{c} * shape.kernel * shape.kernel + tap;
  }

  double activated(int64_t index, int c) {
    const double v = x.get(index);
    if (shape.act < 0) return v;
    const float u = std::fmaf(bn[c], static_cast<float>(v), bn[shape.c + c]);
    float z = u;
    with_activation(params.act, [&](auto act) { z = decltype(act)::fwd(u); });
    return round_to(dtype, z);
  }

  // The terms that scale*x + shift adds.
  double prologue_magnitude(int64_t index, int c) {
    return shape.act < 0 ? 0.0 : std::fabs(bn[c] * x.get(index)) + std::fabs(bn[shape.c + c]);
  }

  // Checks y and the moments; prints what is wrong.  `run`: how many values the kernel sums one after the other in
  // float32, shifted by one of them: the partial sums grow to `run` times the shift's distance from the mean, so their
  // rounding errors, divided by `run`, come to sqrt(run) / 3 times unit32 times that distance; six times that is
  // allowed.  `fused`: scale*x + shift is one multiply-add; otherwise it errs by the rounding of its terms, and the
  // activated value may have been rounded to its other neighbour.  h-swish has a multiply-add of its own, which this
  // program may not fuse as the kernel does.
  bool check(const std::string& label, int run, bool fused = true) {
    const double unit = std::ldexp(1.0, -significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);
    const double smallest_normal = std::ldexp(1.0, dtype == Dtype::kFloat16 ? -14 : -126);
    const int taps = shape.kernel * shape.kernel, pad = shape.kernel / 2, oh_size = out(shape.h), ow_size = out(shape.w);
    bool good = true;
    const auto report = [&](const char* what, int c, double got, double want, double bound) {
      if (std::fabs(got - want) <= bound) return;
      if (good) {
        std::printf("%s, %s: %s of channel %d is %.9g, expected %.9g within %.3g\n", label.c_str(),
                    describe(shape, dtype).c_str(), what, c, got, want, bound);
      }
      good = false;
    };
    for (int c = 0; c < shape.c; ++c) {
      double count = 0.0, sum = 0.0;
      std::vector<double> stored;
      for (int64_t n = 0; n < shape.n; ++n) {
        for (int oh = 0; oh < oh_size; ++oh) {
          for (int ow = 0; ow < ow_size; ++ow) {
            double want = 0.0, magnitude = 0.0, unfused = 0.0;
            for (int tap = 0; tap < taps; ++tap) {
              const int ih = oh * shape.stride - pad + tap / shape.kernel, iw = ow * shape.stride - pad + tap % shape.kernel;
              if (ih < 0 || ih >= shape.h || iw < 0 || iw >= shape.w) continue;
              const int64_t index = ((n * shape.h + ih) * shape.w + iw) * shape.c + c;
              const double w = weight.get(at(c, tap)), term = activated(index, c) * w;
              want += term;
              magnitude += std::fabs(term);
              if (params.act == Activation::kHardswish) unfused += std::fabs(w) * 8 * unit32 + 2 * unit * std::fabs(term);
              if (!fused) unfused += std::fabs(w) * 3 * unit32 * prologue_magnitude(index, c) + 2 * unit * std::fabs(term);
            }
            const double got = y.get(((n * oh_size + oh) * ow_size + ow) * shape.c + c);
            const double rounding = unit * std::max(std::fabs(want), smallest_normal);
            report("y", c, got, want, rounding + taps * unit32 * magnitude + unfused);
            stored.push_back(got);
            sum += got;
            ++count;
          }
        }
      }
      if (!shape.moments) continue;
      if (stored.empty()) {
        report("mean", c, moments[c], 0.0, 0.0);
        report("variance", c, moments[shape.c + c], 0.0, 0.0);
        continue;
      }
      const double mean = sum / count;
      double variance = 0.0, farthest = 0.0;
      for (const double v : stored) {
        variance += (v - mean) * (v - mean) / count;
        farthest = std::max(farthest, std::fabs(v - mean));
      }
      const bool constant = c == shape.constant;
      const double rounding = unit32 * (4 * std::fabs(mean) + 2 * std::sqrt(std::min<double>(run, count)) * farthest);
      report("mean", c, moments[c], constant ? stored[0] : mean, constant ? 0.0 : rounding);
      report("variance", c, moments[shape.c + c], constant ? 0.0 : variance, constant ? 0.0 : 1e-4 * variance);
    }
    return good;
  }
};

// Every kernel, stride, activation; channel and row tails; batch 0 and 1; large means; a constant channel.
inline std::vector<Case> cases() {
  std::vector<Case> list;
  for (const int kernel : {3, 5}) {
    for (const int stride : {1, 2}) {
      for (int act = -1; act < kNumActivations; ++act) list.push_back({2, 24, 9, 13, kernel, stride, act});
      for (const int c : {1, 3, 8, 13, 16, 37, 64, 72, 130}) list.push_back({2, c, 7, 6, kernel, stride, 2});
      list.push_back({3, 16, 1, 1, kernel, stride, 3});
      list.push_back({1, 8, 2, 67, kernel, stride, 1});
      list.push_back({1, 8, 35, 3, kernel, stride, 1});
      list.push_back({0, 5, 4, 4, kernel, stride, 2});
      list.push_back({2, 16, 10, 10, kernel, stride, -1, 100.0});
      list.push_back({2, 17, 12, 21, kernel, stride, -1, 0.0, 3});
      list.push_back({2, 32, 19, 8, kernel, stride, 2, 0.0, 5});
      list.push_back({2, 24, 8, 9, kernel, stride, 3, 0.0, -1, 1});
      Case no_moments{1, 20, 6, 7, kernel, stride, 2};
      no_moments.moments = false;
      list.push_back(no_moments);
      Case transposed{1, 20, 6, 7, kernel, stride, 2};
      transposed.weight_transposed = true;
      list.push_back(transposed);
    }
  }
  return list;
}

}  // namespace mnet::test
