// The CPU kernels of algebraic mode, of every capability this machine has, against loops in double.
#include <cstdio>

#include "../cpu/expand.h"
#include "../cpu/expand_backward.h"
#include "expand_reference.h"

using namespace mnet;
using namespace mnet::test;

struct Block : ExpandProblem {
  cpu::Capability capability;
  Buffer project, y, y3, grad, dx;
  std::vector<float> y_bn, y3_bn, y_coef, y3_coef, gate, offset;

  Block(const ExpandShape& shape, Dtype d, cpu::Capability level, Check& c, uint64_t seed)
      : ExpandProblem(shape, d, c, seed), capability(level), project(d, int64_t{s.o} * s.e), y(d, out * s.e),
        y3(d, out * s.o), grad(d, out * s.o), dx(d, in * s.c), y_bn(safe_table(random, s.e)),
        y3_bn(safe_table(random, s.o)), y_coef(uniform(random, 2 * s.e, -0.2, 0.2)),
        y3_coef(uniform(random, 2 * s.o, -0.2, 0.2)), gate(uniform(random, int64_t{s.n} * s.e, 0, 1)),
        offset(uniform(random, int64_t{s.n} * s.e, -1, 1)) {
    fill(random, d, project, int64_t{s.o} * s.e, -1, 1);
    fill(random, d, y, out * s.e, -1, 1);
    fill(random, d, y3, out * s.o, -1, 1);
    fill(random, d, grad, out * s.o, -1, 1);
  }

  void gram();
  void forward();
  void backward();
  void mix();
};

void Block::gram() {
  std::vector<float> table((s.c + 2) * s.c, -1.f);
  const GramParams p{x.data(), table.data(), in, s.c};
  const cpu::GramPlan plan = cpu::plan_gram(p, capability);
  std::vector<double> workspace(plan.workspace());
  for (int64_t i = plan.chunks - 1; i >= 0; --i) {  // any order
    cpu::gram_units(p, dtype, plan, i, i + 1, workspace.data(), capability);
  }
  cpu::gram_finish(p, dtype, plan, workspace.data(), capability);
  check_gram(table);
}

void Block::forward() {
  Buffer to(dtype, out * s.e);
  std::vector<float> moments(2 * s.e, -1.f);
  ExpandDepthwiseParams p{};
  p.expand = layer();
  geometry(p.depthwise);
  p.depthwise.y = to.data();
  p.depthwise.moments = moments.data();
  const cpu::ExpandPlan plan = cpu::plan_expand_depthwise(p, capability);
  std::vector<float> packed(plan.padded() * s.c);
  std::vector<double> sums(plan.moments_size());
  cpu::expand_pack(p.expand, s.e, dtype, 0, plan.panels, packed.data(), capability);
  for (int64_t i = plan.units() - 1; i >= 0; --i) {
    cpu::expand_depthwise_units(p, dtype, plan, i, i + 1, packed.data(), sums.data(), capability);
  }
  cpu::expand_depthwise_finish(p, plan, sums.data());
  check_forward(to, moments);
}

