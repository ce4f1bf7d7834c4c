// The depthwise kernel of one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its output rows in tiles of kColumns columns.  Per vector of channels a ring of
// kKernel activated input rows, kInColumns wide, float32, stays in the first-level cache (k 3, stride 1, 16 lanes:
// 6.5 KiB): every input is read, converted and activated once per tile, and each output row costs `stride` new input
// rows.  Zero padding is written into the ring, so the convolution itself has no borders.  The vectors of a channel
// block take turns row by row, which uses each cache line of x and y while it is near.  A large y is streamed (simd.h),
// where a vector is half a line after a tile's row of all the unit's channels is complete (at most 128 bytes a channel).
#pragma once

#include <cstdint>
#include <new>

#include "../common/moments.h"
#include "../common/params.h"
#include "../common/plant.h"
#include "depthwise.h"
#include "depthwise_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

template <typename Storage_, int kKernel_, int kStride_>
struct DepthwiseTraits {
  using Storage = Storage_;
  using Lane = typename Storage_::Lane;
  using Raw = typename Storage_::Raw;
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
  static constexpr int kPad = kKernel_ / 2;
  static constexpr int kColumns = 32 / kStride_;  // output columns of a tile
  static constexpr int kInColumns = (kColumns - 1) * kStride_ + kKernel_;
  static constexpr int kBlock = 4;      // output columns computed together, in registers

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
  static_assert(DepthwisePlan::kChannelBlock % kLanes == 0, "a channel block is whole vectors");
  static_assert(kColumns <= kLongestRun, "a row of a tile fits in one run");
};

// One vector of channels of a unit.
template <typename Traits>
struct alignas(64) DepthwiseLanes {
  Vec ring[Traits::kKernel][Traits::kInColumns];
  Vec weight[Traits::kKernel * Traits::kKernel];
  Vec scale, shift;
  ChannelMoments moments;
  int channel;  // the first
  int valid;    // lanes in use
};

template <typename Traits>
void init_lanes(DepthwiseLanes<Traits>& g, const DepthwiseParams& p, int channel, int channel_end) {
  g.channel = channel;
  g.valid = least(kLanes, channel_end - channel);
  for (int tap = 0; tap < Traits::kKernel * Traits::kKernel; ++tap) {
    const int64_t at = tap / Traits::kKernel * p.weight_stride_h + tap % Traits::kKernel * p.weight_stride_w;
    g.weight[tap] = Vec{};
    for (int i = 0; i < g.valid; ++i) {
      g.weight[tap][i] = Traits::Storage::scalar(p.weight, at + (channel + MNET_PLANT(1, i, 0)) * p.weight_stride_c);
    }
  }
  g.scale = g.shift = Vec{};
  if (p.bn != nullptr) {
    g.scale = load_lanes<true, float, Vec>(p.bn + channel, g.valid);
    g.shift = load_lanes<true, float, Vec>(p.bn + p.c + channel, g.valid);
  }
  g.moments.start();
}

// Fills one row of the ring: columns [first, first + count) of x's row; what lies outside [0, w) is zero.
template <typename Traits, bool kPartial>
void load_row(const DepthwiseLanes<Traits>& g, const DepthwiseParams& p, const typename Traits::Lane* row, int64_t first,
              int count, Vec* ring) {
  const int begin = static_cast<int>(within<int64_t>(-first, 0, count));
  const int end = static_cast<int>(within<int64_t>(p.w - first, begin, count));
  fill_zero(ring, ring + begin);
  fill_zero(ring + MNET_PLANT(2, end, count), ring + count);
  const typename Traits::Lane* from = row + (first + begin) * p.c + g.channel;
  const auto load = [&](int64_t i) {
    return Traits::Storage::unpack(load_lanes<kPartial, typename Traits::Lane, typename Traits::Raw>(from + i * p.c, g.valid));
  };
  const int64_t next = int64_t{Traits::kStride} * p.w * p.c;
  const bool line = g.channel * static_cast<int>(sizeof(typename Traits::Lane)) % 64 == 0;
  for (int j = begin; line && j < end; ++j) prefetch<false>(from, next + int64_t{j - begin} * p.c);
  if (p.bn == nullptr) {
    for (int j = begin; j < end; ++j) ring[j] = load(j - begin);
    return;
  }
  const Vec scale = g.scale, shift = g.shift;
  with_activation(p.act, [&](auto act) {
    for (int j = begin; j < end; ++j) {
      ring[j] = Traits::Storage::round(decltype(act)::fwd(Vec(scale * load(j - begin) + shift)));
    }
  });
}

