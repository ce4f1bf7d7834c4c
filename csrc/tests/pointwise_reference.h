// The pointwise stages in double, element by element, and the inputs and bounds the tests share.  Buffers have exactly the
// size they need, so that AddressSanitizer sees every overrun.
#pragma once

#include "../common/pointwise_params.h"
#include "depthwise_reference.h"

namespace mnet::test {

struct PointwiseCase {
  int images, area, c, e, act;  // act -1: no batch norm
  bool gate, residual;
  double mean = 0.0;               // of x
  int skew = 0;                    // elements by which every map misses alignment
  bool weight_transposed = false;  // weight strides other than contiguous
  bool constant = false;           // x is the same at every position
  bool pooled = false;             // the upstream is an offset instead of grad
};

// How far a kernel's arithmetic may be from the reference's beyond the rounding of its results.
struct PointwiseSlack {
  double flips = 0.0;  // units of the storage dtype in every term: an activated value that rounded to its other neighbour
  double terms = 0.0;  // relative error of every operand: tf32
};

inline float activate(Activation act, float u, bool derivative) {
  float out = u;
  with_activation(act, [&](auto a) { out = derivative ? decltype(a)::bwd(u) : decltype(a)::fwd(u); });
  return out;
}

class PointwiseProblem {
 public:
  PointwiseProblem(const PointwiseCase& shape, Dtype dtype, uint64_t seed)
      : s(shape),
        dtype(dtype),
        positions(int64_t{shape.images} * shape.area),
        x(dtype, positions * s.c, s.skew),
        weight(dtype, int64_t{s.e} * s.c),
        y(dtype, positions * s.e, s.skew),
        grad(dtype, positions * s.e, s.skew),
        gx(dtype, positions * s.c, s.skew),
        residual(dtype, positions * s.c, s.skew),
        moments(2 * s.e, std::nanf("")),
        sums(s.gate ? 3 * int64_t{s.images} * s.c : 2 * s.c, std::nanf("")),
        dw(int64_t{s.e} * s.c, std::nanf("")),
        random_(seed) {
    fill(x, positions * s.c, s.mean);
    for (int64_t i = s.c; s.constant && i < positions * s.c; ++i) x.set(i, x.get(i % s.c));
    fill(weight, int64_t{s.e} * s.c, 0.0);
    fill(y, positions * s.e, 0.0);
    fill(grad, positions * s.e, 0.0);
    fill(residual, positions * s.c, 0.0);
    bn = uniform(5 * s.c, -1, 2);
    gate = uniform(int64_t{s.images} * s.c, 0, 1);
    y_bn = uniform(5 * s.e, -1, 1);
    coef = uniform(2 * s.e, -1, 1);
    offset = uniform(int64_t{s.images} * s.e, -2, 2);
    act_ = static_cast<Activation>(s.act < 0 ? 0 : s.act);
  }

  PointwiseParams forward() {
    PointwiseParams p{};
    p.x = x.data();
    p.weight = weight.data();
    p.bn = s.act < 0 ? nullptr : bn.data();
    p.gate = s.gate ? gate.data() : nullptr;
    p.y = y.data();
    p.moments = moments.data();
    p.weight_stride_e = s.weight_transposed ? 1 : s.c;
    p.weight_stride_c = s.weight_transposed ? s.e : 1;
    p.images = s.images;
    p.image_positions = s.area;
    p.c = s.c;
    p.e = s.e;
    p.act = act_;
    return p;
  }

  PointwiseBackwardParams backward() {
    PointwiseBackwardParams b{};
    b.grad = s.pooled ? nullptr : grad.data();
    b.offset = s.pooled ? offset.data() : nullptr;
    b.y = y.data();
    b.y_bn = y_bn.data();
    b.coef = coef.data();
    b.x = x.data();
    b.weight = weight.data();
    b.bn = s.act < 0 ? nullptr : bn.data();
    b.gate = s.gate ? gate.data() : nullptr;
    b.residual = s.residual ? residual.data() : nullptr;
    b.gx = gx.data();
    b.sums = s.act < 0 ? nullptr : sums.data();
    b.dw = dw.data();
    b.weight_stride_e = s.weight_transposed ? 1 : s.c;
    b.weight_stride_c = s.weight_transposed ? s.e : 1;
    b.images = s.images;
    b.image_positions = s.area;
    b.c = s.c;
    b.e = s.e;
    b.y_act = kUpstream;
    b.act = act_;
    return b;
  }

