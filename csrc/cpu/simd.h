// A vector of kLanes floats and its conversions to and from the storage dtypes.
//
// Included once by each capability's translation unit, which sets MNET_CPU_NAMESPACE, MNET_CPU_LANES, MNET_CPU_F16C where
// the processor converts half precision itself, MNET_CPU_BF16 where it multiplies bfloat16 and MNET_CPU_AMX where in tiles,
// and switches the target on before the first function here.
// The vectors are the compiler's own (GCC and clang): arithmetic, comparisons and ?: are written as for floats.
//
// Nothing here or in a kernel may call a function template of the standard library on a type that another translation
// unit uses too: the linker keeps one instance of it, perhaps the one compiled for a processor that is not this one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(MNET_CPU_F16C)
#include <immintrin.h>
#endif

#include "../common/params.h"
#include "../common/portability.h"
#include "scratch.h"

namespace mnet::cpu::MNET_CPU_NAMESPACE {

constexpr int kLanes = MNET_CPU_LANES;
static_assert(kLanes == 8 || kLanes == 16, "the tail path handles half a vector, and F16C converts 8 or 16 lanes");

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Packed __attribute__((vector_size(kLanes * 2)));

static_assert(sizeof(Vec) == kLanes * sizeof(float) && sizeof(Packed) == kLanes * sizeof(uint16_t), "no padding");

MNET_HD Bits bits_of(Vec v) { return reinterpret_cast<Bits>(v); }
MNET_HD Vec float_of(Bits b) { return reinterpret_cast<Vec>(b); }
// `b` below 2^16.  GCC makes several instructions of a conversion that AVX2 has in one or two.
#if defined(MNET_CPU_F16C) && MNET_CPU_LANES == 8
MNET_HD Packed narrow(Bits b) {
  const __m256i halves = _mm256_packus_epi32((__m256i)b, (__m256i)b);
  return (Packed)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x88));
}
MNET_HD Bits widen(Packed p) { return (Bits)_mm256_cvtepu16_epi32((__m128i)p); }
#else
MNET_HD Packed narrow(Bits b) { return __builtin_convertvector(b, Packed); }
MNET_HD Bits widen(Packed p) { return __builtin_convertvector(p, Bits); }
#endif

