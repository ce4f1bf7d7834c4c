// The stem and its backward in double, element by element, and the inputs and bounds the tests share.  Buffers have exactly
// the size they need, so that AddressSanitizer sees every overrun; what lies between the elements of an image with gaps is
// NaN.
#pragma once

#include "../common/stem_params.h"
#include "stage_data.h"

namespace mnet::test {

enum class Layout { kNhwc, kNchw, kGaps };

struct StemCase {
  int n, c, h, w, e, stride;
  Layout layout = Layout::kNchw;
  int y_act = 2;
  double mean = 0.0;               // of x
  int skew = 0;                    // elements by which every map misses alignment
  bool weight_transposed = false;  // weight strides other than contiguous
  bool constant = false;           // x is the same everywhere and only the centre of the weight is not zero
};

inline std::vector<StemCase> stem_cases() {
  std::vector<StemCase> cases = {
      {2, 3, 19, 21, 32, 2},
      {1, 3, 7, 130, 16, 2, Layout::kNhwc, 3},
      {3, 1, 1, 1, 1, 1},
      {2, 4, 5, 1, 7, 2, Layout::kGaps, 4},
      {1, 8, 6, 9, 70, 1, Layout::kNhwc, 1, 0.0, 1, true},
      {0, 3, 8, 8, 5, 2},
      {70, 3, 3, 4, 9, 1, Layout::kNchw, 2, 10.0},
      {2, 5, 30, 16, 24, 2, Layout::kNhwc, 0, 100.0},
      {2, 3, 12, 60, 33, 1, Layout::kGaps, 2, 0.0, 1},
      {1, 3, 33, 4, 8, 1, Layout::kNhwc, 2, 7.3, 0, false, true},
      {6, 3, 9, 9, 40, 2, Layout::kNchw, 2, 7.3, 0, false, true},
  };
  return cases;
}

class StemProblem {
 public:
  StemProblem(const StemCase& shape, Dtype dtype, uint64_t seed)
      : s(shape),
        dtype(dtype),
        out_h((s.h - 1) / s.stride + 1),
        out_w((s.w - 1) / s.stride + 1),
        positions(int64_t{s.n} * out_h * out_w),
        depth(9 * s.c),
        x(dtype, image_size(), s.skew),
        weight(dtype, int64_t{s.e} * depth),
        y(dtype, positions * s.e, s.skew),
        grad(dtype, positions * s.e, s.skew),
        dy(dtype, positions * s.e, s.skew),
        moments(2 * s.e, std::nanf("")),
        dw(int64_t{s.e} * depth, std::nanf("")) {
    Data data(seed);
    for (int n = 0; n < s.n; ++n) {
      for (int c = 0; c < s.c; ++c) {
        for (int h = 0; h < s.h; ++h) {
          for (int w = 0; w < s.w; ++w) x.set(image_at(n, c, h, w), s.constant ? s.mean : s.mean + data.normal(data.random));
        }
      }
    }
    data.fill(weight, int64_t{s.e} * depth);
    for (int64_t i = 0; s.constant && i < int64_t{s.e} * depth; ++i) {
      if (i % 9 != 4) weight.set(i, 0.0);
    }
    data.fill(y, positions * s.e);
    data.fill(grad, positions * s.e);
    y_bn = data.table(5 * s.e);
    coef = data.table(2 * s.e);
    columns_.resize(positions * depth);
    for (int64_t i = 0; i < positions; ++i) {
      const int column = static_cast<int>(i % out_w), row = static_cast<int>(i / out_w % out_h);
      const int n = static_cast<int>(i / out_w / out_h);
      for (int k = 0; k < depth; ++k) {
        const int c = k / 9, h = row * s.stride + k % 9 / 3 - 1, w = column * s.stride + k % 3 - 1;
        columns_[i * depth + k] = h < 0 || h >= s.h || w < 0 || w >= s.w ? 0.0 : x.get(image_at(n, c, h, w));
      }
    }
  }

  StemParams forward() {
    StemParams p{};
    p.image = image();
    p.weight = weight.data();
    p.y = y.data();
    p.moments = moments.data();
    p.weight_stride_e = s.weight_transposed ? 1 : depth;
    const int unit = s.weight_transposed ? s.e : 1;
    p.weight_stride_c = int64_t{9} * unit;
    p.weight_stride_h = int64_t{3} * unit;
    p.weight_stride_w = unit;
    p.e = s.e;
    return p;
  }

  StemBackwardParams backward() {
    StemBackwardParams b{};
    b.image = image();
    b.grad = grad.data();
    b.y = y.data();
    b.y_bn = y_bn.data();
    b.coef = coef.data();
    b.dy = dy.data();
    b.dw = dw.data();
    b.e = s.e;
    b.y_act = static_cast<Activation>(s.y_act);
    return b;
  }

