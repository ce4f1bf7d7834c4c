// Backward of expand layer and depthwise convolution in one (B2), in one capability (see simd.h for how it is included).
//
// Memory plan.  A unit walks down its input rows in strips of about 128 positions, once for every block of expanded
// channels.  Of a strip, float32 and shared by all panels of channels: x - shift (in place where that is x) and the new
// rows of dy3.  Then panel by panel: dz2 = dy3 W3 into a panel in the first-level cache, made dy2 with y2 and written into
// the panel's ring of rows; y1 into another such panel; from it and the ring, 16 columns at a time, z1, the gradients of
// the convolution and g1, which takes y1's place; and from the hot g1 the products G += (x - shift)^T g1 and
// dx' += g1 W~.  The ring holds a strip's rows and the kernel's overlap for every panel of the block (144 channels of 56
// columns: 6 rows, 200 KiB); the plan blocks the channels so that ring, weights and G stay in the second-level cache.  dx'
// is a float32 buffer of a strip, of the whole unit where there are several blocks.  G is summed in float32 over a
// strip or two, dW over 64 positions, both then in the unit's doubles.
#pragma once

#include <cstdint>
#include <new>

#include "../common/plant.h"
#include "depthwise_backward_tile.h"
#include "expand.h"
#include "expand_backward.h"
#include "expand_tile.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

// What a unit keeps of one panel of expanded channels.
template <typename Shape>
struct alignas(64) BackwardPanel {
  Vec weight[kVecs][Shape::kTaps];
  Vec dw[kVecs][Shape::kTaps];  // of the current run
  Vec scale[kVecs], shift[kVecs];
  Vec y_scale[kVecs], y_shift[kVecs], y_mean[kVecs], b[kVecs], c[kVecs];
  Vec sum[kVecs];  // of g1, of the current run
  int dw_run;      // positions
};

// The rows of dy2 that one input row looks at.
template <typename Shape>
struct KernelRows {
  KernelRow row[Shape::kRing];
  int count;
};

// z = act(u) of `count` columns, u = scale * y1 + shift.
template <typename Storage, typename Act>
void expanded_values(const float* y1, int count, const Vec* scale, const Vec* shift, Vec* z) {
  for (int i = 0; i < count; ++i) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      z[i * kVecs + v] = Storage::round(Act::fwd(Vec(scale[v] * load_vec(y1 + i * kPanel + v * kLanes) + shift[v])));
    }
  }
}

// g1 = act'(u) gz, rounded to storage, in the place of y1; and its sum.
template <typename Storage, typename Act>
void expanded_gradients(float* y1, int count, const Vec* scale, const Vec* shift, const Vec* gz, Vec* sum) {
  Vec part[kVecs] = {};
  for (int i = 0; i < count; ++i) {
    MNET_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      float* at = y1 + i * kPanel + v * kLanes;
      const Vec g = Storage::round(gz[i * kVecs + v] * Act::bwd(Vec(scale[v] * load_vec(at) + shift[v])));
      store_vec(at, g);
      part[v] = part[v] + g;
    }
  }
  for (int v = 0; v < kVecs; ++v) sum[v] = sum[v] + part[v];
}

// One vector's dy2 of one row: `dz` in a panel, y in memory.
template <typename Storage, typename Act, bool kPartial>
void expanded_upstream(const float* dz, const typename Storage::Lane* y, int64_t pitch, int columns, int valid, Vec gate,
                       Vec offset, Vec scale, Vec shift, Vec mean, Vec b, Vec c, Vec* dy) {
  for (int i = 0; i < columns; ++i) {
    const Vec value = load_map<Storage, kPartial>(y + i * pitch, valid);
    Vec g = load_vec(dz + i * kPanel) * gate + offset;
    g = g * Act::bwd(Vec(scale * value + shift));
    dy[i * kVecs] = Storage::round(scale * g + b * (value - mean) + c);
  }
}

template <typename Shape, bool kDw>
void expanded_strip(const Vec* ring, BackwardPanel<Shape>& s, const KernelRows<Shape>& rows, const Vec* z, Vec* gz, int column,
                    int count) {
  for (int v = 0; v < kVecs; ++v) {
    gradients_of_strip<Shape, kVecs, true, kDw>({ring + v, s.weight[v], s.dw[v], z + v, gz + v}, rows.row, rows.count, column,
                                                count);
  }
}