void Block::backward() {
  std::vector<float> gramgrad(int64_t{s.e} * (s.c + 1), -1.f), dw(int64_t{s.e} * taps, -1.f);
  ExpandBackwardParams p{};
  p.expand = layer();
  p.project = {grad.data(), y3.data(), y3_bn.data(), y3_coef.data(), project.data(), s.e, 1, s.o, Activation::kRelu};
  geometry(p.depthwise);
  p.depthwise.y = y.data();
  p.depthwise.y_bn = y_bn.data();
  p.depthwise.coef = y_coef.data();
  p.depthwise.gate = s.gated ? gate.data() : nullptr;
  p.depthwise.offset = s.gated ? offset.data() : nullptr;
  p.depthwise.y_act = static_cast<Activation>(s.act);
  p.depthwise.dw = dw.data();
  p.dx = dx.data();
  p.gramgrad = gramgrad.data();
  const cpu::ExpandBackwardPlan plan = cpu::plan_expand_backward(p, capability);
  std::vector<float> packed(plan.padded() * (s.c + s.o) + plan.dx_padded() * s.e);
  const cpu::ExpandBackwardPacked weights{packed.data(), packed.data() + plan.padded() * s.c,
                                          packed.data() + plan.padded() * (s.c + s.o)};
  std::vector<double> workspace(plan.workspace());
  cpu::expand_backward_pack(p, dtype, plan, 0, plan.panels + plan.dx_panels, weights, capability);
  for (int64_t i = plan.chunks - 1; i >= 0; --i) {
    cpu::expand_backward_units(p, dtype, plan, i, i + 1, weights, workspace.data(), capability);
  }
  cpu::expand_backward_combine(p, plan, 0, plan.panels, workspace.data());

  // The upstream; `error`: what rounding may have done to a value.
  std::vector<double> dy3(out * s.o), dy(out * s.e), error(out * s.e);
  for (int64_t i = 0; i < out * s.o; ++i) {
    const int o = static_cast<int>(i % s.o);
    const double g = grad.get(i) * act_slope(1, static_cast<float>(y3_bn[o] * y3.get(i) + y3_bn[s.o + o]));
    dy3[i] = round_to(dtype, y3_bn[o] * g + y3_coef[o] * (y3.get(i) - y3_bn[2 * s.o + o]) + y3_coef[s.o + o]);
  }
  for (int64_t i = 0; i < out * s.e; ++i) {
    const int e = static_cast<int>(i % s.e);
    const int64_t q = i / s.e, at = q / (oh * ow) * s.e + e;
    double g = 0.0, slack = 0.0;
    for (int o = 0; o < s.o; ++o) {
      const double w = project.get(int64_t{o} * s.e + e);
      g += dy3[q * s.o + o] * w;
      slack += (2 * unit * std::fabs(dy3[q * s.o + o]) + (s.o + 8) * unit32) * std::fabs(w);
    }
    if (s.gated) g = gate[at] * g + offset[at];
    const double slope2 = act_slope(s.act, static_cast<float>(y_bn[e] * y.get(i) + y_bn[s.e + e]));
    const double terms[] = {y_bn[e] * g * slope2, y_coef[e] * (y.get(i) - y_bn[2 * s.e + e]), y_coef[s.e + e]};
    dy[i] = round_to(dtype, terms[0] + terms[1] + terms[2]);
    error[i] = 2 * unit * std::fabs(dy[i]) + std::fabs(y_bn[e] * slope2) * slack + 16 * unit32;
  }
  std::vector<double> gz(in * s.e, 0.0), gz_error(in * s.e, 0.0), want_dw(dw.size(), 0.0), dw_error(dw.size(), 0.0);
  for_taps([&](int64_t position, int64_t q, int tap) {
    for (int e = 0; e < s.e; ++e) {
      const int64_t i = position * s.e + e, o = q * s.e + e, t = int64_t{e} * taps + tap;
      const double w = depthwise.get(t);
      gz[i] += dy[o] * w;
      gz_error[i] += (error[o] + 32 * unit32 * std::fabs(dy[o])) * std::fabs(w);
      want_dw[t] += dy[o] * z[i];
      dw_error[t] += error[o] * std::fabs(z[i]) + (2 * unit + 128 * unit32) * std::fabs(dy[o]) * (std::fabs(z[i]) + 8 * unit32);
    }
  });
  for (size_t t = 0; t < dw.size(); ++t) check("dw", static_cast<int64_t>(t), dw[t], want_dw[t], dw_error[t] + 1e-30);
  for (int64_t i = 0; i < in * s.e; ++i) {  // now g1
    gz_error[i] = gz_error[i] * std::fabs(slope[i]) + 8 * unit32 * std::fabs(gz[i]);  // hardswish's slope is rounded
    gz[i] = round_to(dtype, gz[i] * slope[i]);
    gz_error[i] += 2 * unit * std::fabs(gz[i]);
  }
  for (int e = 0; e < s.e; ++e) {
    for (int c = 0; c <= s.c; ++c) {
      double want = 0.0, bound = 1e-30;
      for (int64_t i = 0; i < in; ++i) {
        const double factor = c < s.c ? xk[i * s.c + c] : 1.0, g = gz[i * s.e + e];
        want += g * factor;
        bound += (gz_error[i * s.e + e] + 64 * unit32 * std::fabs(g)) * std::fabs(factor);
      }
      check("gramgrad", e * (s.c + 1) + c, gramgrad[e * (s.c + 1) + c], want, bound);
    }
  }
  for (int64_t i = 0; i < in; ++i) {
    for (int c = 0; c < s.c; ++c) {
      double want = 0.0, bound = 1e-30;
      for (int e = 0; e < s.e; ++e) {
        const double w = round_to(dtype, bn[e] * weight.get(int64_t{e} * s.c + c)), g = gz[i * s.e + e];
        want += g * w;
        bound += (gz_error[i * s.e + e] + (s.e * unit32 + 2 * unit) * std::fabs(g)) * std::fabs(w);
      }
      check("dx", i * s.c + c, dx.get(i * s.c + c), want, bound + 2 * unit * std::fabs(want));
    }
  }
}

