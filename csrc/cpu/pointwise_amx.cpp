// The pointwise kernels for AVX-512 with AMX.
#include "capability.h"

#if defined(MNET_BUILD_AMX)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "target_amx.h"

#include "pointwise_kernel.h"
#include "pointwise_backward_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