template <typename Storage, typename Shape>
class ExpandBackward {
  using Lane = typename Storage::Lane;
  using Panel = BackwardPanel<Shape>;
  // Positions of one float32 sum of G (its rounding is lost beside that of 16-bit maps), and of all that are added up in
  // float32 before they go into doubles.
  static constexpr int kProductRun = sizeof(Lane) == sizeof(float) ? 32 : kShortDepth;
  static constexpr int kSumRun = 100;

 public:
  ExpandBackward(const ExpandBackwardParams& p, const ExpandBackwardPlan& plan, const ExpandBackwardUnit& unit,
                 const ExpandBackwardPacked& packed)
      : p_(p), d_(p.depthwise), plan_(plan), unit_(unit), packed_(packed),
        positions_(int64_t{plan.strip_rows} * d_.w),
        dy_positions_((int64_t{plan.strip_rows} / Shape::kStride + Shape::kKernel) * d_.out_w),
        dx_positions_(p.dx == nullptr ? 0 : plan.blocks == 1 ? positions_ : (unit.row_end - unit.row_begin) * d_.w),
        ring_rows_((plan.strip_rows + Shape::kKernel) / Shape::kStride + 2),
        ring_row_(int64_t{d_.out_w + Shape::kLeft + Shape::kPad + 2} * kVecs),
        dy3_stride_(tile_stride(p.project.c)),
        ring_(ring_row_ * ring_rows_ * plan.panels_per_block),
        states_(plan.panels_per_block),
        rows_(plan.strip_rows),
        arena_(ShiftedRows<Storage>::floats(positions_, p.expand.c) + (dy_positions_ + 5) * dy3_stride_ +
               (dy_positions_ + positions_ + dx_positions_ * plan.dx_panels) * kPanel +
               int64_t{plan.panels_per_block} * p.expand.c * kPanel),
        source_(arena_, p.expand.x, p.expand.shift, p.expand.c, positions_),
        dy3_(arena_.take(dy_positions_ * dy3_stride_)),
        upstream_{project_table(p.project.bn, 0), project_table(p.project.bn, 1), project_table(p.project.bn, 2),
                  project_table(p.project.coef, 0), project_table(p.project.coef, 1)},
        dz_(arena_.take(dy_positions_ * kPanel)),
        y1_(arena_.take(positions_ * kPanel)),
        dx_(arena_.take(dx_positions_ * plan.dx_panels * kPanel)),
        partial_(arena_.take(int64_t{plan.panels_per_block} * p.expand.c * kPanel)) {
    for (int64_t i = 0; i < plan.table_size(); ++i) unit.table[i] = 0.0;
    // A narrow panel's last columns are not written.
    for (int64_t i = 0; i < dy_positions_ * kPanel; ++i) dz_[i] = 0.f;
    for (int64_t i = 0; i < positions_ * kPanel; ++i) y1_[i] = 0.f;
    for (int64_t i = 0; i < int64_t{plan.panels_per_block} * p.expand.c * kPanel; ++i) partial_[i] = 0.f;
  }

  void run() {
    for (begin_ = 0; begin_ < plan_.panels; begin_ += plan_.panels_per_block) {
      panels_ = least(plan_.panels_per_block, plan_.panels - begin_);
      fill_zero(ring_.memory, ring_.memory + ring_row_ * ring_rows_ * panels_);
      for (int i = 0; i < panels_; ++i) init(*new (states_.memory + i) Panel, channel(i));
      run_ = 0;
      int64_t loaded = 0;  // one past the last row of dy2 in the ring
      for (int64_t row = unit_.row_begin; row < unit_.row_end;) {
        const int64_t image = row / d_.h, ih = row % d_.h;
        const int rows = rows_of_strip(row);
        const int64_t first = first_output(ih), end = last_output(ih + rows - 1) + 1;
        if (row == unit_.row_begin || MNET_PLANT(22, ih == 0, false)) loaded = first;
        strip(row, image, ih, rows, loaded, static_cast<int>(end > loaded ? end - loaded : 0));
        loaded = end > loaded ? end : loaded;
        row += rows;
      }
      flush();
    }
  }

 private:
  const float* project_table(const float* table, int row) {
    return arena_.copy(table + int64_t{row} * p_.project.c, p_.project.c);
  }

  int channel(int panel) const { return (begin_ + panel) * kPanel; }
  int used(int panel) const { return least(kPanel, d_.c - channel(panel)); }

