// What the kernels that go back through a depthwise convolution share: the gradients of a strip of inputs (see simd.h for
// how it is included).
#pragma once

#include <cstdint>

#include "simd.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

template <int kKernel_, int kStride_>
struct BackwardShape {
  static constexpr int kKernel = kKernel_;
  static constexpr int kStride = kStride_;
  static constexpr int kPad = kKernel / 2;
  static constexpr int kTaps = kKernel * kKernel;
  static constexpr int kRing = (kKernel + kStride - 1) / kStride;  // rows of dy an input row may look at
  static constexpr int kColumns = 32;                              // input columns of a tile
  static constexpr int kStrip = 16;
  static constexpr int kBlock = 4;
  static constexpr int kLeft = kPad / kStride;
  static constexpr int kRight = (kBlock - 1 + kPad) / kStride - (kBlock / kStride - 1);
  static constexpr int kDyColumns = kColumns / kStride + kLeft + kRight;
  static constexpr int kSumRun = 32;  // positions summed in float32
  static constexpr int kDwRun = 64;

  static_assert(kKernel == 3 || kKernel == 5, "supported kernels");
  static_assert(kStride == 1 || kStride == 2, "supported strides");
  static_assert(kColumns % kStrip == 0 && kStrip % kBlock == 0, "strips are whole blocks");
  static_assert(kBlock % kStride == 0, "a block starts at a column that an output is centred on");
  static_assert(kColumns <= kSumRun && kColumns <= kDwRun, "a row of a tile fits in one run");
};

// A row of the kernel that meets the image: its weights and gradients, and where the row of dy that it looks at begins.
struct KernelRow {
  int kernel_row;
  int64_t offset;  // vectors
};

// One vector of channels; neighbouring columns of dy, z and gz are kPitch vectors apart.
struct GradientLanes {
  const Vec* dy;      // a row begins at the column that input column 0 of the tile looks at first
  const Vec* weight;  // by tap
  Vec* dw;            // by tap, of the current run
  const Vec* z;       // of the strip
  Vec* gz;
};

// gz and dW of kBlock_ neighbouring columns, the first one even within the tile: `column` there, `strip` in the strip.
template <typename Shape, int kBlock_, int kPitch, bool kDx, bool kDw>
MNET_HD void gradients(const GradientLanes& t, const KernelRow* rows, int num_rows, int column, int strip) {
  constexpr int kKernel = Shape::kKernel, kStride = Shape::kStride, kPad = Shape::kPad;
  constexpr int kInputs = Shape::kLeft + (kBlock_ - 1 + kPad) / kStride + 1;
  Vec gz[kBlock_], z[kBlock_];
  MNET_UNROLL
  for (int b = 0; b < kBlock_; ++b) {
    gz[b] = Vec{};
    if constexpr (kDw) z[b] = t.z[(strip + b) * kPitch];
  }
  for (int r = 0; r < num_rows; ++r) {
    const Vec* dy = t.dy + rows[r].offset + int64_t{column / kStride} * kPitch;
    const Vec* weight = t.weight + rows[r].kernel_row * kKernel;
    Vec* total = t.dw + rows[r].kernel_row * kKernel;
    Vec dw[kKernel];
    MNET_UNROLL
    for (int j = 0; kDw && j < kKernel; ++j) dw[j] = total[j];
    MNET_UNROLL
    for (int i = 0; i < kInputs; ++i) {
      const Vec value = dy[i * kPitch];
      MNET_UNROLL
      for (int b = 0; b < kBlock_; ++b) {
        const int j = b + kPad - (i - Shape::kLeft) * kStride;  // the tap through which column b reaches this output
        if (j < 0 || j >= kKernel) continue;
        if constexpr (kDx) gz[b] = gz[b] + value * weight[j];
        if constexpr (kDw) dw[j] = dw[j] + value * z[b];
      }
    }
    MNET_UNROLL
    for (int j = 0; kDw && j < kKernel; ++j) total[j] = dw[j];
  }
  MNET_UNROLL
  for (int b = 0; kDx && b < kBlock_; ++b) t.gz[(strip + b) * kPitch] = gz[b];
}

template <typename Shape, int kPitch, bool kDx, bool kDw>
MNET_HD void gradients_of_strip(const GradientLanes& t, const KernelRow* rows, int num_rows, int column, int count) {
  int j = 0;
  for (; j + Shape::kBlock <= count; j += Shape::kBlock) {
    gradients<Shape, Shape::kBlock, kPitch, kDx, kDw>(t, rows, num_rows, column + j, j);
  }
  if (j + 2 <= count) {
    gradients<Shape, 2, kPitch, kDx, kDw>(t, rows, num_rows, column + j, j);
    j += 2;
  }
  if (j < count) gradients<Shape, 1, kPitch, kDx, kDw>(t, rows, num_rows, column + j, j);
}

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