void Block::mix() {
  const std::vector<float> m = uniform(random, (s.c + 1) * s.c, -1, 1);
  Buffer partial(dtype, in * s.c), to(dtype, in * s.c);
  fill(random, dtype, partial, in * s.c, -1, 1);
  const ExpandMixParams p{partial.data(), x.data(), shift.data(), m.data(), s.gated ? dx.data() : nullptr, to.data(), in, s.c};
  const cpu::ExpandMixPlan plan = cpu::plan_expand_mix(p, capability);
  std::vector<float> packed(plan.packed_size() * s.c);
  cpu::expand_mix_pack(p, plan, packed.data(), capability);
  for (int64_t i = plan.chunks - 1; i >= 0; --i) cpu::expand_mix_units(p, dtype, plan, i, i + 1, packed.data(), capability);
  for (int64_t i = 0; i < in; ++i) {
    for (int c = 0; c < s.c; ++c) {
      const int64_t at = i * s.c + c;
      double want = partial.get(at) + m[s.c * s.c + c] + (s.gated ? dx.get(at) : 0.0), magnitude = 4 + std::fabs(want);
      for (int j = 0; j < s.c; ++j) {
        want += m[c * s.c + j] * xk[i * s.c + j];
        magnitude += std::fabs(m[c * s.c + j] * xk[i * s.c + j]);
      }
      check("mix", at, to.get(at), want, unit * std::fabs(want) + (s.c + 4) * unit32 * magnitude);
    }
  }
}

static void check_product(cpu::Capability capability) {
  Check check("multiply_double");
  std::mt19937_64 random(7);
  constexpr int kRows = 7, kDepth = 19, kColumns = 48;
  const std::vector<float> a = uniform(random, kRows * kDepth, -1, 1), b = uniform(random, kDepth * kColumns, -1, 1);
  const std::vector<double> wide_a(a.begin(), a.end()), wide_b(b.begin(), b.end());
  for (const bool transposed : {false, true}) {
    std::vector<double> c(kRows * kColumns, -1.0);
    cpu::multiply_double(wide_a.data(), transposed ? 1 : kDepth, transposed ? kRows : 1, wide_b.data(), kRows, kDepth,
                         kColumns, c.data(), capability);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        double want = 0.0;
        for (int k = 0; k < kDepth; ++k) want += wide_a[transposed ? k * kRows + i : i * kDepth + k] * wide_b[k * kColumns + j];
        check("product", i * kColumns + j, c[i * kColumns + j], want, 1e-13);
      }
    }
  }
}

int main() {
  std::vector<ExpandShape> shapes = {{1, 1, 1, 1, 1, 1, 3, 1, 2, false, false},   {2, 5, 13, 3, 1, 7, 5, 2, 3, true, true},
                               {0, 4, 6, 5, 3, 3, 3, 1, 2, false, false},   {17, 7, 9, 5, 5, 4, 3, 1, 1, false, true},
                               {1, 34, 70, 19, 29, 11, 3, 1, 2, true, true}, {1, 90, 200, 130, 6, 7, 3, 2, 3, false, false},
                               {1, 3, 20, 4, 2, 150, 5, 1, 2, false, true}, {1, 200, 300, 40, 9, 3, 3, 1, 2, false, true},
                               // units that begin within one image and end in another, units of several images
                               {2, 6, 19, 7, 25, 6, 3, 1, 2, false, false}, {70, 3, 9, 4, 3, 4, 3, 2, 2, true, true}};
  for (int act = 0; act < kNumActivations; ++act) {
    for (const int kernel : {3, 5}) {
      for (const int stride : {1, 2}) shapes.push_back({2, 6, 35, 9, 13, 12, kernel, stride, act, act % 2 == 0, kernel == 3});
    }
  }
  int problems = 0;
  for (int level = 0; level <= static_cast<int>(cpu::supported_capability()); ++level) {
    const auto capability = static_cast<cpu::Capability>(level);
    check_product(capability);
    for (const Dtype dtype : kDtypes) {
      for (const ExpandShape& s : shapes) {
        char label[160];
        std::snprintf(label, sizeof label, "%s %s n%d c%d e%d o%d %dx%d k%d s%d act %d gated %d shifted %d",
                      cpu::capability_name(capability), name(dtype), s.n, s.c, s.e, s.o, s.h, s.w, s.kernel, s.stride, s.act,
                      s.gated, s.shifted);
        Check check(label);
        Block problem(s, dtype, capability, check, static_cast<uint64_t>(++problems));
        problem.gram();
        problem.forward();
        problem.backward();
        problem.mix();
      }
    }
  }
  std::printf("%d problems, %d failures, up to %s\n", problems, failures, cpu::capability_name(cpu::supported_capability()));
  return failures != 0;
}