template <typename T>
MNET_HD constexpr T least(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
MNET_HD T within(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}
MNET_HD void fill_zero(Vec* from, const Vec* to) {
  for (; from < to; ++from) *from = Vec{};
}

// Copies `valid` lanes.  Half a vector (channel counts are often 8 modulo 16) gets a copy of constant size.
template <bool kPartial, typename Lane>
MNET_HD void copy_lanes(void* to, const void* from, int valid) {
  if constexpr (!kPartial) {
    std::memcpy(to, from, kLanes * sizeof(Lane));
  } else if (valid == kLanes / 2) {
    std::memcpy(to, from, kLanes / 2 * sizeof(Lane));
  } else {
    for (int i = 0; i < valid; ++i) static_cast<Lane*>(to)[i] = static_cast<const Lane*>(from)[i];
  }
}

template <bool kPartial, typename Lane, typename V>
MNET_HD V load_lanes(const Lane* from, int valid) {
  V v{};
  copy_lanes<kPartial, Lane>(&v, from, valid);
  return v;
}

// Each storage dtype: `Lane` in memory; `unpack` to float; `pack` with round to nearest even; `round` = both.
struct Float32 {
  using Lane = float;
  using Raw = Vec;
  static MNET_HD Vec unpack(Raw raw) { return raw; }
  static MNET_HD Raw pack(Vec v) { return v; }
  static MNET_HD Vec round(Vec v) { return v; }
  static float scalar(const void* p, int64_t i) { return static_cast<const float*>(p)[i]; }
};

struct BFloat16 {
  using Lane = uint16_t;
  using Raw = Packed;
  static MNET_HD Vec unpack(Raw raw) { return float_of(widen(raw) << 16); }
  // The upper half is the rounded value; the lower half is left over.
  static MNET_HD Bits rounded_bits(Vec v) {
    const Bits b = bits_of(v);
    const Bits rounded = b + 0x7fffu + ((b >> 16) & 1u);
    const Bits nan = Bits{} + 0x7fc00000u;
    return v != v ? nan : rounded;
  }
#if defined(MNET_CPU_BF16)
  static MNET_HD Raw pack(Vec v) { return (Raw)_mm512_cvtneps_pbh((__m512)v); }
  static MNET_HD Vec round(Vec v) { return unpack(pack(v)); }
#else
  static MNET_HD Raw pack(Vec v) { return narrow(rounded_bits(v) >> 16); }
  static MNET_HD Vec round(Vec v) { return float_of(rounded_bits(v) & 0xffff0000u); }
#endif
  static float scalar(const void* p, int64_t i) {
    const uint32_t b = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
    float f;
    std::memcpy(&f, &b, sizeof f);
    return f;
  }
};

struct Float16 {
  using Lane = uint16_t;
  using Raw = Packed;
#if defined(MNET_CPU_F16C) && MNET_CPU_LANES == 16
  // The zero-masked forms under a full mask: the plain ones read an undefined register, of which GCC warns.
  static MNET_HD Vec unpack(Raw raw) { return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw); }
  static MNET_HD Raw pack(Vec v) {
    return (Raw)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
#elif defined(MNET_CPU_F16C)
  static MNET_HD Vec unpack(Raw raw) { return (Vec)_mm256_cvtph_ps((__m128i)raw); }
  static MNET_HD Raw pack(Vec v) { return (Raw)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Exponents are re-biased by adding to the bits.  A subnormal half is the difference of two normal floats that
  // share the exponent 2^-14; the subtraction (or, on the way down, the addition of 0.5) does its shift and rounding.
  static MNET_HD Vec unpack(Raw raw) {
    const Bits h = widen(raw), magnitude = (h & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    const Bits normal = magnitude + 0x38000000u;
    const Bits special = normal + 0x38000000u;
    const Bits subnormal = bits_of(float_of(normal + 0x00800000u) - float_of(Bits{} + 0x38800000u));
    const Bits finite = exponent == 0u ? subnormal : normal;
    return float_of((exponent == 0x0f800000u ? special : finite) | ((h & 0x8000u) << 16));
  }
  static MNET_HD Raw pack(Vec v) {
    const Bits b = bits_of(v), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
    const Bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Bits subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const Bits infinite = Bits{} + 0x7c00u, nan = Bits{} + 0x7e00u;
    const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
    const Bits special = magnitude > 0x7f800000u ? nan : infinite;
    return narrow((magnitude >= 0x47800000u ? special : finite) | sign);
  }
#endif
  static MNET_HD Vec round(Vec v) { return unpack(pack(v)); }
  static float scalar(const void* p, int64_t i) {
    Raw raw{};
    raw[0] = static_cast<const uint16_t*>(p)[i];
    return unpack(raw)[0];
  }
};

// Calls f with the storage of a run-time dtype.
template <typename F>
MNET_HD void with_storage(Dtype dtype, F&& f) {
#if defined(MNET_CPU_BF16)
  (void)dtype;  // the other dtypes run what is compiled for AVX-512
  return f(BFloat16{});
#else
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
    default:
      return f(Float32{});
  }
#endif
}

template <bool value_>
struct Flag {
  static constexpr bool value = value_;
};
template <int value_>
struct Size {
  static constexpr int value = value_;
};

// f(Size<kBlock>, i) for whole blocks of [begin, end), then f(Size<1>, i) for each of the rest.
template <int kBlock, typename Index, typename F>
MNET_HD void for_blocks(Index begin, Index end, F&& f) {
  for (; begin + kBlock <= end; begin += kBlock) f(Size<kBlock>{}, begin);
  for (; begin < end; ++begin) f(Size<1>{}, begin);
}

template <typename Storage, bool kPartial>
MNET_HD Vec load_map(const typename Storage::Lane* from, int valid) {
  return Storage::unpack(load_lanes<kPartial, typename Storage::Lane, typename Storage::Raw>(from, valid));
}

// Asks for a cache line ahead of its use; the address may lie outside the map.
template <bool kWrite, typename Lane>
MNET_HD void prefetch(const Lane* base, int64_t index) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + index * sizeof(Lane)), kWrite, 2);
}