  int rows_of_strip(int64_t row) const {
    return static_cast<int>(least(least<int64_t>(plan_.strip_rows, d_.h - row % d_.h), unit_.row_end - row));
  }

  // Rows [first, last] of dy2 look at input row ih.
  static int64_t first_output(int64_t ih) {
    const int64_t above = ih + Shape::kPad - Shape::kKernel + 1;
    return above > 0 ? (above + Shape::kStride - 1) / Shape::kStride : 0;
  }
  int64_t last_output(int64_t ih) const { return least<int64_t>((ih + Shape::kPad) / Shape::kStride, d_.out_h - 1); }

  Vec* ring_row(int panel, int64_t oh) const {
    return ring_.memory + (int64_t{panel} * ring_rows_ + oh % ring_rows_) * ring_row_;
  }

  void init(Panel& s, int first) {
    for (int v = 0; v < kVecs; ++v) {
      const int at = first + v * kLanes, valid = within(d_.c - at, 0, kLanes);
      for (int tap = 0; tap < Shape::kTaps; ++tap) {
        const int64_t from = tap / Shape::kKernel * d_.weight_stride_h + tap % Shape::kKernel * d_.weight_stride_w;
        s.weight[v][tap] = s.dw[v][tap] = Vec{};
        for (int i = 0; i < valid; ++i) {
          s.weight[v][tap][i] = Storage::scalar(d_.weight, from + (at + i) * d_.weight_stride_c);
        }
      }
      const auto row = [&](const float* table, int64_t i) {
        Vec out{};
        for (int j = 0; j < valid; ++j) out[j] = table[i * d_.c + at + j];
        return out;
      };
      s.scale[v] = row(d_.bn, 0);
      s.shift[v] = row(d_.bn, 1);
      s.y_scale[v] = row(d_.y_bn, 0);
      s.y_shift[v] = row(d_.y_bn, 1);
      s.y_mean[v] = row(d_.y_bn, 2);
      s.b[v] = row(d_.coef, 0);
      s.c[v] = row(d_.coef, 1);
      s.sum[v] = Vec{};
    }
    s.dw_run = 0;
  }

  // Rows [ih, ih + rows) of an image, `row` the first over the batch; rows [loaded, loaded + fresh) of dy2 are new.
  void strip(int64_t row, int64_t image, int64_t ih, int rows, int64_t loaded, int fresh) {
    const int positions = rows * d_.w, dy_positions = fresh * d_.out_w;
    const float* x = source_.rows(row * d_.w, positions);
    if (fresh > 0) project_upstream((image * d_.out_h + loaded) * d_.out_w, dy_positions);
    for (int r = 0; r < rows; ++r) kernel_rows(ih + r, rows_.memory[r]);
    Ahead ahead = look_ahead(row + rows, positions, dy_positions);
    const int64_t at = plan_.blocks == 1 ? 0 : (row - unit_.row_begin) * d_.w;  // in the buffer of dx'
    const bool accumulate = run_ > 0;
    for (int i = 0; i < panels_; ++i) {
      const int64_t e = channel(i);
      Panel& s = states_.memory[i];
      if (fresh > 0) {
        multiply_deep(dy3_, dy3_stride_, packed_.project + e * p_.project.c, p_.project.c, dy_positions, used(i), dz_, ahead);
        upstream(s, i, image, loaded, fresh);
      }
      multiply_deep(x, source_.stride(), packed_.expand + e * p_.expand.c, p_.expand.c, positions, used(i), y1_, ahead);
      gradient_rows(s, i, rows);
      for (int first = 0; first < positions; first += kProductRun) {
        multiply_panel<true>(x + first * source_.stride(), source_.stride(), y1_ + first * kPanel,
                             least(kProductRun, positions - first), p_.expand.c, used(i),
                             partial_ + int64_t{i} * p_.expand.c * kPanel, MNET_PLANT(21, accumulate || first > 0, first > 0),
                             ahead);
      }
      for (int j = 0; p_.dx != nullptr && j < plan_.dx_panels; ++j) {
        multiply_panel<false>(y1_, kPanel, packed_.scaled + (int64_t{j} * d_.c + e) * kPanel, used(i), positions,
                              least(kPanel, p_.expand.c - j * kPanel), dx_ + (j * dx_positions_ + at) * kPanel,
                              MNET_PLANT(23, begin_ + i > 0, i > 0), ahead);
      }
    }
    run_ += MNET_PLANT(27, positions, 0);
    if (run_ >= kSumRun) flush();
    if (p_.dx != nullptr && begin_ + panels_ == plan_.panels) store_dx(row * d_.w, positions, at);
  }

