// The stem's kernels for AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "target_avx2.h"

#include "stem_kernel.h"
#include "stem_backward_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
