// What the launchers of the pointwise products share: a weight that cp.async can read.
#pragma once

#include "pointwise_tiles.h"

namespace mnet::cuda {

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Bytes of the packed weight, none where cp.async reads it as it lies.  Rounded up: what follows it is aligned.
inline int64_t packed_weight_bytes(const void* weight, int64_t stride_e, int64_t stride_c, int32_t e, int32_t c, Dtype dtype) {
  const int64_t vec = 16 / element_bytes(dtype);
  const bool direct = stride_c == 1 && c % vec == 0 && stride_e % vec == 0 && aligned(weight);
  return direct ? 0 : int64_t{e} * divide_up(c, vec) * 16;
}

// A weight that cp.async cannot read as it lies: rows of `stride` elements, the channels beyond c zero.
struct PackWeightTraits {
  static constexpr int kThreads = 256;
  static constexpr int kMaxBlocks = 1024;
};

template <typename Bits>
static __global__ void __launch_bounds__(PackWeightTraits::kThreads)
    pack_weight(const Bits* __restrict__ weight, int64_t stride_e, int64_t stride_c, int32_t e, int32_t c, int32_t stride,
                Bits* __restrict__ packed) {
  const int64_t size = int64_t{e} * stride;
  for (int64_t k = int64_t{blockIdx.x} * PackWeightTraits::kThreads + threadIdx.x; k < size;
       k += int64_t{gridDim.x} * PackWeightTraits::kThreads) {
    const int64_t row = k / stride, column = k % stride;
    packed[k] = MNET_PLANT(28, column < c, column < c && row < e - 1) ? weight[row * stride_e + column * stride_c] : Bits(0);
  }
}

// Makes the weight readable by cp.async, packing it into `packed` where it has to.
template <typename T>
cudaError_t prepare_weight(const void* weight, int64_t stride_e, int64_t stride_c, int32_t e, int32_t c, int64_t packed_bytes,
                           void* packed, cudaStream_t stream, Weight& out) {
  if (packed_bytes == 0) {
    out = {weight, stride_e, e, c};
    return cudaSuccess;
  }
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const auto stride = static_cast<int32_t>(divide_up(c, Pack<T>::kSize) * Pack<T>::kSize);
  out = {packed, stride, e, stride};
  const int64_t wanted = divide_up(int64_t{e} * stride, PackWeightTraits::kThreads);
  const auto blocks = static_cast<unsigned>(wanted < PackWeightTraits::kMaxBlocks ? wanted : PackWeightTraits::kMaxBlocks);
  MNET_LAUNCH(pack_weight<Bits>, blocks, PackWeightTraits::kThreads, stream, static_cast<const Bits*>(weight), stride_e,
              stride_c, e, c, stride, static_cast<Bits*>(packed));
  return launch_status();
}

}  // namespace mnet::cuda
