// Switches the rest of a translation unit to AVX2.  Include it after the standard headers (their inline functions are
// shared with other translation units and must stay plain) and before the kernel's own header; nothing follows, so the
// target is never switched back and holds for the templates instantiated at the end of the file as well.
#pragma once

#define MNET_CPU_NAMESPACE avx2
#define MNET_CPU_LANES 8
#define MNET_CPU_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
