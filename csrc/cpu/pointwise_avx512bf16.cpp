// The pointwise kernels for AVX-512 with products of bfloat16 pairs.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "target_avx512bf16.h"

#include "pointwise_kernel.h"
#include "pointwise_backward_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
