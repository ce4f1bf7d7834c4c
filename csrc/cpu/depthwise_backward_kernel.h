// The depthwise backward kernel of one capability (see simd.h for how it is included).
//
// Both gradients are taken from the input's side.  At input (ih, iw) the outputs that read it are a window of dy, and
//   gz(ih, iw) = sum over taps of w(kh, kw) dy(oh, ow),   dW(kh, kw) += z(ih, iw) dy(oh, ow),   oh = (ih + pad - kh) / s,
// so that one load of dy serves both, and z needs neither a halo nor a ring: it is rebuilt from x once.
//
// Memory plan.  A unit walks down its input rows in tiles of kColumns columns.  Per vector of channels a ring holds
// the rows of dy that an input row looks at, float32, zero where a column lies outside the image (rows outside are left
// out of the sum).  An input row goes by in strips of kStrip columns: z from x, the two gradients, then mask, rounding,
// store and sums.  Maps are read in their own order, position by position, and their next row is prefetched; only the ring
// is walked vector by vector (k 3, stride 1: 408 bytes a channel, in the second-level cache for all but the narrowest
// maps; splitting the channels to fit the first level costs more than it saves, because memory is then met in shorter
// pieces).  Sums and dW stay in float32 for runs of a few positions and are then added to doubles.  A large gx is streamed
// (simd.h).
#pragma once


#include <cstdint>
#include <new>

#include "../common/params.h"
#include "depthwise_backward.h"
#include "depthwise_backward_tile.h"
#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// The coefficients of one vector of channels.
struct alignas(64) BackwardLanes {
  Vec y_scale, y_shift, y_mean, b, c;
  Vec scale, shift, mean;
  Vec sum, sum_x;  // of the current run
  int channel;     // the first
  int valid;       // lanes in use
};

// What a unit keeps, an array a vector of channels each.
template <typename Shape>
struct alignas(64) BackwardTile {
  Vec dy[Shape::kRing][Shape::kDyColumns];
  Vec z[Shape::kStrip];
  Vec gz[Shape::kStrip];
  Vec weight[Shape::kTaps];
  Vec dw[Shape::kTaps];  // of the current run
};

// Vectors [begin, end) of a unit: whole ones, or the one in part.
struct Vectors {
  BackwardLanes* lanes;
  int begin;
  int end;
};

// Whether vector v begins a cache line (where the channels are whole lines), for prefetching.
template <typename Storage>
MNET_HD bool starts_line(int v) {
  return v * kLanes * static_cast<int>(sizeof(typename Storage::Lane)) % 64 == 0;
}

// `count` columns of one row of dy from `column` on; vector v's go to out + v * pitch.  grad and y point to the row, gate
// and offset to the image's.
template <typename Storage, bool kGated, bool kPartial>
void load_dy(const DepthwiseBackwardParams& p, const Vectors& vectors, const typename Storage::Lane* grad,
             const typename Storage::Lane* y, const float* gate, const float* offset, int64_t column, int count, Vec* out,
             int64_t pitch) {
  const int64_t next = int64_t{p.out_w} * p.c;
  with_activation(p.y_act, [&](auto act) {
    for (int j = 0; j < count; ++j) {
      for (int v = vectors.begin; v < vectors.end; ++v) {
        const BackwardLanes& k = vectors.lanes[v];
        const int64_t at = (column + j) * p.c + k.channel;
        if (starts_line<Storage>(v)) {  // a row further down
          prefetch<false>(y, at + next);
          prefetch<false>(grad, at + next);
        }
        const Vec value = load_map<Storage, kPartial>(y + at, k.valid);
        Vec g = load_map<Storage, kPartial>(grad + at, k.valid);
        if constexpr (kGated) {
          if (gate != nullptr) g = g * load_lanes<kPartial, float, Vec>(gate + k.channel, k.valid);
          if (offset != nullptr) g = g + load_lanes<kPartial, float, Vec>(offset + k.channel, k.valid);
        }
        g = g * decltype(act)::bwd(Vec(k.y_scale * value + k.y_shift));
        out[v * pitch + j] = Storage::round(k.y_scale * g + k.b * (value - k.y_mean) + k.c);
      }
    }
  });
}

template <typename Storage>
MNET_HD bool streams_gx(const DepthwiseBackwardParams& p) {
  return streams<Storage>(p.gx, p.n * p.h * p.w, p.c);
}