// Rounds and stores; returns the stored value.
template <typename Storage, bool kPartial>
MNET_HD Vec store_map(typename Storage::Lane* to, Vec v, int valid) {
  const typename Storage::Raw raw = Storage::pack(v);
  copy_lanes<kPartial, typename Storage::Lane>(to, &raw, valid);
  return Storage::unpack(raw);
}

// Whether a map is written past the caches: so large that its reader comes too late to find it there, when a line that need
// not be read before it is written saves half of the traffic.  Float32 only, and by whole cache lines.
template <typename Storage>
MNET_HD bool streams(const void* map, int64_t positions, int64_t channels) {
#if defined(MNET_CPU_F16C)
  constexpr int64_t kSmallest = int64_t{8} << 20, kLine = 64;
  const int64_t row = channels * static_cast<int64_t>(sizeof(typename Storage::Lane));
  return sizeof(typename Storage::Lane) == sizeof(float) && positions * row >= kSmallest && row % kLine == 0 &&
         reinterpret_cast<uintptr_t>(map) % kLine == 0;
#else
  (void)map, (void)positions, (void)channels;
  return false;
#endif
}

// A vector past the caches.
MNET_HD void stream_vec(float* to, Vec v) {
#if defined(MNET_CPU_F16C) && MNET_CPU_LANES == 16
  _mm512_stream_ps(to, (__m512)v);
#elif defined(MNET_CPU_F16C)
  _mm256_stream_ps(to, (__m256)v);
#else
  copy_lanes<false, float>(to, &v, kLanes);
#endif
}

// store_map, past the caches where `stream` says so.  The processor gathers a few lines at a time: where a vector is half
// of one, the other half must follow within a few stores, or kGathers.
template <typename Storage, bool kPartial>
MNET_HD Vec stream_map(typename Storage::Lane* to, Vec v, int valid, bool stream) {
  if constexpr (!kPartial && sizeof(typename Storage::Lane) == sizeof(float)) {
    if (stream) {
      stream_vec(to, v);
      return v;
    }
  }
  (void)stream;
  return store_map<Storage, kPartial>(to, v, valid);
}

// Whether a kernel that goes down a column, vector by vector, gathers what it streams as rows in a cache.
#if defined(MNET_CPU_F16C)
constexpr bool kGathers = kLanes < 16;
#else
constexpr bool kGathers = false;
#endif

// Rows of whole cache lines from there past the caches.
MNET_HD void stream_rows(void* to, int64_t pitch, const float* from, int64_t from_pitch, int rows, int columns) {
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < columns; i += kLanes) {
      Vec v;
      copy_lanes<false, float>(&v, from + row * from_pitch + i, kLanes);
      stream_vec(static_cast<float*>(to) + row * pitch + i, v);
    }
  }
}

// Ends a unit that has streamed: what it wrote comes before whatever the thread does next.
MNET_HD void end_stream(bool stream) {
#if defined(MNET_CPU_F16C)
  if (stream) _mm_sfence();
#endif
  (void)stream;
}

// to[i] += v[i]: a float32 run is added to its double.
MNET_HD void add_lanes(double* to, Vec v, int valid) {
  if (valid == kLanes) {
    for (int i = 0; i < kLanes; ++i) to[i] += static_cast<double>(v[i]);
  } else {
    for (int i = 0; i < valid; ++i) to[i] += static_cast<double>(v[i]);
  }
}

// Uninitialised memory of a unit, aligned for T; several end in the reverse order of their beginning.
template <typename T>
struct Scratch {
  static_assert(alignof(T) <= kScratchAlignment, "scratch memory is aligned to cache lines");
  T* memory;
  explicit Scratch(int64_t count) : memory(static_cast<T*>(scratch_take(sizeof(T) * count))) {}
  ~Scratch() { scratch_give(memory); }
  Scratch(const Scratch&) = delete;
};

}  // namespace mnet::cpu::MNET_CPU_NAMESPACE
