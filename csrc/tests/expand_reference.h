// The stages of algebraic mode in double, element by element: the inputs and the checks that the CPU's and the CUDA kernels'
// tests share.  Pre-activations keep away from the kinks: x and W are bounded, and each channel's shift lies well inside one
// piece of its activation, so that no mask depends on a rounding.
#pragma once

#include "../common/expand_params.h"
#include "gram_reference.h"
#include "stage_data.h"

namespace mnet::test {

struct ExpandShape {
  int n, c, e, o, h, w, kernel, stride, act;
  bool gated, shifted;
};

inline std::vector<float> uniform(std::mt19937_64& random, int64_t size, double low, double high) {
  std::uniform_real_distribution<double> values(low, high);
  std::vector<float> out(size);
  for (float& v : out) v = static_cast<float>(values(random));
  return out;
}

// bn [5, c] whose scale * v + shift is at least 0.3 away from -3, 0, 3 and 6 for every |v| <= 1.
inline std::vector<float> safe_table(std::mt19937_64& random, int c) {
  constexpr float kShifts[] = {-4.1f, -1.5f, 1.5f, 4.5f, 7.5f};
  std::vector<float> table = uniform(random, 5 * c, 0.3, 0.8);
  for (int i = 0; i < c; ++i) {
    if (random() % 2) table[i] = -table[i];
    table[c + i] = kShifts[random() % 5];
  }
  return table;
}

inline void fill(std::mt19937_64& random, Dtype dtype, Buffer& buffer, int64_t size, double low, double high) {
  std::uniform_real_distribution<double> values(low, high);
  for (int64_t i = 0; i < size; ++i) buffer.set(i, round_to(dtype, values(random)));
}

struct ExpandProblem {
  const ExpandShape& s;
  Dtype dtype;
  Check& check;
  int oh, ow, taps, pad;
  int64_t in, out;  // positions
  double unit, unit32 = std::ldexp(1.0, -24);
  std::mt19937_64 random;
  Buffer x, weight, depthwise;
  std::vector<float> shift, bn;
  std::vector<double> xk, z, slope;  // x - k [in, c]; z1 and act'(u1) [in, e]

  // Every map begins `skew` elements from where it would be aligned.
  ExpandProblem(const ExpandShape& shape, Dtype d, Check& c, uint64_t seed, int skew = 0)
      : s(shape), dtype(d), check(c), oh((s.h - 1) / s.stride + 1), ow((s.w - 1) / s.stride + 1), taps(s.kernel * s.kernel),
        pad(s.kernel / 2), in(int64_t{s.n} * s.h * s.w), out(int64_t{s.n} * oh * ow),
        unit(std::ldexp(1.0, -significant_bits(d))), random(seed), x(d, in * s.c, skew), weight(d, int64_t{s.e} * s.c),
        depthwise(d, int64_t{s.e} * taps), shift(s.c), bn(safe_table(random, s.e)), xk(in * s.c), z(in * s.e),
        slope(in * s.e) {
    fill(random, d, x, in * s.c, -1, 1);
    fill(random, d, weight, int64_t{s.e} * s.c, -1.0 / s.c, 1.0 / s.c);
    fill(random, d, depthwise, int64_t{s.e} * taps, -1, 1);
    for (int i = 0; s.shifted && i < s.c; i += 2) {  // x - k is exact
      shift[i] = 8.f;
      for (int64_t p = 0; p < in; ++p) x.set(p * s.c + i, 8.0 + std::ldexp(std::nearbyint(std::ldexp(x.get(p * s.c + i), 4)), -4));
    }
    for (int64_t i = 0; i < in * s.c; ++i) xk[i] = x.get(i) - shift[i % s.c];
    for (int64_t p = 0; p < in; ++p) {
      for (int e = 0; e < s.e; ++e) {
        double y1 = 0.0;
        for (int c = 0; c < s.c; ++c) y1 += xk[p * s.c + c] * weight.get(int64_t{e} * s.c + c);
        const auto u = static_cast<float>(bn[e] * y1 + bn[s.e + e]);
        z[p * s.e + e] = round_to(d, act_value(s.act, u));
        slope[p * s.e + e] = act_slope(s.act, u);
      }
    }
  }

  ExpandLayer layer() { return {x.data(), shift.data(), weight.data(), s.c, 1, s.c}; }

  template <typename Params>
  void geometry(Params& p) {
    p.weight = depthwise.data();
    p.weight_stride_c = taps;
    p.weight_stride_h = s.kernel;
    p.weight_stride_w = 1;
    p.n = s.n;
    p.c = s.e;
    p.h = s.h;
    p.w = s.w;
    p.out_h = oh;
    p.out_w = ow;
    p.kernel = s.kernel;
    p.stride = s.stride;
    p.act = static_cast<Activation>(s.act);
    p.bn = bn.data();
  }

  // f(input position, output position, tap) wherever a tap meets the image.
  template <typename F>
  void for_taps(F&& f) const {
    for (int64_t q = 0; q < out; ++q) {
      const int64_t image = q / (oh * ow), row = q / ow % oh, column = q % ow;
      for (int tap = 0; tap < taps; ++tap) {
        const int64_t ih = row * s.stride - pad + tap / s.kernel, iw = column * s.stride - pad + tap % s.kernel;
        if (ih >= 0 && ih < s.h && iw >= 0 && iw < s.w) f((image * s.h + ih) * s.w + iw, q, tap);
      }
    }
  }

  // What gram wrote.
  void check_gram(const std::vector<float>& table) { test::check_gram(check, dtype, x, in, s.c, table); }

  // y and its moments.  operand_error: relative, of an operand of the expand layer's product.
  void check_forward(Buffer& to, const std::vector<float>& moments, double operand_error = 0.0) {
    std::vector<double> want(out * s.e, 0.0), magnitude(out * s.e, 0.0);
    for_taps([&](int64_t position, int64_t q, int tap) {
      for (int e = 0; e < s.e; ++e) {
        const double term = z[position * s.e + e] * depthwise.get(int64_t{e} * taps + tap);
        want[q * s.e + e] += term;
        // z may have been rounded to its other neighbour
        magnitude[q * s.e + e] += std::fabs(term) * (2 * unit + 32 * unit32) + 8 * unit32;
        // x and W of at most 1 and 1 / c, scale and the activation's slope of at most 0.8 and 1.2
        magnitude[q * s.e + e] += 2 * operand_error * std::fabs(depthwise.get(int64_t{e} * taps + tap));
      }
    });
    for (int e = 0; e < s.e; ++e) {
      double mean = 0.0, variance = 0.0;
      for (int64_t q = 0; q < out; ++q) {
        const double got = to.get(q * s.e + e);
        check("y", q * s.e + e, got, want[q * s.e + e], magnitude[q * s.e + e] + unit * std::fabs(want[q * s.e + e]));
        mean += got / static_cast<double>(out);
      }
      for (int64_t q = 0; q < out; ++q) variance += std::pow(to.get(q * s.e + e) - mean, 2) / static_cast<double>(out);
      check("moments", e, moments[e], mean, 8 * unit32 * (std::fabs(mean) + std::sqrt(variance)));
      check("moments", s.e + e, moments[s.e + e], variance, 1e-5 * variance);
    }
  }
};

}  // namespace mnet::test
