// The forward CUDA kernels of algebraic mode, run on the CPU (cuda_host.h) under every schedule, against loops in double.
#include <cstdio>
#include <cstdlib>

#include "../cuda/combine.cu"  // the launchers themselves, their launches replaced
#include "../cuda/expand_depthwise.cu"
#include "../cuda/expand_finalize.cu"
#include "../cuda/expand_gram.cu"
#include "expand_reference.h"

using namespace mnet;
using namespace mnet::test;

namespace {

struct ExpandCase {
  ExpandShape s;
  int skew = 0;             // elements by which x and y miss alignment
  bool transposed = false;  // strides of the expand weight other than contiguous
};

// As torch allocates it: aligned to 16 bytes, exactly as many bytes as asked for.
std::unique_ptr<char[]> allocate(int64_t bytes) {
  std::unique_ptr<char[]> memory(new char[bytes]);
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

// Runs `launch` under every schedule, or two for large problems; what it returns must be the same to the bit.
template <typename F>
auto under_all_schedules(const std::string& label, bool small, F&& launch) {
  std::unique_ptr<decltype(launch())> first;
  for (const host::Schedule schedule : host::kSchedules) {
    if (!small && schedule != host::Schedule::kForward && schedule != host::Schedule::kRandomWarps) continue;
    host::schedule = schedule;
    auto result = launch();
    if (first == nullptr) {
      first = std::make_unique<decltype(launch())>(std::move(result));
    } else if (std::memcmp(first->data(), result.data(), result.size() * sizeof(result[0])) != 0) {
      std::printf("%s: the result depends on the order of the threads\n", label.c_str());
      ++failures;
    }
  }
  return *first;
}

void run(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("a launch failed");
}

void gram(ExpandProblem& problem, const std::string& label) {
  const ExpandShape& s = problem.s;
  if (s.c > cuda::kMaxGramChannels) return;
  problem.check_gram(under_all_schedules(label + ", gram", problem.in < 4000, [&] {
    std::vector<float> table((s.c + 2) * s.c, -1.f);
    const GramParams p{problem.x.data(), table.data(), problem.in, s.c};
    const cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kGram, problem.dtype, s.c, 80);
    const auto workspace = allocate(cuda::gram_workspace(p, problem.dtype, tile));
    run(cuda::gram(p, problem.dtype, tile, workspace.get(), nullptr));
    return table;
  }));
}

void forward(ExpandProblem& problem, const ExpandCase& shape, bool tf32, const std::string& label) {
  const ExpandShape& s = problem.s;
  Buffer to(problem.dtype, problem.out * s.e, shape.skew), turned(problem.dtype, int64_t{s.e} * s.c);
  ExpandDepthwiseParams p{};
  p.expand = problem.layer();
  if (shape.transposed) {
    for (int64_t i = 0; i < int64_t{s.e} * s.c; ++i) turned.set(i % s.c * s.e + i / s.c, problem.weight.get(i));
    p.expand.weight = turned.data();
    p.expand.weight_stride_e = 1;
    p.expand.weight_stride_c = s.e;
  }
  problem.geometry(p.depthwise);
  p.depthwise.y = to.data();
  std::vector<float> moments(2 * s.e);
  const bool small = problem.in * s.e * s.c < 300000;
  cuda::Tile tile = cuda::choose_tile(cuda::Kernel::kExpandDepthwise, problem.dtype, s.e, 80);
  tile.runs = 2;  // blocks walk over several tiles of small maps
  under_all_schedules(label, small, [&] {
    std::fill(moments.begin(), moments.end(), -1.f);
    for (int64_t i = 0; i < problem.out * s.e; ++i) to.set(i, std::nan(""));
    p.depthwise.moments = moments.data();
    const auto workspace = allocate(cuda::expand_depthwise_workspace(p, problem.dtype, tile));
    run(cuda::expand_depthwise(p, problem.dtype, tile, tf32, workspace.get(), nullptr));
    std::vector<double> everything(moments.begin(), moments.end());
    for (int64_t i = 0; i < problem.out * s.e; ++i) everything.push_back(to.get(i));
    return everything;
  });
  problem.check_forward(to, moments, tf32 && problem.dtype == Dtype::kFloat32 ? 0x1p-11 : 0.0);
}

// bn and mean from a table of gram, which need not be one of real data.
void finalize(ExpandProblem& problem, const std::string& label) {
  const ExpandShape& s = problem.s;
  std::vector<float> factor = uniform(problem.random, s.c * s.c, -1, 1), table((s.c + 2) * s.c, 0.f);
  for (int i = 0; i < s.c * s.c; ++i) {
    for (int k = 0; k < s.c; ++k) table[i] += factor[i / s.c * s.c + k] * factor[i % s.c * s.c + k];
  }
  for (int i = s.c * s.c; i < (s.c + 2) * s.c; ++i) table[i] = static_cast<float>(i % 7) - 3.f;
  const std::vector<float> gamma = uniform(problem.random, s.e, -1, 1), beta = uniform(problem.random, s.e, -1, 1);
  const bool affine = s.e % 2 == 0;
  constexpr double kEps = 1e-3, kCorrection = 1.25;
  const std::vector<float> got = under_all_schedules(label + ", finalize", s.c * s.e < 5000, [&] {
    std::vector<float> result(6 * s.e, -1.f);
    ExpandFinalizeParams p{};
    p.gram = table.data();
    p.weight = problem.weight.data();
    p.gamma = affine ? gamma.data() : nullptr;
    p.beta = affine ? beta.data() : nullptr;
    p.bn = result.data();
    p.mean = result.data() + 5 * s.e;
    p.weight_stride_e = s.c;
    p.weight_stride_c = 1;
    p.eps = kEps;
    p.correction = kCorrection;
    p.c = s.c;
    p.e = s.e;
    run(cuda::expand_finalize(p, problem.dtype, nullptr));
    return result;
  });
  for (int e = 0; e < s.e; ++e) {
    double variance = 0.0, mean = 0.0, mean_k = 0.0, size = 0.0;
    const auto w = [&](int c) { return problem.weight.get(int64_t{e} * s.c + c); };
    for (int i = 0; i < s.c; ++i) {
      const double m = table[s.c * s.c + i], k = table[(s.c + 1) * s.c + i];
      mean += w(i) * m;
      mean_k += w(i) * (m - k);
      size += std::fabs(w(i)) * (std::fabs(m) + std::fabs(k));
      for (int j = 0; j < s.c; ++j) variance += w(i) * w(j) * table[i * s.c + j];
    }
    const double rstd = 1.0 / std::sqrt(variance + kEps), scale = rstd * (affine ? gamma[e] : 1.0);
    const double want[] = {scale, (affine ? beta[e] : 0.0) - mean_k * scale, mean_k, rstd, variance * kCorrection, mean};
    const double unit = problem.unit32, relative = 8 * unit;
    const double bounds[] = {relative * std::fabs(scale), relative * (1 + size * std::fabs(scale)), relative * size,
                             relative * rstd, relative * variance + 1e-12, relative * size};
    for (int row = 0; row < 6; ++row) problem.check("bn", row * s.e + e, got[row * s.e + e], want[row], bounds[row]);
  }
}

}  // namespace

