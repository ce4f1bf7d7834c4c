// The CPU pointwise kernels of every capability this machine has, against sums in double, element by element.  Buffers
// have exactly the size they need, so that AddressSanitizer sees every overrun.
#include <cstdio>

#include "../cpu/pointwise.h"
#include "depthwise_reference.h"

using namespace mnet;
using test::Buffer;

struct Shape {
  int images, area, c, e, act;  // act -1: no batch norm
  bool gate, residual;
};

struct Checker {
  const char* label;
  const Shape& shape;
  Dtype dtype;
  bool good = true;
  void operator()(const char* what, int64_t at, double got, double want, double bound) {
    if (std::fabs(got - want) <= bound) return;
    if (good) {
      std::printf("%s %s n%d area %d c%d e%d act %d gate %d: %s[%lld] is %.9g, expected %.9g within %.3g\n", label,
                  test::name(dtype), shape.images, shape.area, shape.c, shape.e, shape.act, shape.gate, what,
                  static_cast<long long>(at), got, want, bound);
    }
    good = false;
  }
};

static std::vector<float> uniform(std::mt19937_64& random, int64_t size, double low, double high) {
  std::uniform_real_distribution<double> values(low, high);
  std::vector<float> out(size);
  for (float& v : out) v = static_cast<float>(values(random));
  return out;
}

static void fill(std::mt19937_64& random, Buffer& buffer, int64_t size, double scale) {
  std::normal_distribution<double> normal(0.0, scale);
  for (int64_t i = 0; i < size; ++i) buffer.set(i, normal(random));
}

static float activate(Activation act, float u, bool derivative) {
  float out = u;
  with_activation(act, [&](auto a) { out = derivative ? decltype(a)::bwd(u) : decltype(a)::fwd(u); });
  return out;
}

