// normalize, normalize_backward and squeeze in CUDA.  Compute capability 8.0 or higher; free of torch.
#pragma once

#include "../common/params.h"
#include "../common/plant.h"
#include "device.h"
#include "pack.cuh"

namespace mnet::cuda {

// Memory plan.  A map is a matrix of positions by channels.  A block of 256 threads owns `packs` times 16 bytes of channels
// of a run of positions and reads `lanes` positions side by side: narrow maps fill the block as wide ones do, and wherever
// a block has all channels its threads read one unbroken stretch of memory.  A thread stays with its channels, whose
// coefficients it keeps in registers, and has four times 16 bytes in flight, two of each map or four of one: with two
// blocks a multiprocessor (at most 128 registers a thread) 32 KiB, half as much again as an H100 needs to cover its latency.
//   normalize   stores what it has computed, 16 bytes a thread.
//   reductions  sum in registers over the run, over lanes once per block in shared memory, over blocks by combine.h: a fixed
//               order, hence deterministic.
template <typename T_>
struct NormalizeTraits {
  using T = T_;
  static constexpr int kVec = Pack<T_>::kSize;
  static constexpr int kThreads = 256;
  static constexpr int kMaxPacks = 64;  // of a block
  static constexpr int kBlocks = 2;     // of a multiprocessor
  static constexpr int kInFlight = 4;   // 16-byte loads of a thread
  static constexpr int kMaxTables = 3;

  static_assert(kMaxPacks <= kThreads, "a thread for every pack");
  static_assert(kMaxTables * kVec * kThreads * sizeof(float) <= 48 * 1024, "static shared memory");
};

// How a map is dealt to blocks; a function of the shape alone.
struct NormalizeTiling {
  int32_t packs;           // 16 bytes of channels each, of a block
  int32_t lanes;           // kThreads / packs
  int32_t channel_blocks;  // grid = segments * parts * channel_blocks, in one dimension
  int64_t segments;        // tables that are summed apart: one, or (squeeze) one an image
  int64_t segment;         // positions of each
  int64_t part;            // positions of a block
  int64_t parts;           // of a segment
  bool vectorized;         // 16-byte accesses are aligned and end within c
};

// A thread's place.
struct NormalizePlace {
  int pack;
  int lane;  // at least `lanes`: nothing to do
  int channel;
  int valid;  // channels; may be negative
  int64_t segment;
  int64_t part;
  int64_t begin;  // positions of the block, over the whole map
  int64_t end;
};

MNET_DEVICE NormalizePlace find_place(const NormalizeTiling& t, int c, int vec) {
  NormalizePlace place;
  place.pack = threadIdx.x % t.packs;
  place.lane = threadIdx.x / t.packs;
  const int64_t run = blockIdx.x / t.channel_blocks;
  place.channel = (static_cast<int>(blockIdx.x % t.channel_blocks) * t.packs + place.pack) * vec;
  place.valid = place.lane < t.lanes ? (c - place.channel < vec ? c - place.channel : vec) : 0;
  place.segment = run / t.parts;
  place.part = run % t.parts;
  place.begin = place.segment * t.segment + place.part * t.part;
  const int64_t end = (place.part + 1) * t.part;
  place.end = place.segment * t.segment + (end < t.segment ? end : t.segment);
  return place;
}

// The rows of a [5, c] table that the kernels read, for a thread's channels.
template <int kVec>
struct NormalizeCoefficients {
  float scale[kVec], shift[kVec], mean[kVec];
};

template <int kVec>
MNET_DEVICE NormalizeCoefficients<kVec> load_coefficients(const NormalizeParams& p, const NormalizePlace& place) {
  NormalizeCoefficients<kVec> k;
  MNET_UNROLL
  for (int v = 0; v < kVec; ++v) {
    const bool exists = v < place.valid;
    const float* column = p.bn + place.channel + v;
    k.scale[v] = exists ? column[0] : 0.f;
    k.shift[v] = exists ? column[p.c] : 0.f;
    k.mean[v] = exists ? column[2 * int64_t{p.c}] : 0.f;
  }
  return k;
}

template <typename T, bool kResidual>
__global__ void __launch_bounds__(NormalizeTraits<T>::kThreads, NormalizeTraits<T>::kBlocks)
    normalize_kernel(const NormalizeParams p, const NormalizeTiling tiling) {
  using Traits = NormalizeTraits<T>;
  constexpr int kVec = Traits::kVec, kLoads = Traits::kInFlight / (kResidual ? 2 : 1);
  const NormalizePlace place = find_place(tiling, p.c, kVec);
  if (place.valid <= 0) return;  // there is no barrier below
  const NormalizeCoefficients<kVec> k = load_coefficients<kVec>(p, place);
  const T* y = static_cast<const T*>(p.y) + place.channel;
  const T* residual = kResidual ? static_cast<const T*>(p.operand) + place.channel : nullptr;
  T* out = static_cast<T*>(p.output) + place.channel;
  for (int64_t first = place.begin + place.lane; first < place.end; first += int64_t{kLoads} * tiling.lanes) {
    Pack<T> values[kLoads], others[kLoads];
    MNET_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      const int64_t position = first + int64_t{u} * tiling.lanes;
      const bool inside = position < MNET_PLANT(1, place.end, place.end - 1);
      values[u] = inside ? load_pack(y + position * p.c, place.valid, tiling.vectorized) : zero_pack<T>();
      if constexpr (kResidual) {
        others[u] = inside ? load_pack(residual + position * p.c, place.valid, tiling.vectorized) : zero_pack<T>();
      }
    }
    with_activation(p.act, [&](auto act) {
      MNET_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        MNET_UNROLL
        for (int v = 0; v < kVec; ++v) {
          float z = decltype(act)::fwd(fmaf(k.scale[v], to_float(values[u].lane[v]), k.shift[v]));
          if constexpr (kResidual) z += MNET_PLANT(2, to_float(others[u].lane[v]), to_float(others[0].lane[v]));
          values[u].lane[v] = from_float<T>(z);
        }
        const int64_t position = first + int64_t{u} * tiling.lanes;
        if (position < place.end) {
          store_pack(out + position * p.c, values[u], MNET_PLANT(3, place.valid, place.valid - 1), tiling.vectorized);
        }
      }
    });
  }
}