int main() try {
  std::vector<ExpandCase> cases = {
      {{1, 1, 1, 1, 1, 1, 3, 1, 2, false, false}},
      {{2, 5, 13, 0, 1, 7, 5, 2, 3, false, true}},
      {{0, 4, 6, 0, 3, 3, 3, 1, 2, false, false}},
      {{3, 7, 9, 0, 5, 4, 3, 1, 1, false, true}},
      {{1, 64, 72, 0, 11, 9, 3, 1, 2, false, true}},   // every step of the depth, two blocks of channels
      {{1, 33, 40, 0, 9, 10, 3, 2, 3, false, false}},  // a second step of one channel in float32
      {{2, 24, 32, 0, 18, 20, 3, 1, 2, false, false}},  // blocks that walk over several tiles, of two images
      {{2, 16, 48, 0, 13, 17, 5, 2, 4, false, true}},
      {{1, 8, 16, 0, 9, 21, 5, 1, 2, false, true}, 1},         // maps that are not aligned
      {{1, 24, 40, 0, 7, 12, 3, 2, 2, false, true}, 0, true},  // weights that are not contiguous
      {{1, 100, 24, 0, 1, 1, 3, 1, 2, false, false}},          // finalize alone
      {{1, 64, 3, 0, 30, 29, 3, 1, 2, false, true}},           // several tiles and chunks of gram
      {{5, 12, 3, 0, 40, 31, 3, 2, 2, false, false}},
  };
  for (const int act : {0, 1, 3, 4}) cases.push_back({{1, 8, 24, 0, 6, 9, 3, 1, act, false, false}});
  int checks = 0;
  for (const bool tf32 : {true, false}) {
    for (const Dtype dtype : kDtypes) {
      if (!tf32 && dtype != Dtype::kFloat32) continue;
      for (const ExpandCase& shape : cases) {
        const ExpandShape& s = shape.s;
        char label[160];
        std::snprintf(label, sizeof label, "%s tf32 %d n%d c%d e%d %dx%d k%d s%d act %d shifted %d skew %d", name(dtype), tf32,
                      s.n, s.c, s.e, s.h, s.w, s.kernel, s.stride, s.act, s.shifted, shape.skew);
        {
          Check check(label);
          ExpandProblem problem(s, dtype, check, static_cast<uint64_t>(++checks), shape.skew);
          if (s.c <= cuda::kMaxExpandSource) forward(problem, shape, tf32, label);
          if (tf32) gram(problem, label);
          if (tf32) finalize(problem, label);
        }
        if (failures > 0 && std::getenv("MNET_PLANT") != nullptr) return 1;  // found it
      }
    }
  }
  std::printf("%d problems, %d failures\n", checks, failures);
  return failures != 0;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