// `flips`: without a fused multiply-add an activated value may round to its other neighbour.
static bool check(const Shape& s, Dtype dtype, cpu::Capability capability, uint64_t seed) {
  std::mt19937_64 random(seed);
  const int64_t positions = int64_t{s.images} * s.area;
  const Activation act = static_cast<Activation>(s.act < 0 ? 0 : s.act), y_act = Activation::kHardswish;
  const bool flips = capability == cpu::Capability::kDefault;
  Buffer x(dtype, positions * s.c), weight(dtype, int64_t{s.e} * s.c), y(dtype, positions * s.e);
  Buffer grad(dtype, positions * s.e), gx(dtype, positions * s.c), residual(dtype, positions * s.c);
  fill(random, x, positions * s.c, 1.0);
  fill(random, weight, int64_t{s.e} * s.c, 1.0);
  fill(random, grad, positions * s.e, 1.0);
  fill(random, residual, positions * s.c, 1.0);
  const std::vector<float> bn = uniform(random, 5 * s.c, -1, 2), gate = uniform(random, int64_t{s.images} * s.c, 0, 1);
  const std::vector<float> y_bn = uniform(random, 5 * s.e, -1, 1), coef = uniform(random, 4 * s.e, -1, 1);
  std::vector<float> moments(2 * s.e), dw(int64_t{s.e} * s.c);
  std::vector<float> sums(s.gate ? 3 * int64_t{s.images} * s.c : 2 * s.c);
  Checker report{cpu::capability_name(capability), s, dtype};
  const double unit = std::ldexp(1.0, -test::significant_bits(dtype)), unit32 = std::ldexp(1.0, -24);

  PointwiseParams p{};
  p.x = x.data();
  p.weight = weight.data();
  p.bn = s.act < 0 ? nullptr : bn.data();
  p.gate = s.gate ? gate.data() : nullptr;
  p.y = y.data();
  p.moments = moments.data();
  p.weight_stride_e = s.c;
  p.weight_stride_c = 1;
  p.images = s.images;
  p.image_positions = s.area;
  p.c = s.c;
  p.e = s.e;
  p.act = act;
  const cpu::PointwisePlan plan = cpu::plan_pointwise(p, capability);
  std::vector<float> packed(plan.packed_size());
  std::vector<double> workspace(plan.sums_size());
  cpu::pointwise_pack(p, dtype, plan, 0, plan.panels, packed.data(), capability);
  for (int64_t i = plan.units() - 1; i >= 0; --i) {  // any order
    cpu::pointwise_units(p, dtype, plan, i, i + 1, {packed.data(), workspace.data(), nullptr}, capability);
  }
  cpu::pointwise_finish(p, plan, workspace.data());

  // z, u and dy as the kernels must have them, up to a rounding of z.
  std::vector<double> z(positions * s.c), dy(positions * s.e);
  std::vector<float> u(positions * s.c);
  for (int64_t i = 0; i < positions * s.c; ++i) {
    const int c = static_cast<int>(i % s.c);
    u[i] = static_cast<float>(x.get(i));
    if (s.act >= 0) u[i] = std::fmaf(bn[c], u[i], bn[s.c + c]);
    float value = s.act < 0 ? u[i] : activate(act, u[i], false);
    if (s.gate) value *= gate[i / s.c / s.area * s.c + c];
    z[i] = test::round_to(dtype, value);
  }
  for (int e = 0; e < s.e; ++e) {
    double mean = 0.0, variance = 0.0;
    for (int64_t i = 0; i < positions; ++i) {
      double want = 0.0, magnitude = 0.0;
      for (int c = 0; c < s.c; ++c) {
        const double term = z[i * s.c + c] * weight.get(int64_t{e} * s.c + c);
        want += term;
        magnitude += std::fabs(term);
      }
      const double got = y.get(i * s.e + e);
      report("y", i * s.e + e, got, want, unit * std::fabs(want) + (s.c * unit32 + (flips ? 2 : 1) * unit) * magnitude);
      mean += got / positions;
    }
    for (int64_t i = 0; i < positions; ++i) variance += std::pow(y.get(i * s.e + e) - mean, 2) / positions;
    report("mean", e, moments[e], mean, 8 * unit32 * (std::fabs(mean) + std::sqrt(variance)));
    report("variance", e, moments[s.e + e], variance, 1e-5 * variance);
  }

  PointwiseBackwardParams b{};
  b.grad = grad.data();
  b.y = y.data();
  b.y_bn = y_bn.data();
  b.coef = coef.data();
  b.x = x.data();
  b.weight = weight.data();
  b.bn = p.bn;
  b.gate = p.gate;
  b.residual = s.residual ? residual.data() : nullptr;
  b.gx = gx.data();
  b.sums = s.act < 0 ? nullptr : sums.data();
  b.dw = dw.data();
  b.weight_stride_e = s.c;
  b.weight_stride_c = 1;
  b.images = s.images;
  b.image_positions = s.area;
  b.c = s.c;
  b.e = s.e;
  b.y_act = y_act;
  b.act = act;
  const cpu::PointwisePlan back = cpu::plan_pointwise_backward(b, capability);
  std::vector<float> packed_back(back.packed_size()), partials(back.partials_size());
  std::vector<double> table(back.sums_size());
  cpu::pointwise_backward_pack(b, dtype, back, 0, back.panels, packed_back.data(), capability);
  for (int64_t i = back.units() - 1; i >= 0; --i) {
    cpu::pointwise_backward_units(b, dtype, back, i, i + 1, {packed_back.data(), table.data(), partials.data()}, capability);
  }
  if (b.sums != nullptr) cpu::pointwise_backward_finish(b, back, table.data());
  cpu::pointwise_backward_combine(b, back, 0, back.panels, partials.data());

  std::vector<double> slack(positions * s.e);  // of dy: its own rounding may go either way
  for (int64_t i = 0; i < positions * s.e; ++i) {
    const int e = static_cast<int>(i % s.e);
    const auto value = static_cast<float>(y.get(i));
    const double g = grad.get(i) * activate(y_act, std::fmaf(y_bn[e], value, y_bn[s.e + e]), true);
    const double parts[] = {y_bn[e] * g, coef[e] * (static_cast<double>(value) - y_bn[2 * s.e + e]), coef[s.e + e]};
    dy[i] = test::round_to(dtype, parts[0] + parts[1] + parts[2]);
    slack[i] = 2 * unit * std::fabs(dy[i]) + 8 * unit32 * (std::fabs(parts[0]) + std::fabs(parts[1]) + std::fabs(parts[2]));
  }
  std::vector<double> want_sums(sums.size()), sum_bound(sums.size());
  for (int64_t i = 0; i < positions; ++i) {
    for (int c = 0; c < s.c; ++c) {
      double want = 0.0, bound = 0.0;
      for (int e = 0; e < s.e; ++e) {
        const double w = weight.get(int64_t{e} * s.c + c);
        want += dy[i * s.e + e] * w;
        bound += (slack[i * s.e + e] + s.e * unit32 * std::fabs(dy[i * s.e + e])) * std::fabs(w);
      }
      const int64_t at = i * s.c + c;
      const double factor = s.act < 0 || s.gate ? 1.0 : activate(act, u[at], true);
      want = want * factor + (s.residual ? residual.get(at) : 0.0);
      const double got = gx.get(at);
      report("gx", at, got, want, 2 * unit * std::fabs(want) + bound + 4 * unit32 * std::fabs(want));
      if (b.sums == nullptr) continue;
      const double centred = x.get(at) - bn[2 * s.c + c], derivative = activate(act, u[at], true);
      const int64_t image = i / s.area;
      const auto add = [&](int64_t index, double term) {
        want_sums[index] += term;
        sum_bound[index] += 64 * unit32 * std::fabs(term);
      };
      if (s.gate) {
        add(image * s.c + c, got * activate(act, u[at], false));
        add((s.images + image) * s.c + c, got * derivative);
        add((2 * s.images + image) * s.c + c, got * derivative * centred);
      } else {
        add(c, got);
        add(s.c + c, got * centred);
      }
    }
  }
  if (b.sums != nullptr) {
    for (size_t i = 0; i < sums.size(); ++i) report("sums", i, sums[i], want_sums[i], sum_bound[i] + 1e-30);
  }
  for (int e = 0; e < s.e; ++e) {
    for (int c = 0; c < s.c; ++c) {
      double want = 0.0, bound = 0.0;
      for (int64_t i = 0; i < positions; ++i) {
        const double d = dy[i * s.e + e], v = z[i * s.c + c];
        want += d * v;
        bound += slack[i * s.e + e] * std::fabs(v) + (2 * unit + 128 * unit32) * std::fabs(d * v);
      }
      report("dw", int64_t{e} * s.c + c, dw[int64_t{e} * s.c + c], want, bound);
    }
  }
  return report.good;
}

int main() {
  std::vector<Shape> shapes = {{3, 1, 5, 3, -1, true, false},  {2, 49, 40, 70, -1, false, true}, {0, 4, 5, 6, 2, false, false},
                               {1, 1, 1, 1, 2, false, false},  {3, 130, 24, 33, 2, true, false}, {1, 50, 530, 9, 1, false, false},
                               {1, 50, 9, 530, 3, false, false}, {9, 97, 17, 130, 2, false, false}};
  for (int act = -1; act < kNumActivations; ++act) {
    for (const bool gate : {false, true}) shapes.push_back({5, 63, 19, 26, act, gate, false});
  }
  int failures = 0, checks = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    for (const Dtype dtype : test::kDtypes) {
      for (const Shape& shape : shapes) failures += !check(shape, dtype, static_cast<cpu::Capability>(level), ++checks);
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", checks, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
