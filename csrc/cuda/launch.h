// What the launchers share.
#pragma once

#include <cstdint>

#include "../common/params.h"
#include "device.h"

namespace mnet::cuda {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls f with a zero of the storage dtype.
template <typename F>
auto with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
    case Dtype::kFloat16:
      return f(__half{});
    default:
      return f(float{});
  }
}

}  // namespace mnet::cuda
