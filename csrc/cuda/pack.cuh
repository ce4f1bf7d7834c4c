// 16 bytes of channels to and from memory: one access where the tensor allows it, else element by element.
#pragma once

#include "device.h"

namespace mnet::cuda {

// `valid` channels exist at `from`; the others read as zero.
template <typename T>
MNET_DEVICE Pack<T> load_pack(const T* from, int valid, bool vectorized) {
  if (vectorized) return *reinterpret_cast<const Pack<T>*>(from);
  Pack<T> pack;
  MNET_UNROLL
  for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = v < valid ? from[v] : from_float<T>(0.f);
  return pack;
}

template <typename T>
MNET_DEVICE void store_pack(T* to, const Pack<T>& pack, int valid, bool vectorized) {
  if (vectorized) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
    return;
  }
  MNET_UNROLL
  for (int v = 0; v < Pack<T>::kSize; ++v) {
    if (v < valid) to[v] = pack.lane[v];
  }
}

template <typename T>
MNET_DEVICE Pack<T> zero_pack() {
  Pack<T> pack;
  MNET_UNROLL
  for (int v = 0; v < Pack<T>::kSize; ++v) pack.lane[v] = from_float<T>(0.f);
  return pack;
}

}  // namespace mnet::cuda
