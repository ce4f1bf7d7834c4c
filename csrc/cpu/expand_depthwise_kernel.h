// Expand layer and depthwise convolution in one (F1), in one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its output rows in strips of about 128 positions.  The strip's new rows of x - shift are
// in float32 (read in place where they are x itself); then panel by panel of the expanded channels: the product with the
// packed weight into a panel in the first-level cache (112 x 32 x 4 bytes = 14 KiB), from there activated into the panel's
// ring of rows, and the convolution of the ring's rows into y with its moments.  The ring holds a strip's rows and the
// kernel's overlap for every panel of the unit (144 channels of 56 columns: 5 rows, 167 KiB); the plan blocks the channels
// so that ring and weight stay in the second-level cache.  The columns beside the image are zero in the ring from the
// start; rows beyond it are one row of zeros.  A large y is streamed where a panel is one cache line (simd.h).
#pragma once

#include <cstdint>
#include <new>

#include "../common/plant.h"
#include "depthwise_tile.h"
#include "expand.h"
#include "expand_tile.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

template <typename Storage_, int kKernel_, int kStride_>
struct ExpandTraits {
  using Storage = Storage_;
  using Lane = typename Storage_::Lane;
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
  static constexpr int kPad = kKernel_ / 2;
  static constexpr int kTaps = kKernel_ * kKernel_;
  static constexpr int kBlock = 4;

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
};

// What a unit keeps of one panel of channels.
template <typename Traits>
struct alignas(64) ExpandPanel {
  Vec weight[kVecs][Traits::kTaps];
  Vec scale[kVecs], shift[kVecs];
  ChannelMoments moments[kVecs];
  int run;          // positions in the current run of the moments
  int64_t flushed;  // and in those before
};

template <typename Traits>
class ExpandDepthwise {
  using Storage = typename Traits::Storage;
  using Lane = typename Traits::Lane;
  using Panel = ExpandPanel<Traits>;

 public:
  ExpandDepthwise(const ExpandDepthwiseParams& p, const ExpandPlan& plan, const ExpandUnit& unit, const float* packed)
      : p_(p.depthwise), c_(p.expand.c), plan_(plan), unit_(unit), packed_(packed),
        panels_(unit.panel_end - unit.panel_begin),
        ring_rows_(plan.strip_rows * Traits::kStride + Traits::kKernel),
        ring_row_(int64_t{p_.w + 2 * Traits::kPad} * kVecs),
        ring_(ring_row_ * ring_rows_ * panels_ + ring_row_),
        states_(panels_),
        product_rows_(kStripPositions / p_.w > 1 ? kStripPositions / p_.w : 1),
        stream_(kGathers && unit.mean != nullptr && streams<Storage>(p_.y, p_.n * p_.out_h * p_.out_w, p_.c)),
        gathered_floats_(stream_ ? int64_t{kPanel} * least<int64_t>(kLongestRun, p_.out_w) : 0),
        arena_(ShiftedRows<Storage>::floats(int64_t{ring_rows_} * p_.w, c_) + int64_t{product_rows_} * p_.w * kPanel +
               gathered_floats_),
        source_(arena_, p.expand.x, p.expand.shift, c_, int64_t{ring_rows_} * p_.w),
        result_(arena_.take(int64_t{product_rows_} * p_.w * kPanel)),
        gathered_(arena_.take(gathered_floats_)) {
    fill_zero(ring_.memory, ring_.memory + ring_row_ * (int64_t{ring_rows_} * panels_ + 1));
    for (int64_t i = 0; i < int64_t{product_rows_} * p_.w * kPanel; ++i) result_[i] = 0.f;  // not every column is written
    for (int i = 0; i < panels_; ++i) init(*new (states_.memory + i) Panel, channel(i));
  }