// Sums of g = grad * act'(u) and of g * (y - mean).
struct BackwardTerms {
  static constexpr int kTables = 2;
  static constexpr bool kOperand = true;
  template <typename Act>
  static MNET_DEVICE void add(float y, float grad, float scale, float shift, float mean, float (&sums)[kTables]) {
    const float g = grad * Act::bwd(fmaf(scale, y, shift));
    sums[0] += g;
    sums[1] = fmaf(g, y - mean, sums[1]);
  }
};

// Sums of act(u), act'(u) and act'(u) * (y - mean).
struct SqueezeTerms {
  static constexpr int kTables = 3;
  static constexpr bool kOperand = false;
  template <typename Act>
  static MNET_DEVICE void add(float y, float, float scale, float shift, float mean, float (&sums)[kTables]) {
    const float u = fmaf(scale, y, shift), slope = Act::bwd(u);
    sums[0] += Act::fwd(u);
    sums[1] += slope;
    sums[2] = fmaf(slope, y - mean, sums[2]);
  }
};

// Where a block's sums go: table t, channel c of segment s and part i to
// out[s * segment_stride + i * part_stride + t * table_stride + c], the first table divided by `divisor`.
struct NormalizeSums {
  float* out;
  int64_t segment_stride;
  int64_t part_stride;
  int64_t table_stride;
  float divisor;
};

template <typename T, typename Terms>
__global__ void __launch_bounds__(NormalizeTraits<T>::kThreads, NormalizeTraits<T>::kBlocks)
    normalize_sums_kernel(const NormalizeParams p, const NormalizeTiling tiling, const NormalizeSums to) {
  using Traits = NormalizeTraits<T>;
  constexpr int kVec = Traits::kVec, kTables = Terms::kTables;
  constexpr int kLoads = Traits::kInFlight / (Terms::kOperand ? 2 : 1);
  MNET_SHARED(float, totals, [kTables * kVec][Traits::kThreads]);
  const NormalizePlace place = find_place(tiling, p.c, kVec);
  const NormalizeCoefficients<kVec> k = load_coefficients<kVec>(p, place);
  const T* y = static_cast<const T*>(p.y) + place.channel;
  const T* operand = Terms::kOperand ? static_cast<const T*>(p.operand) + place.channel : nullptr;
  const int64_t end = place.valid > 0 ? place.end : place.begin;

  float sums[kVec][kTables] = {};
  for (int64_t first = place.begin + place.lane; first < end; first += int64_t{kLoads} * tiling.lanes) {
    Pack<T> values[kLoads], others[kLoads];
    MNET_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      const int64_t position = first + int64_t{u} * tiling.lanes;
      const bool inside = position < end;
      values[u] = inside ? load_pack(y + position * p.c, place.valid, tiling.vectorized) : zero_pack<T>();
      if constexpr (Terms::kOperand) {
        others[u] = inside ? load_pack(operand + position * p.c, place.valid, tiling.vectorized) : zero_pack<T>();
      }
    }
    with_activation(p.act, [&](auto act) {
      MNET_UNROLL
      for (int u = 0; u < kLoads; ++u) {
        if (MNET_PLANT(4, first + int64_t{u} * tiling.lanes < end, true)) {
          MNET_UNROLL
          for (int v = 0; v < kVec; ++v) {
            float other = 0.f;
            if constexpr (Terms::kOperand) other = to_float(others[u].lane[v]);
            Terms::template add<decltype(act)>(to_float(values[u].lane[v]), other, k.scale[v], k.shift[v], k.mean[v], sums[v]);
          }
        }
      }
    });
  }

  MNET_UNROLL
  for (int v = 0; v < kVec; ++v) {
    MNET_UNROLL
    for (int t = 0; t < kTables; ++t) totals[t * kVec + v][threadIdx.x] = sums[v][t];
  }
  MNET_PLANT(5, __syncthreads(), (void)0);
  // Neighbouring threads add up neighbouring packs: no bank conflicts.
  for (int item = threadIdx.x; item < kTables * kVec * tiling.packs; item += Traits::kThreads) {
    const int pack = item % tiling.packs, row = item / tiling.packs;
    const int channel = place.channel + (pack - place.pack) * kVec + row % kVec;
    double total = 0.0;  // as combine.h goes on
    MNET_UNROLL_BY(8)
    for (int lane = 0; lane < MNET_PLANT(6, tiling.lanes, tiling.lanes - 1); ++lane) {
      total += static_cast<double>(totals[row][lane * tiling.packs + pack]);
    }
    const int table = row / kVec;
    float sum = static_cast<float>(total);
    if (table == 0) sum /= to.divisor;
    if (channel < p.c) {
      to.out[place.segment * to.segment_stride + place.part * to.part_stride + table * to.table_stride + channel] = sum;
    }
  }
}

}  // namespace mnet::cuda
