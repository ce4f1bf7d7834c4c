// What the CUDA kernels' memory plans promise, computed for an H100 and an A100: blocks that share a multiprocessor, bytes that
// they have on the way from memory, and how many of them must be loading at a time to cover the memory's latency (bandwidth x
// latency).  Fails where a multiprocessor cannot hold that many.  Computed, not measured; ctest -R occupancy -V shows the table.
#include <algorithm>
#include <cstdio>
#include <string>

#include "../cuda/depthwise.cuh"
#include "../cuda/depthwise_backward.cuh"
#include "../cuda/expand_depthwise.cuh"
#include "../cuda/expand_gram.cuh"
#include "../cuda/normalize.cuh"
#include "../cuda/normalize_gram.cuh"
#include "../cuda/pointwise.cuh"
#include "../cuda/pointwise_backward_both.cuh"
#include "../cuda/pointwise_tiles.h"

using namespace mnet;
using namespace mnet::cuda;

struct Card {
  const char* name;
  double bandwidth;  // bytes a second, as its maker says
  int multiprocessors;
  int shared;  // bytes of a multiprocessor
};
constexpr Card kCards[] = {{"H100 SXM", 3.35e12, 132, 228 * 1024}, {"A100 80 GB", 2.04e12, 108, 164 * 1024}};
constexpr double kLatency = 600e-9;  // of a busy memory: an assumption, on the safe side of what both cards are said to have
constexpr int kRegisters = 65536, kThreadsPerSm = 2048, kReserved = 1024;  // of a multiprocessor; bytes of a block

// `blocks`: what __launch_bounds__ asks of the compiler, or follows from kernel_bounds.txt.  `reads`: of the bytes that pass
// memory, for what is written is not waited for; 1 where it may be all.
struct Plan {
  std::string kernel;
  int threads, blocks, shared, in_flight;
  double reads = 1.0;
};

static int failures = 0;

static void report(const Plan& plan) {
  for (const Card& card : kCards) {
    const int by_shared = card.shared / (plan.shared + kReserved);
    const int blocks = std::min({plan.blocks, by_shared, kThreadsPerSm / plan.threads});
    const double wanted = card.bandwidth * kLatency / card.multiprocessors * plan.reads;
    const int loading = static_cast<int>(wanted / plan.in_flight) + 1;
    std::printf("| %s | %s | %d | %.1f | %d | %.1f | %.1f | %d |\n", plan.kernel.c_str(), card.name, plan.threads,
                plan.shared / 1024.0, blocks, plan.in_flight / 1024.0, wanted / 1024.0, loading);
    if (loading > blocks) {
      std::printf("%s on %s: %d blocks would have to load at a time\n", plan.kernel.c_str(), card.name, loading);
      ++failures;
    }
  }
}

template <typename T>
static std::string label(const char* kernel, const std::string& what = "") {
  return std::string(kernel) + (sizeof(T) == 2 ? ", 16 bits" : ", float32") + (what.empty() ? "" : ", " + what);
}

template <typename Traits>
static void report_window(const char* kernel, int blocks, int shared, int in_flight, double reads = 1.0) {
  const std::string window = "k" + std::to_string(Traits::kKernel) + " s" + std::to_string(Traits::kStride);
  report({label<typename Traits::T>(kernel, window), Traits::kThreads, blocks, shared, in_flight, reads});
}

template <typename T, int kKernel, int kStride>
static void report_depthwise() {
  using Forward = DepthwiseTraits<T, kKernel, kStride>;
  constexpr int kFewest = kRegisters / (128 * Forward::kThreads);  // kernel_bounds.txt: 128 registers
  report_window<Forward>("depthwise", Forward::kBlocksPerSm > 0 ? Forward::kBlocksPerSm : kFewest, Forward::kSharedBytes,
                         Forward::kLoads * Forward::kThreads * 16);
  using Backward = DepthwiseBackwardTraits<T, kKernel, kStride>;
  report_window<Backward>("depthwise_backward", Backward::kBlocks, Backward::kSharedBytes, 6 * Backward::kThreads * 16);
  constexpr double kExpanded = 6.0 / (kStride * kStride);  // written for every value of x, in V2
  using Expand = ExpandTraits<T, Math::kTensor, kKernel, kStride>;
  for (const int channels : {16, 64}) {
    const int steps = Expand::steps(channels), bytes = Expand::kPixels * channels * int{sizeof(T)};
    report_window<Expand>(("expand_depthwise of " + std::to_string(channels)).c_str(), Expand::kBlocksPerSm,
                          Expand::dynamic_bytes(steps) + Expand::kStaticBytes, bytes, 1.0 / (1.0 + kExpanded));
  }
}