template <typename Traits>
void run_unit(const DepthwiseParams& p, const DepthwiseUnit& unit) {
  using Lane = typename Traits::Lane;
  using Lanes = DepthwiseLanes<Traits>;
  constexpr int kMaxGroups = DepthwisePlan::kChannelBlock / kLanes;
  constexpr int kKernel = Traits::kKernel;
  const Scratch<Lanes> scratch(kMaxGroups);
  Lanes* groups = scratch.memory;
  const int num_groups = (unit.channel_end - unit.channel_begin + kLanes - 1) / kLanes;
  for (int g = 0; g < num_groups; ++g) {
    init_lanes(*new (groups + g) Lanes, p, unit.channel_begin + g * kLanes, unit.channel_end);
  }

  const auto* x = static_cast<const Lane*>(p.x);
  auto* y = static_cast<Lane*>(p.y);
  const int64_t in_row = int64_t{p.w} * p.c, out_row = int64_t{p.out_w} * p.c;
  // Without moments it is inference: the next layer reads y at once, and nobody later.
  const bool stream = unit.mean != nullptr && streams<typename Traits::Storage>(p.y, p.n * p.out_h * p.out_w, p.c);
  const int64_t gathered_pitch = int64_t{num_groups} * kLanes;
  const Scratch<Vec> gathered(kGathers && stream ? int64_t{Traits::kColumns} * num_groups : 0);
  int64_t flushed = 0;  // positions already in the sums
  int run = 0;          // positions in the current run
  const auto flush = [&] {
    if (unit.mean != nullptr && run > 0) {
      for (int g = 0; g < num_groups; ++g) groups[g].moments.flush(run, flushed == 0);
    }
    flushed += run;
    run = 0;
  };

  for (int64_t column = 0; column < p.out_w; column += Traits::kColumns) {
    const int columns = static_cast<int>(least<int64_t>(Traits::kColumns, p.out_w - column));
    const int in_columns = (columns - 1) * Traits::kStride + kKernel;
    const int64_t first_column = column * Traits::kStride - MNET_PLANT(4, Traits::kPad, Traits::kPad - 1);
    int64_t loaded = 0;  // one past the last input row in the ring
    for (int64_t row = unit.row_begin; row < unit.row_end; ++row) {
      const int64_t image = row / p.out_h, oh = row % p.out_h;
      const int64_t top = oh * Traits::kStride - Traits::kPad;
      if (row == unit.row_begin || MNET_PLANT(5, oh == 0, false)) loaded = top;
      const auto slot = [&](int64_t ih) { return static_cast<int>((ih + kKernel) % kKernel); };  // ih >= -kPad
      if (run + columns > longest_run(flushed)) flush();
      for (int g = 0; g < num_groups; ++g) {
        Lanes& lanes = groups[g];
        const bool partial = lanes.valid < kLanes;
        for (int64_t ih = loaded; ih < top + kKernel; ++ih) {
          Vec* ring = lanes.ring[slot(ih)];
          if (ih < 0 || ih >= p.h) {
            fill_zero(ring, ring + in_columns);
          } else {
            const auto load = partial ? load_row<Traits, true> : load_row<Traits, false>;
            load(lanes, p, x + (image * p.h + ih) * in_row, first_column, in_columns, ring);
          }
        }
        const Vec* rows[kKernel];
        for (int i = 0; i < kKernel; ++i) rows[i] = lanes.ring[slot(top + i)];
        // The row after this one, which the next turn of this vector writes.
        Lane* to = y + row * out_row + column * p.c + lanes.channel;
        if (!stream && lanes.channel * static_cast<int>(sizeof(Lane)) % 64 == 0) {
          for (int j = 0; j < columns; ++j) prefetch<true>(to, out_row + int64_t{j} * p.c);
        }
        const bool gather = kGathers && stream;
        if (gather) to = reinterpret_cast<Lane*>(gathered.memory + g);
        const auto output = partial ? output_row<Traits, 1, true> : output_row<Traits, 1, false>;
        output(lanes.moments, lanes.weight, rows, columns, to, gather ? gathered_pitch : p.c, lanes.valid,
               MNET_PLANT(6, run == 0, run + flushed == 0), run + flushed == 0, stream && !gather);
      }
      if (kGathers && stream) {
        stream_rows(y + row * out_row + column * p.c + unit.channel_begin, p.c,
                    reinterpret_cast<const float*>(gathered.memory), gathered_pitch, columns, num_groups * kLanes);
      }
      loaded = top + kKernel;
      run += columns;
    }
  }
  flush();
  end_stream(stream);

  if (unit.mean == nullptr) return;
  for (int g = 0; g < num_groups; ++g) {
    const Lanes& lanes = groups[g];
    lanes.moments.finish(flushed, lanes.valid, unit.mean + lanes.channel, unit.m2 + lanes.channel);
  }
}

template <typename Storage>
void dispatch_shape(const DepthwiseParams& p, const DepthwiseUnit& unit) {
  if (p.kernel == 3) {
    p.stride == 1 ? run_unit<DepthwiseTraits<Storage, 3, 1>>(p, unit) : run_unit<DepthwiseTraits<Storage, 3, 2>>(p, unit);
  } else {
    p.stride == 1 ? run_unit<DepthwiseTraits<Storage, 5, 1>>(p, unit) : run_unit<DepthwiseTraits<Storage, 5, 2>>(p, unit);
  }
}

void depthwise_unit(const DepthwiseParams& params, Dtype dtype, const DepthwiseUnit& unit) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return dispatch_shape<BFloat16>(params, unit);
    case Dtype::kFloat16:
      return dispatch_shape<Float16>(params, unit);
    default:
      return dispatch_shape<Float32>(params, unit);
  }
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