  // dy3 of positions [first, first + count).
  void project_upstream(int64_t first, int count) {
    const int64_t at = first * p_.project.c;
    with_activation(p_.project.act, [&](auto act) {
      upstream_rows<Storage, decltype(act)>(static_cast<const Lane*>(p_.project.grad) + at,
                                            static_cast<const Lane*>(p_.project.y) + at, count, p_.project.c, upstream_, dy3_,
                                            dy3_stride_);
    });
  }

  void kernel_rows(int64_t ih, KernelRows<Shape>& rows) const {
    rows.count = 0;
    for (int64_t oh = first_output(ih); oh <= last_output(ih); ++oh) {
      rows.row[rows.count++] = {static_cast<int>(ih + Shape::kPad - oh * Shape::kStride), oh % ring_rows_ * ring_row_};
    }
  }

  // What the next strip reads.
  Ahead look_ahead(int64_t next, int positions, int dy_positions) const {
    Ahead ahead;
    if (next >= unit_.row_end) return ahead;
    const int rows = rows_of_strip(next);
    ahead.add(source_.at(next * d_.w), int64_t{rows} * d_.w * p_.expand.c * static_cast<int64_t>(sizeof(Lane)));
    const int64_t image = next / d_.h, ih = next % d_.h, end = last_output(ih + rows - 1) + 1;
    const int64_t first = ih == 0 ? 0 : last_output(ih - 1) + 1;
    if (const int64_t count = (end - first) * d_.out_w; count > 0) {
      const int64_t at = (image * d_.out_h + first) * d_.out_w;
      const auto map = [&](const void* from, int channels) {
        ahead.add(static_cast<const Lane*>(from) + at * channels, count * channels * static_cast<int64_t>(sizeof(Lane)));
      };
      map(p_.project.grad, p_.project.c);
      map(p_.project.y, p_.project.c);
      if (plan_.blocks == 1) map(d_.y, d_.c);
    }
    const int64_t blocks = deep_blocks(dy_positions, p_.project.c) + deep_blocks(positions, p_.expand.c) +
                           row_blocks(positions) * plan_.dx_panels + along_blocks(p_.expand.c, positions);
    ahead.spread(panels_ * blocks);
    return ahead;
  }

  // dy2 of rows [first, first + count) into the panel's ring.
  void upstream(const Panel& s, int panel, int64_t image, int64_t first, int count) const {
    with_activation(d_.y_act, [&](auto act) {
      for_vectors(used(panel), [&](auto partial, int column, int valid) {
        constexpr bool kPartial = decltype(partial)::value;
        const int v = column / kLanes;
        const int64_t e = channel(panel) + column, at = image * d_.c + e;
        Vec gate = Vec{} + 1.f, offset{};
        if (MNET_PLANT(24, d_.gate != nullptr, false)) gate = load_lanes<kPartial, float, Vec>(d_.gate + at, valid);
        if (d_.offset != nullptr) offset = load_lanes<kPartial, float, Vec>(d_.offset + at, valid);
        for (int r = 0; r < count; ++r) {
          const auto* y = static_cast<const Lane*>(d_.y) + (image * d_.out_h + first + r) * d_.out_w * d_.c + e;
          expanded_upstream<Storage, decltype(act), kPartial>(
              dz_ + int64_t{r} * d_.out_w * kPanel + column, y, d_.c, d_.out_w, valid, gate, offset, s.y_scale[v],
              s.y_shift[v], s.y_mean[v], s.b[v], s.c[v], ring_row(panel, first + r) + Shape::kLeft * kVecs + v);
        }
      });
    });
  }

