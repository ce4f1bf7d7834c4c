// The upstream gradient of a pointwise convolution as the operand of its backward products.  Free of torch.
#pragma once

#include "pointwise_operand.cuh"

namespace mnet::cuda {

// dy = scale * g + b * (y - mean) + c with g = grad * act'(scale * y + shift): the batch norm's backward, as it is read.
// An image's offset, one value a channel, takes the place of grad where there is none.
struct UpstreamSource {
  const void* grad;
  const float* offset;
  Images images;
  const void* y;
  const float* y_bn;
  const float* coef;
  int32_t e;
  Activation act;
  bool vectorized;  // 16-byte accesses to grad, y and their tables are aligned and end within e
};

template <typename Tile_, int kThreads>
struct Upstream {
  using Tile = Tile_;
  using T = typename Tile_::T;
  using Mine = Share<Tile_, kThreads>;
  static constexpr int kTiles = 2;  // of grad, which becomes dy, and of y

  const UpstreamSource& s;

  MNET_DEVICE int channels() const { return s.e; }

  MNET_DEVICE void issue(Pack<T>* tile, int64_t position, int rows, int first_channel) const {
    // Without grad no row of its tile exists: zeros, which dy replaces.
    Mine::issue(s.grad == nullptr ? s.y : s.grad, position, s.grad == nullptr ? 0 : rows, first_channel, s.e, s.vectorized,
                tile);
    Mine::issue(s.y, position, rows, first_channel, s.e, s.vectorized, tile + Tile::kPacks);
  }

  MNET_DEVICE void prepare(Pack<T>* tile, int64_t position, int rows, int first_channel) const {
    constexpr int kVec = Tile::kVec;
    const int channel = first_channel + Mine::channel(), valid = s.e - channel;
    if (valid <= 0) return;
    with_activation(s.act, [&](auto act) {
      MNET_UNROLL_BY(1)  // four channels at a time: their coefficients are what fits in registers
      for (int quad = 0; quad < kVec / 4; ++quad) {
        const float* const bn = s.y_bn + channel + quad * 4;
        const float* const coef = s.coef + channel + quad * 4;
        const int left = valid - quad * 4;
        float scale[4], shift[4], mean[4], b[4], c[4];
        load_table(bn, left, s.vectorized, scale);
        load_table(bn + s.e, left, s.vectorized, shift);
        load_table(bn + 2 * int64_t{s.e}, left, s.vectorized, mean);
        load_table(coef, left, s.vectorized, b);
        load_table(coef + s.e, left, s.vectorized, c);
        MNET_UNROLL_BY(1)
        for (int u = 0; u < Mine::kLoads && Mine::row(u) < rows; ++u) {
          Pack<T>& grad = reinterpret_cast<Pack<T>&>(Mine::words(tile, u));
          const Pack<T>& y = reinterpret_cast<const Pack<T>&>(Mine::words(tile + Tile::kPacks, u));
          float upper[4];
          if (s.offset != nullptr) {
            const int64_t image = s.images.of(MNET_PLANT(12, position + Mine::row(u), position));
            load_table(s.offset + image * s.e + channel + quad * 4, left, s.vectorized, upper);
          } else {
            MNET_UNROLL
            for (int k = 0; k < 4; ++k) upper[k] = to_float(grad.lane[quad * 4 + k]);
          }
          MNET_UNROLL
          for (int k = 0; k < 4; ++k) {
            const float value = to_float(y.lane[quad * 4 + k]);
            const float g = upper[k] * decltype(act)::bwd(fmaf(scale[k], value, shift[k]));
            const float dy = fmaf(scale[k], g, fmaf(b[k], value - mean[k], c[k]));
            grad.lane[quad * 4 + k] = from_float<T>(k < MNET_PLANT(11, left, left - 1) ? dy : 0.f);
          }
        }
      }
    });
  }
};

}  // namespace mnet::cuda