  // y and its moments.  `terms`: relative error of every operand of the product.
  void check_forward(const std::string& label, double terms = 0.0) {
    Check check(describe(label));
    for (int e = 0; e < s.e; ++e) {
      double mean = 0.0, variance = 0.0;
      for (int64_t i = 0; i < positions; ++i) {
        double want = 0.0, magnitude = 0.0;
        for (int k = 0; k < depth; ++k) {
          const double term = columns_[i * depth + k] * weight.get(weight_at(e, k));
          want += term;
          magnitude += std::fabs(term);
        }
        const double got = y.get(i * s.e + e);
        check("y", i * s.e + e, got, want, unit() * std::fabs(want) + (depth * kUnit32 + 2 * terms) * magnitude);
        mean += got / positions;
      }
      for (int64_t i = 0; i < positions; ++i) variance += std::pow(y.get(i * s.e + e) - mean, 2) / positions;
      if (s.constant && positions > 0) mean = y.get(e), variance = 0.0;
      const double spread = std::fabs(mean) + std::sqrt(variance);
      check("mean", e, moments[e], mean, s.constant ? 0.0 : 8 * kUnit32 * spread);
      check("variance", e, moments[s.e + e], variance, 1e-5 * variance);
    }
  }

  // dy and the weight's gradient, of the y that is there (random, or what the forward pass wrote).
  void check_backward(const std::string& label, double terms = 0.0) {
    Check check(describe(label));
    std::vector<double> rounded(positions * s.e), slack(positions * s.e);
    for (int64_t i = 0; i < positions * s.e; ++i) {
      const int e = static_cast<int>(i % s.e);
      const auto value = static_cast<float>(y.get(i));
      const double g = grad.get(i) * act_slope(s.y_act, std::fmaf(y_bn[e], value, y_bn[s.e + e]));
      const double parts[] = {y_bn[e] * g, coef[e] * (static_cast<double>(value) - y_bn[2 * s.e + e]), coef[s.e + e]};
      const double want = parts[0] + parts[1] + parts[2];
      slack[i] = 16 * kUnit32 * (std::fabs(parts[0]) + std::fabs(parts[1]) + std::fabs(parts[2]));
      rounded[i] = round_to(dtype, want);
      check("dy", i, dy.get(i), want, unit() * std::fabs(want) + slack[i]);
    }
    for (int e = 0; e < s.e; ++e) {
      for (int k = 0; k < depth; ++k) {
        double want = 0.0, bound = 0.0;
        for (int64_t i = 0; i < positions; ++i) {
          const double d = rounded[i * s.e + e], v = columns_[i * depth + k];
          want += d * v;
          bound += slack[i * s.e + e] * std::fabs(v) + (2 * unit() + 128 * kUnit32 + 2 * terms) * std::fabs(d * v);
        }
        check("dw", int64_t{e} * depth + k, dw[int64_t{e} * depth + k], want, bound);
      }
    }
  }

  const StemCase s;
  const Dtype dtype;
  const int out_h, out_w;
  const int64_t positions;
  const int depth;
  Buffer x, weight, y, grad, dy;
  std::vector<float> y_bn, coef, moments, dw;

 private:
  static constexpr double kUnit32 = 0x1p-24;
  static constexpr int kGap = 2;  // between neighbours in a row

  double unit() const { return std::ldexp(1.0, -significant_bits(dtype)); }
  int64_t weight_at(int e, int k) const { return s.weight_transposed ? int64_t{k} * s.e + e : int64_t{e} * depth + k; }

  StemImage image() {
    StemImage out{x.data(), 0, 0, 0, 0, s.n, s.c, s.h, s.w, out_h, out_w, s.stride};
    out.stride_n = image_at(1, 0, 0, 0);
    out.stride_c = image_at(0, 1, 0, 0);
    out.stride_h = image_at(0, 0, 1, 0);
    out.stride_w = image_at(0, 0, 0, 1);
    return out;
  }
  int64_t image_at(int n, int c, int h, int w) const {
    if (s.layout == Layout::kNhwc) return ((int64_t{n} * s.h + h) * s.w + w) * s.c + c;
    return (((int64_t{n} * s.c + c) * s.h + h) * s.w + w) * (s.layout == Layout::kGaps ? kGap : 1);
  }
  int64_t image_size() const { return s.n == 0 ? 0 : image_at(s.n - 1, s.c - 1, s.h - 1, s.w - 1) + 1; }

  std::string describe(const std::string& label) const {
    char text[160];
    std::snprintf(text, sizeof text, "%s %s n%d c%d %dx%d e%d s%d layout %d act %d mean %g skew %d", label.c_str(), name(dtype),
                  s.n, s.c, s.h, s.w, s.e, s.stride, static_cast<int>(s.layout), s.y_act, s.mean, s.skew);
    return text;
  }

  std::vector<double> columns_;
};

}  // namespace mnet::test