  // From y1 and the ring: g1 in y1's place, its sum, and dW.
  void gradient_rows(Panel& s, int panel, int rows) {
    const auto core = d_.dw == nullptr ? expanded_strip<Shape, false> : expanded_strip<Shape, true>;
    const Vec* ring = ring_.memory + int64_t{panel} * ring_rows_ * ring_row_;
    Vec z[Shape::kStrip * kVecs], gz[Shape::kStrip * kVecs];
    with_activation(d_.act, [&](auto act) {
      for (int r = 0; r < rows; ++r) {
        for (int column = 0; column < d_.w; column += Shape::kStrip) {
          const int count = least(Shape::kStrip, d_.w - column);
          float* y1 = y1_ + (int64_t{r} * d_.w + column) * kPanel;
          if (d_.dw != nullptr) expanded_values<Storage, decltype(act)>(y1, count, s.scale, s.shift, z);
          core(ring, s, rows_.memory[r], z, gz, column, count);
          expanded_gradients<Storage, decltype(act)>(y1, count, s.scale, s.shift, gz, s.sum);
          s.dw_run += count;
          if (s.dw_run >= Shape::kDwRun) flush_dw(s, panel);
        }
      }
    });
  }

  void flush_dw(Panel& s, int panel) const {
    s.dw_run = 0;
    if (d_.dw == nullptr) return;
    double* to = unit_.table + plan_.padded() * (p_.expand.c + 1) + channel(panel);
    for (int v = 0; v < kVecs; ++v) {
      for (int tap = 0; tap < Shape::kTaps; ++tap) {
        add_lanes(to + tap * plan_.padded() + v * kLanes, s.dw[v][tap], kLanes);
        s.dw[v][tap] = Vec{};
      }
    }
  }

  // Adds the float32 runs to the unit's table.
  void flush() {
    const int64_t size = int64_t{p_.expand.c} * kPanel;
    for (int i = 0; i < panels_; ++i) {
      Panel& s = states_.memory[i];
      double* to = unit_.table + int64_t{channel(i)} * p_.expand.c;
      for (int64_t j = 0; run_ > 0 && j < size; j += kLanes) add_lanes(to + j, load_vec(partial_ + i * size + j), kLanes);
      for (int v = 0; v < kVecs; ++v) {
        add_lanes(unit_.table + plan_.padded() * p_.expand.c + channel(i) + v * kLanes, s.sum[v], kLanes);
        s.sum[v] = Vec{};
      }
      flush_dw(s, i);
    }
    run_ = 0;
  }

  void store_dx(int64_t first, int positions, int64_t at) const {
    auto* dx = static_cast<Lane*>(p_.dx) + first * p_.expand.c;
    for (int j = 0; j < plan_.dx_panels; ++j) {
      const float* from = dx_ + (j * dx_positions_ + at) * kPanel;
      for_vectors(least(kPanel, p_.expand.c - j * kPanel), [&](auto partial, int c, int valid) {
        for (int i = 0; i < positions; ++i) {
          store_map<Storage, decltype(partial)::value>(dx + int64_t{i} * p_.expand.c + j * kPanel + c,
                                                       load_vec(from + int64_t{i} * kPanel + c), valid);
        }
      });
    }
  }

  const ExpandBackwardParams& p_;
  const DepthwiseBackwardParams& d_;
  const ExpandBackwardPlan& plan_;
  const ExpandBackwardUnit& unit_;
  const ExpandBackwardPacked& packed_;
  const int64_t positions_;     // of a strip's input, at most
  const int64_t dy_positions_;  // of the new rows of dy2
  const int64_t dx_positions_;  // in the buffer of dx'
  const int ring_rows_;         // of every panel
  const int64_t ring_row_;      // vectors
  const int64_t dy3_stride_;
  Scratch<Vec> ring_;
  Scratch<Panel> states_;
  Scratch<KernelRows<Shape>> rows_;  // of a strip's input rows
  Arena arena_;
  ShiftedRows<Storage> source_;
  float* dy3_;
  const UpstreamTables upstream_;
  float *dz_, *y1_, *dx_, *partial_;
  int begin_ = 0;  // the block's first panel
  int panels_ = 0;
  int run_ = 0;    // positions in the current runs of G
};

void expand_backward_unit(const ExpandBackwardParams& p, Dtype dtype, const ExpandBackwardPlan& plan,
                          const ExpandBackwardUnit& unit, const ExpandBackwardPacked& packed) {
  with_storage(dtype, [&](auto storage) {
    const auto run = [&](auto shape) { ExpandBackward<decltype(storage), decltype(shape)>(p, plan, unit, packed).run(); };
    if (p.depthwise.kernel == 3) {
      p.depthwise.stride == 1 ? run(BackwardShape<3, 1>{}) : run(BackwardShape<3, 2>{});
    } else {
      p.depthwise.stride == 1 ? run(BackwardShape<5, 1>{}) : run(BackwardShape<5, 2>{});
    }
  });
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