// z = act(bn(x)), rounded, of `count` columns from `x` on.
template <typename Storage, bool kPartial>
void load_z(const DepthwiseBackwardParams& p, const Vectors& vectors, const typename Storage::Lane* x,
            const typename Storage::Lane* gx, int count, Vec* out, int64_t pitch) {
  const bool in_cache = gx != nullptr && !streams_gx<Storage>(p);
  const int64_t next = int64_t{p.w} * p.c;
  const auto fill = [&](auto prologue) {
    for (int j = 0; j < count; ++j) {
      for (int v = vectors.begin; v < vectors.end; ++v) {
        const BackwardLanes& k = vectors.lanes[v];
        const int64_t at = int64_t{j} * p.c + k.channel;
        if (starts_line<Storage>(v)) {
          prefetch<false>(x, at + next);
          if (in_cache) prefetch<true>(gx, at);  // about to be written
        }
        out[v * pitch + j] = prologue(load_map<Storage, kPartial>(x + at, k.valid), k.scale, k.shift);
      }
    }
  };
  if (p.bn == nullptr) {
    fill([](Vec value, Vec, Vec) { return value; });
  } else {
    with_activation(p.act, [&](auto act) {
      fill([](Vec value, Vec scale, Vec shift) { return Storage::round(decltype(act)::fwd(Vec(scale * value + shift))); });
    });
  }
}

// Masks gz (or adds the residual), rounds, stores, and sums the stored values.
template <typename Storage, bool kPartial>
void store_gx(const DepthwiseBackwardParams& p, const Vectors& vectors, const typename Storage::Lane* x,
              const typename Storage::Lane* residual, typename Storage::Lane* gx, int count, const Vec* gz, int64_t pitch) {
  const bool stream = streams_gx<Storage>(p);
  if (p.bn == nullptr) {
    for_blocks<4>(0, count, [&](auto block, int j) {
      for (int v = vectors.begin; v < vectors.end; ++v) {
        const BackwardLanes& k = vectors.lanes[v];
        MNET_UNROLL
        for (int i = 0; i < decltype(block)::value; ++i) {
          const int64_t at = int64_t{j + i} * p.c + k.channel;
          Vec value = gz[v * pitch + j + i];
          if (residual != nullptr) value = value + load_map<Storage, kPartial>(residual + at, k.valid);
          stream_map<Storage, kPartial>(gx + at, value, k.valid, stream);
        }
      }
    });
    return;
  }
  with_activation(p.act, [&](auto act) {
    for_blocks<4>(0, count, [&](auto block, int j) {
      for (int v = vectors.begin; v < vectors.end; ++v) {
        BackwardLanes& k = vectors.lanes[v];
        const Vec scale = k.scale, shift = k.shift, mean = k.mean;
        Vec sum = k.sum, sum_x = k.sum_x;
        MNET_UNROLL
        for (int i = 0; i < decltype(block)::value; ++i) {
          const int64_t at = int64_t{j + i} * p.c + k.channel;
          const Vec value = load_map<Storage, kPartial>(x + at, k.valid);
          const Vec masked = gz[v * pitch + j + i] * decltype(act)::bwd(Vec(scale * value + shift));
          const Vec stored = stream_map<Storage, kPartial>(gx + at, masked, k.valid, stream);
          sum = sum + stored;
          sum_x = sum_x + stored * (value - mean);
        }
        k.sum = sum;
        k.sum_x = sum_x;
      }
    });
  });
}

template <typename Shape, bool kDx, bool kDw>
void strip_gradients(BackwardTile<Shape>* tiles, int num_vectors, const KernelRow* rows, int num_rows, int column,
                     int count) {
  for (int v = 0; v < num_vectors; ++v) {
    BackwardTile<Shape>& t = tiles[v];
    gradients_of_strip<Shape, 1, kDx, kDw>({t.dy[0], t.weight, t.dw, t.z, t.gz}, rows, num_rows, column, count);
  }
}

inline void init_lanes(BackwardLanes& k, const DepthwiseBackwardParams& p, int channel, int channel_end) {
  k.channel = channel;
  k.valid = least(kLanes, channel_end - channel);
  const auto row = [&](const float* table, int64_t i) {
    return load_lanes<true, float, Vec>(table + i * p.c + channel, k.valid);
  };
  k.y_scale = row(p.y_bn, 0);
  k.y_shift = row(p.y_bn, 1);
  k.y_mean = row(p.y_bn, 2);
  k.b = row(p.coef, 0);
  k.c = row(p.coef, 1);
  k.scale = p.bn != nullptr ? row(p.bn, 0) : Vec{};
  k.shift = p.bn != nullptr ? row(p.bn, 1) : Vec{};
  k.mean = p.bn != nullptr ? row(p.bn, 2) : Vec{};
  k.sum = k.sum_x = Vec{};
}