// The ring's slots but for the one in use.
template <typename Traits>
static void report_product(const char* kernel, int shared) {
  const std::string tile = std::to_string(Traits::kRows) + " x " + std::to_string(Traits::kColumns);
  report({label<typename Traits::T>(kernel, tile), Traits::kThreads, Traits::kBlocksPerSm, Traits::kRingBytes + shared,
          Traits::kRingBytes / Traits::kStages * (Traits::kStages - 1)});
}

template <typename Traits>
static void report_forward() {
  report_product<Traits>("pointwise", StoreOutput<Traits>::kSharedFloats * 4);
}

template <typename Traits>
static void report_gradient() {
  report_product<Traits>("pointwise_input_gradient",
                         (StoreGradient<Traits, true>::kSharedFloats + StoreGradient<Traits, true>::kTableFloats) * 4);
}

template <typename T>
static void report_dtype() {
  report_depthwise<T, 3, 1>();
  report_depthwise<T, 3, 2>();
  report_depthwise<T, 5, 1>();
  report_depthwise<T, 5, 2>();
  using Weight = WeightGradientTraits<T, Math::kTensor, 2>;
  report({label<T>("pointwise_weight_gradient"), Weight::kThreads, Weight::kBlocksPerSm, Weight::kRingBytes,
          Weight::kRingBytes / 2});
  using Normalize = NormalizeTraits<T>;
  const int loads = Normalize::kInFlight * Normalize::kThreads * 16;
  report({label<T>("normalize"), Normalize::kThreads, Normalize::kBlocks, 0, loads});
  report({label<T>("normalize_sums"), Normalize::kThreads, Normalize::kBlocks,
          Normalize::kMaxTables * Normalize::kVec * Normalize::kThreads * 4, loads});
  constexpr int kGramBytes = (GramTraits::kTileFloats + 2 * GramTraits::kThreads + 2 * GramTraits::kMaxChannels) * 4;
  constexpr int kGramLoads = GramTraits::kLoads * GramTraits::kThreads * 16;
  constexpr int kTables = 2 * GramTraits::kMaxChannels * 4;
  report({label<T>("gram"), GramTraits::kThreads, GramTraits::kBlocksPerSm, kGramBytes, kGramLoads});
  report({label<T>("normalize_gram"), GramTraits::kThreads, GramTraits::kBlocksPerSm, kGramBytes + kTables, kGramLoads,
          1.0 / 2.0});
  report({label<T>("normalize_gram", "residual"), GramTraits::kThreads, GramTraits::kBlocksPerSm, kGramBytes + kTables,
          2 * kGramLoads, 2.0 / 3.0});
}

int main() {
  std::printf("| kernel | card | threads | shared, KiB | blocks an SM | in flight a block, KiB | wanted an SM, KiB | "
              "blocks that must load |\n|---|---|---|---|---|---|---|---|\n");
  report_dtype<__half>();
  report_dtype<float>();
  report_forward<NarrowTile<__half>>();
  report_forward<MediumTile<__half>>();
  report_forward<WideTile<__half>>();
  report_forward<FloatTile>();
  report_gradient<MediumGradientTile<__half>>();
  report_gradient<WideGradientTile<__half>>();
  report_gradient<MediumGradientTile<float>>();
  using Both = BothTraits<__half, 3>;
  constexpr int kSums = (StoreGradient<Both, false>::kSharedFloats + StoreGradient<Both, false>::kTableFloats) * 4;
  report({"pointwise_both_gradients, 16 bits", Both::kThreads, Both::kBlocksPerSm, Both::kBytes + kSums, Both::kRingBytes / 2});
  std::printf("%d failures\n", failures);
  return failures != 0;
}
