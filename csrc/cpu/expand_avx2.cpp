// The forward kernels of algebraic mode, and its tables, for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "target_avx2.h"

#include "expand_gram_kernel.h"
#include "expand_mix_kernel.h"
#include "expand_depthwise_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
