// Switches the rest of a translation unit to AVX-512 with AMX's products of bfloat16 tiles (gemm_amx.h, which needs no target
// of its own: its instructions are written out); bfloat16 storage alone.
// Include it after the standard headers (their inline functions are shared with other translation units and must stay
// plain) and before the kernel's own header; nothing follows, so the target is never switched back and holds for the
// templates instantiated at the end of the file as well.
#pragma once

#define MNET_CPU_NAMESPACE amx
#define MNET_CPU_LANES 16
#define MNET_CPU_F16C 1
#define MNET_CPU_BF16 1
#define MNET_CPU_AMX 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