  // y and its moments.
  bool check_forward(const std::string& label, const PointwiseSlack& slack = {}) {
    start(label);
    make_operand();
    for (int e = 0; e < s.e; ++e) {
      double mean = 0.0, variance = 0.0;
      for (int64_t i = 0; i < positions; ++i) {
        double want = 0.0, magnitude = 0.0;
        for (int c = 0; c < s.c; ++c) {
          const double term = z_[i * s.c + c] * weight.get(weight_at(e, c));
          want += term;
          magnitude += std::fabs(term);
        }
        const double got = y.get(i * s.e + e);
        report("y", i * s.e + e, got, want,
               unit() * std::fabs(want) + (s.c * kUnit32 + slack.flips * unit() + 2 * slack.terms) * magnitude);
        mean += got / positions;
      }
      if (positions == 0) {
        report("mean", e, moments[e], 0.0, 0.0);
        report("variance", e, moments[s.e + e], 0.0, 0.0);
        continue;
      }
      for (int64_t i = 0; i < positions; ++i) variance += std::pow(y.get(i * s.e + e) - mean, 2) / positions;
      if (s.constant) mean = y.get(e), variance = 0.0;
      report("mean", e, moments[e], mean, s.constant ? 0.0 : 8 * kUnit32 * (std::fabs(mean) + std::sqrt(variance)));
      report("variance", e, moments[s.e + e], variance, 1e-5 * variance);
    }
    return good_;
  }

  // What is wanted of gx, sums and dW.
  bool check_backward(const std::string& label, const PointwiseSlack& slack = {}, bool gx_wanted = true,
                      bool sums_wanted = true, bool dw_wanted = true) {
    start(label);
    make_operand();
    make_upstream();
    std::vector<double> want_sums(sums.size()), sum_bound(sums.size());
    for (int64_t i = 0; i < positions; ++i) {
      for (int c = 0; c < s.c; ++c) {
        double want = 0.0, bound = 0.0;
        for (int e = 0; e < s.e; ++e) {
          const double w = weight.get(weight_at(e, c)), d = std::fabs(dy_[i * s.e + e]);
          want += dy_[i * s.e + e] * w;
          bound += (dy_slack_[i * s.e + e] + (s.e * kUnit32 + 2 * slack.terms) * d) * std::fabs(w);
        }
        const int64_t at = i * s.c + c;
        const double derivative = activate(act_, u_[at], true);
        const double factor = s.act < 0 || s.gate ? 1.0 : derivative;
        if (slack.flips > 0.0) bound += 16 * kUnit32 * std::fabs(want);
        want = want * factor + (s.residual ? residual.get(at) : 0.0);
        const double got = gx_wanted ? gx.get(at) : want;
        report("gx", at, got, want, 2 * unit() * std::fabs(want) + bound + 4 * kUnit32 * std::fabs(want));
        if (s.act < 0 || !sums_wanted) continue;
        const double centred = x.get(at) - bn[2 * s.c + c], own = gx_wanted ? 0.0 : bound * std::fabs(factor);
        const int64_t image = i / s.area;
        const auto add = [&](int64_t index, double value, double weight_of_term) {
          want_sums[index] += value * weight_of_term;
          sum_bound[index] += (64 * kUnit32 * std::fabs(value) + own) * std::fabs(weight_of_term);
        };
        if (s.gate) {
          add(image * s.c + c, got, activate(act_, u_[at], false));
          add((s.images + image) * s.c + c, got, derivative);
          add((2 * s.images + image) * s.c + c, got, derivative * centred);
        } else {
          add(c, got, 1.0);
          add(s.c + c, got, centred);
        }
      }
    }
    if (s.act >= 0 && sums_wanted) {
      for (size_t i = 0; i < sums.size(); ++i) report("sums", i, sums[i], want_sums[i], sum_bound[i] + 1e-30);
    }
    for (int e = 0; dw_wanted && e < s.e; ++e) {
      for (int c = 0; c < s.c; ++c) {
        double want = 0.0, bound = 0.0;
        for (int64_t i = 0; i < positions; ++i) {
          const double d = dy_[i * s.e + e], v = z_[i * s.c + c];
          want += d * v;
          bound += dy_slack_[i * s.e + e] * std::fabs(v) + (2 * unit() + 128 * kUnit32 + 2 * slack.terms) * std::fabs(d * v);
        }
        report("dw", int64_t{e} * s.c + c, dw[int64_t{e} * s.c + c], want, bound);
      }
    }
    return good_;
  }