template <typename Storage, typename Shape>
void init_tile(BackwardTile<Shape>& t, const DepthwiseBackwardParams& p, const BackwardLanes& k) {
  for (int tap = 0; tap < Shape::kTaps; ++tap) {
    const int64_t at = tap / Shape::kKernel * p.weight_stride_h + tap % Shape::kKernel * p.weight_stride_w;
    t.weight[tap] = t.dw[tap] = Vec{};
    for (int i = 0; i < k.valid; ++i) t.weight[tap][i] = Storage::scalar(p.weight, at + (k.channel + i) * p.weight_stride_c);
  }
}

template <typename Storage, typename Shape>
class BackwardUnit {
  using Lane = typename Storage::Lane;
  static constexpr int kMaxVectors = DepthwiseBackwardPlan::kChannelBlock / kLanes;
  static_assert(DepthwiseBackwardPlan::kChannelBlock % kLanes == 0, "a channel block is whole vectors");

 public:
  BackwardUnit(const DepthwiseBackwardParams& p, const DepthwiseBackwardUnit& unit)
      : p_(p), unit_(unit), lanes_(kMaxVectors), tiles_(kMaxVectors) {
    const int channels = unit.channel_end - unit.channel_begin;
    vectors_ = (channels + kLanes - 1) / kLanes;
    whole_ = channels / kLanes;
    for (int v = 0; v < vectors_; ++v) {
      init_lanes(lanes_.memory[v], p, unit.channel_begin + v * kLanes, unit.channel_end);
      init_tile<Storage>(tiles_.memory[v], p, lanes_.memory[v]);
    }
    for (int row = 0; row < Shape::kTaps + 2; ++row) {
      for (int c = unit.channel_begin; c < unit.channel_end; ++c) unit.totals[int64_t{row} * p.c + c] = 0.0;
    }
  }

  void run() {
    const auto core = p_.gx == nullptr   ? strip_gradients<Shape, false, true>
                      : p_.dw == nullptr ? strip_gradients<Shape, true, false>
                                         : strip_gradients<Shape, true, true>;
    int sum_run = 0, dw_run = 0;  // positions in the current runs
    for (int64_t column = 0; column < p_.w; column += Shape::kColumns) {
      const int columns = static_cast<int>(least<int64_t>(Shape::kColumns, p_.w - column));
      int64_t loaded = 0;  // one past the last row of dy in the ring
      for (int64_t row = unit_.row_begin; row < unit_.row_end; ++row) {
        const int64_t image = row / p_.h, ih = row % p_.h;
        // Rows [first, last] of dy look at input row ih.
        const int64_t above = ih + Shape::kPad - Shape::kKernel + 1;
        const int64_t first = above > 0 ? (above + Shape::kStride - 1) / Shape::kStride : 0;
        const int64_t last = least<int64_t>((ih + Shape::kPad) / Shape::kStride, p_.out_h - 1);
        if (row == unit_.row_begin || ih == 0) loaded = first;
        for (; loaded <= last; ++loaded) load_dy_row(image, loaded, column, columns);

        KernelRow rows[Shape::kRing];
        int num_rows = 0;
        for (int64_t oh = first; oh <= last; ++oh) {
          const auto kernel_row = static_cast<int>(ih + Shape::kPad - oh * Shape::kStride);
          rows[num_rows++] = {kernel_row, oh % Shape::kRing * Shape::kDyColumns};
        }
        if (sum_run + columns > Shape::kSumRun) {
          flush_sums();
          sum_run = 0;
        }
        if (dw_run + columns > Shape::kDwRun) {
          flush_dw();
          dw_run = 0;
        }
        const int64_t at = ((image * p_.h + ih) * p_.w + column) * p_.c;
        for (int strip = 0; strip < columns; strip += Shape::kStrip) {
          const int count = least(Shape::kStrip, columns - strip);
          if (p_.dw != nullptr) z_of(at + int64_t{strip} * p_.c, count);
          core(tiles_.memory, vectors_, rows, num_rows, strip, count);
          if (p_.gx != nullptr) gx_of(at + int64_t{strip} * p_.c, count);
        }
        sum_run += columns;
        dw_run += columns;
      }
    }
    flush_sums();
    flush_dw();
    end_stream(p_.gx != nullptr && streams_gx<Storage>(p_));
  }

 private:
  static constexpr int64_t kPitch = sizeof(BackwardTile<Shape>) / sizeof(Vec);

  // f(vectors, flag) for the whole vectors and for the one in part.
  template <typename F>
  MNET_HD void for_parts(F&& f) {
    if (whole_ > 0) f(Vectors{lanes_.memory, 0, whole_}, Flag<false>{});
    if (whole_ < vectors_) f(Vectors{lanes_.memory, whole_, vectors_}, Flag<true>{});
  }