  void run() {
    int64_t loaded = 0;  // one past the last input row in the ring
    for (int64_t row = unit_.row_begin; row < unit_.row_end;) {
      const int64_t image = row / p_.out_h, oh = row % p_.out_h;
      const int rows = rows_of_strip(row);
      const int64_t top = oh * Traits::kStride - Traits::kPad;
      const int64_t bottom = least<int64_t>(top + (rows - 1) * Traits::kStride + Traits::kKernel, p_.h);
      if (row == unit_.row_begin || MNET_PLANT(15, oh == 0, false)) loaded = top < 0 ? 0 : top;
      const int fresh = static_cast<int>(bottom - loaded);
      const int positions = fresh * p_.w;
      const float* x = positions > 0 ? source_.rows((image * p_.h + loaded) * p_.w, positions) : nullptr;
      Ahead ahead = look_ahead(row + rows, image, bottom, positions);
      for (int i = 0; i < panels_; ++i) {
        Vec* ring = ring_.memory + ring_row_ * ring_rows_ * i;
        for (int first = 0; first < fresh; first += product_rows_) {
          const int count = least(product_rows_, fresh - first), used = least(kPanel, p_.c - channel(i));
          multiply_deep(x + int64_t{first} * p_.w * source_.stride(), source_.stride(),
                        packed_ + int64_t{channel(i)} * c_, c_, count * p_.w, used, result_, ahead);
          activate(states_.memory[i], loaded + first, count, ring);
        }
        for (int r = 0; r < rows; ++r) convolve_row(states_.memory[i], channel(i), ring, row + r, top + r * Traits::kStride);
      }
      loaded = bottom > loaded ? bottom : loaded;
      row += rows;
    }
    end_stream(stream_);
    if (unit_.mean == nullptr) return;
    for (int i = 0; i < panels_; ++i) {
      Panel& s = states_.memory[i];
      flush(s);
      for_vectors(least(kPanel, p_.c - channel(i)), [&](auto, int c, int valid) {
        s.moments[c / kLanes].finish(s.flushed, valid, unit_.mean + channel(i) + c, unit_.m2 + channel(i) + c);
      });
    }
  }

 private:
  int channel(int panel) const { return (unit_.panel_begin + panel) * kPanel; }

  int rows_of_strip(int64_t row) const {
    return static_cast<int>(least(least<int64_t>(plan_.strip_rows, p_.out_h - row % p_.out_h), unit_.row_end - row));
  }

  void init(Panel& s, int first) {
    for (int v = 0; v < kVecs; ++v) {
      const int at = first + v * kLanes, valid = within(p_.c - at, 0, kLanes);
      for (int tap = 0; tap < Traits::kTaps; ++tap) {
        const int64_t from = tap / Traits::kKernel * p_.weight_stride_h + tap % Traits::kKernel * p_.weight_stride_w;
        s.weight[v][tap] = Vec{};
        for (int i = 0; i < valid; ++i) {
          s.weight[v][tap][i] = Storage::scalar(p_.weight, from + (at + i) * p_.weight_stride_c);
        }
      }
      s.scale[v] = s.shift[v] = Vec{};
      for (int i = 0; i < valid; ++i) {
        s.scale[v][i] = p_.bn[at + i];
        s.shift[v][i] = p_.bn[p_.c + at + i];
      }
      s.moments[v].start();
    }
    s.run = 0;
    s.flushed = 0;
  }

  // What the next strip reads and writes.
  Ahead look_ahead(int64_t next, int64_t image, int64_t bottom, int positions) const {
    Ahead ahead;
    if (next >= unit_.row_end) return ahead;
    const int64_t image_rows = next / p_.out_h == image ? p_.h - bottom : p_.h;
    const int64_t x_rows = least<int64_t>(int64_t{plan_.strip_rows} * Traits::kStride, image_rows);
    ahead.add(source_.at((next / p_.out_h == image ? image * p_.h + bottom : (image + 1) * p_.h) * p_.w),
              x_rows * p_.w * c_ * static_cast<int64_t>(sizeof(Lane)));
    if (plan_.blocks == 1 && !stream_) {
      ahead.add(static_cast<const Lane*>(p_.y) + next * p_.out_w * p_.c,
                int64_t{rows_of_strip(next)} * p_.out_w * p_.c * static_cast<int64_t>(sizeof(Lane)));
    }
    ahead.spread(panels_ * deep_blocks(positions, c_));
    return ahead;
  }

  Vec* ring_row(Vec* ring, int64_t ih) const { return ring + ih % ring_rows_ * ring_row_; }

