// The two words every shared header needs: a function that also runs on the device, and a loop to unroll.
#pragma once

#if defined(__CUDACC__)
#define MNET_HD __host__ __device__ __forceinline__
#else
#define MNET_HD inline __attribute__((always_inline))
#endif

#define MNET_PRAGMA_(text) _Pragma(#text)
#if defined(MNET_CUDA_ON_HOST)
// Unrolled a hundredfold, a kernel takes the host's compiler longer than all of its tests take to run.
#define MNET_UNROLL
#define MNET_UNROLL_BY(n)
#elif defined(__CUDACC__) || defined(__clang__)
#define MNET_UNROLL MNET_PRAGMA_(unroll)
#define MNET_UNROLL_BY(n) MNET_PRAGMA_(unroll n)
#else
#define MNET_UNROLL MNET_PRAGMA_(GCC unroll 32)
#define MNET_UNROLL_BY(n) MNET_PRAGMA_(GCC unroll n)
#endif