  const PointwiseCase s;
  const Dtype dtype;
  const int64_t positions;
  Buffer x, weight, y, grad, gx, residual;
  std::vector<float> bn, gate, y_bn, coef, offset, moments, sums, dw;

 private:
  static constexpr Activation kUpstream = Activation::kHardswish;
  static constexpr double kUnit32 = 0x1p-24;

  double unit() const { return std::ldexp(1.0, -significant_bits(dtype)); }
  int64_t weight_at(int e, int c) const { return s.weight_transposed ? int64_t{c} * s.e + e : int64_t{e} * s.c + c; }

  void fill(Buffer& buffer, int64_t size, double mean) {
    std::normal_distribution<double> normal(mean, 1.0);
    for (int64_t i = 0; i < size; ++i) buffer.set(i, normal(random_));
  }
  std::vector<float> uniform(int64_t size, double low, double high) {
    std::uniform_real_distribution<double> values(low, high);
    std::vector<float> out(size);
    for (float& v : out) v = static_cast<float>(values(random_));
    return out;
  }

  void start(const std::string& label) {
    label_ = label;
    good_ = true;
  }
  void report(const char* what, int64_t at, double got, double want, double bound) {
    if (std::fabs(got - want) <= bound) return;
    if (good_) {
      std::printf("%s %s n%d area %d c%d e%d act %d gate %d pooled %d skew %d: %s[%lld] is %.9g, expected %.9g within %.3g\n",
                  label_.c_str(), name(dtype), s.images, s.area, s.c, s.e, s.act, s.gate, s.pooled, s.skew, what,
                  static_cast<long long>(at), got, want, bound);
    }
    good_ = false;
  }

  // z and u as the kernels must have them, up to a rounding of z.
  void make_operand() {
    z_.resize(positions * s.c);
    u_.resize(positions * s.c);
    for (int64_t i = 0; i < positions * s.c; ++i) {
      const int c = static_cast<int>(i % s.c);
      u_[i] = static_cast<float>(x.get(i));
      if (s.act >= 0) u_[i] = std::fmaf(bn[c], u_[i], bn[s.c + c]);
      float value = s.act < 0 ? u_[i] : activate(act_, u_[i], false);
      if (s.gate) value *= gate[i / s.c / s.area * s.c + c];
      z_[i] = round_to(dtype, value);
    }
  }

  // dy, and how far it may be off: its own rounding may go either way.
  void make_upstream() {
    dy_.resize(positions * s.e);
    dy_slack_.resize(positions * s.e);
    for (int64_t i = 0; i < positions * s.e; ++i) {
      const int e = static_cast<int>(i % s.e);
      const auto value = static_cast<float>(y.get(i));
      const double given = s.pooled ? offset[i / s.e / s.area * s.e + e] : grad.get(i);
      const double g = given * activate(kUpstream, std::fmaf(y_bn[e], value, y_bn[s.e + e]), true);
      const double parts[] = {y_bn[e] * g, coef[e] * (static_cast<double>(value) - y_bn[2 * s.e + e]), coef[s.e + e]};
      dy_[i] = round_to(dtype, parts[0] + parts[1] + parts[2]);
      dy_slack_[i] = 2 * unit() * std::fabs(dy_[i]) +
                     8 * kUnit32 * (std::fabs(parts[0]) + std::fabs(parts[1]) + std::fabs(parts[2]));
    }
  }

  std::mt19937_64 random_;
  Activation act_;
  std::vector<double> z_, dy_, dy_slack_;
  std::vector<float> u_;
  std::string label_;
  bool good_ = true;
};

}  // namespace mnet::test