  // The product of rows [first, first + count) of the input, normalised and activated into the ring.
  void activate(const Panel& s, int64_t first, int count, Vec* ring) const {
    with_activation(p_.act, [&](auto act) {
      const float* from = result_;
      for (int row = 0; row < count; ++row) {
        Vec* to = ring_row(ring, first + row) + MNET_PLANT(17, Traits::kPad, 0) * kVecs;
        for (int i = 0; i < p_.w; ++i) {
          MNET_UNROLL
          for (int v = 0; v < kVecs; ++v) {
            const Vec u = s.scale[v] * load_vec(from + v * kLanes) + s.shift[v];
            to[v] = Storage::round(decltype(act)::fwd(u));
          }
          from += kPanel;
          to += kVecs;
        }
      }
    });
  }

  void flush(Panel& s) const {
    if (s.run == 0) return;
    for (int v = 0; v < kVecs; ++v) s.moments[v].flush(s.run, s.flushed == 0);
    s.flushed += s.run;
    s.run = 0;
  }

  // One row of y from the ring, in pieces that fit in a run of the moments.
  void convolve_row(Panel& s, int first, Vec* ring, int64_t row, int64_t top) {
    const Vec* rows[Traits::kKernel];
    for (int i = 0; i < Traits::kKernel; ++i) {
      const int64_t ih = top + i;
      const bool padding = ih < 0 || MNET_PLANT(16, ih >= p_.h, false);
      rows[i] = padding ? ring_.memory + ring_row_ * ring_rows_ * panels_ : ring_row(ring, ih);
    }
    for (int column = 0; column < p_.out_w; column += kLongestRun) {
      const int columns = least(kLongestRun, p_.out_w - column);
      if (s.run + columns > longest_run(s.flushed)) flush(s);
      Lane* to = static_cast<Lane*>(p_.y) + (row * p_.out_w + column) * p_.c + first;
      for_vectors(least(kPanel, p_.c - first), [&](auto partial, int c, int valid) {
        const int v = c / kLanes;
        const Vec* at[Traits::kKernel];
        for (int i = 0; i < Traits::kKernel; ++i) at[i] = rows[i] + int64_t{column} * Traits::kStride * kVecs + v;
        output_row<Traits, kVecs, decltype(partial)::value>(
            s.moments[v], s.weight[v], at, columns, (stream_ ? reinterpret_cast<Lane*>(gathered_) : to) + c,
            stream_ ? kPanel : p_.c, valid, s.run == 0, s.run + s.flushed == 0, /*stream=*/false);
      });
      if (stream_) stream_rows(to, p_.c, gathered_, kPanel, columns, kPanel);
      s.run += columns;
    }
  }

  const DepthwiseParams& p_;
  const int c_;
  const ExpandPlan& plan_;
  const ExpandUnit& unit_;
  const float* packed_;
  const int panels_;
  const int ring_rows_;     // of every panel
  const int64_t ring_row_;  // vectors
  Scratch<Vec> ring_;       // and a row of zeros
  Scratch<Panel> states_;
  const int product_rows_;  // input rows in one product
  const bool stream_;       // y, a panel of a row at a time
  const int64_t gathered_floats_;
  Arena arena_;
  ShiftedRows<Storage> source_;
  float* result_;
  float* gathered_;
};

void expand_pack_panel(const ExpandLayer& expand, int e, Dtype dtype, int64_t panel, float* packed) {
  with_storage(dtype, [&](auto storage) {
    pack_panel<decltype(storage)>(expand.weight, expand.weight_stride_c, expand.weight_stride_e, expand.c,
                                  static_cast<int>(panel) * kPanel, e, packed + panel * kPanel * expand.c);
  });
}

void expand_depthwise_unit(const ExpandDepthwiseParams& p, Dtype dtype, const ExpandPlan& plan, const ExpandUnit& unit,
                           const float* packed) {
  with_storage(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const auto run = [&](auto traits) { ExpandDepthwise<decltype(traits)>(p, plan, unit, packed).run(); };
    if (p.depthwise.kernel == 3) {
      p.depthwise.stride == 1 ? run(ExpandTraits<Storage, 3, 1>{}) : run(ExpandTraits<Storage, 3, 2>{});
    } else {
      p.depthwise.stride == 1 ? run(ExpandTraits<Storage, 5, 1>{}) : run(ExpandTraits<Storage, 5, 2>{});
    }
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