  void load_dy_row(int64_t image, int64_t oh, int64_t column, int columns) {
    Vec* out = tiles_.memory[0].dy[oh % Shape::kRing];
    const int64_t first = column / Shape::kStride - Shape::kLeft;
    constexpr int kCount = Shape::kDyColumns;
    const int count = columns == Shape::kColumns ? kCount
                                                 : (columns + Shape::kStride - 1) / Shape::kStride + kCount -
                                                       Shape::kColumns / Shape::kStride;
    const int begin = static_cast<int>(within<int64_t>(-first, 0, count));
    const int end = static_cast<int>(within<int64_t>(p_.out_w - first, begin, count));
    for (int v = 0; v < vectors_; ++v) {
      fill_zero(out + v * kPitch, out + v * kPitch + begin);
      fill_zero(out + v * kPitch + end, out + v * kPitch + count);
    }
    const int64_t row = (image * p_.out_h + oh) * p_.out_w * p_.c;
    const Lane *grad = static_cast<const Lane*>(p_.grad) + row, *y = static_cast<const Lane*>(p_.y) + row;
    const float* gate = p_.gate == nullptr ? nullptr : p_.gate + image * p_.c;
    const float* offset = p_.offset == nullptr ? nullptr : p_.offset + image * p_.c;
    for_parts([&](const Vectors& vectors, auto partial) {
      const auto load = gate == nullptr && offset == nullptr ? load_dy<Storage, false, decltype(partial)::value>
                                                             : load_dy<Storage, true, decltype(partial)::value>;
      load(p_, vectors, grad, y, gate, offset, first + begin, end - begin, out + begin, kPitch);
    });
  }

  void z_of(int64_t at, int count) {
    const Lane* gx = p_.gx == nullptr ? nullptr : static_cast<const Lane*>(p_.gx) + at;
    for_parts([&](const Vectors& vectors, auto partial) {
      load_z<Storage, decltype(partial)::value>(p_, vectors, static_cast<const Lane*>(p_.x) + at, gx, count,
                                                tiles_.memory[0].z, kPitch);
    });
  }

  void gx_of(int64_t at, int count) {
    const Lane* residual = p_.residual == nullptr ? nullptr : static_cast<const Lane*>(p_.residual) + at;
    for_parts([&](const Vectors& vectors, auto partial) {
      store_gx<Storage, decltype(partial)::value>(p_, vectors, static_cast<const Lane*>(p_.x) + at, residual,
                                                  static_cast<Lane*>(p_.gx) + at, count, tiles_.memory[0].gz, kPitch);
    });
  }

  // Adds a run's float32 sums to the unit's totals.
  void flush_sums() {
    if (p_.sums == nullptr) return;
    for (int v = 0; v < vectors_; ++v) {
      BackwardLanes& k = lanes_.memory[v];
      double* to = unit_.totals + int64_t{Shape::kTaps} * p_.c + k.channel;
      add_lanes(to, k.sum, k.valid);
      add_lanes(to + p_.c, k.sum_x, k.valid);
      k.sum = k.sum_x = Vec{};
    }
  }

  void flush_dw() {
    if (p_.dw == nullptr) return;
    for (int v = 0; v < vectors_; ++v) {
      const BackwardLanes& k = lanes_.memory[v];
      for (int tap = 0; tap < Shape::kTaps; ++tap) {
        add_lanes(unit_.totals + int64_t{tap} * p_.c + k.channel, tiles_.memory[v].dw[tap], k.valid);
        tiles_.memory[v].dw[tap] = Vec{};
      }
    }
  }

  const DepthwiseBackwardParams& p_;
  const DepthwiseBackwardUnit& unit_;
  Scratch<BackwardLanes> lanes_;
  Scratch<BackwardTile<Shape>> tiles_;
  int vectors_;  // of the unit's channels
  int whole_;    // those with every lane in use
};

void depthwise_backward_unit(const DepthwiseBackwardParams& p, Dtype dtype, const DepthwiseBackwardUnit& unit) {
  with_storage(dtype, [&](auto storage) {
    const auto run = [&](auto shape) { BackwardUnit<decltype(storage), decltype(shape)>(p, unit).run(); };
    if (p.kernel == 3) {
      p.stride == 1 ? run(BackwardShape<3, 1>{}) : run(BackwardShape<3, 2>{});
    } else {
      p.stride == 1 ? run(BackwardShape<5, 1>{}) : run(BackwardShape<5, 2>{});
    }
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
