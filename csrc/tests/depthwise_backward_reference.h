// Backward of the depthwise convolution by loops in double, and the inputs and cases that the tests share.
#pragma once

#include <cstdio>

#include "stage_data.h"

namespace mnet::test {

struct BackwardShape {
  int n, c, h, w, kernel, stride;
  int act;    // of x, an Activation, or -1: no batch norm, a residual instead
  int y_act;  // of the upstream
  bool gated;
  int skew;   // elements by which the maps miss alignment
};

struct Dy {
  double value;
  double error;  // of the float32 arithmetic: its terms may cancel
};

struct BackwardProblem {
  BackwardShape s;
  Dtype dtype;
  int oh, ow, taps, pad;
  Buffer grad, y, x, weight, residual, gx;
  std::vector<float> y_bn, bn, coef, gate, offset, sums, dw;
  DepthwiseBackwardParams params{};

  BackwardProblem(const BackwardShape& s, Dtype dtype, uint64_t seed)
      : s(s),
        dtype(dtype),
        oh((s.h - 1) / s.stride + 1),
        ow((s.w - 1) / s.stride + 1),
        taps(s.kernel * s.kernel),
        pad(s.kernel / 2),
        grad(dtype, outputs(), s.skew),
        y(dtype, outputs(), s.skew),
        x(dtype, inputs(), s.skew),
        weight(dtype, int64_t{s.c} * taps),
        residual(dtype, inputs(), s.skew),
        gx(dtype, inputs(), s.skew),
        sums(2 * s.c, -1.f),
        dw(s.c * taps, -1.f) {
    Data data(seed);
    data.fill(grad, outputs());
    data.fill(y, outputs());
    data.fill(x, inputs());
    data.fill(weight, int64_t{s.c} * taps);
    data.fill(residual, inputs());
    y_bn = data.table(5 * s.c);
    bn = data.table(5 * s.c);
    coef = data.table(2 * s.c);
    gate = data.table(int64_t{s.n} * s.c);
    offset = data.table(int64_t{s.n} * s.c);
    DepthwiseBackwardParams& p = params;
    p.grad = grad.data();
    p.y = y.data();
    p.y_bn = y_bn.data();
    p.coef = coef.data();
    p.gate = s.gated ? gate.data() : nullptr;
    p.offset = s.gated ? offset.data() : nullptr;
    p.x = x.data();
    p.weight = weight.data();
    p.bn = s.act < 0 ? nullptr : bn.data();
    p.residual = s.act < 0 ? residual.data() : nullptr;
    p.gx = gx.data();
    p.sums = s.act < 0 ? nullptr : sums.data();
    p.dw = dw.data();
    p.weight_stride_c = taps;
    p.weight_stride_h = s.kernel;
    p.weight_stride_w = 1;
    p.n = s.n;
    p.c = s.c;
    p.h = s.h;
    p.w = s.w;
    p.out_h = oh;
    p.out_w = ow;
    p.kernel = s.kernel;
    p.stride = s.stride;
    p.y_act = static_cast<Activation>(s.y_act);
    p.act = static_cast<Activation>(s.act < 0 ? 0 : s.act);
  }

  int64_t inputs() const { return int64_t{s.n} * s.h * s.w * s.c; }
  int64_t outputs() const { return int64_t{s.n} * oh * ow * s.c; }

  std::string describe(const std::string& runner) const {
    char label[200];
    std::snprintf(label, sizeof label, "%s backward %s n%d c%d %dx%d k%d s%d act %d y_act %d gated %d skew %d",
                  runner.c_str(), name(dtype), s.n, s.c, s.h, s.w, s.kernel, s.stride, s.act, s.y_act, s.gated, s.skew);
    return label;
  }

