// Activations as functors: the value and the derivative side by side.
//
// `V` is float, or a vector of floats of the compiler's vector extension, so that the CPU and CUDA kernels share one
// definition.  `bwd` takes the pre-activation u and agrees with torch's backward at the kinks: relu'(0) = 0,
// relu6'(0) = relu6'(6) = 0, hardswish'(-3) = 0 and hardswish'(3) = 1.  The comparisons are written so that a NaN
// passes through `fwd`, as it does in torch (fmaxf would swallow it).
#pragma once

#include <math.h>

#include <cstdint>

#include "portability.h"

namespace mnet {

// The same codes as mnet_kernels.schema.ACTIVATIONS.
enum class Activation : int32_t { kIdentity = 0, kRelu = 1, kRelu6 = 2, kHardswish = 3, kSilu = 4 };
constexpr int kNumActivations = 5;

// u, or the bound if u lies beyond it; u if it is a NaN.  GCC does not see that this is one instruction.
template <typename V>
MNET_HD V at_least(V u, V bound) {
#if defined(__AVX__) && defined(MNET_CPU_LANES)
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_ps((__m256)bound, (__m256)u);
#endif
  return u < bound ? bound : u;
}
template <typename V>
MNET_HD V at_most(V u, V bound) {
#if defined(__AVX__) && defined(MNET_CPU_LANES)
  if constexpr (sizeof(V) == 32) return (V)_mm256_min_ps((__m256)bound, (__m256)u);
#endif
  return u > bound ? bound : u;
}

// e^u, to about one unit in the last place.  Above 88.8 it is infinite; below -87 it stays at the least normal number.
template <typename V>
MNET_HD V exponential(V u) {
  if constexpr (sizeof(V) == sizeof(float)) {
    return expf(u);
  } else {
    // u = n ln 2 + r: the sum with 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    using Int = decltype(u < u);
    const V zero = V{}, magic = zero + 12582912.f;
    u = at_most(at_least(u, V(zero - 87.f)), V(zero + 89.f));
    const V shifted = u * 1.44269504f + magic, n = shifted - magic;
    const V r = (u - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Int exponent = (Int)shifted - (Int)magic + 127;
    return (r * r * p + r + 1.f) * (V)(exponent << 23);
  }
}

// numerator / (1 + e^-u).  A GPU's own exponential and quotient are a few units in the last place off, which
// is little beside a sum of 1, and cost a fraction of the registers.
template <typename V>
MNET_HD V over_one_plus_exponential(V numerator, V u) {
#if defined(__CUDA_ARCH__)
  return __fdividef(numerator, 1.f + __expf(-u));
#else
  return numerator / (exponential(V(-u)) + 1.f);
#endif
}

struct Identity {
  static constexpr Activation kCode = Activation::kIdentity;
  template <typename V>
  static MNET_HD V fwd(V u) {
    return u;
  }
  template <typename V>
  static MNET_HD V bwd(V) {
    return V{} + 1.f;
  }
};

struct Relu {
  static constexpr Activation kCode = Activation::kRelu;
  template <typename V>
  static MNET_HD V fwd(V u) {
    return at_least(u, V{});
  }
  template <typename V>
  static MNET_HD V bwd(V u) {
    const V zero = V{}, one = zero + 1.f;
    return u <= zero ? zero : one;
  }
};

struct Relu6 {
  static constexpr Activation kCode = Activation::kRelu6;
  template <typename V>
  static MNET_HD V fwd(V u) {
    return at_most(at_least(u, V{}), V(V{} + 6.f));
  }
  template <typename V>
  static MNET_HD V bwd(V u) {
    const V zero = V{}, one = zero + 1.f, six = zero + 6.f;
    const V above = u >= six ? zero : one;
    return u <= zero ? zero : above;
  }
};

struct Hardswish {
  static constexpr Activation kCode = Activation::kHardswish;
  template <typename V>
  static MNET_HD V fwd(V u) {
    // u * relu6(u + 3) / 6 with two roundings; 1.f / 6.f is rounded up, so that both clamps hold from u = -3 and 3 on.
    const V zero = V{}, one = zero + 1.f;
    return u * at_most(at_least(V(u * (1.f / 6.f) + 0.5f), zero), one);
  }
  template <typename V>
  static MNET_HD V bwd(V u) {
    const V zero = V{}, one = zero + 1.f, three = zero + 3.f;
    const V inside = u * (1.f / 3.f) + 0.5f;
    const V upper = u >= three ? one : inside;
    return u <= -three ? zero : upper;
  }
};

struct Silu {
  static constexpr Activation kCode = Activation::kSilu;
  template <typename V>
  static MNET_HD V fwd(V u) {
    return over_one_plus_exponential(u, u);
  }
  template <typename V>
  static MNET_HD V bwd(V u) {
    const V one = V{} + 1.f, sigmoid = over_one_plus_exponential(one, u);
    return sigmoid * (u * (one - sigmoid) + 1.f);
  }
};

// Calls f with the functor of a run-time code: one switch outside the loop instead of one per element.
template <typename F>
MNET_HD void with_activation(Activation act, F&& f) {
  switch (act) {
    case Activation::kRelu:
      f(Relu{});
      break;
    case Activation::kRelu6:
      f(Relu6{});
      break;
    case Activation::kHardswish:
      f(Hardswish{});
      break;
    case Activation::kSilu:
      f(Silu{});
      break;
    default:
      f(Identity{});
  }
}

}  // namespace mnet