  void check(const std::string& runner) {
    Check check(describe(runner));
    const double unit = std::ldexp(1.0, -significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);
    const double least = dtype == Dtype::kFloat16 ? std::ldexp(1.0, -24) : 0.0;  // the step between subnormals
    const auto dy = [&](int64_t n, int i, int j, int c) {
      const int64_t at = ((n * oh + i) * ow + j) * s.c + c;
      double g = grad.get(at);
      if (s.gated) g = gate[n * s.c + c] * g + offset[n * s.c + c];
      const auto value = static_cast<float>(y.get(at));
      g *= act_slope(s.y_act, std::fmaf(y_bn[c], value, y_bn[s.c + c]));
      const double a = y_bn[c] * g, b = coef[c] * (double{value} - y_bn[2 * s.c + c]), d = coef[s.c + c];
      return Dy{round_to(dtype, a + b + d), 4 * unit32 * (2 * std::fabs(a) + std::fabs(b) + std::fabs(d))};
    };
    const auto z = [&](int64_t at, int c) {
      const auto value = static_cast<float>(x.get(at));
      return s.act < 0 ? double{value} : round_to(dtype, act_value(s.act, std::fmaf(bn[c], value, bn[s.c + c])));
    };
    for (int c = 0; c < s.c; ++c) {
      std::vector<double> dw_want(taps, 0.0), dw_size(taps, 0.0), dw_most(taps, 0.0), dw_slack(taps, 0.0);
      double sum = 0.0, sum_x = 0.0, size = 0.0, size_x = 0.0;
      for (int64_t n = 0; n < s.n; ++n) {
        for (int ih = 0; ih < s.h; ++ih) {
          for (int iw = 0; iw < s.w; ++iw) {
            const int64_t at = ((n * s.h + ih) * s.w + iw) * s.c + c;
            double gz = 0.0, magnitude = 0.0, slack = 0.0;
            const double zv = z(at, c), of_x = s.act < 0 ? 0.0 : std::fabs(bn[c] * x.get(at)) + std::fabs(bn[s.c + c]);
            const double z_error = 4 * unit32 * of_x;
            for (int tap = 0; tap < taps; ++tap) {
              const int top = ih + pad - tap / s.kernel, left = iw + pad - tap % s.kernel;
              if (top < 0 || left < 0 || top % s.stride || left % s.stride) continue;
              if (top / s.stride >= oh || left / s.stride >= ow) continue;
              const Dy d = dy(n, top / s.stride, left / s.stride, c);
              const double w = weight.get(int64_t{c} * taps + tap);
              gz += w * d.value;
              magnitude += std::fabs(w * d.value);
              slack += 1.5 * std::fabs(w) * d.error;
              dw_want[tap] += zv * d.value;
              dw_size[tap] += std::fabs(zv * d.value);
              dw_most[tap] = std::max(dw_most[tap], std::fabs(zv * d.value));
              dw_slack[tap] += std::fabs(zv) * d.error + z_error * std::fabs(d.value);
            }
            const auto value = static_cast<float>(x.get(at));
            double want = gz;
            if (s.act >= 0) {
              want *= act_slope(s.act, std::fmaf(bn[c], value, bn[s.c + c]));
              magnitude *= 1.5;
            } else {
              want += residual.get(at);
              magnitude += std::fabs(residual.get(at));
            }
            const double got = gx.get(at);
            check("gx", at, got, want, slack + (2 * unit + (taps + 8) * unit32) * magnitude + least);
            const double centred = double{value} - bn[2 * s.c + c];
            sum += got;
            sum_x += got * centred;
            size += std::fabs(got);
            size_x += std::fabs(got * centred);
          }
        }
      }
      for (int tap = 0; tap < taps; ++tap) {
        check("dw", int64_t{c} * taps + tap, dw[c * taps + tap], dw_want[tap],
              dw_slack[tap] + 16 * unit32 * dw_size[tap] + 8 * unit * dw_most[tap]);
      }
      if (s.act < 0) continue;
      check("sum", c, sums[c], sum, 16 * unit32 * size);  // of the values as stored
      check("sum_x", c, sums[s.c + c], sum_x, 16 * unit32 * size_x);
    }
  }
};

// Every kernel, stride, activation; channel and row tails; batch 0 and 1; unaligned maps.
inline std::vector<BackwardShape> backward_shapes() {
  std::vector<BackwardShape> shapes;
  for (const int kernel : {3, 5}) {
    for (const int stride : {1, 2}) {
      for (int act = -1; act < kNumActivations; ++act) {
        shapes.push_back({2, 24, 9, 13, kernel, stride, act, (act + 2) % kNumActivations, act == 1, 0});
      }
      for (const int c : {1, 3, 8, 13, 16, 37, 72, 130}) shapes.push_back({2, c, 7, 6, kernel, stride, 2, 0, c == 13, 0});
      shapes.push_back({3, 16, 1, 1, kernel, stride, 3, 3, false, 0});
      shapes.push_back({1, 8, 2, 67, kernel, stride, 1, 0, true, 0});
      shapes.push_back({1, 8, 35, 3, kernel, stride, 1, 2, false, 0});
      shapes.push_back({0, 5, 4, 4, kernel, stride, 2, 0, false, 0});
      shapes.push_back({2, 24, 8, 9, kernel, stride, 3, 1, false, 1});
    }
  }
  shapes.push_back({1, 64, 70, 71, 3, 1, 2, 0, false, 0});  // several chunks of an image
  shapes.push_back({1, 64, 70, 71, 5, 2, 2, 0, false, 0});
  return shapes;
}

}  // namespace mnet::test
